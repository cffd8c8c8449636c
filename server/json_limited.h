// JSON of unknown origin. jansson turns one byte of input into some fifty of memory, and recurses
// for each bracket; a scan over the text refuses what would cost too much before jansson sees it.
// Any thread; keeps no state.
#pragma once

#include <jansson.h>

#include "status.h"

enum { JSON_LIMITED_DEPTH_MAX = 16 };

struct json_limits {
    uint32_t depth_max;        // of nested arrays and objects; at most JSON_LIMITED_DEPTH_MAX
    uint64_t values_max;       // in the whole text, containers included
    uint64_t array_values_max; // in any one array
};

// Duplicate keys are errors. `label` names the text in errors, all of them FAILED_PRECONDITION.
NODISCARD enum status json_load_limited(const char *text, size_t bytes,
                                        const struct json_limits *limits, const char *label,
                                        json_t **root, struct error *err);
