// What following one request costs, alone on a thread: the clock readings, counters and histograms
// that record.c adds to each. The least of many rounds, since others disturb the machine.
#include <stdio.h>
#include <stdlib.h>

#include "server/config.h"
#include "server/record.h"
#include "server/service.h"

enum { ROUNDS = 200, REQUESTS = 10000, BAR_NS = 400 };

static uint64_t round_ns(struct service_context *context)
{
    struct job job = {.batch_requests = 1};
    uint64_t started_ns = now_ns();
    for (int i = 0; i < REQUESTS; i++) {
        struct record record;
        record_begin(&record, context, METRICS_EINSUM, METRICS_UNARY);
        record.asked_ns = record.room_ns = now_ns();
        job.queued_ns = record.asked_ns + 1000;
        job.launched_ns = record.asked_ns + 20000;
        job.done_ns = record.asked_ns + 300000;
        record_answer(&record, context, &job, NULL);
        record.answered_ns = now_ns() + 400000;
        record.left_ns = now_ns() + 500000;
        record_end(&record, context);
    }
    return (now_ns() - started_ns) / REQUESTS;
}

int main(void)
{
    struct service_context *context = calloc(1, sizeof *context);
    static struct config config; // neither log nor traces
    struct error err;
    if (!context || metrics_create(&context->metrics, &err) != STATUS_OK)
        return EXIT_FAILURE;
    context->config = &config;
    uint64_t least_ns = UINT64_MAX, clock_ns = UINT64_MAX;
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t ns = round_ns(context);
        least_ns = ns < least_ns ? ns : least_ns;
        uint64_t started_ns = now_ns();
        for (int j = 0; j < REQUESTS; j++)
            (void)now_ns();
        ns = (now_ns() - started_ns) / REQUESTS;
        clock_ns = ns < clock_ns ? ns : clock_ns;
    }
    printf("one request: %llu ns, of that 4 readings of the clock at %llu ns; bar %d ns\n",
           (unsigned long long)least_ns, (unsigned long long)clock_ns, BAR_NS);
    metrics_destroy(context->metrics);
    free(context);
    return least_ns <= BAR_NS ? EXIT_SUCCESS : EXIT_FAILURE;
}
