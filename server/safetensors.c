// Reading one safetensors file.
//
//     | 8 bytes: N | N bytes of JSON | tensors, end to end, in any order |
//                                    ^ data_begin; the JSON's offsets count from here
//
// The header is read and checked whole at open; tensors are copied out of the map on demand. A
// struct safetensors never changes after open, so any thread may read. The process's SIGBUS handler
// is ours from the first open on; faults that are not ours go to the handler that was there before.
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json_limited.h"

enum {
    LENGTH_BYTES = 8,
    // Far more than any checkpoint's: a tensor of two dimensions counts eight.
    HEADER_VALUES_MAX = 16 << 20,
    READ_CHUNK_BYTES = 4 << 20,   // the disk fetches one chunk while another is copied
    PREFETCH_BYTES_MIN = 1 << 17, // smaller reads are left to the kernel's own read-ahead
};

struct safetensors {
    char *label;
    int fd;             // -1 if only a header was parsed
    const uint8_t *map; // the whole file; NULL if only a header was parsed
    uint64_t file_bytes;
    struct safetensors_tensor *tensors; // in the order of the header
    uint32_t *by_name;                  // indices into tensors, in order of name
    size_t tensors_n;
    json_t *header; // owns the names
};

struct dtype {
    const char *name;
    uint32_t bits;
    enum safetensors_dtype dtype;
};

static const struct dtype dtypes[] = {
    {"F8_E4M3", 8, SAFETENSORS_F8_E4M3},   {"F8_E8M0", 8, SAFETENSORS_F8_E8M0},
    {"BF16", 16, SAFETENSORS_BF16},        {"F32", 32, SAFETENSORS_F32},
    {"BOOL", 8, SAFETENSORS_OTHER},        {"F4", 4, SAFETENSORS_OTHER},
    {"F6_E2M3", 6, SAFETENSORS_OTHER},     {"F6_E3M2", 6, SAFETENSORS_OTHER},
    {"U8", 8, SAFETENSORS_OTHER},          {"I8", 8, SAFETENSORS_OTHER},
    {"F8_E5M2", 8, SAFETENSORS_OTHER},     {"F8_E4M3FNUZ", 8, SAFETENSORS_OTHER},
    {"F8_E5M2FNUZ", 8, SAFETENSORS_OTHER}, {"I16", 16, SAFETENSORS_OTHER},
    {"U16", 16, SAFETENSORS_OTHER},        {"F16", 16, SAFETENSORS_OTHER},
    {"I32", 32, SAFETENSORS_OTHER},        {"U32", 32, SAFETENSORS_OTHER},
    {"C64", 64, SAFETENSORS_OTHER},        {"F64", 64, SAFETENSORS_OTHER},
    {"I64", 64, SAFETENSORS_OTHER},        {"U64", 64, SAFETENSORS_OTHER},
};

PRINTF_LIKE(4, 5)
static enum status refuse_tensor(const struct safetensors *file, const char *name,
                                 struct error *err, const char *format, ...)
{
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return error_set(err, STATUS_FAILED_PRECONDITION, "%s: tensor '%.128s': %s", file->label, name,
                     text);
}

// ---- the header

static enum status parse_dtype(const struct safetensors *file, const char *name, json_t *value,
                               struct safetensors_tensor *tensor, uint32_t *bits, struct error *err)
{
    const char *text = json_string_value(value);
    if (!text)
        return refuse_tensor(file, name, err, "no dtype, or one that is not a string");
    for (size_t i = 0; i < ARRAY_LEN(dtypes); i++) {
        if (strcmp(dtypes[i].name, text) != 0)
            continue;
        tensor->dtype = dtypes[i].dtype;
        snprintf(tensor->dtype_name, sizeof tensor->dtype_name, "%s", dtypes[i].name);
        *bits = dtypes[i].bits;
        return STATUS_OK;
    }
    return refuse_tensor(file, name, err, "unknown dtype '%.32s'", text);
}

// Fills in dims; `elements` gets their product.
static enum status parse_shape(const struct safetensors *file, const char *name, json_t *value,
                               struct safetensors_tensor *tensor, uint64_t *elements,
                               struct error *err)
{
    if (!json_is_array(value))
        return refuse_tensor(file, name, err, "no shape, or one that is not an array");
    size_t dims_n = json_array_size(value);
    if (dims_n > SAFETENSORS_DIMS_MAX)
        return refuse_tensor(file, name, err, "%zu dimensions, expected at most %d", dims_n,
                             SAFETENSORS_DIMS_MAX);
    tensor->dims_n = (uint32_t)dims_n;
    *elements = 1;
    for (size_t i = 0; i < dims_n; i++) {
        json_t *dim = json_array_get(value, i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return refuse_tensor(file, name, err, "dimension %zu is not a count", i);
        tensor->dims[i] = (uint64_t)json_integer_value(dim);
        if (__builtin_mul_overflow(*elements, tensor->dims[i], elements))
            return refuse_tensor(file, name, err, "more than 2^64 elements");
    }
    return STATUS_OK;
}

// Fills in offset and bytes, still counted from the first byte of data.
static enum status parse_offsets(const struct safetensors *file, const char *name, json_t *value,
                                 uint64_t data_bytes, struct safetensors_tensor *tensor,
                                 struct error *err)
{
    json_t *first = json_array_get(value, 0), *second = json_array_get(value, 1);
    if (json_array_size(value) != 2 || !json_is_integer(first) || !json_is_integer(second))
        return refuse_tensor(file, name, err, "data_offsets are not two integers");
    json_int_t begin = json_integer_value(first), end = json_integer_value(second);
    if (begin < 0 || end < begin)
        return refuse_tensor(file, name, err,
                             "data_offsets [%" JSON_INTEGER_FORMAT ", %" JSON_INTEGER_FORMAT
                             "] are not a range",
                             begin, end);
    if ((uint64_t)end > data_bytes)
        return refuse_tensor(file, name, err,
                             "data_offsets end at %" JSON_INTEGER_FORMAT
                             ", but the file holds %" PRIu64 " bytes of data",
                             end, data_bytes);
    tensor->offset = (uint64_t)begin;
    tensor->bytes = (uint64_t)(end - begin);
    return STATUS_OK;
}

static enum status parse_tensor(const struct safetensors *file, const char *name, json_t *value,
                                uint64_t data_bytes, struct safetensors_tensor *tensor,
                                struct error *err)
{
    tensor->name = name;
    if (!json_is_object(value))
        return refuse_tensor(file, name, err, "its entry is not an object");
    uint32_t element_bits = 0;
    enum status status =
        parse_dtype(file, name, json_object_get(value, "dtype"), tensor, &element_bits, err);
    if (status != STATUS_OK)
        return status;
    uint64_t elements = 0, bits;
    status = parse_shape(file, name, json_object_get(value, "shape"), tensor, &elements, err);
    if (status != STATUS_OK)
        return status;
    status =
        parse_offsets(file, name, json_object_get(value, "data_offsets"), data_bytes, tensor, err);
    if (status != STATUS_OK)
        return status;
    // A key that we do not know may change what the bytes mean.
    if (json_object_size(value) != 3)
        return refuse_tensor(file, name, err,
                             "%zu keys, expected dtype, shape and data_offsets alone",
                             json_object_size(value));
    if (__builtin_mul_overflow(elements, (uint64_t)element_bits, &bits))
        return refuse_tensor(file, name, err, "more than 2^64 bits");
    if (bits % 8 != 0)
        return refuse_tensor(file, name, err, "%" PRIu64 " elements of %s do not fill whole bytes",
                             elements, tensor->dtype_name);
    if (bits / 8 != tensor->bytes)
        return refuse_tensor(file, name, err,
                             "shape and dtype %s make %" PRIu64
                             " bytes, but data_offsets span %" PRIu64,
                             tensor->dtype_name, bits / 8, tensor->bytes);
    return STATUS_OK;
}

static enum status parse_metadata(const struct safetensors *file, json_t *value, struct error *err)
{
    if (!json_is_object(value))
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: __metadata__ is not an object",
                         file->label);
    const char *key;
    json_t *entry;
    json_object_foreach(value, key, entry)
    {
        if (!json_is_string(entry))
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "%s: __metadata__: '%.128s' is not a string", file->label, key);
    }
    return STATUS_OK;
}

static enum status parse_entries(struct safetensors *file, uint64_t data_bytes, struct error *err)
{
    size_t entries_n = json_object_size(file->header);
    if (entries_n > SAFETENSORS_TENSORS_MAX)
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: %zu tensors, expected at most %d",
                         file->label, entries_n, SAFETENSORS_TENSORS_MAX);
    file->tensors = calloc(entries_n + 1, sizeof *file->tensors);
    file->by_name = calloc(entries_n + 1, sizeof *file->by_name);
    if (!file->tensors || !file->by_name)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "%s: out of memory", file->label);
    const char *name;
    json_t *value;
    json_object_foreach(file->header, name, value)
    {
        enum status status;
        if (strcmp(name, "__metadata__") == 0) {
            status = parse_metadata(file, value, err);
        } else {
            status =
                parse_tensor(file, name, value, data_bytes, &file->tensors[file->tensors_n], err);
            file->tensors_n++;
        }
        if (status != STATUS_OK)
            return status;
    }
    return STATUS_OK;
}

static int compare_by_offset(const void *left, const void *right, void *context)
{
    const struct safetensors *file = context;
    const struct safetensors_tensor *a = &file->tensors[*(const uint32_t *)left];
    const struct safetensors_tensor *b = &file->tensors[*(const uint32_t *)right];
    if (a->offset != b->offset)
        return a->offset < b->offset ? -1 : 1;
    return a->bytes < b->bytes ? -1 : a->bytes > b->bytes;
}

static int compare_by_name(const void *left, const void *right, void *context)
{
    const struct safetensors *file = context;
    return strcmp(file->tensors[*(const uint32_t *)left].name,
                  file->tensors[*(const uint32_t *)right].name);
}

// In order of offset, each tensor must begin where the one before it ended.
static enum status check_tiling(const struct safetensors *file, const uint32_t *by_offset,
                                uint64_t data_bytes, struct error *err)
{
    uint64_t end = 0;
    for (size_t i = 0; i < file->tensors_n; i++) {
        const struct safetensors_tensor *tensor = &file->tensors[by_offset[i]];
        if (tensor->offset < end)
            return refuse_tensor(file, tensor->name, err,
                                 "begins at byte %" PRIu64
                                 ", inside '%.64s', which ends at %" PRIu64,
                                 tensor->offset, file->tensors[by_offset[i - 1]].name, end);
        if (tensor->offset > end)
            return refuse_tensor(file, tensor->name, err,
                                 "begins at byte %" PRIu64 ", leaving a hole after byte %" PRIu64,
                                 tensor->offset, end);
        end += tensor->bytes;
    }
    if (end != data_bytes)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: tensors make %" PRIu64 " bytes, but the file holds %" PRIu64
                         " bytes of data",
                         file->label, end, data_bytes);
    return STATUS_OK;
}

// Checks the tensors against each other and makes them ready to be found.
static enum status index_tensors(struct safetensors *file, uint64_t data_begin, uint64_t data_bytes,
                                 struct error *err)
{
    for (size_t i = 0; i < file->tensors_n; i++)
        file->by_name[i] = (uint32_t)i;
    qsort_r(file->by_name, file->tensors_n, sizeof *file->by_name, compare_by_offset, file);
    enum status status = check_tiling(file, file->by_name, data_bytes, err);
    if (status != STATUS_OK)
        return status;
    qsort_r(file->by_name, file->tensors_n, sizeof *file->by_name, compare_by_name, file);
    for (size_t i = 0; i < file->tensors_n; i++)
        file->tensors[i].offset += data_begin;
    return STATUS_OK;
}

enum status safetensors_parse(const char *header, size_t header_bytes, uint64_t data_bytes,
                              const char *label, struct safetensors **file_out, struct error *err)
{
    static const struct json_limits limits = {
        .depth_max = 3, // all, one tensor, its shape
        .values_max = HEADER_VALUES_MAX,
        .array_values_max = SAFETENSORS_DIMS_MAX,
    };
    struct safetensors *file = calloc(1, sizeof *file);
    if (!file)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "%s: out of memory", label);
    file->fd = -1;
    file->label = strdup(label);
    enum status status;
    if (!file->label) {
        status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "%s: out of memory", label);
        goto close;
    }
    if (header_bytes == 0 || header[0] != '{') {
        status = error_set(err, STATUS_FAILED_PRECONDITION,
                           "%s: the header does not begin with '{'", label);
        goto close;
    }
    status = json_load_limited(header, header_bytes, &limits, label, &file->header, err);
    if (status != STATUS_OK)
        goto close;
    status = parse_entries(file, data_bytes, err);
    if (status != STATUS_OK)
        goto close;
    status = index_tensors(file, LENGTH_BYTES + (uint64_t)header_bytes, data_bytes, err);
    if (status != STATUS_OK)
        goto close;
    *file_out = file;
    return STATUS_OK;

close:
    safetensors_close(file);
    return status;
}

// ---- open and close

// The header is read, not mapped, so that a failing disk is an ordinary error here.
static enum status read_all(int fd, void *to, size_t bytes, off_t offset, const char *label,
                            struct error *err)
{
    char *at = to;
    while (bytes > 0) {
        ssize_t got = pread(fd, at, bytes, offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return error_set(err, STATUS_DATA_LOSS, "%s: %s", label, strerrordesc_np(errno));
        if (got == 0)
            return error_set(err, STATUS_DATA_LOSS, "%s: shrank while it was read", label);
        at += got;
        bytes -= (size_t)got;
        offset += got;
    }
    return STATUS_OK;
}

static enum status read_header_bytes(int fd, uint64_t file_bytes, const char *label,
                                     uint64_t *header_bytes, struct error *err)
{
    if (file_bytes < LENGTH_BYTES)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: %" PRIu64 " bytes, too short for a safetensors file", label,
                         file_bytes);
    uint8_t length[LENGTH_BYTES];
    enum status status = read_all(fd, length, sizeof length, 0, label, err);
    if (status != STATUS_OK)
        return status;
    uint64_t bytes = 0;
    for (int i = LENGTH_BYTES - 1; i >= 0; i--)
        bytes = bytes << 8 | length[i];
    if (bytes > SAFETENSORS_HEADER_BYTES_MAX)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: a header of %" PRIu64 " bytes, expected at most %d", label, bytes,
                         SAFETENSORS_HEADER_BYTES_MAX);
    if (bytes > file_bytes - LENGTH_BYTES)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: a header of %" PRIu64 " bytes in a file of %" PRIu64, label, bytes,
                         file_bytes);
    *header_bytes = bytes;
    return STATUS_OK;
}

static enum status read_and_parse(int fd, uint64_t file_bytes, const char *label,
                                  struct safetensors **file, struct error *err)
{
    uint64_t header_bytes = 0;
    enum status status = read_header_bytes(fd, file_bytes, label, &header_bytes, err);
    if (status != STATUS_OK)
        return status;
    char *header = malloc(header_bytes + 1);
    if (!header)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "%s: out of memory", label);
    status = read_all(fd, header, header_bytes, LENGTH_BYTES, label, err);
    if (status == STATUS_OK)
        status = safetensors_parse(header, header_bytes, file_bytes - LENGTH_BYTES - header_bytes,
                                   label, file, err);
    free(header);
    return status;
}

static void sigbus_install(void);

enum status safetensors_open(int fd, const char *label, struct safetensors **file_out,
                             struct error *err)
{
    static pthread_once_t sigbus_once = PTHREAD_ONCE_INIT;
    pthread_once(&sigbus_once, sigbus_install);

    struct safetensors *file;
    struct stat stat;
    enum status status;
    if (fstat(fd, &stat) != 0) {
        status =
            error_set(err, STATUS_FAILED_PRECONDITION, "%s: %s", label, strerrordesc_np(errno));
        goto close_fd;
    }
    if (!S_ISREG(stat.st_mode)) {
        status = error_set(err, STATUS_FAILED_PRECONDITION, "%s: not a regular file", label);
        goto close_fd;
    }
    status = read_and_parse(fd, (uint64_t)stat.st_size, label, &file, err);
    if (status != STATUS_OK)
        goto close_fd;
    void *map = mmap(NULL, (size_t)stat.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) {
        status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "%s: cannot map %" PRIu64 " bytes: %s",
                           label, (uint64_t)stat.st_size, strerrordesc_np(errno));
        goto close_file;
    }
    // Each page is read once, so neither this file nor the page cache gains by keeping it.
    madvise(map, (size_t)stat.st_size, MADV_SEQUENTIAL);
    file->fd = fd;
    file->map = map;
    file->file_bytes = (uint64_t)stat.st_size;
    *file_out = file;
    return STATUS_OK;

close_file:
    safetensors_close(file);
close_fd:
    close(fd);
    return status;
}

void safetensors_close(struct safetensors *file)
{
    if (!file)
        return;
    if (file->map)
        munmap((void *)(uintptr_t)file->map, file->file_bytes);
    if (file->fd >= 0)
        close(file->fd);
    json_decref(file->header);
    free(file->by_name);
    free(file->tensors);
    free(file->label);
    free(file);
}

// ---- lookup

size_t safetensors_count(const struct safetensors *file)
{
    return file->tensors_n;
}

const struct safetensors_tensor *safetensors_at(const struct safetensors *file, size_t index)
{
    ASSERT(index < file->tensors_n);
    return &file->tensors[index];
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name)
{
    size_t begin = 0, end = file->tensors_n;
    while (begin < end) {
        size_t middle = begin + (end - begin) / 2;
        const struct safetensors_tensor *tensor = &file->tensors[file->by_name[middle]];
        int order = strcmp(name, tensor->name);
        if (order == 0)
            return tensor;
        if (order < 0)
            end = middle;
        else
            begin = middle + 1;
    }
    return NULL;
}

// ---- reading under guard

// While a thread copies out of a map, guard_current points to where it escapes to if the copy
// faults. The fault is synchronous: the handler runs on the faulting thread and sees its own guard.
struct guard {
    sigjmp_buf escape;
    const uint8_t *begin, *end; // of the map
};

static _Thread_local struct guard *volatile guard_current;
static struct sigaction sigbus_previous;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    struct guard *guard = guard_current;
    const uint8_t *address = info->si_addr;
    if (guard && info->si_code > 0 && address >= guard->begin && address < guard->end)
        siglongjmp(guard->escape, 1);

    if (sigbus_previous.sa_flags & SA_SIGINFO) {
        sigbus_previous.sa_sigaction(number, info, context);
    } else if (sigbus_previous.sa_handler == SIG_DFL || sigbus_previous.sa_handler == SIG_IGN) {
        // The kernel does not let a fault be ignored either. The signal is blocked here and arrives
        // as this handler returns.
        struct sigaction action = {.sa_handler = SIG_DFL};
        sigaction(SIGBUS, &action, NULL);
        raise(SIGBUS);
    } else {
        sigbus_previous.sa_handler(number);
    }
}

static void sigbus_install(void)
{
    // In two steps, so that the handler never sees a half-written sigbus_previous.
    sigaction(SIGBUS, NULL, &sigbus_previous);
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
}

// Its own frame: nothing here lives in a register across sigsetjmp.
__attribute__((noinline)) static bool copy_guarded(const struct safetensors *file, void *to,
                                                   const uint8_t *from, size_t bytes)
{
    struct guard guard = {.begin = file->map, .end = file->map + file->file_bytes};
    if (sigsetjmp(guard.escape, 1) != 0) {
        guard_current = NULL;
        return false;
    }
    guard_current = &guard;
    atomic_signal_fence(memory_order_seq_cst);
    memcpy(to, from, bytes);
    atomic_signal_fence(memory_order_seq_cst);
    guard_current = NULL;
    return true;
}

static void prefetch(const uint8_t *from, uint64_t bytes)
{
    uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)from & ~(page_bytes - 1);
    madvise((void *)begin, (uintptr_t)from + bytes - begin, MADV_WILLNEED);
}

uint64_t safetensors_bytes(const struct safetensors *file)
{
    return file->file_bytes;
}

enum status safetensors_read_raw(const struct safetensors *file, uint64_t offset, void *to,
                                 uint64_t bytes, struct error *err)
{
    ASSERT(file->map);
    ASSERT(offset <= file->file_bytes && bytes <= file->file_bytes - offset);
    if (copy_guarded(file, to, file->map + offset, bytes))
        return STATUS_OK;
    return error_set(err, STATUS_DATA_LOSS, "%s: the file has shrunk, or its disk fails",
                     file->label);
}

enum status safetensors_read(const struct safetensors *file,
                             const struct safetensors_tensor *tensor, uint64_t offset, void *to,
                             uint64_t bytes, struct error *err)
{
    ASSERT(file->map);
    ASSERT(offset <= tensor->bytes && bytes <= tensor->bytes - offset);
    const uint8_t *from = file->map + tensor->offset + offset;
    uint8_t *at = to;
    if (bytes >= PREFETCH_BYTES_MIN)
        prefetch(from, bytes < READ_CHUNK_BYTES ? bytes : READ_CHUNK_BYTES);
    for (uint64_t left = bytes; left > 0;) {
        uint64_t chunk = left < READ_CHUNK_BYTES ? left : READ_CHUNK_BYTES;
        uint64_t ahead = left - chunk < READ_CHUNK_BYTES ? left - chunk : READ_CHUNK_BYTES;
        if (ahead > 0)
            prefetch(from + chunk, ahead);
        if (!copy_guarded(file, at, from, chunk))
            return error_set(err, STATUS_DATA_LOSS,
                             "%s: tensor '%.128s': the file has shrunk, or its disk fails",
                             file->label, tensor->name);
        from += chunk;
        at += chunk;
        left -= chunk;
    }
    // The page in which a shrunken file now ends reads as zeros behind that end, without a fault.
    struct stat stat;
    if (fstat(file->fd, &stat) != 0 || (uint64_t)stat.st_size < file->file_bytes)
        return error_set(err, STATUS_DATA_LOSS, "%s: the file has shrunk since it was opened",
                         file->label);
    return STATUS_OK;
}
