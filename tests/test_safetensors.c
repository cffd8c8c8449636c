// safetensors.h against hostile headers, and against files that shrink under the map.
#include <check.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "folder.h"
#include "server/safetensors.h"

static char folder[64];

static void make_folder(void)
{
    folder_make(folder, sizeof folder, "test_safetensors");
}

static void remove_folder(void)
{
    folder_remove(folder);
}

// A file of a length field that claims `claimed_bytes`, a header and bytes 0, 1, 2, ... 250, 0, ...
static int make_file(const char *name, uint64_t claimed_bytes, const char *header,
                     size_t data_bytes)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w+");
    ck_assert_ptr_nonnull(file);
    fwrite(&claimed_bytes, sizeof claimed_bytes, 1, file);
    fputs(header, file);
    for (size_t i = 0; i < data_bytes; i++)
        fputc((int)(i % 251), file);
    int fd = dup(fileno(file));
    ck_assert_int_eq(fclose(file), 0);
    return fd;
}

static struct safetensors *open_good(const char *name, const char *header, size_t data_bytes)
{
    struct safetensors *file;
    struct error err;
    int fd = make_file(name, strlen(header), header, data_bytes);
    ck_assert_msg(safetensors_open(fd, name, &file, &err) == STATUS_OK, "%s", err.text);
    return file;
}

#define TENSOR(name, dtype, shape, begin, end)                                                     \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" #begin        \
    "," #end "]}"

// ---- good files

START_TEST(test_reads_what_is_there)
{
    struct safetensors *file = open_good(
        "good",
        "{\"__metadata__\":{\"format\":\"pt\"}," TENSOR("b", "F8_E4M3", "2,3", 4, 10) "," TENSOR(
            "a", "F32", "", 0, 4) "," TENSOR("empty", "BF16", "0,7", 10, 10) "}   ",
        10);
    ck_assert_uint_eq(safetensors_count(file), 3);
    ck_assert_str_eq(safetensors_at(file, 0)->name, "b");
    ck_assert_str_eq(safetensors_at(file, 2)->name, "empty");
    const struct safetensors_tensor *b = safetensors_find(file, "b");
    ck_assert_ptr_eq(b, safetensors_at(file, 0));
    ck_assert_int_eq(b->dtype, SAFETENSORS_F8_E4M3);
    ck_assert_str_eq(b->dtype_name, "F8_E4M3");
    ck_assert_uint_eq(b->dims_n, 2);
    ck_assert_uint_eq(b->dims[0], 2);
    ck_assert_uint_eq(b->dims[1], 3);
    ck_assert_uint_eq(b->bytes, 6);
    ck_assert_uint_eq(safetensors_find(file, "a")->dims_n, 0);
    ck_assert_ptr_null(safetensors_find(file, "c"));
    ck_assert_ptr_null(safetensors_find(file, "__metadata__"));

    struct error err;
    uint8_t bytes[6];
    ck_assert_int_eq(safetensors_read(file, b, 0, bytes, 6, &err), STATUS_OK);
    for (size_t i = 0; i < 6; i++)
        ck_assert_uint_eq(bytes[i], 4 + i);
    ck_assert_int_eq(safetensors_read(file, b, 5, bytes, 1, &err), STATUS_OK);
    ck_assert_uint_eq(bytes[0], 9);
    ck_assert_int_eq(safetensors_read(file, b, 6, bytes, 0, &err), STATUS_OK);
    safetensors_close(file);
}
END_TEST

START_TEST(test_reads_across_chunks)
{
    enum { BYTES = 9000001 }; // more than two chunks, and a piece
    struct safetensors *file =
        open_good("large", "{" TENSOR("t", "U8", "9000001", 0, 9000001) "}", BYTES);
    const struct safetensors_tensor *tensor = safetensors_find(file, "t");
    uint8_t *bytes = malloc(BYTES);
    struct error err;
    ck_assert_int_eq(safetensors_read(file, tensor, 1, bytes, BYTES - 1, &err), STATUS_OK);
    for (size_t i = 0; i < BYTES - 1; i++)
        if (bytes[i] != (i + 1) % 251)
            ck_abort_msg("byte %zu is %d", i, bytes[i]);
    free(bytes);
    safetensors_close(file);
}
END_TEST

START_TEST(test_no_tensors)
{
    struct safetensors *file = open_good("none", "{}", 0);
    ck_assert_uint_eq(safetensors_count(file), 0);
    ck_assert_ptr_null(safetensors_find(file, ""));
    safetensors_close(file);
}
END_TEST

static const struct {
    const char *name;
    uint32_t bits;
} dtypes[] = {{"BOOL", 8},    {"F4", 4},          {"F6_E2M3", 6},     {"F6_E3M2", 6},
              {"U8", 8},      {"I8", 8},          {"F8_E5M2", 8},     {"F8_E4M3", 8},
              {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
              {"U16", 16},    {"F16", 16},        {"BF16", 16},       {"I32", 32},
              {"U32", 32},    {"F32", 32},        {"C64", 64},        {"F64", 64},
              {"I64", 64},    {"U64", 64}};

START_TEST(test_every_dtype)
{
    char header[256];
    uint32_t bytes = 8 * dtypes[_i].bits / 8;
    snprintf(header, sizeof header,
             "{\"t\":{\"dtype\":\"%s\",\"shape\":[8],\"data_offsets\":[0,%" PRIu32 "]}}",
             dtypes[_i].name, bytes);
    struct safetensors *file;
    struct error err;
    ck_assert_msg(safetensors_parse(header, strlen(header), bytes, "f", &file, &err) == STATUS_OK,
                  "%s", err.text);
    ck_assert_str_eq(safetensors_at(file, 0)->dtype_name, dtypes[_i].name);
    safetensors_close(file);
    ck_assert_int_eq(safetensors_parse(header, strlen(header), bytes + 1, "f", &file, &err),
                     STATUS_FAILED_PRECONDITION);
}
END_TEST

// ---- bad headers

static const struct {
    const char *header;
    uint64_t data_bytes;
    const char *text; // part of the error
} bad[] = {
    {"", 0, "does not begin with '{'"},
    {" {}", 0, "does not begin with '{'"},
    {"[]", 0, "does not begin with '{'"},
    {"{", 0, "JSON, line 1"},
    {"{} {}", 0, "JSON, line 1"},
    {"{\"a\":nan}", 0, "JSON, line 1"},
    {"{\"a\\u0000b\":1}", 0, "JSON, line 1"},
    {"{\"\xff\":1}", 0, "JSON, line 1"},
    {"{\"t\":[[[1]]]}", 0, "nested deeper than 3"},
    {"{\"t\":{\"a\":{\"b\":{", 0, "nested deeper than 3"},
    {"{" TENSOR("t", "U8", "1,1,1,1,1,1,1,1,1", 0, 1) "}", 1, "more than 8 values"},
    {"{" TENSOR("t", "U8", "1", 0, 1) "," TENSOR("t", "U8", "1", 0, 1) "}", 1, "duplicate"},
    {"{\"t\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
     "duplicate"},
    {"{\"__metadata__\":1}", 0, "__metadata__ is not an object"},
    {"{\"__metadata__\":{\"k\":1}}", 0, "__metadata__: 'k' is not a string"},
    {"{\"t\":1}", 0, "f: tensor 't': its entry is not an object"},
    {"{\"t\":{}}", 0, "tensor 't': no dtype"},
    {"{\"t\":{\"dtype\":1}}", 0, "tensor 't': no dtype"},
    {"{" TENSOR("t", "F9", "1", 0, 1) "}", 1, "tensor 't': unknown dtype 'F9'"},
    {"{\"t\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "tensor 't': no shape"},
    {"{\"t\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}", 1, "tensor 't': no shape"},
    {"{" TENSOR("t", "U8", "-1", 0, 1) "}", 1, "dimension 0 is not a count"},
    {"{" TENSOR("t", "U8", "1,1.0", 0, 1) "}", 1, "dimension 1 is not a count"},
    {"{" TENSOR("t", "U8", "\\\"1\\\"", 0, 1) "}", 1, "JSON, line 1"},
    {"{" TENSOR("t", "U8", "9223372036854775808", 0, 1) "}", 1, "too big integer"},
    {"{" TENSOR("t", "U8", "4294967296,4294967296,16", 0, 1) "}", 1, "more than 2^64 elements"},
    {"{" TENSOR("t", "F64", "4294967296,1073741824", 0, 0) "}", 0, "more than 2^64 bits"},
    {"{" TENSOR("t", "F64", "2305843009213693952,8", 0, 0) "}", 0, "more than 2^64"},
    {"{\"t\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "data_offsets are not two integers"},
    {"{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1]}}", 1, "not two integers"},
    {"{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}", 1, "not two integers"},
    {"{" TENSOR("t", "U8", "1", 0, 1.0) "}", 1, "data_offsets are not two integers"},
    {"{" TENSOR("t", "U8", "1", -1, 0) "}", 1, "data_offsets [-1, 0] are not a range"},
    {"{" TENSOR("t", "U8", "1", 1, 0) "}", 1, "data_offsets [1, 0] are not a range"},
    {"{" TENSOR("t", "U8", "2", 0, 2) "}", 1, "end at 2, but the file holds 1 bytes"},
    {"{" TENSOR("t", "U8", "1", 0, 9223372036854775807) "}", 1, "end at 9223372036854775807"},
    {"{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"stride\":[1]}}", 1,
     "4 keys, expected dtype, shape and data_offsets alone"},
    {"{" TENSOR("t", "F4", "3", 0, 1) "}", 1, "3 elements of F4 do not fill whole bytes"},
    {"{" TENSOR("t", "F32", "2", 0, 4) "}", 4, "F32 make 8 bytes, but data_offsets span 4"},
    {"{" TENSOR("t", "F32", "", 0, 8) "}", 8, "F32 make 4 bytes, but data_offsets span 8"},
    {"{" TENSOR("a", "U8", "4", 0, 4) "," TENSOR("b", "U8", "4", 3, 7) "}", 7,
     "tensor 'b': begins at byte 3, inside 'a', which ends at 4"},
    {"{" TENSOR("b", "U8", "4", 0, 4) "," TENSOR("a", "U8", "4", 0, 4) "}", 4, "inside"},
    {"{" TENSOR("a", "U8", "4", 0, 4) "," TENSOR("b", "U8", "0", 2, 2) "}", 4,
     "tensor 'b': begins at byte 2, inside 'a'"},
    {"{" TENSOR("b", "U8", "2", 5, 7) "," TENSOR("a", "U8", "4", 0, 4) "}", 7,
     "tensor 'b': begins at byte 5, leaving a hole after byte 4"},
    {"{" TENSOR("a", "U8", "4", 1, 5) "}", 5, "begins at byte 1, leaving a hole after byte 0"},
    {"{" TENSOR("a", "U8", "4", 0, 4) "}", 6, "tensors make 4 bytes, but the file holds 6"},
    {"{}", 1, "tensors make 0 bytes, but the file holds 1"},
};

START_TEST(test_bad_header)
{
    struct safetensors *file;
    struct error err = {0};
    enum status status = safetensors_parse(bad[_i].header, strlen(bad[_i].header),
                                           bad[_i].data_bytes, "f", &file, &err);
    ck_assert_int_eq(status, STATUS_FAILED_PRECONDITION);
    ck_assert_int_eq(err.status, status);
    ck_assert_msg(strncmp(err.text, "f: ", 3) == 0, "'%s' does not name the file", err.text);
    ck_assert_msg(strstr(err.text, bad[_i].text), "'%s' does not say '%s'", err.text, bad[_i].text);
}
END_TEST

START_TEST(test_nul_in_header)
{
    static const char header[] = "{\"a\0b\":1}";
    struct safetensors *file;
    ck_assert_int_eq(safetensors_parse(header, sizeof header - 1, 0, "f", &file, NULL),
                     STATUS_FAILED_PRECONDITION);
}
END_TEST

// A bracket a byte, up to the largest header there may be: refused before jansson recurses or
// allocates.
START_TEST(test_deep_header)
{
    size_t bytes = SAFETENSORS_HEADER_BYTES_MAX;
    char *header = malloc(bytes);
    header[0] = '{';
    memset(header + 1, '[', bytes - 1);
    struct safetensors *file;
    struct error err;
    ck_assert_int_eq(safetensors_parse(header, bytes, 0, "f", &file, &err),
                     STATUS_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(err.text, "nested deeper"));
    free(header);
}
END_TEST

// 20 million values cost gigabytes once parsed.
START_TEST(test_many_values)
{
    static const char value[] = "\"\":[],";
    size_t values_n = 10 << 20, bytes = 1 + values_n * (sizeof value - 1);
    char *header = malloc(bytes);
    header[0] = '{';
    for (size_t i = 0; i < values_n; i++)
        memcpy(header + 1 + i * (sizeof value - 1), value, sizeof value - 1);
    struct safetensors *file;
    struct error err;
    ck_assert_int_eq(safetensors_parse(header, bytes, 0, "f", &file, &err),
                     STATUS_FAILED_PRECONDITION);
    ck_assert_msg(strstr(err.text, "more than 16777216 values"), "%s", err.text);
    free(header);
}
END_TEST

// ---- bad files

static const struct {
    uint64_t claimed_bytes;
    const char *text;
} bad_lengths[] = {
    {3, "a header of 3 bytes in a file of 10"},
    {UINT32_C(100) << 20, "a header of 104857600 bytes in a file of 10"},
    {(UINT32_C(100) << 20) + 1, "a header of 104857601 bytes, expected at most 104857600"},
    {UINT64_C(2) << 30, "a header of 2147483648 bytes, expected at most 104857600"},
    {UINT64_C(1) << 63, "a header of 9223372036854775808 bytes, expected at most"},
    {UINT64_MAX, "a header of 18446744073709551615 bytes, expected at most"},
    {0, "does not begin with '{'"},
};

START_TEST(test_bad_length)
{
    struct safetensors *file;
    struct error err;
    int fd = make_file("bad", bad_lengths[_i].claimed_bytes, "{}", 0);
    ck_assert_int_eq(safetensors_open(fd, "bad", &file, &err), STATUS_FAILED_PRECONDITION);
    ck_assert_msg(strstr(err.text, bad_lengths[_i].text), "%s", err.text);
    ck_assert_int_eq(fcntl(fd, F_GETFD), -1); // taken
}
END_TEST

START_TEST(test_too_short)
{
    struct safetensors *file;
    struct error err;
    for (off_t bytes = 0; bytes < 8; bytes++) {
        int fd = make_file("short", 2, "{}", 0);
        ck_assert_int_eq(ftruncate(fd, bytes), 0);
        ck_assert_int_eq(safetensors_open(fd, "short", &file, &err), STATUS_FAILED_PRECONDITION);
        ck_assert_ptr_nonnull(strstr(err.text, "too short"));
    }
}
END_TEST

START_TEST(test_not_a_file)
{
    struct safetensors *file;
    struct error err;
    int fd = open(folder, O_RDONLY | O_DIRECTORY);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(safetensors_open(fd, "folder", &file, &err), STATUS_FAILED_PRECONDITION);
    ck_assert_str_eq(err.text, "folder: not a regular file");
    ck_assert_int_eq(safetensors_open(-1, "closed", &file, &err), STATUS_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(err.text, "Bad file descriptor"));
}
END_TEST

// ---- a file that shrinks

enum { SHRINKING_BYTES = 1 << 20 };
#define SHRINKING_HEADER "{" TENSOR("t", "U8", "1048576", 0, 1048576) "}"

static void shrink(const char *name, off_t bytes)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    ck_assert_int_eq(truncate(path, bytes), 0);
}

// Off by one byte is seen too, though no page is missing then.
START_TEST(test_shrunk_file)
{
    static const off_t cuts[] = {0, 8, 4096, 600000, -1};
    struct safetensors *file = open_good("shrinking", SHRINKING_HEADER, SHRINKING_BYTES);
    off_t whole = (off_t)(8 + strlen(SHRINKING_HEADER) + SHRINKING_BYTES);
    shrink("shrinking", cuts[_i] < 0 ? whole + cuts[_i] : cuts[_i]);
    const struct safetensors_tensor *tensor = safetensors_find(file, "t");
    uint8_t *bytes = malloc(SHRINKING_BYTES);
    for (int round = 0; round < 3; round++) { // the guard works again and again
        struct error err = {0};
        ck_assert_int_eq(safetensors_read(file, tensor, 0, bytes, SHRINKING_BYTES, &err),
                         STATUS_DATA_LOSS);
        ck_assert_msg(strstr(err.text, "shrinking: ") && strstr(err.text, "has shrunk"), "%s",
                      err.text);
    }
    free(bytes);
    safetensors_close(file);
}
END_TEST

struct reader {
    const struct safetensors *file;
    bool shrunk;
    uint32_t rounds;
};

static void *read_again_and_again(void *context)
{
    struct reader *reader = context;
    uint8_t *bytes = malloc(SHRINKING_BYTES);
    const struct safetensors_tensor *tensor = safetensors_at(reader->file, 0);
    enum status expected = reader->shrunk ? STATUS_DATA_LOSS : STATUS_OK;
    for (uint32_t i = 0; i < 50; i++)
        if (safetensors_read(reader->file, tensor, 0, bytes, SHRINKING_BYTES, NULL) == expected)
            reader->rounds++;
    free(bytes);
    return NULL;
}

// Faults on some threads leave the reads of others alone.
START_TEST(test_shrunk_on_many_threads)
{
    enum { THREADS = 6 };
    struct safetensors *whole = open_good("whole", SHRINKING_HEADER, SHRINKING_BYTES);
    struct safetensors *shrunk = open_good("shrunk", SHRINKING_HEADER, SHRINKING_BYTES);
    shrink("shrunk", 8192);
    pthread_t threads[THREADS];
    struct reader readers[THREADS];
    for (int i = 0; i < THREADS; i++) {
        readers[i] = (struct reader){.file = i % 2 ? shrunk : whole, .shrunk = i % 2};
        ck_assert_int_eq(pthread_create(&threads[i], NULL, read_again_and_again, &readers[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        ck_assert_uint_eq(readers[i].rounds, 50);
    }
    safetensors_close(shrunk);
    safetensors_close(whole);
}
END_TEST

// ---- faults that are not ours

static void on_previous(int number)
{
    (void)number;
    _exit(42);
}

// Installs `previous`, opens a file, then faults in a map of our own. Returns how the child ended.
static int fault_elsewhere(void (*previous)(int))
{
    fflush(NULL);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        signal(SIGBUS, previous);
        struct safetensors *file = open_good("other", SHRINKING_HEADER, SHRINKING_BYTES);
        int fd = make_file("victim", 0, "", 16384);
        volatile uint8_t *map = mmap(NULL, 16384, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED || ftruncate(fd, 0) != 0)
            _exit(1);
        uint8_t byte = map[8192];
        safetensors_close(file);
        _exit(byte ? 2 : 3); // never reached
    }
    int ended;
    ck_assert_int_eq(waitpid(child, &ended, 0), child);
    return ended;
}

START_TEST(test_foreign_fault_kills)
{
    int ended = fault_elsewhere(SIG_DFL);
    ck_assert_msg(WIFSIGNALED(ended) && WTERMSIG(ended) == SIGBUS, "ended with %x", ended);
}
END_TEST

START_TEST(test_foreign_fault_reaches_previous_handler)
{
    int ended = fault_elsewhere(on_previous);
    ck_assert_msg(WIFEXITED(ended) && WEXITSTATUS(ended) == 42, "ended with %x", ended);
}
END_TEST

static Suite *suite(void)
{
    Suite *suite = suite_create("safetensors");
    TCase *tcase = tcase_create("headers");
    tcase_set_timeout(tcase, 60);
    tcase_add_loop_test(tcase, test_every_dtype, 0, ARRAY_LEN(dtypes));
    tcase_add_loop_test(tcase, test_bad_header, 0, ARRAY_LEN(bad));
    tcase_add_test(tcase, test_nul_in_header);
    tcase_add_test(tcase, test_deep_header);
    tcase_add_test(tcase, test_many_values);
    suite_add_tcase(suite, tcase);

    tcase = tcase_create("files");
    tcase_set_timeout(tcase, 60);
    tcase_add_checked_fixture(tcase, make_folder, remove_folder);
    tcase_add_test(tcase, test_reads_what_is_there);
    tcase_add_test(tcase, test_reads_across_chunks);
    tcase_add_test(tcase, test_no_tensors);
    tcase_add_loop_test(tcase, test_bad_length, 0, ARRAY_LEN(bad_lengths));
    tcase_add_test(tcase, test_too_short);
    tcase_add_test(tcase, test_not_a_file);
    tcase_add_loop_test(tcase, test_shrunk_file, 0, 5);
    tcase_add_test(tcase, test_shrunk_on_many_threads);
    tcase_add_test(tcase, test_foreign_fault_kills);
    tcase_add_test(tcase, test_foreign_fault_reaches_previous_handler);
    suite_add_tcase(suite, tcase);
    return suite;
}

int main(void)
{
    SRunner *runner = srunner_create(suite());
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
