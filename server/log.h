// The log: one line per event, plain or JSON, to standard error. Any thread; a line is written
// whole by one write(2).
//
//     LOG(INFO, "weight loaded", LOG_STR("name", name), LOG_U64("bytes", bytes));
//
// plain: 2026-11-22T10:00:00.123Z info weight loaded name=layers.0.attn.wo_a bytes=33554432
// json:  {"ts":"2026-11-22T10:00:00.123Z","level":"info","msg":"weight loaded",
//         "name":"layers.0.attn.wo_a","bytes":33554432}           on one line
#pragma once

#include "base.h"

enum log_level { LOG_LEVEL_DEBUG, LOG_LEVEL_INFO, LOG_LEVEL_WARN, LOG_LEVEL_ERROR };
enum log_format { LOG_FORMAT_PLAIN, LOG_FORMAT_JSON };

enum log_kind { LOG_KIND_STR, LOG_KIND_U64, LOG_KIND_F64, LOG_KIND_BOOL };

struct log_field {
    const char *key;
    enum log_kind kind;
    union {
        const char *str;
        uint64_t u64;
        double f64;
        bool boolean;
    } value;
};

#define LOG_STR(k, v) ((struct log_field){.key = (k), .kind = LOG_KIND_STR, .value.str = (v)})
#define LOG_U64(k, v) ((struct log_field){.key = (k), .kind = LOG_KIND_U64, .value.u64 = (v)})
#define LOG_F64(k, v) ((struct log_field){.key = (k), .kind = LOG_KIND_F64, .value.f64 = (v)})
#define LOG_BOOL(k, v) ((struct log_field){.key = (k), .kind = LOG_KIND_BOOL, .value.boolean = (v)})

// The {0} in front keeps the array non-empty when an event has no fields; it is not passed on.
#define LOG(level, message, ...)                                                                   \
    do {                                                                                           \
        if (log_enabled(LOG_LEVEL_##level))                                                        \
            log_write(LOG_LEVEL_##level, (message),                                                \
                      (const struct log_field[]){{0}, ##__VA_ARGS__} + 1,                          \
                      ARRAY_LEN(((const struct log_field[]){{0}, ##__VA_ARGS__})) - 1);            \
    } while (0)

// Any thread; holds for lines that are begun from then on. Until then: plain, info.
void log_configure(enum log_level level, enum log_format format);
// Before the first thread, for standard error as it is then: from here on a line for which a pipe, a
// socket or a terminal has no room, since nobody reads, is dropped.
void log_never_wait(void);
bool log_enabled(enum log_level level);

// Strings may hold any bytes: they are escaped, and cut when the line would pass 4 KiB. Never
// fails: a line that cannot be written is dropped and counted.
void log_write(enum log_level level, const char *message, const struct log_field *fields,
               size_t fields_n);
uint64_t log_lines_dropped(void);
