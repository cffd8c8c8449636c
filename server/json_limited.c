// The scan knows only strings, brackets and commas: enough to count values and depth exactly in
// valid JSON. In anything else its counts mean little, but jansson stops at the first fault, so it
// never builds more than was counted up to there.
#include "json_limited.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>

struct scan {
    const struct json_limits *limits;
    uint64_t values;
    uint32_t depth;
    uint64_t commas[JSON_LIMITED_DEPTH_MAX + 1]; // in the container open at each depth
    bool array[JSON_LIMITED_DEPTH_MAX + 1];
};

// The index of the closing quote, or `bytes`.
static size_t skip_string(const char *text, size_t bytes, size_t opening)
{
    size_t at = opening + 1;
    while (at < bytes && text[at] != '"')
        at += text[at] == '\\' ? 2 : 1;
    return at < bytes ? at : bytes;
}

static enum status scan_open(struct scan *scan, bool array, const char *label, struct error *err)
{
    if (scan->depth == scan->limits->depth_max)
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: JSON nested deeper than %" PRIu32,
                         label, scan->limits->depth_max);
    scan->depth++;
    scan->values++;
    scan->commas[scan->depth] = 0;
    scan->array[scan->depth] = array;
    return STATUS_OK;
}

static enum status scan_comma(struct scan *scan, const char *label, struct error *err)
{
    scan->values++;
    scan->commas[scan->depth]++;
    if (scan->array[scan->depth] && scan->commas[scan->depth] >= scan->limits->array_values_max)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: JSON array of more than %" PRIu64 " values", label,
                         scan->limits->array_values_max);
    return STATUS_OK;
}

static enum status scan_text(const char *text, size_t bytes, const struct json_limits *limits,
                             const char *label, struct error *err)
{
    ASSERT(limits->depth_max <= JSON_LIMITED_DEPTH_MAX);
    struct scan scan = {.limits = limits};
    enum status status = STATUS_OK;
    for (size_t at = 0; at < bytes && status == STATUS_OK; at++) {
        switch (text[at]) {
        case '"':
            at = skip_string(text, bytes, at);
            break;
        case '{':
        case '[':
            status = scan_open(&scan, text[at] == '[', label, err);
            break;
        case '}':
        case ']':
            if (scan.depth > 0)
                scan.depth--;
            break;
        case ',':
            status = scan_comma(&scan, label, err);
            break;
        default:
            break;
        }
        if (status == STATUS_OK && scan.values > limits->values_max)
            status =
                error_set(err, STATUS_FAILED_PRECONDITION,
                          "%s: JSON of more than %" PRIu64 " values", label, limits->values_max);
    }
    return status;
}

// ---- memory

// jansson cuts a token short that it finds no memory for, and goes on: a number of fewer digits, a
// name without its end. So what it asked for in vain is remembered.
static __thread bool asked_in_vain;

static void *json_alloc(size_t bytes)
{
    void *memory = malloc(bytes);
    asked_in_vain |= !memory;
    return memory;
}

static void watch_memory(void)
{
    json_set_alloc_funcs(json_alloc, free);
}

json_t *json_load_whole(const char *text, size_t bytes, size_t flags, json_error_t *fault,
                        bool *out_of_memory)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_memory);
    asked_in_vain = false;
    json_t *root = json_loadb(text, bytes, flags, fault);
    *out_of_memory = asked_in_vain;
    if (!asked_in_vain)
        return root;
    json_decref(root);
    return NULL;
}

// ---- limits

enum status json_load_limited(const char *text, size_t bytes, const struct json_limits *limits,
                              const char *label, json_t **root, struct error *err)
{
    enum status status = scan_text(text, bytes, limits, label, err);
    if (status != STATUS_OK)
        return status;
    json_error_t fault;
    bool out_of_memory;
    *root = json_load_whole(text, bytes, JSON_REJECT_DUPLICATES, &fault, &out_of_memory);
    if (out_of_memory)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "%s: out of memory", label);
    if (!*root)
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: JSON, line %d column %d: %s", label,
                         fault.line, fault.column, fault.text);
    return STATUS_OK;
}
