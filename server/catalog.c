#include "catalog.h"

#include <dirent.h>
#include <errno.h>
#include <fnmatch.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json_limited.h"

#define INDEX_NAME "model.safetensors.index.json"
#define WEIGHT_SUFFIX ".weight"

enum {
    INDEX_BYTES_MAX = 100 << 20,
    TENSOR_NAME_BYTES = 512, // longer ones cannot become weights
    PATTERN_BYTES_MAX = 256,
    OUTPUT_DIM_DEFAULT = 1024,
    SHAPE_TEXT_BYTES = 192,
};

struct catalog_file {
    char *name;  // in its folder
    char *label; // below its root
    struct safetensors *safetensors;
};

struct place { // where a tensor is; borrows both names
    const char *tensor;
    const char *file;
};

struct catalog_contents {
    const struct roots *roots;
    char folder[ROOTS_PATH_BYTES]; // resolved
    struct catalog_file files[CATALOG_FILES_MAX];
    size_t files_n;
    json_t *index;        // owns the names in places; NULL if the files' headers do
    struct place *places; // in order of tensor
    size_t places_n;
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

// ---- files of the folder

static enum status check_file_name(const char *name, struct error *err)
{
    if (name[0] == '\0' || strchr(name, '/') || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         INDEX_NAME ": '%.256s' is not a plain file name", name);
    return STATUS_OK;
}

// Opens a file of the folder. Errors show `label`, never where the roots are.
static enum status folder_open(const struct catalog_contents *contents, const char *name,
                               const char *label, int *fd, struct error *err)
{
    char path[ROOTS_PATH_BYTES], resolved[ROOTS_PATH_BYTES];
    int length = snprintf(path, sizeof path, "%s/%s", contents->folder, name);
    if (length < 0 || (size_t)length >= sizeof path)
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: path too long", label);
    enum status status = roots_resolve(contents->roots, path, resolved, NULL);
    if (status == STATUS_OK)
        return roots_open(contents->roots, resolved, fd, err);
    if (status == STATUS_NOT_FOUND)
        return error_set(err, status, "%s: no such file", label);
    if (status == STATUS_PERMISSION_DENIED)
        return error_field(err, status, "path", "'%s' is outside the configured roots", label);
    return error_set(err, status, "%s: cannot be resolved", label);
}

static char *label_make(const struct catalog_contents *contents, const char *name)
{
    const char *below = roots_below(contents->roots, contents->folder);
    char *label;
    if (asprintf(&label, "%s%s%s", below, below[0] ? "/" : "", name) < 0)
        return NULL;
    return label;
}

// Finds an open file, or opens it.
static enum status file_get(struct catalog_contents *contents, const char *name,
                            struct catalog_file **file_out, struct error *err)
{
    for (size_t i = 0; i < contents->files_n; i++) {
        *file_out = &contents->files[i];
        if (strcmp((*file_out)->name, name) == 0)
            return STATUS_OK;
    }
    if (contents->files_n == CATALOG_FILES_MAX)
        return error_set(err, STATUS_FAILED_PRECONDITION, "more than %d safetensors files",
                         CATALOG_FILES_MAX);
    struct catalog_file *file = &contents->files[contents->files_n];
    *file = (struct catalog_file){.name = strdup(name), .label = label_make(contents, name)};
    enum status status;
    if (!file->name || !file->label) {
        status = out_of_memory(err);
        goto free_file;
    }
    int fd = -1;
    status = folder_open(contents, name, file->label, &fd, err);
    if (status == STATUS_NOT_FOUND)
        status = error_set(err, STATUS_FAILED_PRECONDITION, "%s: no such file", file->label);
    if (status != STATUS_OK)
        goto free_file;
    status = safetensors_open(fd, file->label, &file->safetensors, err);
    if (status != STATUS_OK)
        goto free_file;
    contents->files_n++;
    *file_out = file;
    return STATUS_OK;

free_file:
    free(file->label);
    free(file->name);
    return status;
}

// ---- which tensor is in which file

static enum status places_reserve(struct catalog_contents *contents, size_t more, struct error *err)
{
    size_t wanted = contents->places_n + more;
    if (wanted > SAFETENSORS_TENSORS_MAX)
        return error_set(err, STATUS_FAILED_PRECONDITION, "more than %d tensors",
                         SAFETENSORS_TENSORS_MAX);
    struct place *places = realloc(contents->places, (wanted + 1) * sizeof *places);
    if (!places)
        return out_of_memory(err);
    contents->places = places;
    return STATUS_OK;
}

static enum status read_text(int fd, const char *label, char **text, size_t *bytes,
                             struct error *err)
{
    struct stat stat;
    if (fstat(fd, &stat) != 0 || !S_ISREG(stat.st_mode) || stat.st_size > INDEX_BYTES_MAX)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: not a regular file of at most %d bytes", label, INDEX_BYTES_MAX);
    *text = malloc((size_t)stat.st_size + 1);
    if (!*text)
        return out_of_memory(err);
    *bytes = 0;
    ssize_t got;
    do {
        got = read(fd, *text + *bytes, (size_t)stat.st_size - *bytes);
        if (got > 0)
            *bytes += (size_t)got;
    } while (got > 0 || (got < 0 && errno == EINTR));
    if (got == 0)
        return STATUS_OK;
    enum status status = error_set(err, STATUS_DATA_LOSS, "%s: %s", label, strerrordesc_np(errno));
    free(*text);
    return status;
}

static enum status parse_index(struct catalog_contents *contents, const char *text, size_t bytes,
                               const char *label, struct error *err)
{
    static const struct json_limits limits = {
        .depth_max = 8, // for what others keep under "metadata"
        .values_max = 4 * SAFETENSORS_TENSORS_MAX,
        .array_values_max = SAFETENSORS_TENSORS_MAX,
    };
    enum status status = json_load_limited(text, bytes, &limits, label, &contents->index, err);
    if (status != STATUS_OK)
        return status;
    json_t *map = json_object_get(contents->index, "weight_map");
    if (!json_is_object(map))
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: no weight_map, or not an object",
                         label);
    status = places_reserve(contents, json_object_size(map), err);
    if (status != STATUS_OK)
        return status;
    const char *tensor;
    json_t *file;
    json_object_foreach(map, tensor, file)
    {
        if (!json_is_string(file))
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "%s: weight_map: the file of '%.128s' is not a string", label, tensor);
        contents->places[contents->places_n++] =
            (struct place){.tensor = tensor, .file = json_string_value(file)};
    }
    return STATUS_OK;
}

// NOT_FOUND: there is no index.
static enum status gather_from_index(struct catalog_contents *contents, struct error *err)
{
    int fd;
    enum status status = folder_open(contents, INDEX_NAME, INDEX_NAME, &fd, err);
    if (status != STATUS_OK)
        return status;
    char *text = NULL;
    size_t bytes = 0;
    status = read_text(fd, INDEX_NAME, &text, &bytes, err);
    close(fd);
    if (status != STATUS_OK)
        return status;
    status = parse_index(contents, text, bytes, INDEX_NAME, err);
    free(text);
    return status;
}

static enum status gather_from_file(struct catalog_contents *contents, const char *name,
                                    struct error *err)
{
    struct catalog_file *file;
    enum status status = file_get(contents, name, &file, err);
    if (status != STATUS_OK)
        return status;
    size_t tensors_n = safetensors_count(file->safetensors);
    status = places_reserve(contents, tensors_n, err);
    if (status != STATUS_OK)
        return status;
    for (size_t i = 0; i < tensors_n; i++)
        contents->places[contents->places_n++] = (struct place){
            .tensor = safetensors_at(file->safetensors, i)->name, .file = file->name};
    return STATUS_OK;
}

static int is_safetensors_name(const struct dirent *entry)
{
    static const char suffix[] = ".safetensors";
    size_t length = strlen(entry->d_name), suffix_length = sizeof suffix - 1;
    return entry->d_name[0] != '.' && length > suffix_length &&
           strcmp(entry->d_name + length - suffix_length, suffix) == 0;
}

static enum status gather_from_all_files(struct catalog_contents *contents, const char *path,
                                         struct error *err)
{
    struct dirent **names;
    int names_n = scandir(contents->folder, &names, is_safetensors_name, alphasort);
    if (names_n < 0)
        return error_field(err,
                           errno == EACCES ? STATUS_PERMISSION_DENIED : STATUS_FAILED_PRECONDITION,
                           "path", "'%.256s': %s", path, strerrordesc_np(errno));
    enum status status = STATUS_OK;
    if (names_n == 0)
        status = error_field(err, STATUS_NOT_FOUND, "path",
                             "'%.256s' holds neither " INDEX_NAME " nor any *.safetensors", path);
    for (int i = 0; i < names_n && status == STATUS_OK; i++)
        status = gather_from_file(contents, names[i]->d_name, err);
    for (int i = 0; i < names_n; i++)
        free(names[i]);
    free(names);
    return status;
}

static int compare_places(const void *left, const void *right)
{
    const struct place *a = left, *b = right;
    int order = strcmp(a->tensor, b->tensor);
    return order ? order : strcmp(a->file, b->file);
}

// Fills in folder, files and places from the path of the request.
static enum status gather(struct catalog_contents *contents, const char *path, struct error *err)
{
    enum status status = roots_resolve(contents->roots, path, contents->folder, err);
    if (status != STATUS_OK)
        return status;
    struct stat stat_now;
    if (stat(contents->folder, &stat_now) != 0)
        return error_field(err, STATUS_NOT_FOUND, "path", "'%.256s': %s", path,
                           strerrordesc_np(errno));
    if (S_ISDIR(stat_now.st_mode)) {
        status = gather_from_index(contents, err);
        if (status == STATUS_NOT_FOUND)
            status = gather_from_all_files(contents, path, err);
    } else {
        char *slash = strrchr(contents->folder, '/');
        char name[NAME_MAX + 1];
        snprintf(name, sizeof name, "%s", slash + 1);
        slash[slash == contents->folder ? 1 : 0] = '\0'; // a file of "/" keeps that slash
        status = gather_from_file(contents, name, err);
    }
    if (status == STATUS_OK && contents->places_n > 0)
        qsort(contents->places, contents->places_n, sizeof *contents->places, compare_places);
    return status;
}

// The first place of that name; NULL if none. More may follow it.
static const struct place *find_place(const struct catalog_contents *contents, const char *tensor)
{
    size_t begin = 0, end = contents->places_n;
    while (begin < end) {
        size_t middle = begin + (end - begin) / 2;
        if (strcmp(contents->places[middle].tensor, tensor) < 0)
            begin = middle + 1;
        else
            end = middle;
    }
    bool found = begin < contents->places_n && strcmp(contents->places[begin].tensor, tensor) == 0;
    return found ? &contents->places[begin] : NULL;
}

// Opens the file that holds the tensor of `place` and points `slice` at all of it.
static enum status slice_whole(struct catalog_contents *contents, const struct place *place,
                               struct catalog_slice *slice, struct catalog_file **file,
                               struct error *err)
{
    const struct place *next = place + 1;
    if (next < contents->places + contents->places_n && strcmp(next->tensor, place->tensor) == 0)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "tensor '%.128s' is in both '%.128s' and '%.128s'", place->tensor,
                         place->file, next->file);
    enum status status = check_file_name(place->file, err);
    if (status != STATUS_OK)
        return status;
    status = file_get(contents, place->file, file, err);
    if (status != STATUS_OK)
        return status;
    const struct safetensors_tensor *tensor = safetensors_find((*file)->safetensors, place->tensor);
    if (!tensor)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         INDEX_NAME " puts tensor '%.128s' in '%.128s', which does not hold it",
                         place->tensor, (*file)->label);
    *slice = (struct catalog_slice){
        .file = (*file)->safetensors, .tensor = tensor, .bytes = tensor->bytes};
    return STATUS_OK;
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
static enum status find_scales(struct catalog_contents *contents, const char *weight,
                               struct catalog_slice *scales, struct error *err)
{
    static const char *const suffixes[] = {".scale", ".weight_scale_inv", ".weight_scale"};
    const struct place *found = NULL;
    size_t stem_length = strlen(weight) - strlen(WEIGHT_SUFFIX);
    for (size_t i = 0; i < ARRAY_LEN(suffixes); i++) {
        char name[TENSOR_NAME_BYTES + 32];
        snprintf(name, sizeof name, "%.*s%s", (int)stem_length, weight, suffixes[i]);
        const struct place *place = find_place(contents, name);
        if (place && found)
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "weight '%.128s' has two scales: '%.128s' and '%.128s'", weight,
                             found->tensor, place->tensor);
        if (place)
            found = place;
    }
    if (!found)
        return STATUS_OK;
    struct catalog_file *file;
    return slice_whole(contents, found, scales, &file, err);
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

static enum status make_entry(struct catalog_contents *contents, const struct query *query,
                              const struct place *place, struct catalog_entry *entry,
                              struct error *err)
{
    *entry = (struct catalog_entry){0};
    enum status status = name_entry(query, place->tensor, entry, err);
    if (status != STATUS_OK)
        return status;
    struct catalog_file *file;
    status = slice_whole(contents, place, &entry->weight, &file, err);
    if (status != STATUS_OK)
        return status;
    snprintf(entry->source, sizeof entry->source, "%s", file->label);
    status = find_scales(contents, place->tensor, &entry->scales, err);
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
    enum status status = make_entry(catalog->contents, query, place, &catalog->entries[count], err);
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
    const struct catalog_contents *contents = catalog->contents;
    for (size_t i = 0; i < contents->places_n; i++) {
        const struct place *place = &contents->places[i];
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
    catalog->contents = calloc(1, sizeof *catalog->contents);
    if (!catalog->contents)
        return out_of_memory(err);
    catalog->contents->roots = roots;
    status = gather(catalog->contents, load->path, err);
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
    struct catalog_contents *contents = catalog->contents;
    if (contents) {
        for (size_t i = 0; i < contents->files_n; i++) {
            safetensors_close(contents->files[i].safetensors);
            free(contents->files[i].label);
            free(contents->files[i].name);
        }
        json_decref(contents->index);
        free(contents->places);
        free(contents);
    }
    free(catalog->entries);
    *catalog = (struct catalog){0};
}
