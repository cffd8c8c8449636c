// NumPy's .npy header:
//
//     \x93NUMPY  major minor  length (2 bytes, from version 2 on 4)  {'descr': '<f4', ...}\n
//
// The dictionary is Python's, as numpy.save writes it; keys may come in any order.

#include "tensor_file.h"

#include <stdlib.h>
#include <string.h>

struct text {
    const char *at, *end;
};

static void skip_spaces(struct text *text)
{
    while (text->at < text->end && (*text->at == ' ' || *text->at == '\n'))
        text->at++;
}

static bool take(struct text *text, char wanted)
{
    skip_spaces(text);
    if (text->at == text->end || *text->at != wanted)
        return false;
    text->at++;
    return true;
}

static bool take_string(struct text *text, char *to, size_t size)
{
    skip_spaces(text);
    if (text->at == text->end || (*text->at != '\'' && *text->at != '"'))
        return false;
    char quote = *text->at++;
    size_t length = 0;
    for (; text->at < text->end && *text->at != quote; text->at++) {
        if (length + 1 >= size)
            return false;
        to[length++] = *text->at;
    }
    to[length] = '\0';
    return take(text, quote);
}

static bool take_number(struct text *text, uint64_t *value)
{
    skip_spaces(text);
    const char *start = text->at;
    *value = 0;
    for (; text->at < text->end && *text->at >= '0' && *text->at <= '9'; text->at++) {
        if (*value > UINT64_MAX / 10 - 1)
            return false;
        *value = *value * 10 + (uint64_t)(*text->at - '0');
    }
    return text->at > start;
}

static bool take_shape(struct text *text, struct tensor *tensor)
{
    tensor->dims_n = 0;
    if (!take(text, '('))
        return false;
    while (!take(text, ')')) {
        if (tensor->dims_n == TENSOR_DIMS_MAX || !take_number(text, &tensor->dims[tensor->dims_n]))
            return false;
        tensor->dims_n++;
        if (!take(text, ',') && text->at < text->end && *text->at != ')')
            return false;
    }
    return true;
}

// "<f4", "|u1", "|V1" (what numpy.save makes of float8): byte order, kind, size.
static bool set_type(struct tensor *tensor, const char *descr)
{
    size_t length = strlen(descr);
    if (length < 3 || length >= sizeof tensor->type || strchr("<|=", descr[0]) == NULL)
        return false;
    char *end;
    unsigned long bytes = strtoul(descr + 2, &end, 10);
    if (*end || bytes < 1 || bytes > 16)
        return false;
    memcpy(tensor->type, descr, length + 1);
    tensor->element_bytes = (uint32_t)bytes;
    tensor->kind = bytes == 1                      ? TENSOR_BYTES
                   : bytes == 4 && descr[1] == 'f' ? TENSOR_FP32
                                                   : TENSOR_OTHER;
    return true;
}

static bool set_bytes(struct tensor *tensor)
{
    uint64_t bytes = tensor->element_bytes;
    for (uint32_t i = 0; i < tensor->dims_n; i++) {
        if (__builtin_mul_overflow(bytes, tensor->dims[i], &bytes))
            return false;
    }
    tensor->bytes = bytes;
    return true;
}

static bool parse_dictionary(struct text *text, struct tensor *tensor)
{
    char key[32], descr[32] = "";
    bool row_major = false, has_shape = false;
    if (!take(text, '{'))
        return false;
    while (!take(text, '}')) {
        if (!take_string(text, key, sizeof key) || !take(text, ':'))
            return false;
        skip_spaces(text);
        size_t left = (size_t)(text->end - text->at);
        if (strcmp(key, "descr") == 0 && take_string(text, descr, sizeof descr)) {
        } else if (strcmp(key, "shape") == 0 && take_shape(text, tensor)) {
            has_shape = true;
        } else if (strcmp(key, "fortran_order") == 0 && left >= 5 &&
                   memcmp(text->at, "False", 5) == 0) {
            row_major = true;
            text->at += 5;
        } else {
            return false;
        }
        take(text, ',');
    }
    return has_shape && row_major && set_type(tensor, descr) && set_bytes(tensor);
}

enum status npy_parse(const uint8_t *bytes, size_t bytes_n, struct tensor *tensor,
                      size_t *header_bytes, struct error *err)
{
    bool sound =
        bytes_n >= 10 && memcmp(bytes, "\x93NUMPY", 6) == 0 && bytes[6] >= 1 && bytes[6] <= 3;
    size_t start = sound && bytes[6] > 1 ? 12 : 10;
    if (!sound || bytes_n < start)
        return error_set(err, STATUS_FAILED_PRECONDITION, "no .npy file");
    uint64_t length = bytes[8] | (uint64_t)bytes[9] << 8;
    if (start == 12)
        length |= (uint64_t)bytes[10] << 16 | (uint64_t)bytes[11] << 24;
    if (length > bytes_n - start)
        return error_set(err, STATUS_FAILED_PRECONDITION, "cut short within its header");
    struct text text = {(const char *)bytes + start, (const char *)bytes + start + length};
    *header_bytes = start + (size_t)length;
    if (!parse_dictionary(&text, tensor))
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "no array of little-endian numbers in C order with at most %d dimensions",
                         TENSOR_DIMS_MAX);
    return STATUS_OK;
}
