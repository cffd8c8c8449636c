// A page of metrics on its way: families of samples, in Prometheus's text format or in OpenMetrics.
// One thread. What goes wrong on the way (there is only memory that can run out) page_close tells.
#pragma once

#include <stdio.h>

#include "status.h"

enum page_format {
    PAGE_PROMETHEUS, // text format 0.0.4
    PAGE_OPENMETRICS // 1.0.0
};
extern const char *const page_content_types[];

enum page_type { PAGE_COUNTER, PAGE_GAUGE, PAGE_HISTOGRAM };

struct page {
    FILE *out;
    enum page_format format;
    const char *name; // of the family at hand
    char *text;
    size_t bytes;
};

NODISCARD enum status page_open(struct page *page, enum page_format format, struct error *err);
// The page's text, on the heap.
NODISCARD enum status page_close(struct page *page, char **text, size_t *bytes, struct error *err);

// What follows belongs to this family. `name` is that of its samples, a counter's with its _total.
void page_family(struct page *page, const char *name, enum page_type type, const char *help);
// `labels`: `a="b",c="d"`, or "".
void page_u64(struct page *page, const char *labels, uint64_t value);
void page_f64(struct page *page, const char *labels, double value);
// Buckets in ascending order, then their end, which holds the bucket without a bound as well.
void page_bucket(struct page *page, const char *labels, double bound, uint64_t cumulative);
void page_histogram_end(struct page *page, const char *labels, double sum, uint64_t n);

// Adds one label of any text, escaped, or as much of it as has room.
enum { PAGE_LABELS_BYTES = 512 };
void page_label(char labels[PAGE_LABELS_BYTES], const char *key, const char *value);
