// The page that Prometheus reads: every figure of the daemon with its name, unit and meaning, taken
// from the modules that keep it. The table in METRICS.md lists the same; a test compares them.
#pragma once

#include "status.h"

struct service_context;

enum scrape_format {
    SCRAPE_PROMETHEUS, // text format 0.0.4
    SCRAPE_OPENMETRICS // 1.0.0
};

extern const char *const scrape_content_types[];

// Any thread, one at a time. Takes no lock for longer than it takes to copy a few figures. `text` is
// on the heap.
NODISCARD enum status scrape_write(struct service_context *context, enum scrape_format format,
                                   char **text, size_t *bytes, struct error *err);
