// The log: formats one event into one line on the stack and hands it to the kernel with one
// write(2), if the kernel takes it at once. Any thread; lines of different threads never mix. Nothing
// is locked but for a pipe or terminal, which must be asked for room first.
//
//     | opening | field | field | ... | tail |        LINE_BYTES in all
//      time,      each whole, or cut    kept free for the closing mark and newline
//
// Invariant: `used` never passes LINE_BYTES - TAIL_BYTES before line_end, so that what must close
// the line always fits. JSON stays valid and UTF-8 whatever bytes come in.
#include "log.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LINE_BYTES = 4096, TAIL_BYTES = 32 }; // PIPE_BUF: a pipe takes a line whole, or not

struct line {
    char bytes[LINE_BYTES];
    size_t used;
    bool cut; // something did not fit: nothing more is added
};

static const char *const level_names[] = {
    [LOG_LEVEL_DEBUG] = "debug",
    [LOG_LEVEL_INFO] = "info",
    [LOG_LEVEL_WARN] = "warn",
    [LOG_LEVEL_ERROR] = "error",
};

static _Atomic enum log_level configured_level = LOG_LEVEL_INFO;
static _Atomic enum log_format configured_format = LOG_FORMAT_PLAIN;
// Written before the first thread, read-only from then on.
static enum { SINK_WRITE, SINK_ASK, SINK_SEND } sink;

static pthread_mutex_t ask_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_bool torn; // the last line has no end: a disk had room for a part of it

static atomic_uint_fast64_t lines_dropped;

void log_configure(enum log_level level, enum log_format format)
{
    ASSERT((size_t)level < ARRAY_LEN(level_names));
    ASSERT(format == LOG_FORMAT_PLAIN || format == LOG_FORMAT_JSON);
    atomic_store_explicit(&configured_level, level, memory_order_relaxed);
    atomic_store_explicit(&configured_format, format, memory_order_relaxed);
}

void log_never_wait(void)
{
    struct stat stat;
    if (fstat(STDERR_FILENO, &stat) != 0)
        return;
    if (S_ISSOCK(stat.st_mode))
        sink = SINK_SEND;
    else if (S_ISFIFO(stat.st_mode) || S_ISCHR(stat.st_mode))
        sink = SINK_ASK;
}

bool log_enabled(enum log_level level)
{
    return level >= atomic_load_explicit(&configured_level, memory_order_relaxed);
}

uint64_t log_lines_dropped(void)
{
    return atomic_load_explicit(&lines_dropped, memory_order_relaxed);
}

// Adds all of `bytes` or, when they do not fit, none.
static bool line_add(struct line *line, const char *bytes, size_t bytes_n)
{
    if (line->cut || bytes_n > LINE_BYTES - TAIL_BYTES - line->used) {
        line->cut = true;
        return false;
    }
    memcpy(line->bytes + line->used, bytes, bytes_n);
    line->used += bytes_n;
    return true;
}

static bool line_add_str(struct line *line, const char *str)
{
    return line_add(line, str, strlen(str));
}

PRINTF_LIKE(2, 3) static bool line_add_format(struct line *line, const char *format, ...)
{
    char text[64];
    va_list args;
    va_start(args, format);
    int bytes = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ASSERT(bytes >= 0 && (size_t)bytes < sizeof text);
    return line_add(line, text, (size_t)bytes);
}

// The bytes of the well-formed UTF-8 character that `str` starts with; 0 if it starts with none.
// Overlong forms, surrogates and values past U+10FFFF are not well-formed. The terminator ends
// every test early, so nothing behind it is read.
static size_t utf8_bytes(const char *str)
{
    const unsigned char *s = (const unsigned char *)str;
    if (s[0] < 0x80)
        return 1;
    if (s[0] < 0xc2 || s[0] > 0xf4)
        return 0;
    // The second byte carries what the first leaves open: overlong, surrogate, too large.
    unsigned char low = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : 0x80;
    unsigned char high = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : 0xbf;
    if (s[1] < low || s[1] > high)
        return 0;
    size_t bytes = s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
    for (size_t i = 2; i < bytes; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    return bytes;
}

// C0, DEL and C1: what a terminal may obey.
static bool is_control(const char *character, size_t bytes)
{
    unsigned char first = (unsigned char)character[0];
    return (bytes == 1 && (first < 0x20 || first == 0x7f)) ||
           (bytes == 2 && first == 0xc2 && (unsigned char)character[1] < 0xa0);
}

// Adds one character of `str` as the body of a quoted string, and returns how many bytes of `str`
// it was; 0 once the line is full.
static size_t add_escaped_character(struct line *line, enum log_format format, const char *str)
{
    size_t bytes = utf8_bytes(str);
    unsigned byte = (unsigned char)*str;
    bool fits;
    if (bytes == 0) // plain shows the byte; JSON has no way to, and marks the place
        fits = format == LOG_FORMAT_JSON ? line_add_str(line, "\xef\xbf\xbd")
                                         : line_add_format(line, "\\x%02x", byte);
    else if (*str == '"' || *str == '\\')
        fits = line_add_format(line, "\\%c", *str);
    else if (*str == '\n')
        fits = line_add_str(line, "\\n");
    else if (is_control(str, bytes))
        fits = line_add_format(line, format == LOG_FORMAT_JSON ? "\\u%04x" : "\\x%02x",
                               bytes == 1 ? byte : (unsigned char)str[1]);
    else
        fits = line_add(line, str, bytes);
    if (!fits)
        return 0;
    return bytes ? bytes : 1;
}

static void add_escaped(struct line *line, enum log_format format, const char *str)
{
    while (*str) {
        size_t bytes = add_escaped_character(line, format, str);
        if (!bytes)
            return;
        str += bytes;
    }
}

// A quoted string is closed even when it was cut, or the line would not parse; TAIL_BYTES holds
// room for that.
static void add_quoted(struct line *line, enum log_format format, const char *str)
{
    if (!line_add_str(line, "\""))
        return;
    add_escaped(line, format, str);
    line->bytes[line->used++] = '"';
}

// Whether a plain value reads back unambiguously without quotes.
static bool is_bare(const char *str)
{
    if (!*str)
        return false;
    for (; *str; str++) {
        unsigned char byte = (unsigned char)*str;
        if (byte <= ' ' || byte >= 0x7f || byte == '"' || byte == '=' || byte == '\\')
            return false;
    }
    return true;
}

static void add_str(struct line *line, enum log_format format, const char *str)
{
    if (!str)
        line_add_str(line, "null");
    else if (format == LOG_FORMAT_PLAIN && is_bare(str))
        add_escaped(line, format, str);
    else
        add_quoted(line, format, str);
}

// The shortest of 15 to 17 digits that reads back as the same value.
static void add_f64(struct line *line, enum log_format format, double value)
{
    if (!isfinite(value)) { // JSON has no number for these
        const char *name = isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
        line_add_format(line, format == LOG_FORMAT_JSON ? "\"%s\"" : "%s", name);
        return;
    }
    char text[32];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value)
            break;
    }
    line_add_str(line, text);
}

static void add_value(struct line *line, enum log_format format, const struct log_field *field)
{
    switch (field->kind) {
    case LOG_KIND_STR:
        add_str(line, format, field->value.str);
        return;
    case LOG_KIND_U64:
        line_add_format(line, "%llu", (unsigned long long)field->value.u64);
        return;
    case LOG_KIND_F64:
        add_f64(line, format, field->value.f64);
        return;
    case LOG_KIND_BOOL:
        line_add_str(line, field->value.boolean ? "true" : "false");
        return;
    }
    ASSERT(false && "unknown kind of log field");
}

// A field whose value could not even begin is taken back whole: a key alone is not JSON.
static void add_field(struct line *line, enum log_format format, const struct log_field *field)
{
    size_t before = line->used;
    line_add_str(line, format == LOG_FORMAT_JSON ? ",\"" : " ");
    add_escaped(line, format, field->key);
    line_add_str(line, format == LOG_FORMAT_JSON ? "\":" : "=");
    size_t value_at = line->used;
    if (!line->cut)
        add_value(line, format, field);
    if (line->cut && line->used == value_at)
        line->used = before;
}

static void add_opening(struct line *line, enum log_format format, enum log_level level,
                        const char *message)
{
    struct timespec now;
    struct tm date;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &date);
    char time[32];
    size_t bytes = strftime(time, sizeof time, "%Y-%m-%dT%H:%M:%S", &date);
    snprintf(time + bytes, sizeof time - bytes, ".%03dZ", (int)(now.tv_nsec / 1000000));

    const char *level_name = level_names[level];
    if (format == LOG_FORMAT_JSON) {
        line_add_format(line, "{\"ts\":\"%s\",\"level\":\"%s\",\"msg\":", time, level_name);
        add_quoted(line, format, message);
    } else {
        line_add_format(line, "%s %s ", time, level_name);
        add_escaped(line, format, message);
    }
}

// Uses the room that line_add left.
static void line_end(struct line *line, enum log_format format)
{
    const char *end = format == LOG_FORMAT_JSON ? line->cut ? ",\"cut\":true}\n" : "}\n"
                      : line->cut               ? " cut=true\n"
                                                : "\n";
    size_t bytes = strlen(end);
    ASSERT(bytes <= LINE_BYTES - line->used);
    memcpy(line->bytes + line->used, end, bytes);
    line->used += bytes;
}

static ssize_t write_once(const char *bytes, size_t bytes_n)
{
    ssize_t written;
    do
        written = sink == SINK_SEND
                      ? send(STDERR_FILENO, bytes, bytes_n, MSG_DONTWAIT | MSG_NOSIGNAL)
                      : write(STDERR_FILENO, bytes, bytes_n);
    while (written < 0 && errno == EINTR);
    return written;
}

static bool sink_has_room(void)
{
    struct pollfd sink_fd = {.fd = STDERR_FILENO, .events = POLLOUT};
    return poll(&sink_fd, 1, 0) == 1 && sink_fd.revents == POLLOUT;
}

// True: the line is out, whole.
static bool write_line(const struct line *line)
{
    if (atomic_load_explicit(&torn, memory_order_relaxed) && write_once("\n", 1) == 1)
        atomic_store_explicit(&torn, false, memory_order_relaxed);
    ssize_t written = write_once(line->bytes, line->used);
    if (written > 0 && (size_t)written < line->used)
        atomic_store_explicit(&torn, true, memory_order_relaxed);
    return written == (ssize_t)line->used;
}

void log_write(enum log_level level, const char *message, const struct log_field *fields,
               size_t fields_n)
{
    ASSERT((size_t)level < ARRAY_LEN(level_names));
    int errno_before = errno; // so that a line can be logged between a failure and its report
    enum log_format format = atomic_load_explicit(&configured_format, memory_order_relaxed);
    struct line line; // its 4 KiB are not worth clearing
    line.used = 0;
    line.cut = false;
    add_opening(&line, format, level, message ? message : "");
    for (size_t i = 0; i < fields_n && !line.cut; i++)
        add_field(&line, format, &fields[i]);
    line_end(&line, format);

    bool written;
    if (sink == SINK_ASK) { // nobody may take the room between the question and the line
        pthread_mutex_lock(&ask_lock);
        written = sink_has_room() && write_line(&line);
        pthread_mutex_unlock(&ask_lock);
    } else {
        written = write_line(&line);
    }
    if (!written)
        atomic_fetch_add_explicit(&lines_dropped, 1, memory_order_relaxed);
    errno = errno_before;
}
