// The registry, its roots and its catalog: what may be loaded, what is refused and how, and that no
// weight is ever leaked or freed under a reader. The engine here keeps the bytes that it was given.
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "folder.h"
#include "server/weights.h"

enum { REDUCED_DIM_MAX = 4096, SPECS_MAX = 6 };

// ---- an engine that keeps bytes

struct engine {
    atomic_int live; // weights that are loaded and not freed
    atomic_int loads;
    int load_that_fails;  // counted from 1; 0: none
    const char *truncate; // file that shrinks when the first piece has been read
};

struct engine_weight {
    uint64_t weight_bytes, scale_bytes;
    uint8_t *weight, *scales;
};

static enum status read_pieces(struct engine *engine, const struct engine_weight_source *source,
                               struct engine_weight *weight, struct error *err)
{
    enum { PIECE_BYTES = 3000 };
    for (uint64_t at = 0; at < weight->weight_bytes; at += PIECE_BYTES) {
        uint64_t left = weight->weight_bytes - at;
        uint64_t bytes = left < PIECE_BYTES ? left : PIECE_BYTES;
        enum status status = source->read_weight(source, at, weight->weight + at, bytes, err);
        if (status != STATUS_OK)
            return status;
        source->progress(source, bytes);
        if (engine->truncate)
            ck_assert_int_eq(truncate(engine->truncate, 4096), 0);
    }
    enum status status = source->read_scales(source, weight->scales, err);
    source->progress(source, weight->scale_bytes);
    return status;
}

static void fake_free(struct engine *engine, struct engine_weight *weight)
{
    free(weight->weight);
    free(weight->scales);
    free(weight);
    atomic_fetch_sub(&engine->live, 1);
}

static enum status fake_load(struct engine *engine, const struct engine_weight_source *source,
                             struct engine_weight **weight_out, struct error *err)
{
    if (atomic_fetch_add(&engine->loads, 1) + 1 == engine->load_that_fails)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "device memory is full");
    struct engine_weight *weight = calloc(1, sizeof *weight);
    ck_assert_ptr_nonnull(weight);
    weight->weight_bytes = einsum_weight_bytes(&source->format);
    weight->scale_bytes = einsum_weight_scale_bytes(&source->format);
    weight->weight = malloc(weight->weight_bytes);
    weight->scales = malloc(weight->scale_bytes + 1);
    atomic_fetch_add(&engine->live, 1);
    enum status status = read_pieces(engine, source, weight, err);
    if (status != STATUS_OK)
        fake_free(engine, weight);
    else
        *weight_out = weight;
    return status;
}

static uint64_t fake_bytes(const struct engine_weight *weight)
{
    return weight->weight_bytes + weight->scale_bytes;
}

static const struct engine_ops fake = {
    .name = "fake", .weight_load = fake_load, .weight_free = fake_free, .weight_bytes = fake_bytes};

// ---- files

// base/            removed at the end
//     root/        the first root
//     second/      the second root
//     outside/
static char base[64], root[80];
static struct engine engine;
static struct weights *weights;

PRINTF_LIKE(1, 2) static const char *in_base(const char *format, ...)
{
    static _Thread_local char paths[4][512];
    static _Thread_local unsigned next;
    char *path = paths[next++ % 4];
    int used = snprintf(path, sizeof paths[0], "%s/", base);
    va_list args;
    va_start(args, format);
    vsnprintf(path + used, sizeof paths[0] - (size_t)used, format, args);
    va_end(args);
    return path;
}

static void set_up(void)
{
    folder_make(base, sizeof base, "test_weights");
    snprintf(root, sizeof root, "%s/root", base);
    ck_assert_int_eq(mkdir(root, 0777), 0);
    ck_assert_int_eq(mkdir(in_base("second"), 0777), 0);
    ck_assert_int_eq(mkdir(in_base("outside"), 0777), 0);
    engine = (struct engine){0};
    struct error err;
    const char *roots[] = {root, in_base("second")};
    ck_assert_msg(weights_create(&fake, &engine, roots, 2, REDUCED_DIM_MAX, &weights, &err) ==
                      STATUS_OK,
                  "%s", err.text);
}

static void tear_down(void)
{
    weights_destroy(weights);
    ck_assert_int_eq(atomic_load(&engine.live), 0);
    folder_remove(base);
}

struct spec {
    const char *name, *dtype;
    uint32_t dims[3]; // the third is 0 if there are two, all are if there is no tensor
};

static uint64_t spec_bytes(const struct spec *spec)
{
    uint64_t elements = 1;
    for (int i = 0; i < 3 && spec->dims[i]; i++)
        elements *= spec->dims[i];
    bool four = strcmp(spec->dtype, "F32") == 0;
    bool two = strcmp(spec->dtype, "BF16") == 0 || strcmp(spec->dtype, "F16") == 0;
    return elements * (four ? 4 : two ? 2 : 1);
}

// No E4M3 NaN, and whatever four bytes make is a finite FP32.
static uint8_t byte_at(uint64_t index)
{
    return (uint8_t)(index * 2654435761u >> 7 & 0x3f);
}

// Byte i of a tensor's data is byte_at(salt + i).
static void write_shard(const char *path, const struct spec *specs, size_t specs_n, uint64_t salt)
{
    char header[4096] = "{";
    uint64_t offset = 0;
    int used = 1;
    for (size_t i = 0; i < specs_n && specs[i].name; i++) {
        const struct spec *spec = &specs[i];
        char third[16] = "";
        if (spec->dims[2])
            snprintf(third, sizeof third, ",%u", spec->dims[2]);
        used +=
            snprintf(header + used, sizeof header - (size_t)used,
                     "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%u,%u%s],\"data_offsets\":[%lu,%lu]}",
                     i ? "," : "", spec->name, spec->dtype, spec->dims[0], spec->dims[1], third,
                     (unsigned long)offset, (unsigned long)(offset + spec_bytes(spec)));
        offset += spec_bytes(spec);
    }
    used += snprintf(header + used, sizeof header - (size_t)used, "}");
    uint64_t length = (uint64_t)used;
    FILE *file = fopen(path, "w");
    ck_assert_msg(file != NULL, "%s: %s", path, strerror(errno));
    fwrite(&length, sizeof length, 1, file);
    fputs(header, file);
    for (size_t i = 0; i < specs_n && specs[i].name; i++)
        for (uint64_t j = 0; j < spec_bytes(&specs[i]); j++)
            fputc(byte_at(salt + j), file);
    ck_assert_int_eq(fclose(file), 0);
}

static void write_text(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    ck_assert_msg(file != NULL, "%s: %s", path, strerror(errno));
    fputs(text, file);
    ck_assert_int_eq(fclose(file), 0);
}

#define WEIGHT(layer) "layers." #layer ".attn.wo_a.weight"
#define SCALE(layer) "layers." #layer ".attn.wo_a.scale"

// Two groups of [32, 128], a scale for each 32 x 32.
#define LAYER(layer)                                                                               \
    {WEIGHT(layer), "F8_E4M3", {64, 128}},                                                         \
    {                                                                                              \
        SCALE(layer), "F8_E8M0",                                                                   \
        {                                                                                          \
            2, 4                                                                                   \
        }                                                                                          \
    }

static const struct spec three_layers[] = {LAYER(0), LAYER(1), LAYER(2)};

static enum status load_path(const char *path, struct error *err)
{
    struct weights_load load = {.path = path, .output_dim = 32};
    return weights_load(weights, &load, NULL, err);
}

static void load_good(const struct weights_load *load, uint32_t expected)
{
    struct error err;
    uint32_t loaded = 0;
    ck_assert_msg(weights_load(weights, load, &loaded, &err) == STATUS_OK, "%s", err.text);
    ck_assert_uint_eq(loaded, expected);
}

static void check_refused(enum status got, const struct error *err, enum status expected,
                          const char *text)
{
    ck_assert_msg(got == expected, "%s, expected %s: %s", status_name(got), status_name(expected),
                  err->text);
    ck_assert_int_eq(err->status, got);
    ck_assert_msg(strstr(err->text, text), "'%s' does not say '%s'", err->text, text);
    ck_assert_int_eq(atomic_load(&engine.live), 0);
    ck_assert_uint_eq(weights_totals(weights).weights, 0);
}

static struct weight *get(const char *name)
{
    return weights_get(weights, name, strlen(name));
}

static bool has(const char *name)
{
    struct weight *weight = get(name);
    bool found = weight != NULL;
    weight_unref(weight);
    return found;
}

// ---- names

static const struct {
    const char *given, *canonical;
} names[] = {
    {"layers.0.attn.wo_a", "layers.0.attn.wo_a"},
    {"layers.0.attn.wo_a.weight", "layers.0.attn.wo_a"},
    {"model.layers.0.attn.wo_a", "layers.0.attn.wo_a"},
    {"model.layers.0.attn.wo_a.weight", "layers.0.attn.wo_a"},
    {"model.model.x.weight.weight", "x"},
    {"pro/model.x", "pro/model.x"},
    {"models.x", "models.x"},
    {"x.weights", "x.weights"},
    {"model.", "model."},
    {".weight", ".weight"},
    {"model.weight", "weight"},
    {"model..weight", ".weight"},
    {"", ""},
};

START_TEST(test_canonical_name)
{
    size_t bytes, again_bytes;
    const char *given = names[_i].given;
    const char *name = weight_name_canonical(given, strlen(given), &bytes);
    ck_assert_uint_eq(bytes, strlen(names[_i].canonical));
    ck_assert_int_eq(strncmp(name, names[_i].canonical, bytes), 0);
    ck_assert_ptr_eq(weight_name_canonical(name, bytes, &again_bytes), name);
    ck_assert_uint_eq(again_bytes, bytes);
}
END_TEST

START_TEST(test_get_by_any_spelling)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    load_good(&(struct weights_load){.path = "a.safetensors", .output_dim = 32}, 3);
    ck_assert(has("layers.0.attn.wo_a"));
    ck_assert(has("layers.1.attn.wo_a.weight"));
    ck_assert(has("model.layers.2.attn.wo_a.weight"));
    ck_assert(!has("layers.3.attn.wo_a"));
    ck_assert(!has("layers.0.attn.wo_"));
    ck_assert(!has("layers.0.attn.wo_aa"));
    ck_assert(!has(""));
    ck_assert(!has("model."));
    // The caller's bytes need no terminator, and may hold one where it does not belong.
    static const char buffer[] = "layers.0.attn.wo_abcdef";
    struct weight *weight = weights_get(weights, buffer, 18);
    ck_assert_ptr_nonnull(weight);
    ck_assert_str_eq(weight->name, "layers.0.attn.wo_a");
    weight_unref(weight);
    ck_assert_ptr_null(weights_get(weights, "layers.0.attn.wo_a\0", 19));
    ck_assert_ptr_null(weights_get(weights, "layers.0.attn.wo_a\0.weight", 26));
    char long_name[1000];
    memset(long_name, 'x', sizeof long_name);
    ck_assert_ptr_null(weights_get(weights, long_name, sizeof long_name));
}
END_TEST

// ---- good loads

struct visited {
    char names[8][WEIGHT_NAME_BYTES];
    uint32_t n;
};

static void on_visit(void *context, struct weight *weight)
{
    struct visited *visited = context;
    ck_assert_uint_lt(visited->n, 8);
    snprintf(visited->names[visited->n++], WEIGHT_NAME_BYTES, "%s", weight->name);
}

START_TEST(test_load_file)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 7);
    load_good(&(struct weights_load){.path = "a.safetensors", .output_dim = 32}, 3);
    struct weight *weight = get("layers.1.attn.wo_a");
    ck_assert_uint_eq(weight->format.groups, 2);
    ck_assert_uint_eq(weight->format.output_dim, 32);
    ck_assert_uint_eq(weight->format.reduced_dim, 128);
    ck_assert_int_eq(weight->format.weight_type, EINSUM_WEIGHT_E4M3);
    ck_assert_int_eq(weight->format.scale_type, EINSUM_SCALE_UE8M0);
    ck_assert_uint_eq(weight->format.block_d, 32);
    ck_assert_uint_eq(weight->format.block_r, 32);
    ck_assert_str_eq(weight->source, "a.safetensors");
    ck_assert_uint_eq(weight->tensor_parallel_size, 1);
    ck_assert_uint_eq(weight->generation, 1);
    ck_assert_uint_eq(weight->resident_bytes, 64 * 128 + 8);
    ck_assert_ptr_nonnull(weight->answers);
    for (uint64_t i = 0; i < 64 * 128; i++)
        ck_assert_uint_eq(weight->engine_weight->weight[i], byte_at(7 + i));
    for (uint64_t i = 0; i < 8; i++)
        ck_assert_uint_eq(weight->engine_weight->scales[i], byte_at(7 + i));
    weight_unref(weight);

    struct weights_totals totals = weights_totals(weights);
    ck_assert_uint_eq(totals.weights, 3);
    ck_assert_uint_eq(totals.resident_bytes, 3 * (64 * 128 + 8));
    ck_assert_uint_eq(totals.groups_max, 2);
    ck_assert_uint_eq(totals.output_dim_max, 32);
    ck_assert_uint_eq(totals.reduced_dim_max, 128);
    struct visited visited = {.n = 0};
    weights_visit(weights, on_visit, &visited);
    ck_assert_uint_eq(visited.n, 3);
    ck_assert_str_eq(visited.names[0], "layers.0.attn.wo_a");
    ck_assert_str_eq(visited.names[2], "layers.2.attn.wo_a");
}
END_TEST

// Scales may be in another shard than their weight; shards that hold nothing wanted may be missing.
START_TEST(test_load_by_index)
{
    ck_assert_int_eq(mkdir(in_base("root/m"), 0777), 0);
    write_shard(in_base("root/m/1"), (struct spec[]){{WEIGHT(0), "F8_E4M3", {64, 128}}}, 1, 0);
    write_shard(in_base("root/m/2"), (struct spec[]){{SCALE(0), "F32", {64, 1}}}, 1, 0);
    write_text(in_base("root/m/model.safetensors.index.json"),
               "{\"metadata\":{\"total_size\":1,\"x\":[[1]]},\"weight_map\":{"
               "\"" SCALE(0) "\":\"2\",\"norm.weight\":\"3\",\"" WEIGHT(0) "\":\"1\"}}");
    load_good(&(struct weights_load){.path = "m", .output_dim = 32}, 1);
    struct weight *weight = get(WEIGHT(0));
    ck_assert_str_eq(weight->source, "m/1");
    ck_assert_uint_eq(weight->format.block_d, 1);
    ck_assert_uint_eq(weight->format.block_r, 128);
    ck_assert_int_eq(weight->format.scale_type, EINSUM_SCALE_FP32);
    weight_unref(weight);
}
END_TEST

START_TEST(test_load_folder_without_index)
{
    write_shard(in_base("second/b.safetensors"), (struct spec[]){LAYER(0)}, 2, 0);
    write_shard(in_base("second/a.safetensors"), (struct spec[]){LAYER(1)}, 2, 0);
    write_text(in_base("second/notes.txt"), "not a shard");
    write_text(in_base("second/.c.safetensors"), "nor this");
    load_good(&(struct weights_load){.path = in_base("second"), .output_dim = 32, .threads = 9}, 2);
    struct weight *weight = get(WEIGHT(0));
    ck_assert_str_eq(weight->source, "b.safetensors");
    weight_unref(weight);
}
END_TEST

// As download caches have it: links to files elsewhere below a root.
START_TEST(test_links_inside_the_roots)
{
    write_shard(in_base("second/blob"), three_layers, 2, 0);
    ck_assert_int_eq(mkdir(in_base("root/m"), 0777), 0);
    ck_assert_int_eq(symlink("../../second/blob", in_base("root/m/a.safetensors")), 0);
    ck_assert_int_eq(symlink("m", in_base("root/link")), 0);
    load_good(&(struct weights_load){.path = "link", .output_dim = 32}, 1);
    struct weight *weight = get(WEIGHT(0));
    ck_assert_str_eq(weight->source, "m/a.safetensors");
    weight_unref(weight);
}
END_TEST

static const struct {
    struct spec specs[2];
    uint32_t output_dim;
    struct einsum_weight_format format;
} formats[] = {
    {{{WEIGHT(0), "F8_E4M3", {256, 128}}, {SCALE(0), "F8_E8M0", {2, 1}}},
     128,
     {2, 128, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128}},
    {{{WEIGHT(0), "F8_E4M3", {1024, 256}}, {SCALE(0), "F32", {8, 2}}},
     0, // 1024
     {1, 1024, 256, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 128, 128}},
    {{{WEIGHT(0), "F8_E4M3", {64, 128}}, {SCALE(0), "F8_E8M0", {2, 4}}},
     32,
     {2, 32, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 32, 32}},
    {{{WEIGHT(0), "F8_E4M3", {64, 128}}, {SCALE(0), "F8_E8M0", {64, 4}}},
     32,
     {2, 32, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 1, 32}},
    {{{WEIGHT(0), "F8_E4M3", {64, 128}}, {SCALE(0), "F32", {64, 1}}},
     64,
     {1, 64, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 128}},
    {{{WEIGHT(0), "F8_E4M3", {3, 64, 128}}, {SCALE(0), "F32", {3, 2, 4}}},
     0, // 3-D: not used
     {3, 64, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 32, 32}},
    {{{WEIGHT(0), "F8_E4M3", {3, 64, 128}}, {SCALE(0), "F32", {6, 4}}},
     0,
     {3, 64, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 32, 32}},
    {{{WEIGHT(0), "F8_E4M3", {192, 128}}, {SCALE(0), "F32", {3, 64, 1}}},
     64,
     {3, 64, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 128}},
    {{{WEIGHT(0), "BF16", {96, 128}}},
     32,
     {3, 32, 128, EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128}},
    {{{WEIGHT(0), "F8_E4M3", {32, 4096}}, {"layers.0.attn.wo_a.weight_scale_inv", "F32", {32, 32}}},
     32,
     {1, 32, 4096, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 128}},
    {{{WEIGHT(0), "F8_E4M3", {8192, 128}}, {"layers.0.attn.wo_a.weight_scale", "F32", {256, 4}}},
     32,
     {256, 32, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 32, 32}},
};

START_TEST(test_format)
{
    write_shard(in_base("root/a.safetensors"), formats[_i].specs, 2, 0);
    load_good(&(struct weights_load){.path = "a.safetensors", .output_dim = formats[_i].output_dim},
              1);
    struct weight *weight = get(WEIGHT(0));
    const struct einsum_weight_format *got = &weight->format, *expected = &formats[_i].format;
    ck_assert_uint_eq(got->groups, expected->groups);
    ck_assert_uint_eq(got->output_dim, expected->output_dim);
    ck_assert_uint_eq(got->reduced_dim, expected->reduced_dim);
    ck_assert_int_eq(got->weight_type, expected->weight_type);
    ck_assert_int_eq(got->scale_type, expected->scale_type);
    ck_assert_uint_eq(got->block_d, expected->block_d);
    ck_assert_uint_eq(got->block_r, expected->block_r);
    weight_unref(weight);
}
END_TEST

START_TEST(test_tensor_parallel_slices)
{
    // Four groups of [32, 128]; rows of scales: one for each group.
    write_shard(in_base("root/a.safetensors"),
                (struct spec[]){{WEIGHT(0), "F8_E4M3", {128, 128}}, {SCALE(0), "F32", {4, 4}}}, 2,
                0);
    for (uint32_t size = 1; size <= 4; size *= 2) {
        for (uint32_t rank = 0; rank < size; rank++) {
            load_good(&(struct weights_load){.path = "a.safetensors",
                                             .output_dim = 32,
                                             .tensor_parallel_rank = rank,
                                             .tensor_parallel_size = size,
                                             .replace = true},
                      1);
            struct weight *weight = get(WEIGHT(0));
            const struct engine_weight *held = weight->engine_weight;
            uint32_t groups = 4 / size;
            ck_assert_uint_eq(weight->format.groups, groups);
            ck_assert_uint_eq(weight->tensor_parallel_rank, rank);
            ck_assert_uint_eq(weight->tensor_parallel_size, size);
            ck_assert_uint_eq(held->weight_bytes, groups * 32 * 128);
            ck_assert_uint_eq(held->scale_bytes, groups * 4 * 4);
            for (uint64_t i = 0; i < held->weight_bytes; i++)
                ck_assert_uint_eq(held->weight[i], byte_at(rank * held->weight_bytes + i));
            for (uint64_t i = 0; i < held->scale_bytes; i++)
                ck_assert_uint_eq(held->scales[i], byte_at(rank * held->scale_bytes + i));
            weight_unref(weight);
        }
    }
}
END_TEST

START_TEST(test_patterns_and_prefix)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    const char *some[] = {"layers.[01].*", "*.2.attn.wo_a.weight"}, *one[] = {WEIGHT(1)};
    struct weights_load load = {.path = "a.safetensors",
                                .output_dim = 32,
                                .tensors = some,
                                .tensors_n = 2,
                                .name_prefix = "pro/"};
    load_good(&load, 3);
    ck_assert(has("pro/layers.0.attn.wo_a"));
    ck_assert(has("pro/layers.2.attn.wo_a.weight"));
    ck_assert(!has("layers.0.attn.wo_a"));
    load.tensors = one;
    load.tensors_n = 1;
    load.name_prefix = "";
    load_good(&load, 1);
    ck_assert(has("layers.1.attn.wo_a"));
    // A prefix that any spelling may leave out is left out here too.
    load.name_prefix = "model.";
    struct error err;
    ck_assert_int_eq(weights_load(weights, &load, NULL, &err), STATUS_ALREADY_EXISTS);
    load.tensors = (const char *[]){WEIGHT(2)};
    load_good(&load, 1);
    ck_assert(has("layers.2.attn.wo_a"));
    ck_assert(has("model.layers.2.attn.wo_a"));
}
END_TEST

// ---- refusals: paths

static const struct {
    const char *path; // $ stands for the base folder
    enum status status;
    const char *text;
} paths[] = {
    {"", STATUS_INVALID_ARGUMENT, "path: empty"},
    {"missing", STATUS_NOT_FOUND, "path: 'missing': No such file"},
    {"missing/deeper/still", STATUS_NOT_FOUND, "path: 'missing/deeper/still': No such file"},
    {"file/below", STATUS_NOT_FOUND, "Not a directory"},
    {"$/root/missing", STATUS_NOT_FOUND, "No such file"},
    {"$/outside", STATUS_PERMISSION_DENIED, "outside' is outside the configured roots"},
    {"$/outside/good.safetensors", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    // Whether it exists is not told.
    {"$/outside/missing", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"$/outside/missing/deeper", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"$/root/../outside/missing", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"/missing", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"../outside/good.safetensors", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"../missing", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"$/root2/good.safetensors", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"..", STATUS_PERMISSION_DENIED, "path: '..' is outside the configured roots"},
    {"/", STATUS_PERMISSION_DENIED, "path: '/' is outside the configured roots"},
    {"/etc/passwd", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"link_file", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"link_folder", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"link_folder/good.safetensors", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"link_folder/missing", STATUS_PERMISSION_DENIED, "is outside the configured roots"},
    {"folder_of_links", STATUS_PERMISSION_DENIED,
     "path: 'folder_of_links/a.safetensors' is outside the configured roots"},
    {"folder_of_index", STATUS_PERMISSION_DENIED,
     "path: 'model.safetensors.index.json' is outside the configured roots"},
    {"loop", STATUS_FAILED_PRECONDITION, "Too many levels of symbolic links"},
    {"empty", STATUS_NOT_FOUND, "holds neither model.safetensors.index.json nor any *.safetensors"},
    {"file", STATUS_FAILED_PRECONDITION, "file: 4 bytes, too short for a safetensors file"},
    {"fifo", STATUS_FAILED_PRECONDITION, "fifo: not a regular file"},
};

START_TEST(test_path)
{
    write_shard(in_base("outside/good.safetensors"), three_layers, 6, 0);
    ck_assert_int_eq(mkdir(in_base("root2"), 0777), 0);
    write_shard(in_base("root2/good.safetensors"), three_layers, 6, 0);
    write_text(in_base("outside/model.safetensors.index.json"), "{\"weight_map\":{}}");
    write_text(in_base("root/file"), "text");
    ck_assert_int_eq(mkdir(in_base("root/empty"), 0777), 0);
    ck_assert_int_eq(mkdir(in_base("root/folder_of_links"), 0777), 0);
    ck_assert_int_eq(mkdir(in_base("root/folder_of_index"), 0777), 0);
    ck_assert_int_eq(mkfifo(in_base("root/fifo"), 0666), 0);
    ck_assert_int_eq(symlink(in_base("outside/good.safetensors"), in_base("root/link_file")), 0);
    ck_assert_int_eq(symlink("../outside", in_base("root/link_folder")), 0);
    ck_assert_int_eq(
        symlink("../../outside/good.safetensors", in_base("root/folder_of_links/a.safetensors")),
        0);
    ck_assert_int_eq(symlink("../../outside/model.safetensors.index.json",
                             in_base("root/folder_of_index/model.safetensors.index.json")),
                     0);
    ck_assert_int_eq(symlink("loop", in_base("root/loop")), 0);

    const char *path =
        paths[_i].path[0] == '$' ? in_base("%s", paths[_i].path + 2) : paths[_i].path;
    struct error err = {0};
    check_refused(load_path(path, &err), &err, paths[_i].status, paths[_i].text);
    ck_assert_str_eq(err.field, strncmp(err.text, "path: ", 6) == 0 ? "path" : "");
}
END_TEST

START_TEST(test_path_too_long)
{
    char path[5000];
    memset(path, 'x', sizeof path - 1);
    path[sizeof path - 1] = '\0';
    struct error err = {0};
    check_refused(load_path(path, &err), &err, STATUS_INVALID_ARGUMENT, "path: longer than");
    path[4000] = '\0'; // fits, but no name may be so long
    check_refused(load_path(path, &err), &err, STATUS_FAILED_PRECONDITION, "File name too long");
}
END_TEST

START_TEST(test_roots)
{
    struct weights *other;
    struct error err;
    const char *missing[] = {root, "/nowhere/at/all"}, *file[] = {in_base("root/file")};
    ck_assert_int_eq(weights_create(&fake, &engine, missing, 2, 128, &other, &err),
                     STATUS_FAILED_PRECONDITION);
    ck_assert_str_eq(err.text, "weights_roots: '/nowhere/at/all': No such file or directory");
    write_text(file[0], "text");
    ck_assert_int_eq(weights_create(&fake, &engine, file, 1, 128, &other, &err),
                     STATUS_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(err.text, "root/file' is not a folder"));

    // Without roots nothing may be read.
    ck_assert_int_eq(weights_create(&fake, &engine, NULL, 0, 128, &other, &err), STATUS_OK);
    struct weights_load load = {.path = "/tmp"};
    ck_assert_int_eq(weights_load(other, &load, NULL, &err), STATUS_PERMISSION_DENIED);
    weights_destroy(other);

    // A root reached by a link holds what its target holds.
    ck_assert_int_eq(symlink("root", in_base("link")), 0);
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    const char *link[] = {in_base("link")};
    ck_assert_int_eq(weights_create(&fake, &engine, link, 1, 128, &other, &err), STATUS_OK);
    load = (struct weights_load){.path = in_base("link/a.safetensors"), .output_dim = 32};
    ck_assert_msg(weights_load(other, &load, NULL, &err) == STATUS_OK, "%s", err.text);
    weights_destroy(other);
}
END_TEST

// ---- refusals: indexes

static const struct {
    const char *index;
    enum status status;
    const char *text;
} indexes[] = {
    {"", STATUS_FAILED_PRECONDITION, "model.safetensors.index.json: JSON, line 1"},
    {"[]", STATUS_FAILED_PRECONDITION, "no weight_map, or not an object"},
    {"{}", STATUS_FAILED_PRECONDITION, "no weight_map, or not an object"},
    {"{\"weight_map\":[]}", STATUS_FAILED_PRECONDITION, "no weight_map, or not an object"},
    {"{\"weight_map\":{\"t\":1}}", STATUS_FAILED_PRECONDITION, "the file of 't' is not a string"},
    {"{\"weight_map\":{\"t\":\"a\",\"t\":\"b\"}}", STATUS_FAILED_PRECONDITION, "duplicate"},
    {"{\"x\":[[[[[[[[[1]]]]]]]]]}", STATUS_FAILED_PRECONDITION, "nested deeper than 8"},
    {"{\"weight_map\":{}}", STATUS_NOT_FOUND,
     "tensors: no tensor whose name ends in .weight matches '*.attn.wo_a.weight'"},
    {"{\"weight_map\":{\"" WEIGHT(0) "\":\"gone.safetensors\"}}", STATUS_FAILED_PRECONDITION,
     "m/gone.safetensors: no such file"},
    {"{\"weight_map\":{\"" WEIGHT(0) "\":\"../a.safetensors\"}}", STATUS_FAILED_PRECONDITION,
     "'../a.safetensors' is not a plain file name"},
    {"{\"weight_map\":{\"" WEIGHT(0) "\":\"/etc/passwd\"}}", STATUS_FAILED_PRECONDITION,
     "'/etc/passwd' is not a plain file name"},
    {"{\"weight_map\":{\"" WEIGHT(0) "\":\"..\"}}", STATUS_FAILED_PRECONDITION,
     "'..' is not a plain file name"},
    {"{\"weight_map\":{\"" WEIGHT(0) "\":\".\"}}", STATUS_FAILED_PRECONDITION,
     "'.' is not a plain file name"},
    {"{\"weight_map\":{\"" WEIGHT(0) "\":\"\"}}", STATUS_FAILED_PRECONDITION,
     "'' is not a plain file name"},
    {"{\"weight_map\":{\"" WEIGHT(0) "\":\"link\"}}", STATUS_PERMISSION_DENIED,
     "path: 'm/link' is outside the configured roots"},
    {"{\"weight_map\":{\"" WEIGHT(9) "\":\"a.safetensors\"}}", STATUS_FAILED_PRECONDITION,
     "model.safetensors.index.json puts tensor 'layers.9.attn.wo_a.weight' in 'm/a.safetensors', "
     "which does not hold it"},
    // The scale is in the file, but the index is what counts.
    {"{\"weight_map\":{\"" WEIGHT(0) "\":\"a.safetensors\"}}", STATUS_FAILED_PRECONDITION,
     "weight 'layers.0.attn.wo_a.weight' is F8_E4M3, but no tensor of its name with .scale"},
    {"{\"weight_map\":{\"" WEIGHT(0) "\":\"a.safetensors\",\"" SCALE(0) "\":\"gone\"}}",
     STATUS_FAILED_PRECONDITION, "m/gone: no such file"},
};

START_TEST(test_index)
{
    ck_assert_int_eq(mkdir(in_base("root/m"), 0777), 0);
    write_shard(in_base("root/m/a.safetensors"), three_layers, 6, 0);
    write_shard(in_base("outside/a.safetensors"), three_layers, 6, 0);
    ck_assert_int_eq(symlink("../../outside/a.safetensors", in_base("root/m/link")), 0);
    write_text(in_base("root/m/model.safetensors.index.json"), indexes[_i].index);
    struct error err = {0};
    check_refused(load_path("m", &err), &err, indexes[_i].status, indexes[_i].text);
}
END_TEST

// ---- refusals: tensors and requests

static const struct {
    struct spec specs[SPECS_MAX];
    struct weights_load load;
    enum status status;
    const char *text;
} refusals[] = {
    // types
    {{{WEIGHT(0), "F16", {64, 128}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "is F16 [64, 128], expected dtype F8_E4M3 or BF16"},
    {{{WEIGHT(0), "F8_E5M2", {64, 128}}, {SCALE(0), "F32", {2, 4}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "is F8_E5M2 [64, 128], expected dtype F8_E4M3 or BF16"},
    {{{WEIGHT(0), "F8_E4M3", {64, 128}}},
     {0},
     STATUS_FAILED_PRECONDITION,
     "is F8_E4M3, but no tensor of its name with .scale, .weight_scale_inv or .weight_scale"},
    {{{WEIGHT(0), "BF16", {64, 128}}, {SCALE(0), "F32", {2, 4}}},
     {0},
     STATUS_FAILED_PRECONDITION,
     "is BF16 and must have no scales, but there is 'layers.0.attn.wo_a.scale'"},
    {{{WEIGHT(0), "F8_E4M3", {64, 128}}, {SCALE(0), "BF16", {2, 4}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "scale 'layers.0.attn.wo_a.scale' is BF16 [2, 4], expected dtype F8_E8M0 or F32"},
    {{LAYER(0), {"layers.0.attn.wo_a.weight_scale", "F32", {2, 4}}},
     {0},
     STATUS_FAILED_PRECONDITION,
     "has two scales: 'layers.0.attn.wo_a.scale' and 'layers.0.attn.wo_a.weight_scale'"},
    // shapes
    {{{WEIGHT(0), "F8_E4M3", {48, 128}}, {SCALE(0), "F32", {1, 4}}},
     {0},
     STATUS_FAILED_PRECONDITION,
     "is F8_E4M3 [48, 128], expected [G*D, R] with D = 32 (output_dim), or [G, D, R]"},
    {{{WEIGHT(0), "F8_E4M3", {64, 128}}, {SCALE(0), "F32", {2, 4}}},
     {.output_dim = 1024},
     STATUS_FAILED_PRECONDITION,
     "with D = 1024 (output_dim)"},
    {{{WEIGHT(0), "F8_E4M3", {64, 96}}, {SCALE(0), "F32", {2, 3}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "D 32 and R 96 must be multiples of 32 and 128, both at most 65536"},
    {{{WEIGHT(0), "F8_E4M3", {2, 48, 128}}, {SCALE(0), "F32", {96, 1}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "D 48 and R 128 must be multiples of 32 and 128"},
    {{{WEIGHT(0), "F8_E4M3", {32, 4224}}, {SCALE(0), "F32", {1, 132}}},
     {0},
     STATUS_FAILED_PRECONDITION,
     "is F8_E4M3 [32, 4224]: R 4224 exceeds 4096, for which the daemon was started"},
    {{{WEIGHT(0), "F8_E4M3", {8224, 128}}, {SCALE(0), "F32", {257, 4}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "257 groups, expected at most 256"},
    // blocks
    {{{WEIGHT(0), "F8_E4M3", {64, 128}}, {SCALE(0), "F32", {2, 2}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "scale 'layers.0.attn.wo_a.scale' is F32 [2, 2] for a weight F8_E4M3 [64, 128] with D = 32: "
     "expected one scale for each 128x128, 32x32, 1x128 or 1x32 of [D, R]"},
    {{{WEIGHT(0), "F8_E4M3", {64, 128}}, {SCALE(0), "F32", {2, 1}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "expected one scale for each"}, // 32 x 128
    {{{WEIGHT(0), "F8_E4M3", {256, 128}}, {SCALE(0), "F32", {2, 1}}},
     {.output_dim = 64},
     STATUS_UNIMPLEMENTED,
     "expected one scale for each"}, // a block across two groups
    {{{WEIGHT(0), "F8_E4M3", {64, 128}}, {SCALE(0), "F32", {4, 2}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "is F32 [4, 2] for a weight"}, // transposed
    {{{WEIGHT(0), "F8_E4M3", {3, 64, 128}}, {SCALE(0), "F32", {2, 3, 4}}},
     {0},
     STATUS_UNIMPLEMENTED,
     "is F32 [2, 3, 4] for a weight"},
    // requests
    {{LAYER(0)},
     {.tensor_parallel_rank = 1},
     STATUS_INVALID_ARGUMENT,
     "tensor_parallel_rank: 1, expected less than tensor_parallel_size, 1"},
    {{LAYER(0)},
     {.tensor_parallel_rank = 2, .tensor_parallel_size = 2},
     STATUS_INVALID_ARGUMENT,
     "tensor_parallel_rank: 2, expected less than tensor_parallel_size, 2"},
    {{LAYER(0)},
     {.tensor_parallel_size = 3},
     STATUS_INVALID_ARGUMENT,
     "tensor_parallel_size: 3 does not divide the 2 groups of 'layers.0.attn.wo_a.weight'"},
    {{LAYER(0)},
     {.tensor_parallel_size = 4},
     STATUS_INVALID_ARGUMENT,
     "tensor_parallel_size: 4 does not divide the 2 groups"},
    {{LAYER(0)},
     {.tensors = (const char *const[]){"*.attn.wo_a.weight", "nothing*"}, .tensors_n = 2},
     STATUS_NOT_FOUND,
     "tensors: no tensor whose name ends in .weight matches 'nothing*'"},
    {{LAYER(0)},
     {.tensors = (const char *const[]){SCALE(0)}, .tensors_n = 1},
     STATUS_NOT_FOUND,
     "matches 'layers.0.attn.wo_a.scale'"},
    {{LAYER(0), {"norm.weight", "BF16", {64, 100}}},
     {.tensors = (const char *const[]){"*"}, .tensors_n = 1},
     STATUS_UNIMPLEMENTED,
     "weight 'norm.weight' is BF16 [64, 100]"},
    // names
    {{LAYER(0), {"model." WEIGHT(0), "BF16", {64, 128}}},
     {0},
     STATUS_FAILED_PRECONDITION,
     "would both be named 'layers.0.attn.wo_a'"},
    {{{"a\\tb.attn.wo_a.weight", "BF16", {64, 128}}},
     {0},
     STATUS_FAILED_PRECONDITION,
     "byte 0x09 in its name, expected printable ASCII"},
    {{LAYER(0)},
     {.name_prefix = "a b"},
     STATUS_FAILED_PRECONDITION,
     "byte 0x20 in its name, expected printable ASCII"},
    {{LAYER(0)},
     {.name_prefix = "\xff"},
     STATUS_FAILED_PRECONDITION,
     "byte 0xff in its name, expected printable ASCII"},
};

START_TEST(test_refusal)
{
    write_shard(in_base("root/a.safetensors"), refusals[_i].specs, SPECS_MAX, 0);
    struct weights_load load = refusals[_i].load;
    load.path = "a.safetensors";
    load.output_dim = load.output_dim ? load.output_dim : 32;
    struct error err = {0};
    check_refused(weights_load(weights, &load, NULL, &err), &err, refusals[_i].status,
                  refusals[_i].text);
}
END_TEST

START_TEST(test_long_names_and_many_patterns)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    char text[400];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    const char *patterns[65];
    for (size_t i = 0; i < ARRAY_LEN(patterns); i++)
        patterns[i] = text;
    struct error err = {0};
    struct weights_load load = {
        .path = "a.safetensors", .output_dim = 32, .tensors = patterns, .tensors_n = 65};
    check_refused(weights_load(weights, &load, NULL, &err), &err, STATUS_INVALID_ARGUMENT,
                  "tensors: 65 patterns, expected at most 64");
    load.tensors_n = 1;
    check_refused(weights_load(weights, &load, NULL, &err), &err, STATUS_INVALID_ARGUMENT,
                  "tensors: a pattern of 399 bytes, expected at most 256");
    load.tensors_n = 0;
    load.name_prefix = text;
    check_refused(weights_load(weights, &load, NULL, &err), &err, STATUS_INVALID_ARGUMENT,
                  "name_prefix: 399 bytes, expected at most 255");
    text[250] = '\0';
    check_refused(weights_load(weights, &load, NULL, &err), &err, STATUS_FAILED_PRECONDITION,
                  "a name of 268 bytes with its prefix, expected at most 255");
    // Many stars must not make matching take for ever.
    memset(text, 'x', 240);
    for (size_t i = 0; i < 240; i += 2)
        text[i] = '*';
    load.name_prefix = "";
    load.tensors_n = 1;
    uint64_t begun_ns = now_ns();
    check_refused(weights_load(weights, &load, NULL, &err), &err, STATUS_NOT_FOUND, "matches");
    ck_assert_uint_lt(now_ns() - begun_ns, 5000000000u);
}
END_TEST

START_TEST(test_tensor_in_two_files)
{
    write_shard(in_base("root/a.safetensors"), (struct spec[]){LAYER(0)}, 2, 0);
    write_shard(in_base("root/b.safetensors"), (struct spec[]){LAYER(0)}, 2, 0);
    struct error err = {0};
    check_refused(load_path(root, &err), &err, STATUS_FAILED_PRECONDITION,
                  "is in both 'a.safetensors' and 'b.safetensors'");
}
END_TEST

// ---- failures while loading

START_TEST(test_engine_fails)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    struct weights_load load = {
        .path = "a.safetensors", .output_dim = 32, .threads = (uint32_t)_i % 4};
    engine.load_that_fails = 1 + _i % 3;
    struct error err = {0};
    enum status status = weights_load(weights, &load, NULL, &err);
    check_refused(status, &err, STATUS_RESOURCE_EXHAUSTED, "device memory is full");
    ck_assert_msg(strncmp(err.text, "weight 'layers.", 15) == 0, "%s", err.text);
}
END_TEST

START_TEST(test_file_shrinks_while_loading)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    engine.truncate = in_base("root/a.safetensors");
    struct error err = {0};
    check_refused(load_path("a.safetensors", &err), &err, STATUS_DATA_LOSS, "has shrunk");
}
END_TEST

struct progress {
    uint32_t calls, give_up_at; // 0: never
    uint32_t weights_done;
    uint64_t bytes_done;
};

static bool on_progress(void *context, uint32_t weights_done, uint32_t weights_total,
                        uint64_t bytes_done, uint64_t bytes_total)
{
    struct progress *progress = context;
    ck_assert_uint_eq(weights_total, 3);
    ck_assert_uint_eq(bytes_total, 3 * (64 * 128 + 8));
    ck_assert_uint_ge(weights_done, progress->weights_done);
    ck_assert_uint_ge(bytes_done, progress->bytes_done);
    ck_assert_uint_le(bytes_done, bytes_total);
    progress->weights_done = weights_done;
    progress->bytes_done = bytes_done;
    return ++progress->calls != progress->give_up_at;
}

START_TEST(test_progress)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    struct progress progress = {0};
    load_good(&(struct weights_load){.path = "a.safetensors",
                                     .output_dim = 32,
                                     .threads = 3,
                                     .progress = on_progress,
                                     .progress_context = &progress},
              3);
    ck_assert_uint_ge(progress.calls, 3);
    ck_assert_uint_eq(progress.weights_done, 3);
    ck_assert_uint_eq(progress.bytes_done, 3 * (64 * 128 + 8));
}
END_TEST

START_TEST(test_give_up)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    struct progress progress = {.give_up_at = (uint32_t)_i};
    struct weights_load load = {.path = "a.safetensors",
                                .output_dim = 32,
                                .threads = 2,
                                .progress = on_progress,
                                .progress_context = &progress};
    struct error err = {0};
    check_refused(weights_load(weights, &load, NULL, &err), &err, STATUS_CANCELLED,
                  "given up by its caller");
}
END_TEST

// ---- replace and unload

static uint64_t generation(const char *name)
{
    struct weight *weight = get(name);
    uint64_t found = weight ? weight->generation : 0;
    weight_unref(weight);
    return found;
}

static void on_unloaded(void *context, const char *name)
{
    struct visited *visited = context;
    ck_assert_uint_lt(visited->n, 8);
    snprintf(visited->names[visited->n++], WEIGHT_NAME_BYTES, "%s", name);
}

START_TEST(test_replace_and_unload)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 4, 0);
    write_shard(in_base("root/b.safetensors"), three_layers, 6, 5);
    struct weights_load load = {.path = "a.safetensors", .output_dim = 32};
    load_good(&load, 2);
    struct error err;
    load.path = "b.safetensors";
    ck_assert_int_eq(weights_load(weights, &load, NULL, &err), STATUS_ALREADY_EXISTS);
    ck_assert_str_eq(err.text,
                     "weight 'layers.0.attn.wo_a' is resident; set replace to load it anew");
    ck_assert_int_eq(atomic_load(&engine.loads), 2); // refused before any work
    ck_assert(!has(WEIGHT(2)));

    // Who holds the old weight keeps it; the newcomer beside it starts at generation 1.
    struct weight *before = get(WEIGHT(0));
    load.replace = true;
    load_good(&load, 3);
    ck_assert_uint_eq(generation(WEIGHT(0)), 2);
    ck_assert_uint_eq(generation(WEIGHT(2)), 1);
    ck_assert_int_eq(atomic_load(&engine.live), 4);
    ck_assert_uint_eq(before->engine_weight->weight[0], byte_at(0));
    ck_assert_uint_eq(before->generation, 1);
    weight_unref(before);
    ck_assert_int_eq(atomic_load(&engine.live), 3);

    struct visited gone = {.n = 0};
    ck_assert_int_eq(weights_unload(weights, "layers.9*", on_unloaded, &gone, &err),
                     STATUS_NOT_FOUND);
    ck_assert_str_eq(err.text, "names: no resident weight matches 'layers.9*'");
    ck_assert_str_eq(err.field, "names");
    ck_assert_uint_eq(gone.n, 0);
    ck_assert_int_eq(weights_unload(weights, "model." WEIGHT(0), on_unloaded, &gone, &err),
                     STATUS_OK);
    ck_assert_uint_eq(gone.n, 1);
    ck_assert_str_eq(gone.names[0], "layers.0.attn.wo_a");
    ck_assert(!has(WEIGHT(0)));
    ck_assert_int_eq(weights_unload(weights, "*.wo_a", NULL, NULL, &err), STATUS_OK);
    ck_assert_uint_eq(weights_totals(weights).weights, 0);
    ck_assert_int_eq(atomic_load(&engine.live), 0);

    // What comes back goes on counting.
    load_good(&load, 3);
    ck_assert_uint_gt(generation(WEIGHT(0)), 2);
    char long_pattern[WEIGHT_NAME_BYTES + 1];
    memset(long_pattern, '*', sizeof long_pattern);
    long_pattern[WEIGHT_NAME_BYTES] = '\0';
    ck_assert_int_eq(weights_unload(weights, long_pattern, NULL, NULL, &err),
                     STATUS_INVALID_ARGUMENT);
}
END_TEST

// A name with brackets, read as a pattern, matches other names than itself.
START_TEST(test_unload_name_with_brackets)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 2, 0);
    load_good(
        &(struct weights_load){.path = "a.safetensors", .output_dim = 32, .name_prefix = "v[1]/"},
        1);
    ck_assert_int_eq(weights_unload(weights, "v[1]/layers.0.attn.wo_a", NULL, NULL, NULL),
                     STATUS_OK);
}
END_TEST

START_TEST(test_replaced_load_fails)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    struct weights_load load = {.path = "a.safetensors", .output_dim = 32};
    load_good(&load, 3);
    engine.load_that_fails = 5;
    load.replace = true;
    struct error err;
    ck_assert_int_eq(weights_load(weights, &load, NULL, &err), STATUS_RESOURCE_EXHAUSTED);
    ck_assert_uint_eq(weights_totals(weights).weights, 3); // the old ones, untouched
    ck_assert_uint_eq(generation(WEIGHT(0)), 1);
    ck_assert_int_eq(atomic_load(&engine.live), 3);
}
END_TEST

// ---- the set changed as a whole

static enum status prepare(const struct weights_change *change, struct weights_prepared **prepared,
                           struct error *err)
{
    *prepared = NULL;
    return weights_prepare(weights, change, prepared, err);
}

START_TEST(test_change_swaps_all_at_once)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 4, 0);
    write_shard(in_base("root/b.safetensors"), three_layers, 6, 5);
    struct weights_load load = {.path = "a.safetensors", .output_dim = 32, .tag = 7};
    load_good(&load, 2);
    load = (struct weights_load){.path = "a.safetensors", .output_dim = 32, .name_prefix = "rpc."};
    load_good(&load, 2);

    const struct weights_load loads[] = {
        {.path = "b.safetensors", .output_dim = 32, .tag = 8},
        {.path = "a.safetensors", .output_dim = 32, .name_prefix = "z.", .tag = 9},
    };
    const uint64_t drops[] = {7};
    const struct weights_change change = {
        .loads = loads, .loads_n = 2, .drops = drops, .drops_n = 1};
    struct weights_prepared *prepared;
    struct error err;
    ck_assert_msg(prepare(&change, &prepared, &err) == STATUS_OK, "%s", err.text);
    ck_assert_uint_eq(weights_totals(weights).weights, 4); // as before
    ck_assert_uint_eq(generation(WEIGHT(0)), 1);
    weights_commit(prepared);
    ck_assert_uint_eq(weights_totals(weights).weights, 7);
    ck_assert_uint_eq(generation(WEIGHT(0)), 2);
    ck_assert_uint_eq(generation(WEIGHT(2)), 1);
    ck_assert(has("rpc.layers.0.attn.wo_a") && has("z.layers.1.attn.wo_a"));
    ck_assert_int_eq(atomic_load(&engine.live), 9); // what went is there until the next line
    weights_prepared_destroy(prepared);
    ck_assert_int_eq(atomic_load(&engine.live), 7);

    // All of the configuration's go; a name that comes back goes on counting.
    const uint64_t rest[] = {8, 9};
    const struct weights_change none = {.drops = rest, .drops_n = 2};
    ck_assert_int_eq(prepare(&none, &prepared, &err), STATUS_OK);
    weights_commit(prepared);
    weights_prepared_destroy(prepared);
    ck_assert_uint_eq(weights_totals(weights).weights, 2);
    load = (struct weights_load){.path = "a.safetensors", .output_dim = 32};
    load_good(&load, 2);
    ck_assert_uint_gt(generation(WEIGHT(0)), 2);
}
END_TEST

// In each of its loads, and with names that are taken; and destroyed uncommitted.
START_TEST(test_change_fails_whole)
{
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    load_good(&(struct weights_load){.path = "a.safetensors", .output_dim = 32, .tag = 1}, 3);
    struct weights_load loads[] = {
        {.path = "a.safetensors", .output_dim = 32, .tag = 2},
        {.path = "a.safetensors", .output_dim = 32, .name_prefix = "b.", .tag = 3},
    };
    const uint64_t drops[] = {1};
    struct weights_change change = {.loads = loads, .loads_n = 2, .drops = drops, .drops_n = 1};
    struct weights_prepared *prepared;
    struct error err;
    for (int fails = 4; fails <= 9; fails++) {
        engine.loads = 3;
        engine.load_that_fails = fails;
        ck_assert_int_eq(prepare(&change, &prepared, &err), STATUS_RESOURCE_EXHAUSTED);
        ck_assert_str_eq(err.field, "weights");
        ck_assert_int_eq(strncmp(err.text, fails <= 6 ? "weights[0]: " : "weights[1]: ", 12), 0);
        ck_assert_int_eq(atomic_load(&engine.live), 3);
    }
    engine.load_that_fails = 0;
    loads[1].name_prefix = "";
    ck_assert_int_eq(prepare(&change, &prepared, &err), STATUS_ALREADY_EXISTS);
    change.loads_n = 1;
    change.drops_n = 0;
    ck_assert_int_eq(prepare(&change, &prepared, &err), STATUS_ALREADY_EXISTS);
    change.drops_n = 1;
    ck_assert_int_eq(prepare(&change, &prepared, &err), STATUS_OK);
    ck_assert_int_eq(atomic_load(&engine.live), 6);
    weights_prepared_destroy(prepared);
    ck_assert_int_eq(atomic_load(&engine.live), 3);
    ck_assert_uint_eq(generation(WEIGHT(0)), 1);
    load_good(
        &(struct weights_load){.path = "a.safetensors", .output_dim = 32, .name_prefix = "free."},
        3); // nobody is left changing
}
END_TEST

// ---- readers beside a changing registry

static atomic_bool stop;

static void check_whole(void *context, struct weight *weight)
{
    uint64_t *sum = context;
    // Touches what the last reference frees.
    *sum += weight->engine_weight->weight[0] + weight->engine_weight->weight_bytes;
}

static void *read_registry(void *context)
{
    uint64_t *found = context, sum = 0;
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        for (int layer = 0; layer < 3; layer++) {
            char name[64];
            snprintf(name, sizeof name, "layers.%d.attn.wo_a", layer);
            struct weight *weight = get(name);
            if (!weight)
                continue;
            check_whole(&sum, weight);
            weight_unref(weight_ref(weight));
            weight_unref(weight);
            (*found)++;
        }
        weights_visit(weights, check_whole, &sum);
        sum += weights_totals(weights).resident_bytes;
    }
    ck_assert_uint_gt(sum, 0);
    return NULL;
}

static void *hold_and_drop(void *context)
{
    weight_unref(context);
    return NULL;
}

START_TEST(test_readers_beside_changes)
{
    enum { READERS = 3, ROUNDS = 60 };
    write_shard(in_base("root/a.safetensors"), three_layers, 6, 0);
    struct weights_load load = {
        .path = "a.safetensors", .output_dim = 32, .threads = 2, .replace = true};
    load_good(&load, 3);
    atomic_store(&stop, false);
    pthread_t readers[READERS];
    uint64_t found[READERS] = {0};
    for (int i = 0; i < READERS; i++)
        ck_assert_int_eq(pthread_create(&readers[i], NULL, read_registry, &found[i]), 0);
    for (int round = 0; round < ROUNDS; round++) {
        struct weight *held = get(WEIGHT(1));
        load_good(&load, 3);
        if (round % 3 == 0)
            ck_assert_int_eq(weights_unload(weights, "layers.[12].*", NULL, NULL, NULL), STATUS_OK);
        // The last reference may go on a thread that knows nothing else of the registry.
        pthread_t dropper;
        ck_assert_int_eq(pthread_create(&dropper, NULL, hold_and_drop, held), 0);
        pthread_join(dropper, NULL);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < READERS; i++) {
        pthread_join(readers[i], NULL);
        ck_assert_uint_gt(found[i], 0);
    }
    ck_assert_uint_eq(weights_totals(weights).weights, 3);
    ck_assert_int_eq(atomic_load(&engine.live), 3);
}
END_TEST

static Suite *suite(void)
{
    Suite *suite = suite_create("weights");
    TCase *tcase = tcase_create("names");
    tcase_add_loop_test(tcase, test_canonical_name, 0, ARRAY_LEN(names));
    suite_add_tcase(suite, tcase);

    tcase = tcase_create("registry");
    tcase_set_timeout(tcase, 120);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_test(tcase, test_get_by_any_spelling);
    tcase_add_test(tcase, test_load_file);
    tcase_add_test(tcase, test_load_by_index);
    tcase_add_test(tcase, test_load_folder_without_index);
    tcase_add_test(tcase, test_links_inside_the_roots);
    tcase_add_loop_test(tcase, test_format, 0, ARRAY_LEN(formats));
    tcase_add_test(tcase, test_tensor_parallel_slices);
    tcase_add_test(tcase, test_patterns_and_prefix);
    tcase_add_loop_test(tcase, test_path, 0, ARRAY_LEN(paths));
    tcase_add_test(tcase, test_path_too_long);
    tcase_add_test(tcase, test_roots);
    tcase_add_loop_test(tcase, test_index, 0, ARRAY_LEN(indexes));
    tcase_add_loop_test(tcase, test_refusal, 0, ARRAY_LEN(refusals));
    tcase_add_test(tcase, test_long_names_and_many_patterns);
    tcase_add_test(tcase, test_tensor_in_two_files);
    tcase_add_loop_test(tcase, test_engine_fails, 0, 12);
    tcase_add_test(tcase, test_file_shrinks_while_loading);
    tcase_add_test(tcase, test_progress);
    tcase_add_loop_test(tcase, test_give_up, 1, 4);
    tcase_add_test(tcase, test_replace_and_unload);
    tcase_add_test(tcase, test_unload_name_with_brackets);
    tcase_add_test(tcase, test_replaced_load_fails);
    tcase_add_test(tcase, test_change_swaps_all_at_once);
    tcase_add_test(tcase, test_change_fails_whole);
    tcase_add_test(tcase, test_readers_beside_changes);
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
