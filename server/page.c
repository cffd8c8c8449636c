// Where the formats differ (the names of counters, the end mark) is in page_family and page_close.
// All else is the same: OpenMetrics wants bounds that look like floats, and Prometheus lets them.
#include "page.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

const char *const page_content_types[] = {
    [PAGE_PROMETHEUS] = "text/plain; version=0.0.4; charset=utf-8",
    [PAGE_OPENMETRICS] = "application/openmetrics-text; version=1.0.0; charset=utf-8",
};

enum status page_open(struct page *page, enum page_format format, struct error *err)
{
    *page = (struct page){.format = format};
    page->out = open_memstream(&page->text, &page->bytes);
    return page->out ? STATUS_OK
                     : error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the page");
}

enum status page_close(struct page *page, char **text, size_t *bytes, struct error *err)
{
    if (page->format == PAGE_OPENMETRICS)
        fputs("# EOF\n", page->out);
    bool whole = !ferror(page->out);
    if (fclose(page->out) != 0 || !whole) {
        free(page->text);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the page");
    }
    *text = page->text;
    *bytes = page->bytes;
    return STATUS_OK;
}

void page_family(struct page *page, const char *name, enum page_type type, const char *help)
{
    static const char *const types[] = {"counter", "gauge", "histogram"};
    size_t length = strlen(name);
    if (type == PAGE_COUNTER && page->format == PAGE_OPENMETRICS)
        length -= strlen("_total");
    fprintf(page->out, "# HELP %.*s %s\n# TYPE %.*s %s\n", (int)length, name, help, (int)length,
            name, types[type]);
    page->name = name;
}

static void head(struct page *page, const char *suffix, const char *labels)
{
    const char *open = labels[0] ? "{" : "", *close = labels[0] ? "}" : "";
    fprintf(page->out, "%s%s%s%s%s ", page->name, suffix, open, labels, close);
}

void page_u64(struct page *page, const char *labels, uint64_t value)
{
    head(page, "", labels);
    fprintf(page->out, "%" PRIu64 "\n", value);
}

void page_f64(struct page *page, const char *labels, double value)
{
    head(page, "", labels);
    fprintf(page->out, "%.17g\n", value);
}

void page_bucket(struct page *page, const char *labels, double bound, uint64_t cumulative)
{
    char text[32];
    snprintf(text, sizeof text, "%g", bound);
    bool whole = text[strspn(text, "0123456789")] == '\0';
    fprintf(page->out, "%s_bucket{%s%sle=\"%s%s\"} %" PRIu64 "\n", page->name, labels,
            labels[0] ? "," : "", text, whole ? ".0" : "", cumulative);
}

void page_histogram_end(struct page *page, const char *labels, double sum, uint64_t n)
{
    fprintf(page->out, "%s_bucket{%s%sle=\"+Inf\"} %" PRIu64 "\n", page->name, labels,
            labels[0] ? "," : "", n);
    head(page, "_sum", labels);
    fprintf(page->out, "%.17g\n", sum);
    head(page, "_count", labels);
    fprintf(page->out, "%" PRIu64 "\n", n);
}

void page_label(char labels[PAGE_LABELS_BYTES], const char *key, const char *value)
{
    size_t used = strlen(labels);
    int n = snprintf(labels + used, PAGE_LABELS_BYTES - used, "%s%s=\"", used ? "," : "", key);
    ASSERT(n > 0 && used + (size_t)n + 2 < PAGE_LABELS_BYTES); // keys are ours, and few
    used += (size_t)n;
    for (; *value && used + 4 < PAGE_LABELS_BYTES; value++) {
        if (*value == '\\' || *value == '"' || *value == '\n')
            labels[used++] = '\\';
        labels[used++] = *value == '\n' ? 'n' : *value;
    }
    labels[used++] = '"';
    labels[used] = '\0';
}
