#include "status.h"

#undef error_set // what status.h tells the static analyser
#undef error_field

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[] = {
    [STATUS_OK] = "OK",
    [STATUS_CANCELLED] = "CANCELLED",
    [STATUS_UNKNOWN] = "UNKNOWN",
    [STATUS_INVALID_ARGUMENT] = "INVALID_ARGUMENT",
    [STATUS_DEADLINE_EXCEEDED] = "DEADLINE_EXCEEDED",
    [STATUS_NOT_FOUND] = "NOT_FOUND",
    [STATUS_ALREADY_EXISTS] = "ALREADY_EXISTS",
    [STATUS_PERMISSION_DENIED] = "PERMISSION_DENIED",
    [STATUS_RESOURCE_EXHAUSTED] = "RESOURCE_EXHAUSTED",
    [STATUS_FAILED_PRECONDITION] = "FAILED_PRECONDITION",
    [STATUS_ABORTED] = "ABORTED",
    [STATUS_OUT_OF_RANGE] = "OUT_OF_RANGE",
    [STATUS_UNIMPLEMENTED] = "UNIMPLEMENTED",
    [STATUS_INTERNAL] = "INTERNAL",
    [STATUS_UNAVAILABLE] = "UNAVAILABLE",
    [STATUS_DATA_LOSS] = "DATA_LOSS",
    [STATUS_UNAUTHENTICATED] = "UNAUTHENTICATED",
};

const char *status_name(enum status status)
{
    return (size_t)status < ARRAY_LEN(names) ? names[status] : "UNKNOWN";
}

void assert_failed(const char *condition, const char *file, int line, const char *function)
{
    fprintf(stderr, "einsumd: %s:%d: %s: invariant broken: %s\n", file, line, function, condition);
    abort();
}

// Names and values that a client sent end up in these texts, and the texts in headers, logs and
// terminals: whatever is not printable ASCII becomes '?'.
static void make_printable(char *text)
{
    for (; *text; text++) {
        unsigned char byte = (unsigned char)*text;
        if (byte < 0x20 || byte >= 0x7f)
            *text = '?';
    }
}

// Formats into `text`, cutting silently at its end: a long client-sent name must not become a
// second error.
static void format_text(char *text, size_t bytes, const char *format, va_list args)
{
    if (vsnprintf(text, bytes, format, args) < 0)
        text[0] = '\0';
    make_printable(text);
}

enum status error_set(struct error *err, enum status status, const char *format, ...)
{
    if (!err)
        return status;
    err->status = status;
    err->field[0] = '\0';
    err->retry_after_ms = 0;
    va_list args;
    va_start(args, format);
    format_text(err->text, sizeof err->text, format, args);
    va_end(args);
    return status;
}

enum status error_field(struct error *err, enum status status, const char *field,
                        const char *format, ...)
{
    if (!err)
        return status;
    err->status = status;
    err->retry_after_ms = 0;
    snprintf(err->field, sizeof err->field, "%s", field);
    make_printable(err->field);
    // The text names as much of the field as `field` holds, so that a long one leaves room for what
    // is wrong with it.
    int used = snprintf(err->text, sizeof err->text, "%s: ", err->field);
    ASSERT(used > 0 && (size_t)used < sizeof err->text);
    size_t at = (size_t)used;
    va_list args;
    va_start(args, format);
    format_text(err->text + at, sizeof err->text - at, format, args);
    va_end(args);
    return status;
}
