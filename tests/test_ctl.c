// einsumctl from within: its files of tensors, its FP64 reference, its histogram and load
// generator, and the exit codes of its commands, against a server in the same process.

#include "../client/bench.h"
#include "../client/checkpoint.h"
#include "../client/ctl.h"
#include "../client/ctl_attention.h"
#include "../client/ctl_reference.h"
#include "../client/tensor_file.h"
#include "../kernels/attention.h"
#include "../kernels/fp8.h"
#include "../server/rope.h"
#include "fake_server.h"

#include <ftw.h>
#include <math.h>
#include <unistd.h>

// ---- files --------------------------------------------------------------------------------------

static const struct {
    const char *dictionary;
    bool good;
    uint64_t bytes;
    enum tensor_kind kind;
} npys[] = {
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", true, 24, TENSOR_FP32},
    {"{'descr': '|u1', 'fortran_order': False, 'shape': (5,), }", true, 5, TENSOR_BYTES},
    {"{'descr': '|V1', 'fortran_order': False, 'shape': (2,2,2)}", true, 8, TENSOR_BYTES},
    {"{'shape': (), 'fortran_order': False, 'descr': '<i4'}", true, 4, TENSOR_OTHER},
    {"{\"descr\": \"<u2\", 'fortran_order': False, 'shape': (0, 7)}", true, 0, TENSOR_OTHER},
    {"{'descr': '>f4', 'fortran_order': False, 'shape': (2,)}", false, 0, 0},
    {"{'descr': '<f4', 'fortran_order': True, 'shape': (2,)}", false, 0, 0},
    {"{'descr': '<f4', 'fortran_order': False}", false, 0, 0},
    {"{'descr': '<f4', 'shape': (2,)}", false, 0, 0},
    {"{'fortran_order': False, 'shape': (2,)}", false, 0, 0},
    {"{'descr': '<f99', 'fortran_order': False, 'shape': (2,)}", false, 0, 0},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}", false, 0, 0},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}", false, 0, 0},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,1)}", false, 0, 0},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", false, 0, 0},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (2 3)}", false, 0, 0},
    {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}", false, 0, 0},
    {"", false, 0, 0},
    {"{", false, 0, 0},
    {"{'descr': '<f4", false, 0, 0},
};

static size_t make_npy(uint8_t *to, const char *dictionary)
{
    size_t length = strlen(dictionary);
    memcpy(to, "\x93NUMPY\x01\x00", 8);
    to[8] = (uint8_t)length;
    to[9] = (uint8_t)(length >> 8);
    memcpy(to + 10, dictionary, length);
    return 10 + length;
}

START_TEST(test_npy)
{
    uint8_t bytes[512];
    size_t n = make_npy(bytes, npys[_i].dictionary), header_bytes = 0;
    struct tensor tensor = {0};
    struct error err;
    enum status status = npy_parse(bytes, n, &tensor, &header_bytes, &err);
    ck_assert_int_eq(status == STATUS_OK, npys[_i].good);
    if (npys[_i].good) {
        ck_assert_uint_eq(tensor.bytes, npys[_i].bytes);
        ck_assert_int_eq((int)tensor.kind, (int)npys[_i].kind);
        ck_assert_uint_eq(header_bytes, n);
    }
    // Cut anywhere it is refused, with no byte read past the cut (for ASan).
    for (size_t cut = 0; cut < n; cut++) {
        uint8_t *copy = malloc(cut ? cut : 1);
        memcpy(copy, bytes, cut);
        ck_assert_int_ne((int)npy_parse(copy, cut, &tensor, &header_bytes, &err), STATUS_OK);
        free(copy);
    }
}
END_TEST

static char directory[64];

static void in_directory(char path[128], const char *name)
{
    snprintf(path, 128, "%s/%s", directory, name);
}

static int remove_entry(const char *path, const struct stat *stat, int flag, struct FTW *ftw)
{
    (void)stat;
    (void)flag;
    (void)ftw;
    return remove(path);
}

static void make_directory(void)
{
    snprintf(directory, sizeof directory, "/tmp/einsumctl-test-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(directory));
}

static void remove_directory(void)
{
    nftw(directory, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

START_TEST(test_tensor_round_trip)
{
    static const char *const names[] = {"a.npy", "a.safetensors"};
    const uint64_t dims[3] = {2, 3, 5};
    bool fp32 = _i & 1;
    uint8_t data[120];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i * 7);
    char path[128];
    in_directory(path, names[_i >> 1]);
    struct error err;
    struct tensor tensor;
    ck_assert_int_eq((int)tensor_write(path, data, fp32, 3, dims, &err), STATUS_OK);
    ck_assert_msg(tensor_read(path, "output", &tensor, &err) == STATUS_OK, "%s", err.text);
    ck_assert_uint_eq(tensor.bytes, fp32 ? 120 : 60);
    ck_assert_uint_eq(tensor.dims_n, 3);
    ck_assert_uint_eq(tensor.dims[2], 5);
    ck_assert_int_eq(tensor.kind == TENSOR_FP32, fp32);
    ck_assert_mem_eq(tensor.data, data, tensor.bytes);
    tensor_deinit(&tensor);
    // A file cut short is refused, whichever its form.
    ck_assert_int_eq(truncate(path, 150), 0);
    ck_assert_int_ne((int)tensor_read(path, "output", &tensor, &err), STATUS_OK);
    ck_assert_ptr_null(tensor.data);
}
END_TEST

START_TEST(test_tensor_refused)
{
    struct error err;
    struct tensor tensor;
    char path[128];
    in_directory(path, "none.npy");
    ck_assert_int_eq((int)tensor_read(path, "x", &tensor, &err), STATUS_NOT_FOUND);
    in_directory(path, "none.safetensors:a");
    ck_assert_int_eq((int)tensor_read(path, "x", &tensor, &err), STATUS_NOT_FOUND);
    ck_assert_int_eq((int)tensor_read("a.txt", "x", &tensor, &err), STATUS_INVALID_ARGUMENT);
    ck_assert_int_eq((int)tensor_write("a.txt", "", true, 0, NULL, &err), STATUS_INVALID_ARGUMENT);
    const uint64_t dims[1] = {1};
    ck_assert_int_ne((int)tensor_write("/nowhere/a.npy", "1234", true, 1, dims, &err), STATUS_OK);
    in_directory(path, "b.safetensors");
    ck_assert_int_eq((int)tensor_write(path, "1234", true, 1, dims, &err), STATUS_OK);
    in_directory(path, "b.safetensors:missing");
    ck_assert_int_eq((int)tensor_read(path, "x", &tensor, &err), STATUS_NOT_FOUND);
    ck_assert_ptr_nonnull(strstr(err.text, "missing"));
}
END_TEST

// ---- numbers ------------------------------------------------------------------------------------

START_TEST(test_histogram)
{
    static struct bench_histogram histogram;
    ck_assert_uint_eq(bench_histogram_at(&histogram, 0.5), 0);
    for (uint64_t i = 1; i <= 100000; i++)
        bench_histogram_add(&histogram, i * 1000);
    const double shares[] = {0.001, 0.5, 0.9, 0.99, 0.999, 1};
    for (size_t i = 0; i < ARRAY_LEN(shares); i++) {
        double exact = shares[i] * 1e8, got = (double)bench_histogram_at(&histogram, shares[i]);
        ck_assert_double_ge(got, exact);
        ck_assert_double_le(got, exact * (1 + 1.0 / 64) + 1);
    }
    ck_assert_uint_eq(histogram.max, 100000000);
    // Every power of two and its neighbours have a place.
    for (unsigned bit = 0; bit < 64; bit++) {
        memset(&histogram, 0, sizeof histogram);
        bench_histogram_add(&histogram, 1ull << bit);
        bench_histogram_add(&histogram, (1ull << bit) - 1);
        ck_assert_uint_eq(bench_histogram_at(&histogram, 1), 1ull << bit);
    }
    bench_histogram_add(&histogram, UINT64_MAX);
    ck_assert_uint_eq(bench_histogram_at(&histogram, 1), UINT64_MAX);
}
END_TEST

START_TEST(test_number_list)
{
    uint32_t values[3];
    ck_assert_uint_eq(ctl_number_list("x", "1,8,64", 1, 64, values, 3), 3);
    ck_assert_uint_eq(values[2], 64);
    static const char *const bad[] = {
        "",        "1,", ",1", "1,,2", "0", "65", "1 2", "-1", "+1", "1.5", "99999999999999999999",
        "1,2,3,4", "x"};
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        ck_assert_uint_eq(ctl_number_list("x", bad[i], 1, 64, values, 3), 0);
}
END_TEST

// The fast reference is the slow one, for every layout and type.
START_TEST(test_reference)
{
    struct einsum_weight_format format = {
        .groups = 3,
        .output_dim = 128,
        .reduced_dim = 512,
        .weight_type = _i & 16 ? EINSUM_WEIGHT_BF16 : EINSUM_WEIGHT_E4M3,
        .scale_type = _i & 16  ? EINSUM_SCALE_NONE
                      : _i & 8 ? EINSUM_SCALE_FP32
                               : EINSUM_SCALE_UE8M0,
        .block_d = _i & 16   ? 1
                   : _i & 32 ? 128
                             : 32,
        .block_r = _i & 48 ? 128 : 32,
    };
    enum { TOKENS = 5, GROUPS = 2 };
    uint64_t weight_bytes = einsum_weight_bytes(&format);
    uint64_t scale_bytes = einsum_weight_scale_bytes(&format), state = 3;
    uint8_t *weight = malloc(weight_bytes), *scales = malloc(scale_bytes + 1);
    for (uint64_t i = 0; i < weight_bytes; i++)
        weight[i] = (uint8_t)(ctl_random_next(&state) & 0x3f); // BF16 stays small as well
    for (uint64_t i = 0; i < scale_bytes; i++)
        scales[i] = (uint8_t)(format.scale_type == EINSUM_SCALE_FP32 ? 0x3f : 110 + i % 20);
    const struct einsum_client_weight shape = {
        .groups = GROUPS, .reduced_dim = 512, .block_r = format.block_r};
    struct einsum_operand operand = {
        .tokens = TOKENS,
        .group_begin = 1,
        .groups = GROUPS,
        .activation_layout = _i & 1 ? EINSUM_ACTIVATIONS_GTR : EINSUM_ACTIVATIONS_TGR,
        .scale_layout = _i & 2 ? EINSUM_SCALES_GKT : EINSUM_SCALES_TGK,
        .scale_type = _i & 4 ? EINSUM_SCALE_FP32 : EINSUM_SCALE_UE8M0,
        .output_type = EINSUM_OUTPUT_BF16,
    };
    struct ctl_inputs inputs;
    ck_assert(ctl_random_inputs(
        &shape, TOKENS, (enum einsum_client_scale_layout)(int)operand.scale_layout,
        (enum einsum_client_scale_type)(int)operand.scale_type, 9, &inputs));
    inputs.activations[700] = E4M3_NAN;
    operand.activations = inputs.activations;
    operand.scales = inputs.scales;
    static double slow[TOKENS * GROUPS * 128], exact[TOKENS * GROUPS * 128];
    static double magnitude[TOKENS * GROUPS * 128], wgmma_loss[TOKENS * GROUPS * 128];
    einsum_reference(&format, weight, scales, &operand, slow);
    const struct ctl_reference reference = {.format = &format,
                                            .weight = weight,
                                            .weight_scales = scales,
                                            .operand = &operand,
                                            .exact = exact,
                                            .magnitude = magnitude,
                                            .wgmma_loss = wgmma_loss};
    ck_assert(ctl_reference_compute(&reference, 1 + (unsigned)_i % 3));
    size_t nans = 0;
    for (uint32_t i = 0; i < TOKENS * GROUPS * 128; i++) {
        nans += isnan(slow[i]) != 0;
        ck_assert_int_eq(isnan(slow[i]) != 0, isnan(exact[i]) != 0);
        if (isnan(slow[i]))
            continue;
        double slow_magnitude, slow_loss;
        einsum_reference_one(&format, weight, scales, &operand, i / 256, i / 128 % 2, i % 128,
                             &slow_magnitude, &slow_loss);
        ck_assert_double_le(fabs(exact[i] - slow[i]), slow_magnitude * 0x1p-44);
        ck_assert_double_le(fabs(magnitude[i] - slow_magnitude), slow_magnitude * 0x1p-40);
        ck_assert_double_le(fabs(wgmma_loss[i] - slow_loss), slow_loss * 0x1p-40);
        ck_assert_int_eq(slow_loss > 0, einsum_hopper_takes(&format));
    }
    ck_assert_uint_eq(nans, 128); // those of one token and group
    ctl_inputs_deinit(&inputs);
    free(weight);
    free(scales);
}
END_TEST

START_TEST(test_random_inputs)
{
    const struct einsum_client_weight weight = {.groups = 2, .reduced_dim = 256, .block_r = 128};
    struct ctl_inputs a, b;
    ck_assert(
        ctl_random_inputs(&weight, 7, EINSUM_CLIENT_SCALES_GKT, EINSUM_CLIENT_SCALE_FP32, 5, &a));
    ck_assert(
        ctl_random_inputs(&weight, 7, EINSUM_CLIENT_SCALES_GKT, EINSUM_CLIENT_SCALE_FP32, 5, &b));
    ck_assert_uint_eq(a.activations_bytes, 7 * 2 * 256);
    ck_assert_uint_eq(a.scales_bytes, 8 * 2 * 2 * 4);
    ck_assert_mem_eq(a.activations, b.activations, a.activations_bytes);
    ck_assert_mem_eq(a.scales, b.scales, a.scales_bytes);
    bool seen[256] = {0};
    int different = 0;
    for (uint64_t i = 0; i < a.activations_bytes; i++) {
        ck_assert(!e4m3_is_nan(a.activations[i]));
        different += !seen[a.activations[i]];
        seen[a.activations[i]] = true;
    }
    ck_assert_int_gt(different, 64);
    for (uint64_t i = 0; i < a.scales_bytes; i += 4)
        ck_assert(fp32_load(a.scales + i) > 0.001f && fp32_load(a.scales + i) < 0.012f);
    ctl_inputs_deinit(&a);
    ctl_inputs_deinit(&b);
}
END_TEST

// Two opinions of one step: this side's, and the server's rope with the kernels' quantisation.
static const struct {
    struct rope_options rope;
    uint32_t block;
} attentions[] = {
    {{.theta = 10000}, 128},
    {{.theta = 160000, .factor = 16, .original_positions_max = 65536}, 32},
    {{.theta = 3, .factor = 2, .original_positions_max = 100, .beta_fast = 9, .beta_slow = 2}, 128},
    {{.theta = 10000, .factor = 1.5, .original_positions_max = 1}, 32}, // a ramp before all pairs
    {{.theta = 1e9, .factor = 9, .original_positions_max = 1 << 24, .positions_max = 1 << 24}, 32},
};

START_TEST(test_attention)
{
    enum { TOKENS_N = 9, GROUPS_N = 3, R = 1024, HEADS = GROUPS_N * R / 512 };
    struct rope *server_rope;
    struct error err;
    ck_assert_int_eq(rope_create(&attentions[_i].rope, NULL, &server_rope, &err), STATUS_OK);
    const struct rope_options *options = rope_describe(server_rope);
    const struct ctl_rope rope = {.theta = options->theta,
                                  .factor = options->factor,
                                  .original_positions_max = options->original_positions_max,
                                  .beta_fast = options->beta_fast,
                                  .beta_slow = options->beta_slow};
    uint32_t block = attentions[_i].block;
    const struct einsum_client_weight weight = {
        .groups = GROUPS_N, .reduced_dim = R, .block_r = block};
    struct ctl_inputs inputs, quantised;
    ck_assert(ctl_random_attention(&weight, TOKENS_N, options->positions_max, 5, &inputs));
    ck_assert_uint_eq(inputs.activations_bytes, TOKENS_N * HEADS * 512 * 2);
    ck_assert_uint_eq(inputs.scales_bytes, TOKENS_N * 8);
    uint16_t *bits = (uint16_t *)(void *)inputs.activations;
    bits[700] = 0x7fc0;             // NaN
    bits[2 * 512 + 448] = 0xff80;   // infinity in the turned dims: its partner becomes NaN
    memset(bits + 3 * 512, 0, 512); // half a head of zeros
    ck_assert(ctl_quantise_attention(&rope, &weight, TOKENS_N, &inputs, &quantised));

    const int64_t *positions = (const int64_t *)(const void *)inputs.scales;
    struct attention_rotation rotations[TOKENS_N];
    ck_assert_int_eq(rope_rotations(server_rope, positions, TOKENS_N, rotations, &err), STATUS_OK);
    uint8_t *row = aligned_alloc(64, 2 * R);
    for (uint32_t i = 0; i < TOKENS_N * GROUPS_N; i++) {
        memcpy(row, inputs.activations + i * 2 * R, 2 * R);
        attention_quantise(row, R, block, &rotations[i / GROUPS_N]);
        ck_assert_mem_eq(quantised.activations + i * R, row, R);
        ck_assert_mem_eq(quantised.scales + i * (R / block), row + R, R / block);
    }
    free(row);
    ctl_inputs_deinit(&quantised);
    ctl_inputs_deinit(&inputs);
    rope_unref(server_rope);
}
END_TEST

// ---- commands -----------------------------------------------------------------------------------

#define BYTES(text) .bytes = (text), .bytes_n = sizeof(text) - 1

static enum ctl_exit run(const struct ctl_command *command, const char *endpoint,
                         struct ctl_args args)
{
    struct ctl ctl = {.endpoint = endpoint, .timeout_ms = 5000, .json = true};
    args.command = command;
    enum ctl_exit code = command->run(&ctl, &args);
    einsum_client_destroy(ctl.client);
    return code;
}

static void give(struct ctl_args *args, const struct ctl_command *command, const char *name,
                 const char *value)
{
    int option = 0;
    while (strcmp(command->options[option].name, name) != 0)
        option++;
    args->given[args->given_n].option = option;
    args->given[args->given_n++].value = value;
}

START_TEST(test_exit_codes)
{
    static const struct fake_act acts[] = {
        {.kind = FAKE_BYTES, BYTES("\x08\x01")}, // SERVING
        {.kind = FAKE_BYTES, BYTES("\x08\x02")},
        {.kind = FAKE_STATUS, .status = 5, .text = "no such service"},
        {.kind = FAKE_BYTES, BYTES("\x08\x01")}, // self-test passed
        {.kind = FAKE_BYTES, BYTES("")},
        {.kind = FAKE_STATUS, .status = 9, .text = "no"},
        {.kind = FAKE_BYTES, BYTES("\xff")},
    };
    struct fake fake;
    fake_start(&fake, acts, ARRAY_LEN(acts));
    char endpoint[64];
    snprintf(endpoint, sizeof endpoint, "127.0.0.1:%d", fake.port);
    const struct ctl_args none = {0};
    ck_assert_int_eq((int)run(&ctl_command_health, endpoint, none), CTL_OK);
    ck_assert_int_eq((int)run(&ctl_command_health, endpoint, none), CTL_FAILED);
    ck_assert_int_eq((int)run(&ctl_command_health, endpoint, none), CTL_REFUSED);
    ck_assert_int_eq((int)run(&ctl_command_selftest, endpoint, none), CTL_OK);
    ck_assert_int_eq((int)run(&ctl_command_selftest, endpoint, none), CTL_FAILED);
    ck_assert_int_eq((int)run(&ctl_command_info, endpoint, none), CTL_REFUSED);
    ck_assert_int_eq((int)run(&ctl_command_info, endpoint, none), CTL_FAILED); // garbled
    ck_assert_int_eq((int)run(&ctl_command_info, "127.0.0.1:1", none), CTL_UNREACHABLE);
    ck_assert_int_eq((int)run(&ctl_command_info, "nonsense", none), CTL_USAGE);
    const struct ctl_args load = {.operands_n = 1, .operands = {"load"}};
    ck_assert_int_eq((int)run(&ctl_command_weights, endpoint, load), CTL_USAGE);
    ck_assert_int_eq((int)run(&ctl_command_run, endpoint, none), CTL_USAGE);
    ck_assert_int_eq((int)run(&ctl_command_check, endpoint, none), CTL_USAGE);
    fake_stop(&fake);
}
END_TEST

static size_t pack_weights(uint8_t *to, bool one)
{
    Einsum__V1__Weight weight = EINSUM__V1__WEIGHT__INIT;
    Einsum__V1__Recipe recipes[1] = {1};
    weight.name = (char *)"layers.0.attn.wo_a";
    weight.groups = FAKE_GROUPS;
    weight.output_dim = FAKE_OUTPUT_DIM;
    weight.reduced_dim = FAKE_REDUCED_DIM;
    weight.weight_type = 1;
    weight.scale_type = 2;
    weight.block_d = weight.block_r = 128;
    weight.recipes = recipes;
    weight.n_recipes = 1;
    weight.tensor_parallel_size = 1;
    Einsum__V1__Weight *weights[1] = {&weight};
    Einsum__V1__ListWeightsResponse list = EINSUM__V1__LIST_WEIGHTS_RESPONSE__INIT;
    Einsum__V1__GetWeightResponse get = EINSUM__V1__GET_WEIGHT_RESPONSE__INIT;
    list.weights = weights;
    list.n_weights = 1;
    get.weight = &weight;
    return protobuf_c_message_pack(one ? &get.base : &list.base, to);
}

// Of a server with two kernels.
static size_t pack_info(uint8_t *to, const char *second_kernel)
{
    Einsum__V1__ServerInfoResponse info = EINSUM__V1__SERVER_INFO_RESPONSE__INIT;
    char *kernels[2] = {(char *)"decode", (char *)(uintptr_t)second_kernel};
    info.kernels = kernels;
    info.n_kernels = ARRAY_LEN(kernels);
    return einsum__v1__server_info_response__pack(&info, to);
}

static void write_checkpoint(char path[128])
{
    in_directory(path, "checkpoint");
    struct checkpoint_options checkpoint;
    struct error err;
    ck_assert_int_eq((int)checkpoint_options_init(&checkpoint, "v4-flash", &err), STATUS_OK);
    checkpoint.directory = path;
    checkpoint.layers = checkpoint.shards = 1;
    checkpoint.format.groups = FAKE_GROUPS;
    checkpoint.format.output_dim = FAKE_OUTPUT_DIM;
    checkpoint.format.reduced_dim = FAKE_REDUCED_DIM;
    ck_assert_msg(checkpoint_write(&checkpoint, &err) == STATUS_OK, "%s", err.text);
}

// A server that answers with numbers of the right shape which are not the product: check says so.
START_TEST(test_check_finds_wrong_numbers)
{
    char path[128];
    write_checkpoint(path);
    uint8_t info[512], list[512];
    const struct fake_act acts[] = {
        {.kind = FAKE_BYTES, .bytes = info, .bytes_n = pack_info(info, "hopper")},
        {.kind = FAKE_BYTES, .bytes = list, .bytes_n = pack_weights(list, false)},
        {.kind = FAKE_ANSWER},
    };
    struct fake fake;
    fake_start(&fake, acts, ARRAY_LEN(acts));
    char endpoint[64];
    snprintf(endpoint, sizeof endpoint, "127.0.0.1:%d", fake.port);
    struct ctl_args args = {0};
    give(&args, &ctl_command_check, "checkpoint", path);
    give(&args, &ctl_command_check, "tokens", "1,2");
    ck_assert_int_eq((int)run(&ctl_command_check, endpoint, args), CTL_FAILED);
    ck_assert_uint_eq(atomic_load(&fake.calls), 2 + 2 * 5);
    fake_stop(&fake);
}
END_TEST

// The answer to check's first case, for one token, less right by all that wgmma may lose.
static size_t pack_wgmma_answer(uint8_t *to, const char *checkpoint)
{
    static const struct einsum_weight_format format = {
        .groups = FAKE_GROUPS,
        .output_dim = FAKE_OUTPUT_DIM,
        .reduced_dim = FAKE_REDUCED_DIM,
        .weight_type = EINSUM_WEIGHT_E4M3,
        .scale_type = EINSUM_SCALE_UE8M0,
        .block_d = 128,
        .block_r = 128,
    };
    static const struct einsum_client_weight shape = {
        .groups = FAKE_GROUPS, .reduced_dim = FAKE_REDUCED_DIM, .block_r = 128};
    char file[256];
    snprintf(file, sizeof file, "%s/model-00001-of-00001.safetensors", checkpoint);
    struct tensor weight, scales;
    struct error err;
    ck_assert_int_eq((int)tensor_read(file, "layers.0.attn.wo_a.weight", &weight, &err), STATUS_OK);
    ck_assert_int_eq((int)tensor_read(file, "layers.0.attn.wo_a.scale", &scales, &err), STATUS_OK);
    struct ctl_inputs inputs;
    ck_assert(ctl_random_inputs(&shape, 1, EINSUM_CLIENT_SCALES_TGK, EINSUM_CLIENT_SCALE_FP32, 1,
                                &inputs));
    const struct einsum_operand operand = {.tokens = 1,
                                           .groups = FAKE_GROUPS,
                                           .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                           .scale_layout = EINSUM_SCALES_TGK,
                                           .scale_type = EINSUM_SCALE_FP32,
                                           .activations = inputs.activations,
                                           .scales = inputs.scales};
    uint16_t output[FAKE_GROUPS * FAKE_OUTPUT_DIM];
    for (uint32_t i = 0; i < ARRAY_LEN(output); i++) {
        double loss;
        double exact = einsum_reference_one(&format, weight.data, scales.data, &operand, 0,
                                            i / FAKE_OUTPUT_DIM, i % FAKE_OUTPUT_DIM, NULL, &loss);
        output[i] = bf16_from_double(exact + loss);
    }
    Einsum__V1__EinsumResponse response = EINSUM__V1__EINSUM_RESPONSE__INIT;
    response.tokens = 1;
    response.groups = FAKE_GROUPS;
    response.output_dim = FAKE_OUTPUT_DIM;
    response.output_type = EINSUM__V1__OUTPUT_TYPE__OUTPUT_TYPE_BF16;
    response.output.data = (uint8_t *)output;
    response.output.len = sizeof output;
    ctl_inputs_deinit(&inputs);
    tensor_deinit(&scales);
    tensor_deinit(&weight);
    return einsum__v1__einsum_response__pack(&response, to);
}

static const struct {
    const char *offered, *asked; // kernels
    enum ctl_exit exit;
} tolerances[] = {{"hopper", NULL, CTL_OK},
                  {"hopper", "hopper", CTL_OK},
                  {"hopper", "decode", CTL_FAILED},
                  {"prefill", NULL, CTL_FAILED}};

// What wgmma may lose passes where it may have run, and nowhere else.
START_TEST(test_check_allows_what_wgmma_loses)
{
    char path[128];
    write_checkpoint(path);
    uint8_t info[512], list[512], answer[1024];
    const struct fake_act acts[] = {
        {.kind = FAKE_BYTES, .bytes = info, .bytes_n = pack_info(info, tolerances[_i].offered)},
        {.kind = FAKE_BYTES, .bytes = list, .bytes_n = pack_weights(list, false)},
        {.kind = FAKE_BYTES, .bytes = answer, .bytes_n = pack_wgmma_answer(answer, path)},
    };
    struct fake fake;
    fake_start(&fake, acts, ARRAY_LEN(acts));
    char endpoint[64];
    snprintf(endpoint, sizeof endpoint, "127.0.0.1:%d", fake.port);
    struct ctl_args args = {0};
    give(&args, &ctl_command_check, "checkpoint", path);
    give(&args, &ctl_command_check, "tokens", "1");
    if (tolerances[_i].asked)
        give(&args, &ctl_command_check, "kernel", tolerances[_i].asked);
    ck_assert_int_eq((int)run(&ctl_command_check, endpoint, args), (int)tolerances[_i].exit);
    ck_assert_uint_eq(atomic_load(&fake.calls), 2 + 5);
    fake_stop(&fake);
}
END_TEST

START_TEST(test_run_writes)
{
    uint8_t get[512];
    const struct fake_act acts[] = {
        {.kind = FAKE_BYTES, .bytes = get, .bytes_n = pack_weights(get, true)},
        {.kind = FAKE_ANSWER},
    };
    struct fake fake;
    fake_start(&fake, acts, ARRAY_LEN(acts));
    char endpoint[64], path[128];
    snprintf(endpoint, sizeof endpoint, "127.0.0.1:%d", fake.port);
    in_directory(path, "out.npy");
    struct ctl_args args = {0};
    give(&args, &ctl_command_run, "weight", "layers.0.attn.wo_a");
    give(&args, &ctl_command_run, "random", "3");
    give(&args, &ctl_command_run, "output", path);
    ck_assert_int_eq((int)run(&ctl_command_run, endpoint, args), CTL_OK);
    struct tensor tensor;
    struct error err;
    ck_assert_int_eq((int)tensor_read(path, "", &tensor, &err), STATUS_OK);
    ck_assert_uint_eq(tensor.bytes, 3 * FAKE_GROUPS * FAKE_OUTPUT_DIM * 2);
    ck_assert_str_eq(tensor.type, "<u2");
    tensor_deinit(&tensor);
    fake_stop(&fake);
}
END_TEST

// ---- the load generator -------------------------------------------------------------------------

static const struct einsum_client_weight fake_weight = {
    .name = "layers.0.attn.wo_a",
    .groups = FAKE_GROUPS,
    .output_dim = FAKE_OUTPUT_DIM,
    .reduced_dim = FAKE_REDUCED_DIM,
    .block_d = 128,
    .block_r = 128,
};

static struct einsum_client *bench_client(const struct fake *fake)
{
    char endpoint[64];
    snprintf(endpoint, sizeof endpoint, "127.0.0.1:%d", fake->port);
    struct einsum_client_options options;
    einsum_client_options_init(&options);
    options.attempts_max = 1;
    struct einsum_client *client;
    ck_assert_int_eq((int)einsum_client_create(endpoint, &options, &client, NULL), 0);
    return client;
}

// The first two calls check numbers: here the digest is not the output's.
START_TEST(test_bench_numbers_first)
{
    static const struct fake_act act = {.kind = FAKE_ANSWER};
    struct fake fake;
    fake_start(&fake, &act, 1);
    struct einsum_client *client = bench_client(&fake);
    struct bench_options options = {.client = client,
                                    .weights = &fake_weight,
                                    .weights_n = 1,
                                    .tokens = {2},
                                    .tokens_n = 1,
                                    .concurrency = 2,
                                    .duration_ns = 100000000};
    static struct bench_result result;
    struct einsum_client_error error;
    ck_assert_int_eq((int)bench_run(&options, &result, &error), EINSUM_CLIENT_INTERNAL);
    ck_assert_uint_eq(atomic_load(&fake.calls), 2);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

// A reply whose output is zeros, and a digest of them.
static size_t pack_zeros(uint8_t *to, bool digest_only)
{
    static uint8_t zeros[2 * FAKE_GROUPS * FAKE_OUTPUT_DIM * 2];
    Einsum__V1__EinsumResponse response = EINSUM__V1__EINSUM_RESPONSE__INIT;
    Einsum__V1__Digest digest = EINSUM__V1__DIGEST__INIT;
    Einsum__V1__BatchInfo batch = EINSUM__V1__BATCH_INFO__INIT;
    digest.crc32 = 0xefb5af2e; // of 1024 zeros
    batch.bucket = 2;
    batch.requests = 1;
    response.tokens = 2;
    response.groups = FAKE_GROUPS;
    response.output_dim = FAKE_OUTPUT_DIM;
    response.output_type = 1;
    response.batch = &batch;
    if (digest_only) {
        response.digest = &digest;
    } else {
        response.output.data = zeros;
        response.output.len = sizeof zeros;
    }
    return einsum__v1__einsum_response__pack(&response, to);
}

static bool never_ends(void *context, double share_done, uint64_t calls)
{
    (void)share_done;
    return calls < *(const uint64_t *)context;
}

START_TEST(test_bench_loops)
{
    static uint8_t zeros[4096], digest[256];
    const struct fake_act acts[] = {
        {.kind = FAKE_BYTES, .bytes = zeros, .bytes_n = pack_zeros(zeros, false)},
        {.kind = FAKE_BYTES, .bytes = digest, .bytes_n = pack_zeros(digest, true)},
        {.kind = FAKE_BYTES, .bytes = zeros, .bytes_n = pack_zeros(zeros, false)},
        {.kind = FAKE_STATUS, .status = 8, .text = "full", .pushback = "1"},
        {.kind = FAKE_BYTES, .bytes = zeros, .bytes_n = pack_zeros(zeros, false)},
    };
    struct fake fake;
    fake_start(&fake, acts, ARRAY_LEN(acts));
    struct einsum_client *client = bench_client(&fake);
    uint64_t enough = 10;
    struct bench_options options = {
        .client = client,
        .weights = &fake_weight,
        .weights_n = 1,
        .tokens = {2},
        .tokens_n = 1,
        .concurrency = 3,
        .rate = _i == 1 ? 500 : 0,
        .activation_layout = EINSUM_CLIENT_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_CLIENT_SCALES_TGK,
        .scale_type = EINSUM_CLIENT_SCALE_FP32,
        .output_type = EINSUM_CLIENT_OUTPUT_BF16,
        .zeros_allowed = true,
        .duration_ns = 20000000000,
        .requests_max = _i == 2 ? 0 : 40,
        .on_tick = _i == 2 ? never_ends : NULL,
        .context = &enough,
    };
    static struct bench_result result;
    struct einsum_client_error error;
    ck_assert_msg(bench_run(&options, &result, &error) == EINSUM_CLIENT_OK, "%s", error.text);
    if (_i == 2)
        ck_assert(result.interrupted && result.calls >= 10);
    else
        ck_assert_uint_eq(result.calls, 40);
    ck_assert_uint_eq(result.tokens, 2 * result.calls);
    ck_assert_uint_eq(result.latency.total, result.calls);
    ck_assert_uint_eq(result.failed[8], 1);
    ck_assert_str_eq(result.last_error.text, "full");
    ck_assert_uint_eq(result.buckets_n, 1);
    ck_assert_uint_eq(result.buckets[0].bucket, 2);
    ck_assert_uint_gt(result.elapsed_ns, 0);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ctl");
    TCase *files = tcase_create("files");
    tcase_add_checked_fixture(files, make_directory, remove_directory);
    tcase_add_loop_test(files, test_npy, 0, (int)ARRAY_LEN(npys));
    tcase_add_loop_test(files, test_tensor_round_trip, 0, 4);
    tcase_add_test(files, test_tensor_refused);
    suite_add_tcase(suite, files);
    TCase *numbers = tcase_create("numbers");
    tcase_set_timeout(numbers, 60);
    tcase_add_test(numbers, test_histogram);
    tcase_add_test(numbers, test_number_list);
    tcase_add_loop_test(numbers, test_reference, 0, 48);
    tcase_add_test(numbers, test_random_inputs);
    tcase_add_loop_test(numbers, test_attention, 0, (int)ARRAY_LEN(attentions));
    suite_add_tcase(suite, numbers);
    TCase *commands = tcase_create("commands");
    tcase_set_timeout(commands, 60);
    tcase_add_checked_fixture(commands, make_directory, remove_directory);
    tcase_add_test(commands, test_exit_codes);
    tcase_add_test(commands, test_check_finds_wrong_numbers);
    tcase_add_loop_test(commands, test_check_allows_what_wgmma_loses, 0,
                        (int)ARRAY_LEN(tolerances));
    tcase_add_test(commands, test_run_writes);
    tcase_add_test(commands, test_bench_numbers_first);
    tcase_add_loop_test(commands, test_bench_loops, 0, 3);
    suite_add_tcase(suite, commands);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
