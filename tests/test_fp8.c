// Every code of E4M3, UE8M0 and BF16, and every boundary at which a rounding changes its answer.
#include <check.h>
#include <math.h>
#include <stdlib.h>

#include "kernels/fp8.h"

// E4M3 from its definition alone.
static double e4m3_by_definition(uint32_t code)
{
    uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
    double magnitude =
        exponent == 0 ? ldexp(mantissa, -9) : ldexp(8 + mantissa, (int)exponent - 10);
    return code & 0x80 ? -magnitude : magnitude;
}

START_TEST(test_e4m3_codes)
{
    for (uint32_t code = 0; code < 256; code++) {
        float value = e4m3_to_float((uint8_t)code);
        if ((code & 0x7F) == 0x7F) {
            ck_assert(e4m3_is_nan((uint8_t)code));
            ck_assert(isnan(value));
            ck_assert_uint_eq(e4m3_from_float(value) & 0x7F, E4M3_NAN);
            continue;
        }
        ck_assert(!e4m3_is_nan((uint8_t)code));
        ck_assert_double_eq((double)value, e4m3_by_definition(code));
        ck_assert_int_eq(signbit(value) != 0, code >> 7);
        ck_assert_uint_eq(e4m3_from_float(value), code);
        ck_assert_uint_eq(e4m3_from_double((double)value), code);
    }
    ck_assert_double_eq((double)e4m3_to_float(0x7E), 448);
    ck_assert_double_eq((double)e4m3_to_float(0x01), 0x1p-9);
    ck_assert_double_eq((double)e4m3_to_float(0x88), -0x1p-6);
}
END_TEST

START_TEST(test_e4m3_rounding)
{
    for (uint32_t code = 0; code < E4M3_GREATEST; code++) {
        double low = e4m3_by_definition(code), high = e4m3_by_definition(code + 1);
        double middle = 0.5 * (low + high);
        uint32_t even = code % 2 == 0 ? code : code + 1;
        for (uint32_t sign = 0; sign <= 0x80; sign += 0x80) {
            double s = sign ? -1 : 1;
            ck_assert_uint_eq(e4m3_from_double(s * middle), sign | even);
            ck_assert_uint_eq(e4m3_from_float((float)(s * middle)), sign | even);
            ck_assert_uint_eq(e4m3_from_double(s * nextafter(middle, 0)), sign | code);
            ck_assert_uint_eq(e4m3_from_double(s * nextafter(middle, 1e9)), sign | (code + 1));
            ck_assert_uint_eq(e4m3_from_double(s * nextafter(low, 1e9)), sign | code);
            ck_assert_uint_eq(e4m3_from_double(s * nextafter(high, 0)), sign | (code + 1));
        }
    }
}
END_TEST

START_TEST(test_e4m3_saturates)
{
    const double large[] = {448, 449, 464, 480, 1e4, 1e300, INFINITY};
    for (size_t i = 0; i < sizeof(large) / sizeof(large[0]); i++) {
        ck_assert_uint_eq(e4m3_from_double(large[i]), 0x7E);
        ck_assert_uint_eq(e4m3_from_double(-large[i]), 0xFE);
    }
    const double tiny[] = {0, 0x1p-1074, 0x1p-1022, 0x1p-127, 0x1p-11, 0x1p-10};
    for (size_t i = 0; i < sizeof(tiny) / sizeof(tiny[0]); i++) {
        ck_assert_uint_eq(e4m3_from_double(tiny[i]), 0x00);
        ck_assert_uint_eq(e4m3_from_double(-tiny[i]), 0x80);
    }
    ck_assert_uint_eq(e4m3_from_double(NAN) & 0x7F, E4M3_NAN);
}
END_TEST

START_TEST(test_ue8m0_codes)
{
    for (int code = 0; code < 255; code++)
        ck_assert_double_eq((double)ue8m0_to_float((uint8_t)code), ldexp(1, code - 127));
    ck_assert(isnan(ue8m0_to_float(UE8M0_NAN)));
}
END_TEST

START_TEST(test_bf16_codes)
{
    for (uint32_t code = 0; code < 65536; code++) {
        float value = bf16_to_float((uint16_t)code);
        ck_assert_uint_eq(fp32_bits(value), code << 16);
        uint32_t back = isnan(value) ? BF16_NAN : code;
        ck_assert_uint_eq(bf16_from_float(value), back);
        ck_assert_uint_eq(bf16_from_double((double)value), back);
    }
    // NaN whose payload lies in the half that is cut off must not become infinity.
    ck_assert_uint_eq(bf16_from_float(fp32_from_bits(0x7F800001)), BF16_NAN);
    ck_assert_uint_eq(bf16_from_float(fp32_from_bits(0xFFFFFFFF)), BF16_NAN);
}
END_TEST

// What lies between any two neighbours, up to infinity as the neighbour of the greatest.
START_TEST(test_bf16_rounding)
{
    for (uint32_t code = 0; code < 0x7F80; code++) {
        double low = (double)bf16_to_float((uint16_t)code);
        double high = code + 1 == 0x7F80 ? 0x1p128 : (double)bf16_to_float((uint16_t)(code + 1));
        double middle = 0.5 * (low + high);
        uint32_t even = code % 2 == 0 ? code : code + 1;
        for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000) {
            double s = sign ? -1 : 1;
            ck_assert_uint_eq(bf16_from_double(s * middle), sign | even);
            ck_assert_uint_eq(bf16_from_double(s * nextafter(middle, 0)), sign | code);
            ck_assert_uint_eq(bf16_from_double(s * nextafter(middle, 1e300)), sign | (code + 1));
            ck_assert_uint_eq(bf16_from_float((float)(s * middle)), sign | even);
            uint32_t middle_bits = fp32_bits((float)(s * middle));
            ck_assert_uint_eq(bf16_from_float(fp32_from_bits(middle_bits - 1)), sign | code);
            ck_assert_uint_eq(bf16_from_float(fp32_from_bits(middle_bits + 1)), sign | (code + 1));
        }
    }
    ck_assert_uint_eq(bf16_from_double(1e300), 0x7F80);
    ck_assert_uint_eq(bf16_from_double(-INFINITY), 0xFF80);
    ck_assert_uint_eq(bf16_from_double(0x1p-1074), 0);
    ck_assert_uint_eq(bf16_from_double(-0x1p-300), 0x8000);
    ck_assert_uint_eq(bf16_from_double(NAN), BF16_NAN);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("fp8");
    TCase *tcase = tcase_create("conversions");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, test_e4m3_codes);
    tcase_add_test(tcase, test_e4m3_rounding);
    tcase_add_test(tcase, test_e4m3_saturates);
    tcase_add_test(tcase, test_ue8m0_codes);
    tcase_add_test(tcase, test_bf16_codes);
    tcase_add_test(tcase, test_bf16_rounding);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
