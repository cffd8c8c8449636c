// One vocabulary for failures. The numbers are gRPC's, so that a status travels to the client
// unchanged.
//
// A fallible function is `NODISCARD enum status f(..., struct error *err)`: it returns STATUS_OK,
// or fills `err` and returns err->status. The text is for the client: factual, lower case, no full
// stop; it names the field, what was expected and what came. What only the operator may know goes
// to the log instead.
#pragma once

#include "base.h"

enum status {
    STATUS_OK = 0,
    STATUS_CANCELLED = 1,
    STATUS_UNKNOWN = 2,
    STATUS_INVALID_ARGUMENT = 3,
    STATUS_DEADLINE_EXCEEDED = 4,
    STATUS_NOT_FOUND = 5,
    STATUS_ALREADY_EXISTS = 6,
    STATUS_PERMISSION_DENIED = 7,
    STATUS_RESOURCE_EXHAUSTED = 8,
    STATUS_FAILED_PRECONDITION = 9,
    STATUS_ABORTED = 10,
    STATUS_OUT_OF_RANGE = 11,
    STATUS_UNIMPLEMENTED = 12,
    STATUS_INTERNAL = 13,
    STATUS_UNAVAILABLE = 14,
    STATUS_DATA_LOSS = 15,
    STATUS_UNAUTHENTICATED = 16,
};

enum { ERROR_TEXT_BYTES = 512, ERROR_FIELD_BYTES = 64 };

struct error {
    enum status status;
    char field[ERROR_FIELD_BYTES]; // the request field or config key at fault; empty if none
    uint32_t retry_after_ms;       // advice with RESOURCE_EXHAUSTED and UNAVAILABLE; 0: none
    char text[ERROR_TEXT_BYTES];
};

// Fills `err` (which may be NULL) and returns `status`, so that a failure is one line: return
// error_set(err, ...).
enum status error_set(struct error *err, enum status status, const char *format, ...)
    PRINTF_LIKE(3, 4);

// The same, naming the field at fault; the text then begins with "<field>: ".
enum status error_field(struct error *err, enum status status, const char *field,
                        const char *format, ...) PRINTF_LIKE(4, 5);

// "INVALID_ARGUMENT" and so on; "UNKNOWN" for a number that is not gRPC's.
const char *status_name(enum status status);

// The static analyser sees one file at a time; this tells it that a failure is never STATUS_OK.
#ifdef __clang_analyzer__
#define error_set(err, status, ...) (error_set(err, status, __VA_ARGS__), (status))
#define error_field(err, status, ...) (error_field(err, status, __VA_ARGS__), (status))
#endif
