// gnuplot reads its commands and, between them, its data from a pipe. It draws to a file beside the
// one that was asked for, which is renamed once it is whole. Text goes in as gnuplot's single-quoted
// strings, in which a quote is doubled and nothing else means anything.
#include "ctl_plot.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static bool gnuplot_is_there(void)
{
    int status = system("gnuplot --version >/dev/null 2>&1"); // NOLINT: no text of others is in it
    return status != -1 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool ctl_plot_possible(const char *file)
{
    size_t length = strlen(file);
    if (length < 5 || strcmp(file + length - 4, ".png") != 0) {
        ctl_usage_error("--plot: expected a file that ends in .png, got \"%s\"", file);
        return false;
    }
    if (strpbrk(file, "\n\r")) {
        ctl_usage_error("--plot: a line break in the file's name");
        return false;
    }
    if (!gnuplot_is_there()) {
        ctl_usage_error("--plot: gnuplot is not installed, or does not run (Debian: gnuplot-nox)");
        return false;
    }
    FILE *probe = fopen(file, "ae");
    if (!probe) {
        ctl_usage_error("--plot: %s cannot be written: %s", file, strerror(errno));
        return false;
    }
    bool was_empty = ftell(probe) == 0;
    fclose(probe);
    if (was_empty)
        unlink(file);
    return true;
}

void ctl_plot_add(struct ctl_plot_points *points, uint64_t at_ns, uint64_t calls)
{
    if (points->every == 0)
        points->every = 1;
    if (++points->skipped < points->every)
        return;
    points->skipped = 0;
    if (points->n == CTL_PLOT_POINTS_MAX) {
        for (uint32_t i = 0; i < CTL_PLOT_POINTS_MAX / 2; i++)
            points->points[i] = points->points[2 * i + 1];
        points->n /= 2;
        points->every *= 2;
    }
    points->points[points->n++] = (struct ctl_plot_point){at_ns, calls};
}

static void put_quoted(FILE *gnuplot, const char *text)
{
    putc('\'', gnuplot);
    for (; *text; text++) {
        if (*text == '\'')
            putc('\'', gnuplot);
        putc(*text == '\n' ? ' ' : *text, gnuplot);
    }
    putc('\'', gnuplot);
}

// Ranges are ours to give: where all values are one, gnuplot finds none, and complains.

// x is 1 / (1 - share): p90 is 10, p99 is 100, and so on.
static void put_latency(FILE *gnuplot, const struct bench_histogram *latency)
{
    double least = (double)bench_histogram_at(latency, 0) / 1000,
           most = (double)latency->max / 1000;
    double last = latency->total > 2 ? (double)latency->total : 2;
    fprintf(gnuplot, "set xrange [1:%.6g]\nset yrange [%.6g:%.6g]\n", last, least / 1.1 + 1e-3,
            most * 1.1 + 2e-3);
    fputs(
        "set logscale x 10\nset logscale y 10\nset xlabel 'percentile'\nset ylabel 'latency, us'\n"
        "set xtics ('p50' 2, 'p90' 10, 'p99' 100, 'p99.9' 1000, 'p99.99' 10000, "
        "'p99.999' 100000)\n"
        "plot '-' using 1:2 with lines linewidth 2 notitle\n",
        gnuplot);
    double x = 1;
    while (x < last) {
        fprintf(gnuplot, "%.6g %.6g\n", x,
                (double)bench_histogram_at(latency, 1 - 1 / x) / 1000 + 1e-3);
        x *= 1.05;
    }
    fprintf(gnuplot, "%.6g %.6g\ne\n", last, most + 1e-3);
}

static double seconds_at(const struct ctl_plot_points *points, uint32_t i)
{
    return (double)(points->points[i].at_ns - points->points[0].at_ns) / 1e9;
}

// Of the calls between a point and the one before; counts begin anew after the warm-up.
static double rate_at(const struct ctl_plot_points *points, uint32_t i)
{
    const struct ctl_plot_point *from = &points->points[i - 1], *to = &points->points[i];
    double s = (double)(to->at_ns - from->at_ns) / 1e9;
    return s > 0 && to->calls >= from->calls ? (double)(to->calls - from->calls) / s : 0;
}

static void put_rate(FILE *gnuplot, const struct ctl_plot_points *points)
{
    double most = 1;
    for (uint32_t i = 1; i < points->n; i++)
        if (rate_at(points, i) > most)
            most = rate_at(points, i);
    fprintf(gnuplot, "unset logscale\nset xrange [0:%.6g]\nset yrange [0:%.6g]\n",
            seconds_at(points, points->n - 1) + 1e-3, most * 1.1);
    fputs("set xtics auto\nset xlabel 'seconds'\nset ylabel 'calls a second'\n"
          "plot '-' using 1:2 with lines linewidth 2 notitle\n",
          gnuplot);
    for (uint32_t i = 1; i < points->n; i++)
        fprintf(gnuplot, "%.6g %.6g\n", seconds_at(points, i), rate_at(points, i));
    fputs("e\n", gnuplot);
}

bool ctl_plot(const char *file, const char *title, const struct bench_histogram *latency,
              const struct ctl_plot_points *points)
{
    char part[4096];
    int length = snprintf(part, sizeof part, "%s.part", file);
    if (length < 0 || (size_t)length >= sizeof part) {
        fprintf(stderr, "einsumctl: --plot: the file's name is too long\n");
        return false;
    }
    FILE *gnuplot = popen("gnuplot", "we"); // NOLINT: no text of others is in it
    if (!gnuplot) {
        fprintf(stderr, "einsumctl: --plot: gnuplot cannot be started: %s\n", strerror(errno));
        return false;
    }
    fputs("set terminal pngcairo size 1200, 500 noenhanced\nset output ", gnuplot);
    put_quoted(gnuplot, part);
    fputs("\nset grid\nset multiplot layout 1, 2 title ", gnuplot);
    put_quoted(gnuplot, title);
    putc('\n', gnuplot);
    put_latency(gnuplot, latency);
    put_rate(gnuplot, points);
    fputs("unset multiplot\nunset output\n", gnuplot);
    int status = pclose(gnuplot);
    if (status == 0 && rename(part, file) == 0)
        return true;
    fprintf(stderr, "einsumctl: --plot: gnuplot could not draw %s\n", file);
    unlink(part);
    return false;
}
