// The checkpoint writer: what it writes loads, its values are those of the seed however the files
// are cut, outputs have magnitude one, and failures name the path and leave nothing behind.
#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <signal.h>
#include <unistd.h>

#include "client/checkpoint.h"
#include "folder.h"
#include "server/catalog.h"

static char base[64];
static struct roots roots;

static void set_up(void)
{
    folder_make(base, sizeof base, "test_checkpoint");
    const char *paths[] = {base};
    ck_assert_int_eq(roots_init(&roots, paths, 1, NULL), STATUS_OK);
}

static void tear_down(void)
{
    roots_deinit(&roots);
    folder_remove(base);
}

// A small model: 5 layers of 2 groups.
static struct checkpoint_options small(const char *directory)
{
    struct checkpoint_options options;
    ck_assert_int_eq(checkpoint_options_init(&options, "v4-flash", NULL), STATUS_OK);
    options.directory = directory;
    options.layers = 5;
    options.shards = 2;
    options.format.groups = 2;
    options.format.output_dim = 128;
    options.format.reduced_dim = 512;
    return options;
}

static const char *in_base(const char *name)
{
    static char paths[4][128];
    static unsigned next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", base, name);
    return path;
}

static void write_good(const struct checkpoint_options *options)
{
    struct error err;
    ck_assert_msg(checkpoint_write(options, &err) == STATUS_OK, "%s", err.text);
}

static void open_catalog(const struct checkpoint_options *options, struct catalog *catalog)
{
    struct weights_load load = {.path = options->directory,
                                .output_dim = options->format.output_dim};
    struct error err;
    ck_assert_msg(catalog_init(catalog, &roots, 65536, &load, &err) == STATUS_OK, "%s", err.text);
    ck_assert_uint_eq(catalog->entries_n, options->layers);
}

static uint8_t *read_slice(const struct tensor_slice *slice)
{
    uint8_t *bytes = calloc(1, slice->bytes + 1);
    if (slice->bytes)
        ck_assert_int_eq(
            safetensors_read(slice->file, slice->tensor, slice->offset, bytes, slice->bytes, NULL),
            STATUS_OK);
    return bytes;
}

static void check_same(const struct checkpoint_options *one, const struct checkpoint_options *other)
{
    struct catalog catalog, other_catalog;
    open_catalog(one, &catalog);
    open_catalog(other, &other_catalog);
    uint32_t both = one->layers < other->layers ? one->layers : other->layers;
    for (uint32_t i = 0; i < both; i++) {
        uint8_t *weight = read_slice(&catalog.entries[i].weight);
        uint8_t *other_weight = read_slice(&other_catalog.entries[i].weight);
        uint8_t *scales = read_slice(&catalog.entries[i].scales);
        uint8_t *other_scales = read_slice(&other_catalog.entries[i].scales);
        ck_assert_mem_eq(weight, other_weight, catalog.entries[i].weight.bytes);
        ck_assert_mem_eq(scales, other_scales, catalog.entries[i].scales.bytes);
        free(other_scales);
        free(scales);
        free(other_weight);
        free(weight);
    }
    catalog_deinit(&other_catalog);
    catalog_deinit(&catalog);
}

START_TEST(test_cut_changes_nothing)
{
    struct checkpoint_options one = small(in_base("one")), other = small(in_base("other"));
    other.shards = 3;
    other.name_prefix = "model.";
    other.scale_suffix = "weight_scale_inv";
    write_good(&one);
    write_good(&other);
    check_same(&one, &other);
    other.layers = other.shards = 2;
    write_good(&other); // over the larger one
    check_same(&one, &other);
}
END_TEST

START_TEST(test_seeds_and_layers_differ)
{
    struct checkpoint_options options = small(in_base("one"));
    uint8_t *weights[3];
    for (int i = 0; i < 2; i++) {
        struct catalog catalog;
        options.seed = (uint64_t)i;
        write_good(&options);
        open_catalog(&options, &catalog);
        weights[i] = read_slice(&catalog.entries[0].weight);
        weights[2] = read_slice(&catalog.entries[1].weight);
        ck_assert_mem_ne(weights[i], weights[2], 64);
        free(weights[2]);
        catalog_deinit(&catalog);
    }
    ck_assert_mem_ne(weights[0], weights[1], 64);
    free(weights[0]);
    free(weights[1]);
}
END_TEST

static const struct einsum_weight_format formats[] = {
    {2, 128, 512, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128},
    {2, 128, 512, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 128, 128},
    {3, 96, 4096, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 32, 32},
    {1, 32, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 128},
    {1, 64, 1024, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 1, 32},
    {2, 128, 512, EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128},
};

// Activations of 1 and -1: the mean square of all outputs is near 1, and none is NaN.
START_TEST(test_formats_and_magnitude)
{
    const struct einsum_weight_format *format = &formats[_i];
    struct checkpoint_options options = small(in_base("one"));
    options.format = *format;
    options.layers = options.shards = 1;
    write_good(&options);
    struct catalog catalog;
    open_catalog(&options, &catalog);
    const struct catalog_entry *entry = &catalog.entries[0];
    ck_assert_str_eq(entry->name, "layers.0.attn.wo_a");
    ck_assert_str_eq(entry->source, "one/model-00001-of-00001.safetensors");
    ck_assert_int_eq(memcmp(&entry->format, format, sizeof *format), 0);

    uint8_t *weight = read_slice(&entry->weight), *scales = read_slice(&entry->scales);
    uint64_t row_values = (uint64_t)format->groups * format->reduced_dim;
    uint64_t blocks = row_values / format->block_r;
    uint8_t *activations = malloc(row_values);
    float *activation_scales = malloc(blocks * sizeof(float));
    for (uint64_t i = 0; i < row_values; i++)
        activations[i] = i * 2654435761u >> 16 & 1 ? 0x38 : 0xb8;
    for (uint64_t i = 0; i < blocks; i++)
        activation_scales[i] = 1;
    struct einsum_operand operand = {.tokens = 1,
                                     .groups = format->groups,
                                     .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                     .scale_layout = EINSUM_SCALES_TGK,
                                     .scale_type = EINSUM_SCALE_FP32,
                                     .activations = activations,
                                     .scales = activation_scales};
    uint64_t outputs_n = (uint64_t)format->groups * format->output_dim;
    double *out = malloc(outputs_n * sizeof *out), squares = 0;
    einsum_reference(format, weight, scales, &operand, out);
    for (uint64_t i = 0; i < outputs_n; i++)
        squares += out[i] * out[i];
    double deviation = sqrt(squares / (double)outputs_n);
    ck_assert_msg(deviation > 0.5 && deviation < 2, "deviation %g", deviation);
    free(out);
    free(activation_scales);
    free(activations);
    free(scales);
    free(weight);
    catalog_deinit(&catalog);
}
END_TEST

START_TEST(test_presets)
{
    static const struct {
        const char *name;
        uint32_t layers, groups, block;
        uint64_t bytes;
    } presets[] = {
        {"v4-flash", 43, 8, 128, 43 * (UINT64_C(8192) * 4096 + 64 * 32)},
        {"v4-pro", 61, 16, 128, 61 * (UINT64_C(16384) * 4096 + 128 * 32)},
        {"v4.1-flash", 40, 8, 32, 40 * (UINT64_C(8192) * 4096 + 256 * 128)},
    };
    struct checkpoint_options options;
    for (size_t i = 0; i < ARRAY_LEN(presets); i++) {
        ck_assert_str_eq(checkpoint_preset(i), presets[i].name);
        ck_assert_int_eq(checkpoint_options_init(&options, presets[i].name, NULL), STATUS_OK);
        ck_assert_uint_eq(options.layers, presets[i].layers);
        ck_assert_uint_eq(options.format.groups, presets[i].groups);
        ck_assert_uint_eq(options.format.block_d, presets[i].block);
        ck_assert_uint_eq(options.format.block_r, presets[i].block);
        ck_assert_uint_eq(checkpoint_bytes(&options), presets[i].bytes);
    }
    ck_assert_ptr_null(checkpoint_preset(ARRAY_LEN(presets)));
    struct error err;
    ck_assert_int_eq(checkpoint_options_init(&options, "v3", &err), STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.text, "model: 'v3', expected v4-flash, v4-pro or v4.1-flash");
}
END_TEST

// ---- refusals

#define BAD(field, value, text)                                                                    \
    {                                                                                              \
        offsetof(struct checkpoint_options, field), value, text                                    \
    }

static const struct {
    size_t offset; // of a uint32_t option
    uint32_t value;
    const char *text;
} bad_numbers[] = {
    BAD(layers, 0, "layers: 0, expected 1 to 4096"),
    BAD(layers, 4097, "layers: 4097, expected 1 to 4096"),
    BAD(shards, 0, "shards: 0, expected 1 to the number of layers, 5"),
    BAD(shards, 6, "shards: 6, expected 1 to the number of layers, 5"),
    BAD(format.groups, 0, "groups: 0, expected 1 to 256"),
    BAD(format.groups, 257, "groups: 257"),
    BAD(format.output_dim, 0, "output_dim: 0, expected a multiple of 32 up to 65536"),
    BAD(format.output_dim, 65568, "output_dim: 65568"),
    BAD(format.output_dim, 160, "output_dim: 160 is no multiple of the block, 128"),
    BAD(format.reduced_dim, 64, "reduced_dim: 64, expected a multiple of 128 up to 65536"),
    BAD(format.block_d, 32, "block: 32x128, expected 128x128, 32x32, 1x128 or 1x32"),
    BAD(format.block_r, 64, "block: 128x64"),
    BAD(format.block_d, 0, "block: 0x128"),
};

START_TEST(test_bad_number)
{
    struct checkpoint_options options = small(in_base("one"));
    memcpy((char *)&options + bad_numbers[_i].offset, &bad_numbers[_i].value, sizeof(uint32_t));
    struct error err;
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_INVALID_ARGUMENT);
    ck_assert_msg(strstr(err.text, bad_numbers[_i].text), "%s", err.text);
    ck_assert_int_eq(access(in_base("one"), F_OK), -1);
}
END_TEST

static void check_bad_name(const char *prefix, const char *suffix, const char *text)
{
    struct checkpoint_options options = small(in_base("one"));
    options.name_prefix = prefix;
    options.scale_suffix = suffix;
    struct error err;
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_INVALID_ARGUMENT);
    ck_assert_msg(strstr(err.text, text), "%s", err.text);
}

START_TEST(test_bad_names)
{
    char long_prefix[CHECKPOINT_NAME_BYTES + 1];
    memset(long_prefix, 'x', sizeof long_prefix);
    long_prefix[CHECKPOINT_NAME_BYTES] = '\0';
    check_bad_name("a\"b", "scale", "name_prefix: byte 0x22");
    check_bad_name("a\\b", "scale", "name_prefix: byte 0x5c");
    check_bad_name("\n", "scale", "name_prefix: byte 0x0a");
    check_bad_name(long_prefix, "scale", "name_prefix: longer than 63 bytes");
    check_bad_name("", "scales", "scale_suffix: 'scales', expected scale, weight_scale_inv or");
}
END_TEST

// ---- failures

static size_t count_files(const char *directory)
{
    DIR *dir = opendir(directory);
    ck_assert_ptr_nonnull(dir);
    size_t count = 0;
    for (struct dirent *entry; (entry = readdir(dir));)
        count += strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0;
    closedir(dir);
    return count;
}

START_TEST(test_bad_directory)
{
    struct error err;
    struct checkpoint_options options = small(in_base("no/parent"));
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(err.text, "no/parent: No such file or directory"));
    options = small(in_base("file"));
    close(open(in_base("file"), O_CREAT | O_WRONLY, 0666));
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_FAILED_PRECONDITION);
    ck_assert_msg(strstr(err.text, "Not a directory"), "%s", err.text);
    options = small("");
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_INVALID_ARGUMENT);
}
END_TEST

// A limit on the size of files stands in for a full disk: both come from write(2).
START_TEST(test_write_fails)
{
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {.rlim_cur = 100000, .rlim_max = RLIM_INFINITY};
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    struct checkpoint_options options = small(in_base("one"));
    struct error err;
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_FAILED_PRECONDITION);
    ck_assert_msg(strstr(err.text, "one/model-00001-of-00002.safetensors: File too large"), "%s",
                  err.text);
    ck_assert_uint_eq(count_files(in_base("one")), 0);
}
END_TEST

START_TEST(test_disk_full)
{
    if (access("/dev/full", W_OK) != 0)
        return;
    // The temporary file's name is known: with a link to /dev/full there, write(2) fails for real.
    struct checkpoint_options options = small(in_base("one"));
    ck_assert_int_eq(mkdir(in_base("one"), 0777), 0);
    char link[256];
    snprintf(link, sizeof link, "%s/one/.model-00001-of-00002.safetensors.%ld", base,
             (long)getpid());
    ck_assert_int_eq(symlink("/dev/full", link), 0);
    struct error err;
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_RESOURCE_EXHAUSTED);
    ck_assert_msg(strstr(err.text, "No space left on device"), "%s", err.text);
    ck_assert_uint_eq(count_files(in_base("one")), 0);
}
END_TEST

struct progress {
    uint64_t done, total;
    uint32_t calls, give_up_at;
};

static bool on_progress(void *context, uint64_t done, uint64_t total)
{
    struct progress *progress = context;
    ck_assert_uint_gt(done, progress->done);
    progress->done = done;
    progress->total = total;
    return ++progress->calls != progress->give_up_at;
}

START_TEST(test_progress_and_giving_up)
{
    struct progress progress = {0};
    struct checkpoint_options options = small(in_base("one"));
    options.progress = on_progress;
    options.progress_context = &progress;
    write_good(&options);
    ck_assert_uint_eq(progress.done, checkpoint_bytes(&options));
    ck_assert_uint_eq(progress.total, progress.done);
    ck_assert_uint_eq(count_files(in_base("one")), 3);

    // Given up in the second shard: the first stays, but no index makes it look whole.
    progress = (struct progress){.give_up_at = 7};
    struct error err;
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_CANCELLED);
    ck_assert_int_eq(access(in_base("one/model.safetensors.index.json"), F_OK), -1);
    ck_assert_uint_eq(count_files(in_base("one")), 2);
}
END_TEST

static Suite *suite(void)
{
    Suite *suite = suite_create("checkpoint");
    TCase *tcase = tcase_create("checkpoint");
    tcase_set_timeout(tcase, 60);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_test(tcase, test_cut_changes_nothing);
    tcase_add_test(tcase, test_seeds_and_layers_differ);
    tcase_add_loop_test(tcase, test_formats_and_magnitude, 0, ARRAY_LEN(formats));
    tcase_add_test(tcase, test_presets);
    tcase_add_loop_test(tcase, test_bad_number, 0, ARRAY_LEN(bad_numbers));
    tcase_add_test(tcase, test_bad_names);
    tcase_add_test(tcase, test_bad_directory);
    tcase_add_test(tcase, test_write_fails);
    tcase_add_test(tcase, test_disk_full);
    tcase_add_test(tcase, test_progress_and_giving_up);
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
