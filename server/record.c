#include "record.h"

#include <stdio.h>
#include <string.h>

#include "config.h"
#include "log.h"
#include "service.h"

void record_begin(struct record *record, struct service_context *context,
                  enum metrics_method method, enum metrics_transport transport)
{
    *record = (struct record){.method = method, .transport = transport, .received_ns = now_ns()};
    METRICS_ADD(context->metrics, received, 1);
}

// Between two instants of which both were reached.
static bool between(uint64_t from_ns, uint64_t to_ns, uint64_t *ns)
{
    if (from_ns == 0 || to_ns == 0)
        return false;
    // The engine's own clock readings may lie a little apart from ours.
    *ns = to_ns > from_ns ? to_ns - from_ns : 0;
    return true;
}

bool record_phase(const struct record *record, enum metrics_phase phase, uint64_t *ns)
{
    uint64_t for_room_ns;
    switch (phase) {
    case METRICS_RECEIVE:
        return between(record->received_ns, record->asked_ns, ns);
    case METRICS_QUEUE:
        if (!between(record->asked_ns, record->room_ns, &for_room_ns) ||
            !between(record->queued_ns, record->launched_ns, ns))
            return false;
        *ns += for_room_ns;
        return true;
    case METRICS_COPY_IN:
        return between(record->room_ns, record->queued_ns, ns);
    case METRICS_KERNEL:
        return between(record->launched_ns, record->done_ns, ns);
    case METRICS_COPY_OUT:
        return between(record->done_ns, record->answered_ns, ns);
    case METRICS_SEND:
        return between(record->answered_ns, record->left_ns, ns);
    case METRICS_PHASES:
        break;
    }
    ASSERT(!"no such phase");
}

// ---- the answer

// Whether the log has a line of its own for this request.
static bool wants_line(const struct record *record, struct service_context *context)
{
    const struct config *config = context->config;
    enum config_request_log which = config_now(config, request_log);
    if (which == CONFIG_REQUEST_LOG_OFF)
        return false;
    if (record->status != STATUS_OK)
        return true;
    return which == CONFIG_REQUEST_LOG_ALL &&
           atomic_fetch_add_explicit(&context->requests_answered, 1, memory_order_relaxed) %
                   config_now(config, request_log_sample) ==
               0;
}

static void keep_details(struct record *record, const struct job *job, const struct error *err)
{
    if (err)
        snprintf(record->error, sizeof record->error, "%.*s", (int)sizeof record->error - 1,
                 err->text);
    if (!job)
        return;
    record->connection = job->connection;
    record->tokens = job->operand.tokens;
    record->batch_tokens = job->batch_tokens;
    record->batch_bucket = job->batch_bucket;
    record->batch_requests = job->batch_requests;
    record->weight = job->weight ? weight_ref(job->weight) : NULL;
}

void record_answer(struct record *record, struct service_context *context, const struct job *job,
                   const struct error *err)
{
    record->status = err ? err->status : STATUS_OK;
    if (job && job->batch_requests > 0) { // it was launched
        record->queued_ns = job->queued_ns;
        record->launched_ns = job->launched_ns;
        record->done_ns = job->done_ns;
    }
    metrics_count_request(context->metrics, record->method, record->transport, record->status);
    if (job)
        job_count(job, record->status);
    record->logged = wants_line(record, context);
    record->traced = tracer_takes(context->tracer, &record->trace, record->span_id);
    if (record->logged || record->traced)
        keep_details(record, job, record->status == STATUS_OK ? NULL : err);
}

void record_timing(const struct record *record, char text[RECORD_TIMING_BYTES])
{
    size_t used = 0;
    text[0] = '\0';
    for (enum metrics_phase phase = 0; phase < METRICS_PHASES; phase++) {
        uint64_t ns;
        if (!record_phase(record, phase, &ns))
            continue;
        int n = snprintf(text + used, RECORD_TIMING_BYTES - used, "%s%s;dur=%.6f", used ? ", " : "",
                         metrics_phase_names[phase], (double)ns / 1e6);
        used += n > 0 && (size_t)n < RECORD_TIMING_BYTES - used ? (size_t)n : 0;
    }
    text[used] = '\0';
}

// ---- the end

static uint64_t end_ns(const struct record *record)
{
    if (record->left_ns)
        return record->left_ns;
    return record->answered_ns ? record->answered_ns : now_ns();
}

static void write_line(const struct record *record, uint64_t total_ns)
{
    enum { FIELDS_MAX = 24 };
    static const char *const keys[] = {
        [METRICS_RECEIVE] = "receive_ns",   [METRICS_QUEUE] = "queue_ns",
        [METRICS_COPY_IN] = "copy_in_ns",   [METRICS_KERNEL] = "kernel_ns",
        [METRICS_COPY_OUT] = "copy_out_ns", [METRICS_SEND] = "send_ns",
    };
    struct log_field fields[FIELDS_MAX] = {
        LOG_STR("method", metrics_method_names[record->method]),
        LOG_STR("transport", metrics_transport_names[record->transport]),
        LOG_STR("code", status_name(record->status)),
        LOG_U64("request_id", record->request_id),
        LOG_U64("connection", record->connection),
        LOG_U64("tokens", record->tokens),
        LOG_U64("total_ns", total_ns),
    };
    size_t n = 7;
    if (record->weight)
        fields[n++] = LOG_STR("weight", record->weight->name);
    if (record->batch_requests > 0) {
        fields[n++] = LOG_U64("batch_tokens", record->batch_tokens);
        fields[n++] = LOG_U64("batch_bucket", record->batch_bucket);
        fields[n++] = LOG_U64("batch_requests", record->batch_requests);
    }
    for (enum metrics_phase phase = 0; phase < METRICS_PHASES; phase++) {
        uint64_t ns;
        if (record_phase(record, phase, &ns))
            fields[n++] = LOG_U64(keys[phase], ns);
    }
    char trace_id[2 * TRACE_ID_BYTES + 1], span_id[2 * TRACE_SPAN_ID_BYTES + 1];
    if (record->trace.given || record->traced) {
        trace_hex(record->trace.trace_id, TRACE_ID_BYTES, trace_id);
        fields[n++] = LOG_STR("trace_id", trace_id);
    }
    if (record->traced) {
        trace_hex(record->span_id, TRACE_SPAN_ID_BYTES, span_id);
        fields[n++] = LOG_STR("span_id", span_id);
    }
    if (record->status != STATUS_OK)
        fields[n++] = LOG_STR("error", record->error);
    ASSERT(n <= FIELDS_MAX);
    log_write(LOG_LEVEL_INFO, "request", fields, n); // whatever log_level: it has a key of its own
}

// What lies between two instants, if both were reached.
static void add_step(struct trace_request *request, enum metrics_phase phase, uint64_t start_ns,
                     uint64_t step_end_ns)
{
    if (start_ns == 0 || step_end_ns <= start_ns)
        return;
    ASSERT(request->steps_n < TRACE_STEPS_MAX);
    request->steps[request->steps_n++] = (struct trace_step){
        .name = metrics_phase_names[phase], .start_ns = start_ns, .end_ns = step_end_ns};
}

static void submit_trace(const struct record *record, struct service_context *context)
{
    struct trace_request request = {
        .context = record->trace,
        .method = metrics_method_paths[record->method],
        .transport = metrics_transport_names[record->transport],
        .status = record->status,
        .request_id = record->request_id,
        .start_ns = record->received_ns,
        .end_ns = end_ns(record),
        .tokens = record->tokens,
        .batch_tokens = record->batch_tokens,
        .batch_bucket = record->batch_bucket,
        .batch_requests = record->batch_requests,
    };
    memcpy(request.span_id, record->span_id, sizeof request.span_id);
    memcpy(request.error, record->error, sizeof request.error);
    if (record->weight)
        snprintf(request.weight, sizeof request.weight, "%.*s", (int)sizeof request.weight - 1,
                 record->weight->name);
    add_step(&request, METRICS_RECEIVE, record->received_ns, record->asked_ns);
    add_step(&request, METRICS_QUEUE, record->asked_ns, record->room_ns);
    add_step(&request, METRICS_COPY_IN, record->room_ns, record->queued_ns);
    add_step(&request, METRICS_QUEUE, record->queued_ns, record->launched_ns);
    add_step(&request, METRICS_KERNEL, record->launched_ns, record->done_ns);
    add_step(&request, METRICS_COPY_OUT, record->done_ns, record->answered_ns);
    add_step(&request, METRICS_SEND, record->answered_ns, record->left_ns);
    tracer_submit(context->tracer, &request);
}

void record_end(struct record *record, struct service_context *context)
{
    uint64_t ns, total_ns = 0;
    for (enum metrics_phase phase = 0; phase < METRICS_PHASES; phase++)
        if (record_phase(record, phase, &ns))
            metrics_observe_phase(context->metrics, phase, ns);
    if (between(record->received_ns, end_ns(record), &total_ns))
        metrics_observe_duration(context->metrics, record->method, total_ns);
    // One that waited and then gave way to another is not among them: it was let in.
    if (record->status == STATUS_RESOURCE_EXHAUSTED && record->room_ns == 0 &&
        between(record->received_ns, record->answered_ns, &total_ns))
        metrics_observe_refusal(context->metrics, total_ns);
    if (record->logged)
        write_line(record, total_ns);
    if (record->traced)
        submit_trace(record, context);
    if (record->weight)
        weight_unref(record->weight);
}
