// A benchmark's result as a picture, drawn by gnuplot: latency by percentile, and calls a second over
// time.
#pragma once

#include "bench.h"
#include "ctl.h"

enum { CTL_PLOT_POINTS_MAX = 1200 };

// How many calls had been answered when. Once full, every other point goes, and from then on only
// every other is taken.
struct ctl_plot_points {
    uint32_t n, every, skipped;
    struct ctl_plot_point {
        uint64_t at_ns, calls;
    } points[CTL_PLOT_POINTS_MAX];
};
void ctl_plot_add(struct ctl_plot_points *points, uint64_t at_ns, uint64_t calls);

// Before a long run: whether gnuplot is there and `file` can be written. Says so if not.
NODISCARD bool ctl_plot_possible(const char *file);
// `title` is shown as it is; at least three points. false: said so.
NODISCARD bool ctl_plot(const char *file, const char *title, const struct bench_histogram *latency,
                        const struct ctl_plot_points *points);
