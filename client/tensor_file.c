// See tensor_file.h. Reading a file of either form, and writing it by way of a temporary one.

#include "tensor_file.h"

#include "../server/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PATH_BYTES = 4096, HEADER_BYTES_MAX = 1 << 20 };

// ---- reading ------------------------------------------------------------------------------------

static enum status system_error(struct error *err, const char *path)
{
    return error_set(err, errno == ENOENT ? STATUS_NOT_FOUND : STATUS_FAILED_PRECONDITION, "%s: %s",
                     path, strerror(errno));
}

static enum status read_all(int fd, const char *path, void *to, uint64_t bytes, off_t offset,
                            struct error *err)
{
    for (uint64_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (uint8_t *)to + done, bytes - done, offset + (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return system_error(err, path);
        if (n == 0)
            return error_set(err, STATUS_FAILED_PRECONDITION, "%s: cut short", path);
        done += (uint64_t)n;
    }
    return STATUS_OK;
}

static enum status read_npy_at(int fd, const char *path, struct tensor *tensor, struct error *err)
{
    struct stat stat;
    if (fstat(fd, &stat) != 0)
        return system_error(err, path);
    uint64_t file_bytes = stat.st_size > 0 ? (uint64_t)stat.st_size : 0;
    size_t head_bytes = file_bytes < HEADER_BYTES_MAX ? (size_t)file_bytes : HEADER_BYTES_MAX;
    uint8_t *head = malloc(head_bytes + 1);
    if (!head)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory");
    size_t header_bytes = 0;
    struct error inner;
    enum status status = read_all(fd, path, head, head_bytes, 0, err);
    if (status == STATUS_OK) {
        status = npy_parse(head, head_bytes, tensor, &header_bytes, &inner);
        if (status != STATUS_OK)
            error_set(err, status, "%s: %s", path, inner.text);
    }
    free(head);
    if (status != STATUS_OK)
        return status;
    if (file_bytes - header_bytes != tensor->bytes)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: its shape says %" PRIu64 " bytes and %" PRIu64 " follow", path,
                         tensor->bytes, file_bytes - header_bytes);
    tensor->data = malloc(tensor->bytes + 1);
    if (!tensor->data)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "%s: no memory", path);
    return read_all(fd, path, tensor->data, tensor->bytes, (off_t)header_bytes, err);
}

static enum status read_npy(const char *path, struct tensor *tensor, struct error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return system_error(err, path);
    enum status status = read_npy_at(fd, path, tensor, err);
    close(fd);
    return status;
}

static enum status take_safetensor(const struct safetensors *file, const char *path,
                                   const char *name, struct tensor *tensor, struct error *err)
{
    const struct safetensors_tensor *found = safetensors_find(file, name);
    if (!found)
        return error_set(err, STATUS_NOT_FOUND, "%s: has no tensor \"%s\"", path, name);
    if (found->dims_n > TENSOR_DIMS_MAX)
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: too many dimensions", name);
    uint64_t elements = 1;
    tensor->dims_n = found->dims_n;
    for (uint32_t i = 0; i < found->dims_n; i++)
        elements *= tensor->dims[i] = found->dims[i];
    tensor->bytes = found->bytes;
    tensor->element_bytes = elements ? (uint32_t)(found->bytes / elements) : 1;
    tensor->kind = found->dtype == SAFETENSORS_F32 ? TENSOR_FP32
                   : tensor->element_bytes == 1    ? TENSOR_BYTES
                                                   : TENSOR_OTHER;
    snprintf(tensor->type, sizeof tensor->type, "%s", found->dtype_name);
    tensor->data = malloc(found->bytes + 1);
    if (!tensor->data)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "%s: no memory", path);
    return safetensors_read(file, found, 0, tensor->data, found->bytes, err);
}

static enum status read_safetensors(const char *path, const char *name, struct tensor *tensor,
                                    struct error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return system_error(err, path);
    struct safetensors *file;
    enum status status = safetensors_open(fd, path, &file, err);
    if (status != STATUS_OK)
        return status;
    status = take_safetensor(file, path, name, tensor, err);
    safetensors_close(file);
    return status;
}

static bool ends_with(const char *text, const char *end)
{
    size_t length = strlen(text), end_length = strlen(end);
    return length > end_length && strcmp(text + length - end_length, end) == 0;
}

enum status tensor_read(const char *name, const char *usual, struct tensor *tensor,
                        struct error *err)
{
    *tensor = (struct tensor){0};
    char path[PATH_BYTES];
    if (strlen(name) >= sizeof path)
        return error_set(err, STATUS_INVALID_ARGUMENT, "a path of %zu bytes", strlen(name));
    memcpy(path, name, strlen(name) + 1);
    enum status status;
    char *colon = strstr(path, ".safetensors:");
    if (colon) {
        colon += sizeof ".safetensors" - 1;
        *colon = '\0';
        status = read_safetensors(path, colon + 1, tensor, err);
    } else if (ends_with(path, ".safetensors")) {
        status = read_safetensors(path, usual, tensor, err);
    } else if (ends_with(path, ".npy")) {
        status = read_npy(path, tensor, err);
    } else {
        status =
            error_set(err, STATUS_INVALID_ARGUMENT, "%s: is neither .npy nor .safetensors", name);
    }
    if (status != STATUS_OK)
        tensor_deinit(tensor);
    return status;
}

void tensor_deinit(struct tensor *tensor)
{
    free(tensor->data);
    *tensor = (struct tensor){0};
}

// ---- writing ------------------------------------------------------------------------------------

static size_t put_dims(char *to, size_t size, uint32_t dims_n, const uint64_t *dims)
{
    size_t used = 0;
    for (uint32_t i = 0; i < dims_n; i++)
        used += (size_t)snprintf(to + used, size - used, "%s%" PRIu64, i ? ", " : "", dims[i]);
    return used;
}

// Both headers are padded with spaces so that the data starts at a multiple of 64 bytes.
static size_t npy_header(char *to, size_t size, bool fp32, const char *dims, uint32_t dims_n)
{
    static const char magic[10] = "\x93NUMPY\x01";
    memcpy(to, magic, sizeof magic);
    size_t used = sizeof magic;
    used += (size_t)snprintf(to + used, size - used,
                             "{'descr': '%s', 'fortran_order': False, 'shape': (%s%s), }",
                             fp32 ? "<f4" : "<u2", dims, dims_n == 1 ? "," : "");
    while ((used + 1) % 64)
        to[used++] = ' ';
    to[used++] = '\n';
    size_t length = used - sizeof magic;
    to[8] = (char)(length & 0xff);
    to[9] = (char)(length >> 8);
    return used;
}

static size_t safetensors_header(char *to, size_t size, bool fp32, const char *dims, uint64_t bytes)
{
    size_t used = 8;
    used += (size_t)snprintf(
        to + used, size - used,
        "{\"output\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[0,%" PRIu64 "]}}",
        fp32 ? "F32" : "BF16", dims, bytes);
    while (used % 64)
        to[used++] = ' ';
    uint64_t length = used - 8;
    for (int i = 0; i < 8; i++)
        to[i] = (char)(length >> (8 * i) & 0xff);
    return used;
}

static bool write_file(const char *path, const void *head, size_t head_bytes, const void *data,
                       size_t bytes)
{
    FILE *file = fopen(path, "wbe");
    if (!file)
        return false;
    bool good = fwrite(head, 1, head_bytes, file) == head_bytes &&
                fwrite(data, 1, bytes, file) == bytes && fflush(file) == 0;
    return fclose(file) == 0 && good;
}

enum status tensor_write(const char *name, const void *data, bool fp32, uint32_t dims_n,
                         const uint64_t *dims, struct error *err)
{
    char dims_text[24 * TENSOR_DIMS_MAX], head[1024], temporary[PATH_BYTES];
    uint64_t bytes = fp32 ? 4 : 2;
    for (uint32_t i = 0; i < dims_n; i++)
        bytes *= dims[i];
    put_dims(dims_text, sizeof dims_text, dims_n, dims);
    size_t head_bytes;
    if (ends_with(name, ".npy"))
        head_bytes = npy_header(head, sizeof head, fp32, dims_text, dims_n);
    else if (ends_with(name, ".safetensors"))
        head_bytes = safetensors_header(head, sizeof head, fp32, dims_text, bytes);
    else
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s: is neither .npy nor .safetensors",
                         name);
    if ((size_t)snprintf(temporary, sizeof temporary, "%s.part", name) >= sizeof temporary)
        return error_set(err, STATUS_INVALID_ARGUMENT, "a path of %zu bytes", strlen(name));
    if (write_file(temporary, head, head_bytes, data, bytes) && rename(temporary, name) == 0)
        return STATUS_OK;
    enum status status = system_error(err, name);
    unlink(temporary);
    return status;
}
