// JSON of unknown origin. jansson turns one byte of input into some fifty of memory, and recurses
// for each bracket; a scan over the text refuses what would cost too much before jansson sees it.
// Any thread.
#pragma once

#include <jansson.h>

#include "status.h"

enum { JSON_LIMITED_DEPTH_MAX = 16 };

struct json_limits {
    uint32_t depth_max;        // of nested arrays and objects; at most JSON_LIMITED_DEPTH_MAX
    uint64_t values_max;       // in the whole text, containers included
    uint64_t array_values_max; // in any one array
};

// json_loadb, but for what jansson makes of a lack of memory: NULL then, and `out_of_memory`.
json_t *json_load_whole(const char *text, size_t bytes, size_t flags, json_error_t *fault,
                        bool *out_of_memory);

// Duplicate keys are errors. `label` names the text in errors, FAILED_PRECONDITION unless there is
// no memory.
NODISCARD enum status json_load_limited(const char *text, size_t bytes,
                                        const struct json_limits *limits, const char *label,
                                        json_t **root, struct error *err);
