#include "catalog.h"

#include <fnmatch.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WEIGHT_SUFFIX ".weight"

enum {
    TENSOR_NAME_BYTES = 512, // longer ones cannot become weights
    PATTERN_BYTES_MAX = 256,
    OUTPUT_DIM_DEFAULT = 1024,
    SHAPE_TEXT_BYTES = 192,
};

// What add_entry needs besides the tensor at hand.
struct query {
    const struct weights_load *load;
    uint32_t output_dim;
    uint32_t rank, size; // tensor-parallel
    uint32_t reduced_dim_max;
};

static enum status out_of_memory(struct error *err)
{
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
}

// ---- from tensors to formats

// "F8_E4M3 [8192, 4096]"
static const char *shape_text(const struct safetensors_tensor *tensor, char text[SHAPE_TEXT_BYTES])
{
    int at = snprintf(text, SHAPE_TEXT_BYTES, "%s [", tensor->dtype_name);
    for (uint32_t i = 0; i < tensor->dims_n && at > 0 && at < SHAPE_TEXT_BYTES; i++)
        at += snprintf(text + at, (size_t)(SHAPE_TEXT_BYTES - at), "%s%" PRIu64, i ? ", " : "",
                       tensor->dims[i]);
    if (at > 0 && at < SHAPE_TEXT_BYTES)
        snprintf(text + at, (size_t)(SHAPE_TEXT_BYTES - at), "]");
    return text;
}

static enum status infer_types(const struct safetensors_tensor *weight,
                               const struct safetensors_tensor *scales,
                               struct einsum_weight_format *format, struct error *err)
{
    char text[SHAPE_TEXT_BYTES];
    if (weight->dtype == SAFETENSORS_BF16) {
        if (scales)
            return error_set(
                err, STATUS_FAILED_PRECONDITION,
                "weight '%.128s' is BF16 and must have no scales, but there is '%.128s'",
                weight->name, scales->name);
        format->weight_type = EINSUM_WEIGHT_BF16;
        format->scale_type = EINSUM_SCALE_NONE;
        return STATUS_OK;
    }
    if (weight->dtype != SAFETENSORS_F8_E4M3)
        return error_set(err, STATUS_UNIMPLEMENTED,
                         "weight '%.128s' is %s, expected dtype F8_E4M3 or BF16", weight->name,
                         shape_text(weight, text));
    format->weight_type = EINSUM_WEIGHT_E4M3;
    if (!scales)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "weight '%.128s' is F8_E4M3, but no tensor of its name with .scale, "
                         ".weight_scale_inv or .weight_scale is there",
                         weight->name);
    if (scales->dtype != SAFETENSORS_F8_E8M0 && scales->dtype != SAFETENSORS_F32)
        return error_set(err, STATUS_UNIMPLEMENTED,
                         "scale '%.128s' is %s, expected dtype F8_E8M0 or F32", scales->name,
                         shape_text(scales, text));
    format->scale_type = scales->dtype == SAFETENSORS_F32 ? EINSUM_SCALE_FP32 : EINSUM_SCALE_UE8M0;
    return STATUS_OK;
}

// G (of all ranks), D and R.
static enum status infer_shape(const struct query *query, const struct safetensors_tensor *weight,
                               struct einsum_weight_format *format, uint64_t *groups,
                               struct error *err)
{
    char text[SHAPE_TEXT_BYTES];
    uint64_t output_dim, reduced_dim;
    if (weight->dims_n == 3) {
        *groups = weight->dims[0];
        output_dim = weight->dims[1];
        reduced_dim = weight->dims[2];
    } else if (weight->dims_n == 2 && weight->dims[0] % query->output_dim == 0) {
        *groups = weight->dims[0] / query->output_dim;
        output_dim = query->output_dim;
        reduced_dim = weight->dims[1];
    } else {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "weight '%.128s' is %s, expected [G*D, R] with D = %" PRIu32
                         " (output_dim), or [G, D, R]",
                         weight->name, shape_text(weight, text), query->output_dim);
    }
    if (output_dim == 0 || output_dim > EINSUM_DIM_MAX ||
        output_dim % EINSUM_OUTPUT_DIM_MULTIPLE != 0 || reduced_dim == 0 ||
        reduced_dim > EINSUM_DIM_MAX || reduced_dim % EINSUM_REDUCED_DIM_MULTIPLE != 0)
        return error_set(err, STATUS_UNIMPLEMENTED,
                         "weight '%.128s' is %s: D %" PRIu64 " and R %" PRIu64
                         " must be multiples of %d and %d, both at most %d",
                         weight->name, shape_text(weight, text), output_dim, reduced_dim,
                         EINSUM_OUTPUT_DIM_MULTIPLE, EINSUM_REDUCED_DIM_MULTIPLE, EINSUM_DIM_MAX);
    if (reduced_dim > query->reduced_dim_max)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "weight '%.128s' is %s: R %" PRIu64 " exceeds %" PRIu32
                         ", for which the daemon was started",
                         weight->name, shape_text(weight, text), reduced_dim,
                         query->reduced_dim_max);
    format->output_dim = (uint32_t)output_dim;
    format->reduced_dim = (uint32_t)reduced_dim;
    return STATUS_OK;
}

// Whether scales of this shape are one for each block_d x block_r of every group's [D, R].
static bool scales_fit(const struct safetensors_tensor *scales,
                       const struct einsum_weight_format *format, uint64_t groups, uint32_t block_d,
                       uint32_t block_r)
{
    if (format->output_dim % block_d != 0 || format->reduced_dim % block_r != 0)
        return false;
    uint64_t rows = format->output_dim / block_d, columns = format->reduced_dim / block_r;
    if (scales->dims_n == 2)
        return scales->dims[0] == groups * rows && scales->dims[1] == columns;
    return scales->dims_n == 3 && scales->dims[0] == groups && scales->dims[1] == rows &&
           scales->dims[2] == columns;
}

static enum status infer_blocks(const struct safetensors_tensor *weight,
                                const struct safetensors_tensor *scales, uint64_t groups,
                                struct einsum_weight_format *format, struct error *err)
{
    static const struct {
        uint32_t block_d, block_r;
    } supported[] = {{128, 128}, {32, 32}, {1, 128}, {1, 32}};
    if (!scales) {
        format->block_d = 1;
        format->block_r = 128;
        return STATUS_OK;
    }
    for (size_t i = 0; i < ARRAY_LEN(supported); i++) {
        if (scales_fit(scales, format, groups, supported[i].block_d, supported[i].block_r)) {
            format->block_d = supported[i].block_d;
            format->block_r = supported[i].block_r;
            return STATUS_OK;
        }
    }
    char weight_text[SHAPE_TEXT_BYTES], scales_text[SHAPE_TEXT_BYTES];
    return error_set(err, STATUS_UNIMPLEMENTED,
                     "scale '%.96s' is %s for a weight %s with D = %" PRIu32
                     ": expected one scale for each 128x128, 32x32, 1x128 or 1x32 of [D, R]",
                     scales->name, shape_text(scales, scales_text), shape_text(weight, weight_text),
                     format->output_dim);
}

// Cuts weight and scales down to this rank's groups.
static enum status cut_groups(const struct query *query, uint64_t groups,
                              struct catalog_entry *entry, struct error *err)
{
    const char *name = entry->weight.tensor->name;
    if (groups == 0 || groups % query->size != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tensor_parallel_size",
                           "%" PRIu32 " does not divide the %" PRIu64 " groups of '%.128s'",
                           query->size, groups, name);
    uint64_t groups_here = groups / query->size;
    if (groups_here > EINSUM_GROUPS_MAX)
        return error_set(err, STATUS_UNIMPLEMENTED,
                         "weight '%.128s': %" PRIu64 " groups, expected at most %d", name,
                         groups_here, EINSUM_GROUPS_MAX);
    entry->format.groups = (uint32_t)groups_here;
    entry->weight.bytes /= query->size;
    entry->weight.offset = query->rank * entry->weight.bytes;
    entry->scales.bytes /= query->size;
    entry->scales.offset = query->rank * entry->scales.bytes;
    return STATUS_OK;
}

// ---- entries

// Finds the one tensor that holds a weight's scales; leaves `scales` empty if there is none.
static enum status find_scales(struct shards *shards, const char *weight,
                               struct tensor_slice *scales, struct error *err)
{
    static const char *const suffixes[] = {".scale", ".weight_scale_inv", ".weight_scale"};
    const struct place *found = NULL;
    size_t stem_length = strlen(weight) - strlen(WEIGHT_SUFFIX);
    for (size_t i = 0; i < ARRAY_LEN(suffixes); i++) {
        char name[TENSOR_NAME_BYTES + 32];
        snprintf(name, sizeof name, "%.*s%s", (int)stem_length, weight, suffixes[i]);
        const struct place *place = shards_find(shards, name);
        if (place && found)
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "weight '%.128s' has two scales: '%.128s' and '%.128s'", weight,
                             found->tensor, place->tensor);
        if (place)
            found = place;
    }
    if (!found)
        return STATUS_OK;
    return shards_slice(shards, found, scales, err);
}

static enum status name_entry(const struct query *query, const char *tensor,
                              struct catalog_entry *entry, struct error *err)
{
    const char *prefix = query->load->name_prefix ? query->load->name_prefix : "";
    char name[WEIGHT_NAME_BYTES + TENSOR_NAME_BYTES];
    size_t length;
    const char *stem = weight_name_canonical(tensor, strlen(tensor), &length);
    int used =
        snprintf(name, sizeof name, "%.*s%.*s", WEIGHT_NAME_BYTES, prefix, (int)length, stem);
    // The prefix may itself be a "model.", which any spelling may leave out.
    stem = weight_name_canonical(name, used < 0 ? 0 : (size_t)used, &length);
    if (length >= sizeof entry->name)
        return error_set(
            err, STATUS_FAILED_PRECONDITION,
            "weight '%.128s': a name of %zu bytes with its prefix, expected at most %zu", tensor,
            length, sizeof entry->name - 1);
    for (size_t i = 0; i < length; i++)
        if (stem[i] <= ' ' || stem[i] > '~')
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "weight '%.128s': byte 0x%02x in its name, expected printable ASCII",
                             tensor, (unsigned char)stem[i]);
    memcpy(entry->name, stem, length);
    return STATUS_OK;
}

static enum status make_entry(struct shards *shards, const struct query *query,
                              const struct place *place, struct catalog_entry *entry,
                              struct error *err)
{
    *entry = (struct catalog_entry){0};
    enum status status = name_entry(query, place->tensor, entry, err);
    if (status != STATUS_OK)
        return status;
    status = shards_slice(shards, place, &entry->weight, err);
    if (status != STATUS_OK)
        return status;
    snprintf(entry->source, sizeof entry->source, "%s", entry->weight.label);
    status = find_scales(shards, place->tensor, &entry->scales, err);
    if (status != STATUS_OK)
        return status;

    const struct safetensors_tensor *weight = entry->weight.tensor, *scales = entry->scales.tensor;
    uint64_t groups = 0;
    status = infer_types(weight, scales, &entry->format, err);
    if (status != STATUS_OK)
        return status;
    status = infer_shape(query, weight, &entry->format, &groups, err);
    if (status != STATUS_OK)
        return status;
    status = infer_blocks(weight, scales, groups, &entry->format, err);
    if (status != STATUS_OK)
        return status;
    return cut_groups(query, groups, entry, err);
}

static bool is_weight_name(const char *tensor)
{
    size_t length = strlen(tensor), suffix_length = strlen(WEIGHT_SUFFIX);
    return length > suffix_length && length < TENSOR_NAME_BYTES &&
           strcmp(tensor + length - suffix_length, WEIGHT_SUFFIX) == 0;
}

// Marks in `hits` the patterns that match. Returns whether any does.
static bool match(const char *const *patterns, size_t patterns_n, const char *tensor, bool *hits)
{
    bool any = false;
    for (size_t i = 0; i < patterns_n; i++) {
        if (fnmatch(patterns[i], tensor, 0) == 0) {
            hits[i] = true;
            any = true;
        }
    }
    return any;
}

static enum status append_entry(struct catalog *catalog, const struct query *query,
                                const struct place *place, struct error *err)
{
    if (catalog->entries_n == CATALOG_ENTRIES_MAX)
        return error_field(err, STATUS_RESOURCE_EXHAUSTED, "tensors", "more than %d weights match",
                           CATALOG_ENTRIES_MAX);
    uint32_t count = catalog->entries_n;
    if ((count & (count - 1)) == 0) { // full at each power of two
        struct catalog_entry *entries =
            realloc(catalog->entries, (count ? 2 * (size_t)count : 1) * sizeof *entries);
        if (!entries)
            return out_of_memory(err);
        catalog->entries = entries;
    }
    enum status status = make_entry(catalog->shards, query, place, &catalog->entries[count], err);
    if (status == STATUS_OK)
        catalog->entries_n++;
    return status;
}

static enum status select_entries(struct catalog *catalog, const struct query *query,
                                  struct error *err)
{
    static const char *const everything[] = {"*.attn.wo_a" WEIGHT_SUFFIX};
    const char *const *patterns = query->load->tensors_n ? query->load->tensors : everything;
    size_t patterns_n = query->load->tensors_n ? query->load->tensors_n : ARRAY_LEN(everything);
    bool hits[CATALOG_PATTERNS_MAX] = {false};
    const struct shards *shards = catalog->shards;
    for (size_t i = 0; i < shards_count(shards); i++) {
        const struct place *place = shards_at(shards, i);
        if (!is_weight_name(place->tensor) || !match(patterns, patterns_n, place->tensor, hits))
            continue;
        enum status status = append_entry(catalog, query, place, err);
        if (status != STATUS_OK)
            return status;
    }
    for (size_t i = 0; i < patterns_n; i++)
        if (!hits[i])
            return error_field(err, STATUS_NOT_FOUND, "tensors",
                               "no tensor whose name ends in " WEIGHT_SUFFIX " matches '%s'",
                               patterns[i]);
    return STATUS_OK;
}

static int compare_entries(const void *left, const void *right)
{
    const struct catalog_entry *a = left, *b = right;
    return strcmp(a->name, b->name);
}

static enum status sort_entries(struct catalog *catalog, struct error *err)
{
    qsort(catalog->entries, catalog->entries_n, sizeof *catalog->entries, compare_entries);
    for (uint32_t i = 1; i < catalog->entries_n; i++) {
        const struct catalog_entry *a = &catalog->entries[i - 1], *b = &catalog->entries[i];
        if (strcmp(a->name, b->name) == 0)
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "tensors '%.128s' and '%.128s' would both be named '%.128s'",
                             a->weight.tensor->name, b->weight.tensor->name, a->name);
    }
    return STATUS_OK;
}

// ---- the whole

static enum status check_request(const struct weights_load *load, struct query *query,
                                 struct error *err)
{
    query->load = load;
    query->output_dim = load->output_dim ? load->output_dim : OUTPUT_DIM_DEFAULT;
    query->rank = load->tensor_parallel_rank;
    query->size = load->tensor_parallel_size ? load->tensor_parallel_size : 1;
    if (query->rank >= query->size)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tensor_parallel_rank",
                           "%" PRIu32 ", expected less than tensor_parallel_size, %" PRIu32,
                           query->rank, query->size);
    if (load->tensors_n > CATALOG_PATTERNS_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tensors",
                           "%zu patterns, expected at most %d", load->tensors_n,
                           CATALOG_PATTERNS_MAX);
    for (size_t i = 0; i < load->tensors_n; i++)
        if (strlen(load->tensors[i]) > PATTERN_BYTES_MAX)
            return error_field(err, STATUS_INVALID_ARGUMENT, "tensors",
                               "a pattern of %zu bytes, expected at most %d",
                               strlen(load->tensors[i]), PATTERN_BYTES_MAX);
    if (load->name_prefix && strlen(load->name_prefix) >= WEIGHT_NAME_BYTES)
        return error_field(err, STATUS_INVALID_ARGUMENT, "name_prefix",
                           "%zu bytes, expected at most %d", strlen(load->name_prefix),
                           WEIGHT_NAME_BYTES - 1);
    return STATUS_OK;
}

enum status catalog_init(struct catalog *catalog, const struct roots *roots,
                         uint32_t reduced_dim_max, const struct weights_load *load,
                         struct error *err)
{
    *catalog = (struct catalog){0};
    struct query query = {.reduced_dim_max = reduced_dim_max};
    enum status status = check_request(load, &query, err);
    if (status != STATUS_OK)
        return status;
    status = shards_create(roots, load->path, &catalog->shards, err);
    if (status == STATUS_OK)
        status = select_entries(catalog, &query, err);
    if (status == STATUS_OK)
        status = sort_entries(catalog, err);
    if (status != STATUS_OK)
        catalog_deinit(catalog);
    return status;
}

void catalog_deinit(struct catalog *catalog)
{
    shards_destroy(catalog->shards);
    free(catalog->entries);
    *catalog = (struct catalog){0};
}
