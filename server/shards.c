#include "shards.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json_limited.h"

enum { INDEX_BYTES_MAX = 100 << 20 };

struct shard {
    char *name;  // in its folder
    char *label; // below its root
    struct safetensors *safetensors;
};

struct shards {
    const struct roots *roots;     // borrowed
    char folder[ROOTS_PATH_BYTES]; // resolved
    struct shard files[SHARDS_MAX];
    size_t files_n;
    json_t *index;        // owns the names in places; NULL if the files' headers do
    struct place *places; // in order of tensor
    size_t places_n;
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
                         SHARDS_INDEX_NAME ": '%.256s' is not a plain file name", name);
    return STATUS_OK;
}

// Opens a file of the folder. Errors show `label`, never where the roots are.
static enum status folder_open(const struct shards *shards, const char *name, const char *label,
                               int *fd, struct error *err)
{
    char path[ROOTS_PATH_BYTES], resolved[ROOTS_PATH_BYTES];
    int length = snprintf(path, sizeof path, "%s/%s", shards->folder, name);
    if (length < 0 || (size_t)length >= sizeof path)
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: path too long", label);
    enum status status = roots_resolve(shards->roots, path, resolved, NULL);
    if (status == STATUS_OK)
        return roots_open(shards->roots, resolved, fd, err);
    if (status == STATUS_NOT_FOUND)
        return error_set(err, status, "%s: no such file", label);
    if (status == STATUS_PERMISSION_DENIED)
        return error_field(err, status, "path", "'%s' is outside the configured roots", label);
    return error_set(err, status, "%s: cannot be resolved", label);
}

static char *label_make(const struct shards *shards, const char *name)
{
    const char *below = roots_below(shards->roots, shards->folder);
    char *label;
    if (asprintf(&label, "%s%s%s", below, below[0] ? "/" : "", name) < 0)
        return NULL;
    return label;
}

static void shard_deinit(struct shard *shard)
{
    safetensors_close(shard->safetensors);
    free(shard->label);
    free(shard->name);
}

static enum status shard_init(const struct shards *shards, const char *name, struct shard *shard,
                              struct error *err)
{
    *shard = (struct shard){.name = strdup(name), .label = label_make(shards, name)};
    enum status status;
    if (!shard->name || !shard->label) {
        status = out_of_memory(err);
        goto deinit;
    }
    int fd = -1;
    status = folder_open(shards, name, shard->label, &fd, err);
    if (status == STATUS_NOT_FOUND)
        status = error_set(err, STATUS_FAILED_PRECONDITION, "%s: no such file", shard->label);
    if (status != STATUS_OK)
        goto deinit;
    status = safetensors_open(fd, shard->label, &shard->safetensors, err);
    if (status != STATUS_OK)
        goto deinit;
    return STATUS_OK;

deinit:
    shard_deinit(shard);
    return status;
}

// Finds an open file, or opens it.
static enum status shard_get(struct shards *shards, const char *name, struct shard **found,
                             struct error *err)
{
    for (size_t i = 0; i < shards->files_n; i++) {
        *found = &shards->files[i];
        if (strcmp((*found)->name, name) == 0)
            return STATUS_OK;
    }
    if (shards->files_n == SHARDS_MAX)
        return error_set(err, STATUS_FAILED_PRECONDITION, "more than %d safetensors files",
                         SHARDS_MAX);
    struct shard shard;
    enum status status = shard_init(shards, name, &shard, err);
    if (status != STATUS_OK)
        return status;
    *found = &shards->files[shards->files_n++];
    **found = shard;
    return STATUS_OK;
}

// ---- which tensor is in which file

static enum status places_reserve(struct shards *shards, size_t more, struct error *err)
{
    size_t wanted = shards->places_n + more;
    if (wanted > SAFETENSORS_TENSORS_MAX)
        return error_set(err, STATUS_FAILED_PRECONDITION, "more than %d tensors",
                         SAFETENSORS_TENSORS_MAX);
    struct place *places = realloc(shards->places, (wanted + 1) * sizeof *places);
    if (!places)
        return out_of_memory(err);
    shards->places = places;
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

static enum status parse_index(struct shards *shards, const char *text, size_t bytes,
                               const char *label, struct error *err)
{
    static const struct json_limits limits = {
        .depth_max = 8, // for what others keep under "metadata"
        .values_max = 4 * SAFETENSORS_TENSORS_MAX,
        .array_values_max = SAFETENSORS_TENSORS_MAX,
    };
    enum status status = json_load_limited(text, bytes, &limits, label, &shards->index, err);
    if (status != STATUS_OK)
        return status;
    json_t *map = json_object_get(shards->index, "weight_map");
    if (!json_is_object(map))
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: no weight_map, or not an object",
                         label);
    status = places_reserve(shards, json_object_size(map), err);
    if (status != STATUS_OK)
        return status;
    const char *tensor;
    json_t *file;
    json_object_foreach(map, tensor, file)
    {
        if (!json_is_string(file))
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "%s: weight_map: the file of '%.128s' is not a string", label, tensor);
        shards->places[shards->places_n++] =
            (struct place){.tensor = tensor, .file = json_string_value(file)};
    }
    return STATUS_OK;
}

// NOT_FOUND: there is no index.
static enum status gather_from_index(struct shards *shards, struct error *err)
{
    int fd;
    enum status status = folder_open(shards, SHARDS_INDEX_NAME, SHARDS_INDEX_NAME, &fd, err);
    if (status != STATUS_OK)
        return status;
    char *text = NULL;
    size_t bytes = 0;
    status = read_text(fd, SHARDS_INDEX_NAME, &text, &bytes, err);
    close(fd);
    if (status != STATUS_OK)
        return status;
    status = parse_index(shards, text, bytes, SHARDS_INDEX_NAME, err);
    free(text);
    return status;
}

static enum status gather_from_file(struct shards *shards, const char *name, struct error *err)
{
    struct shard *shard;
    enum status status = shard_get(shards, name, &shard, err);
    if (status != STATUS_OK)
        return status;
    size_t tensors_n = safetensors_count(shard->safetensors);
    status = places_reserve(shards, tensors_n, err);
    if (status != STATUS_OK)
        return status;
    for (size_t i = 0; i < tensors_n; i++)
        shards->places[shards->places_n++] = (struct place){
            .tensor = safetensors_at(shard->safetensors, i)->name, .file = shard->name};
    return STATUS_OK;
}

static int is_safetensors_name(const struct dirent *entry)
{
    static const char suffix[] = ".safetensors";
    size_t length = strlen(entry->d_name), suffix_length = sizeof suffix - 1;
    return entry->d_name[0] != '.' && length > suffix_length &&
           strcmp(entry->d_name + length - suffix_length, suffix) == 0;
}

static enum status gather_from_all_files(struct shards *shards, const char *path, struct error *err)
{
    struct dirent **names;
    int names_n = scandir(shards->folder, &names, is_safetensors_name, alphasort);
    if (names_n < 0)
        return error_field(err,
                           errno == EACCES ? STATUS_PERMISSION_DENIED : STATUS_FAILED_PRECONDITION,
                           "path", "'%.256s': %s", path, strerrordesc_np(errno));
    enum status status = STATUS_OK;
    if (names_n == 0)
        status =
            error_field(err, STATUS_NOT_FOUND, "path",
                        "'%.256s' holds neither " SHARDS_INDEX_NAME " nor any *.safetensors", path);
    for (int i = 0; i < names_n && status == STATUS_OK; i++)
        status = gather_from_file(shards, names[i]->d_name, err);
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
static enum status gather(struct shards *shards, const char *path, struct error *err)
{
    enum status status = roots_resolve(shards->roots, path, shards->folder, err);
    if (status != STATUS_OK)
        return status;
    struct stat stat_now;
    if (stat(shards->folder, &stat_now) != 0)
        return error_field(err, STATUS_NOT_FOUND, "path", "'%.256s': %s", path,
                           strerrordesc_np(errno));
    if (S_ISDIR(stat_now.st_mode)) {
        status = gather_from_index(shards, err);
        if (status == STATUS_NOT_FOUND)
            status = gather_from_all_files(shards, path, err);
    } else {
        char *slash = strrchr(shards->folder, '/');
        char name[NAME_MAX + 1];
        snprintf(name, sizeof name, "%s", slash + 1);
        slash[slash == shards->folder ? 1 : 0] = '\0'; // a file of "/" keeps that slash
        status = gather_from_file(shards, name, err);
    }
    if (status == STATUS_OK && shards->places_n > 0)
        qsort(shards->places, shards->places_n, sizeof *shards->places, compare_places);
    return status;
}

const struct place *shards_find(const struct shards *shards, const char *tensor)
{
    size_t begin = 0, end = shards->places_n;
    while (begin < end) {
        size_t middle = begin + (end - begin) / 2;
        if (strcmp(shards->places[middle].tensor, tensor) < 0)
            begin = middle + 1;
        else
            end = middle;
    }
    bool found = begin < shards->places_n && strcmp(shards->places[begin].tensor, tensor) == 0;
    return found ? &shards->places[begin] : NULL;
}

enum status shards_slice(struct shards *shards, const struct place *place,
                         struct tensor_slice *slice, struct error *err)
{
    const struct place *next = place + 1;
    if (next < shards->places + shards->places_n && strcmp(next->tensor, place->tensor) == 0)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "tensor '%.128s' is in both '%.128s' and '%.128s'", place->tensor,
                         place->file, next->file);
    enum status status = check_file_name(place->file, err);
    if (status != STATUS_OK)
        return status;
    struct shard *shard;
    status = shard_get(shards, place->file, &shard, err);
    if (status != STATUS_OK)
        return status;
    const struct safetensors_tensor *tensor = safetensors_find(shard->safetensors, place->tensor);
    if (!tensor)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         SHARDS_INDEX_NAME
                         " puts tensor '%.128s' in '%.128s', which does not hold it",
                         place->tensor, shard->label);
    *slice = (struct tensor_slice){.file = shard->safetensors,
                                   .label = shard->label,
                                   .tensor = tensor,
                                   .bytes = tensor->bytes};
    return STATUS_OK;
}

// ---- the whole

enum status shards_create(const struct roots *roots, const char *path, struct shards **shards_out,
                          struct error *err)
{
    struct shards *shards = calloc(1, sizeof *shards);
    if (!shards)
        return out_of_memory(err);
    shards->roots = roots;
    enum status status = gather(shards, path, err);
    if (status == STATUS_OK)
        *shards_out = shards;
    else
        shards_destroy(shards);
    return status;
}

void shards_destroy(struct shards *shards)
{
    if (!shards)
        return;
    for (size_t i = 0; i < shards->files_n; i++)
        shard_deinit(&shards->files[i]);
    json_decref(shards->index);
    free(shards->places);
    free(shards);
}

size_t shards_count(const struct shards *shards)
{
    return shards->places_n;
}

const struct place *shards_at(const struct shards *shards, size_t index)
{
    ASSERT(index < shards->places_n);
    return &shards->places[index];
}
