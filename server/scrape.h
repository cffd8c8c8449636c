// The page that Prometheus reads: every figure of the daemon with its name, unit and meaning, taken
// from the modules that keep it. The table in METRICS.md lists the same; a test compares them.
#pragma once

#include "page.h"

struct service_context;

// Any thread, one at a time. Takes no lock for longer than it takes to copy a few figures. `text` is
// on the heap.
NODISCARD enum status scrape_write(struct service_context *context, enum page_format format,
                                   char **text, size_t *bytes, struct error *err);
