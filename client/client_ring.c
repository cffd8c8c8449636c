// Requests by the ring: submitted by whoever starts them, completed by one reaper at a time.
//
//     start --> [slot?] --> submitted --completion--> ended: a blocked caller wakes, or a callback
//        |         no: pending                  |
//        |                                      '--> paused, and submitted again: advised to
//        '-- not for the ring: the caller goes by gRPC
//
// The reaper is the ring's thread, or, while its own call is the only one, a blocked caller: then
// nobody else need wake up for it. Callbacks run on the ring's thread alone.

#include "client_shared.h"

#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    SLICE_NS = 50 * 1000 * 1000,      // of sleep; then the connection is looked at
    RECONNECT_NS = 200 * 1000 * 1000, // between attempts
    IDLE_NS = 1000 * 1000 * 1000,
};

struct einsum_client_ring_call {
    struct einsum_client_ring_call *next; // pending, ready or paused
    uint64_t ticket;
    struct einsum_ring_submission submission;
    uint64_t epoch;                        // of the connection that its numbers are of
    char weight[EINSUM_SHARED_TEXT_BYTES]; // names, to be numbered anew after a reconnect
    char kernel[EINSUM_SHARED_TEXT_BYTES];
    struct einsum_client_expected expected;
    einsum_client_on_response *on_response; // NULL: a caller is blocked
    void *context;
    uint64_t started_ns, deadline_ns, due_ns;
    uint32_t attempts;
    bool submitted; // at some time: the daemon may know it
    struct einsum_client_response response;
    struct einsum_client_error error; // status OK: none
    _Atomic uint32_t done;            // of a blocked caller: 1, and woken, when it has ended
};

static void futex_sleep(uint32_t *word, uint32_t expected, bool shared, uint64_t ns)
{
    struct timespec time = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    syscall(SYS_futex, word, shared ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, expected, &time, NULL, 0);
}

// ---- submitting ---------------------------------------------------------------------------------

void einsum_client_ring_reset(struct einsum_client_shared *shared)
{
    // What was submitted before has been failed; the daemon has zeroed the header.
    shared->submitted = shared->read = shared->in_flight = 0;
    shared->free_slots_n = shared->entries;
    for (uint32_t i = 0; i < shared->entries; i++)
        shared->free_slots[i] = i;
}

// The caller holds the lock. True: the daemon sleeps, and its doorbell is to be rung.
static bool submit_locked(struct einsum_client_shared *shared, struct einsum_client_ring_call *call)
{
    uint32_t slot = shared->free_slots[--shared->free_slots_n];
    shared->slots[slot] = call;
    call->submission.id = slot;
    uint32_t cuda = call->expected.place.cuda;
    call->submission.region = cuda ? shared->cuda[cuda - 1].region : shared->region;
    uint64_t now = einsum_client_now_ns();
    call->submission.timeout_ns = call->deadline_ns == UINT64_MAX ? 0
                                  : call->deadline_ns > now       ? call->deadline_ns - now
                                                                  : 1;
    call->attempts++;
    call->submitted = true;
    shared->submissions[shared->submitted & (shared->entries - 1)] = call->submission;
    einsum_ring_tell(&shared->header->submit_tail, ++shared->submitted);
    shared->in_flight++;
    return einsum_ring_look(&shared->header->daemon_sleeps) != 0;
}

static void ring_doorbell(const struct einsum_client_shared *shared)
{
    uint64_t one = 1;
    (void)!write(shared->doorbell, &one, sizeof one);
}

static void append(struct einsum_client_ring_call *call, struct einsum_client_ring_call ***end)
{
    call->next = NULL;
    **end = call;
    *end = &call->next;
}

static void finish_locked(struct einsum_client_shared *shared,
                          struct einsum_client_ring_call *call);

static void fail_locked(struct einsum_client_shared *shared, struct einsum_client_ring_call *call,
                        enum einsum_client_status status, const char *text)
{
    einsum_client_error_set(&call->error, status, "%s", text);
    finish_locked(shared, call);
}

// Submits it, or lets it wait for a slot, or fails it.
static void launch_locked(struct einsum_client_shared *shared, struct einsum_client_ring_call *call)
{
    if (!shared->has_ring || call->epoch != shared->epoch)
        fail_locked(shared, call, EINSUM_CLIENT_UNAVAILABLE,
                    "the connection for shared memory was lost");
    else if (shared->free_slots_n == 0)
        append(call, &shared->pending_end);
    else if (submit_locked(shared, call))
        ring_doorbell(shared);
}

// ---- ending -------------------------------------------------------------------------------------

// Whether it goes on after a pause.
static bool try_again(struct einsum_client_shared *shared, struct einsum_client_ring_call *call)
{
    const struct einsum_client_options *options = &shared->client->options;
    const struct einsum_client_error *error = &call->error;
    bool again = error->status == EINSUM_CLIENT_UNAVAILABLE ||
                 (error->status == EINSUM_CLIENT_RESOURCE_EXHAUSTED && error->from_server);
    if (!again || shared->stopping)
        return false;
    shared->random = shared->random * 6364136223846793005u + 1442695040888963407u;
    uint64_t due_ns =
        einsum_client_now_ns() +
        einsum_client_pause_ns(options, call->attempts, error->retry_after_ms, shared->random);
    if (due_ns >= call->deadline_ns ||
        !einsum_client_may_retry(options, call->attempts, options->attempts_max, call->started_ns,
                                 due_ns))
        return false;
    call->due_ns = due_ns;
    call->next = shared->paused;
    shared->paused = call;
    pthread_cond_signal(&shared->changed);
    return true;
}

// It has ended, well or not.
static void finish_locked(struct einsum_client_shared *shared, struct einsum_client_ring_call *call)
{
    if (call->error.status != EINSUM_CLIENT_OK && try_again(shared, call))
        return;
    call->error.attempts = call->response.attempts = call->attempts;
    call->response.latency_ns = einsum_client_now_ns() - call->started_ns;
    if (call->on_response) {
        append(call, &shared->ready_end);
        if (shared->reaper != REAPER_THREAD)
            pthread_cond_signal(&shared->changed);
        return;
    }
    atomic_store_explicit(&call->done, 1, memory_order_release);
    if (call != shared->own)
        syscall(SYS_futex, &call->done, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void translate(struct einsum_client_ring_call *call,
                      const struct einsum_ring_completion *from)
{
    struct einsum_client_response *response = &call->response;
    call->error.status = EINSUM_CLIENT_OK;
    if (from->status == 0) {
        response->request_id = call->expected.request_id;
        response->tokens = from->tokens;
        response->groups = from->groups;
        response->output_dim = from->output_dim;
        response->output_type = call->expected.output_type;
        response->batch_tokens = from->batch_tokens;
        response->batch_bucket = from->batch_bucket;
        response->batch_requests = from->batch_requests;
        response->queue_ns = from->queue_ns;
        response->run_ns = from->run_ns;
        response->parts = from->parts;
        response->has_output_crc32c = from->checksums & EINSUM_RING_SUM_OUTPUT;
        response->output_crc32c = from->output_crc32c;
        einsum_client_accept_placed(&call->expected, response, &call->error);
        return;
    }
    memset(&call->error, 0, sizeof call->error);
    call->error.status = from->status <= EINSUM_CLIENT_UNAUTHENTICATED
                             ? (enum einsum_client_status)from->status
                             : EINSUM_CLIENT_UNKNOWN;
    call->error.from_server = true;
    call->error.retry_after_ms = from->retry_after_ms;
    einsum_client_clean_text(call->error.field, sizeof call->error.field, from->field,
                             strnlen(from->field, sizeof from->field));
    einsum_client_clean_text(call->error.text, sizeof call->error.text, from->text,
                             strnlen(from->text, sizeof from->text));
}

// The lock is let go of while the output is copied, so that others may submit.
static void take_completion_locked(struct einsum_client_shared *shared)
{
    struct einsum_ring_completion completion;
    const struct einsum_ring_completion *entry =
        &shared->completions[shared->read & (shared->entries - 1)];
    memcpy(&completion, entry, offsetof(struct einsum_ring_completion, field));
    if (completion.status != 0)
        completion = *entry;
    einsum_ring_set(&shared->header->complete_head, ++shared->read);
    struct einsum_client_ring_call *call =
        completion.id < shared->entries ? shared->slots[completion.id] : NULL;
    if (!call)
        return; // the daemon breaks the protocol
    shared->slots[completion.id] = NULL;
    shared->in_flight--;
    pthread_mutex_unlock(&shared->lock);
    translate(call, &completion);
    pthread_mutex_lock(&shared->lock);
    shared->free_slots[shared->free_slots_n++] = (uint32_t)completion.id;
    struct einsum_client_ring_call *next = shared->pending;
    if (next) {
        shared->pending = next->next;
        if (!shared->pending)
            shared->pending_end = &shared->pending;
        launch_locked(shared, next);
    }
    finish_locked(shared, call);
}

// Reads what has been completed; returns how many. The caller is the reaper and holds the lock.
static uint32_t reap_locked(struct einsum_client_shared *shared)
{
    uint32_t n = 0;
    uint64_t epoch = shared->epoch;
    while (shared->has_ring && shared->epoch == epoch &&
           einsum_ring_get(&shared->header->complete_tail) != shared->read) {
        take_completion_locked(shared);
        n++;
    }
    return n;
}

void einsum_client_ring_fail(struct einsum_client_shared *shared)
{
    static const char text[] = "the connection for shared memory was lost";
    struct einsum_client_ring_call *pending = shared->pending;
    shared->pending = NULL;
    shared->pending_end = &shared->pending;
    for (uint32_t i = 0; i < shared->entries && shared->slots; i++) {
        struct einsum_client_ring_call *call = shared->slots[i];
        shared->slots[i] = NULL;
        if (call)
            fail_locked(shared, call, EINSUM_CLIENT_UNAVAILABLE, text);
    }
    shared->in_flight = 0;
    while (pending) {
        struct einsum_client_ring_call *next = pending->next;
        fail_locked(shared, pending, EINSUM_CLIENT_UNAVAILABLE, text);
        pending = next;
    }
}

// ---- waiting ------------------------------------------------------------------------------------

// A daemon that answers nothing long after a deadline hangs: what it was given is not waited for.
static void give_up_if_late(struct einsum_client_shared *shared)
{
    uint64_t now = einsum_client_now_ns();
    uint64_t stall_ns = shared->client->options.stall_ms * 1000000ull;
    bool late = false;
    pthread_mutex_lock(&shared->lock);
    for (uint32_t i = 0; i < shared->entries; i++) {
        const struct einsum_client_ring_call *call = shared->slots[i];
        late = late || (call && now > call->deadline_ns && now - call->deadline_ns > stall_ns);
    }
    pthread_mutex_unlock(&shared->lock);
    if (late)
        einsum_client_shared_disconnect(shared);
}

static bool completed(const struct einsum_client_shared *shared)
{
    return einsum_ring_look(&shared->header->complete_tail) != shared->read;
}

// Until something is completed, or a while has passed. The caller is the reaper, without the lock.
static void wait_for_completion(struct einsum_client_shared *shared, uint64_t at_most_ns)
{
    uint64_t begin = einsum_client_now_ns(), waited = 0;
    while (!completed(shared) && einsum_spin_on(&shared->spin, waited))
        waited = einsum_client_now_ns() - begin;
    if (completed(shared)) {
        einsum_spin_adapt(&shared->spin, waited);
        return;
    }
    struct einsum_ring_word *sleeps = &shared->header->caller_sleeps;
    einsum_ring_tell(sleeps, 1);
    if (!completed(shared) && !einsum_ring_look(&shared->header->closed))
        futex_sleep(&sleeps->value, 1, true, at_most_ns);
    einsum_ring_set(sleeps, 0);
    einsum_spin_adapt(&shared->spin, einsum_client_now_ns() - begin);
    if (!completed(shared) && einsum_client_shared_alive(shared))
        give_up_if_late(shared);
}

// ---- the thread ---------------------------------------------------------------------------------

static void call_back(struct einsum_client_shared *shared, struct einsum_client_ring_call *call)
{
    bool quiet =
        call->error.status == EINSUM_CLIENT_OK || call->error.from_server || !call->submitted;
    einsum_client_unplace(shared->client, &call->expected.place, quiet);
    if (call->error.status == EINSUM_CLIENT_OK)
        call->on_response(call->context, &call->response, NULL);
    else
        call->on_response(call->context, NULL, &call->error);
    free(call);
}

static void call_ready_locked(struct einsum_client_shared *shared)
{
    while (shared->ready) {
        struct einsum_client_ring_call *ready = shared->ready;
        shared->ready = NULL;
        shared->ready_end = &shared->ready;
        pthread_mutex_unlock(&shared->lock);
        while (ready) {
            struct einsum_client_ring_call *next = ready->next;
            call_back(shared, ready);
            ready = next;
        }
        pthread_mutex_lock(&shared->lock);
    }
}

// Numbers of this connection. The lock is let go of, since the daemon may have to be asked.
static void renumber(struct einsum_client_shared *shared, struct einsum_client_ring_call *call)
{
    uint64_t epoch;
    if (!einsum_client_shared_number(shared, EINSUM_SHARED_WEIGHT, call->weight,
                                     &call->submission.weight, &call->epoch))
        return;
    if (call->kernel[0])
        einsum_client_shared_number(shared, EINSUM_SHARED_KERNEL, call->kernel,
                                    &call->submission.kernel, &epoch);
}

// Starts again what is due; tells when the next one is.
static uint64_t resume_locked(struct einsum_client_shared *shared)
{
    uint64_t now = einsum_client_now_ns(), next_ns = UINT64_MAX;
    struct einsum_client_ring_call *all = shared->paused, *due = NULL;
    shared->paused = NULL;
    while (all) {
        struct einsum_client_ring_call *call = all;
        all = all->next;
        bool now_due = call->due_ns <= now || shared->stopping;
        if (!now_due && call->due_ns < next_ns)
            next_ns = call->due_ns;
        struct einsum_client_ring_call **list = now_due ? &due : &shared->paused;
        call->next = *list;
        *list = call;
    }
    while (due) {
        struct einsum_client_ring_call *call = due;
        due = due->next;
        if (shared->stopping) {
            fail_locked(shared, call, EINSUM_CLIENT_CANCELLED, "the client is being destroyed");
            continue;
        }
        if (call->epoch != shared->epoch) {
            pthread_mutex_unlock(&shared->lock);
            renumber(shared, call);
            pthread_mutex_lock(&shared->lock);
        }
        if (!shared->has_ring || call->epoch != shared->epoch)
            call->attempts++; // as good as an attempt
        launch_locked(shared, call);
    }
    return next_ns;
}

static bool idle_locked(const struct einsum_client_shared *shared)
{
    return (shared->in_flight == 0 || shared->reaper == REAPER_CALLER) && !shared->ready;
}

static void sleep_locked(struct einsum_client_shared *shared, uint64_t until_ns)
{
    uint64_t most_ns =
        einsum_client_now_ns() + (shared->socket < 0 ? (uint64_t)RECONNECT_NS : IDLE_NS);
    if (until_ns > most_ns)
        until_ns = most_ns;
    struct timespec until = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};
    pthread_cond_timedwait(&shared->changed, &shared->lock, &until);
}

// While nothing is under way: is the daemon there, or there again?
static void look_after_connection(struct einsum_client_shared *shared)
{
    if (shared->socket >= 0)
        einsum_client_shared_alive(shared);
    else
        (void)einsum_client_shared_connect(shared, NULL);
}

// Everything has been called back, and nothing is to come.
static bool over_locked(const struct einsum_client_shared *shared)
{
    return shared->stopping && shared->in_flight == 0 && !shared->ready && !shared->paused &&
           !shared->pending;
}

void *einsum_client_ring_thread(void *argument)
{
    struct einsum_client_shared *shared = argument;
    einsum_client_enter_own_thread();
    uint64_t looked_ns = einsum_client_now_ns();
    pthread_mutex_lock(&shared->lock);
    while (!over_locked(shared)) {
        uint64_t next_ns = shared->paused ? resume_locked(shared) : UINT64_MAX;
        call_ready_locked(shared);
        uint64_t now = einsum_client_now_ns();
        if (shared->in_flight > 0 && shared->reaper != REAPER_CALLER) {
            shared->reaper = REAPER_THREAD;
            uint32_t n = reap_locked(shared);
            call_ready_locked(shared);
            if (n == 0 && shared->in_flight > 0 && shared->has_ring) {
                uint64_t wait_ns = next_ns > now + SLICE_NS ? SLICE_NS
                                   : next_ns > now          ? next_ns - now
                                                            : 1000;
                pthread_mutex_unlock(&shared->lock);
                wait_for_completion(shared, wait_ns);
                pthread_mutex_lock(&shared->lock);
            }
            continue;
        }
        if (shared->reaper == REAPER_THREAD)
            shared->reaper = REAPER_NONE;
        if (now - looked_ns > RECONNECT_NS && shared->in_flight == 0) {
            looked_ns = now;
            pthread_mutex_unlock(&shared->lock);
            look_after_connection(shared);
            pthread_mutex_lock(&shared->lock);
            continue;
        }
        if (idle_locked(shared) && !over_locked(shared))
            sleep_locked(shared, next_ns);
    }
    pthread_mutex_unlock(&shared->lock);
    return NULL;
}

// ---- calls --------------------------------------------------------------------------------------

// Fills in what is the same for both kinds of call. false: not for the ring.
static bool prepare(struct einsum_client *client, const struct einsum_client_request *request,
                    struct einsum_client_ring_call *call)
{
    struct einsum_client_shared *shared = client->shared;
    const char *kernel = request->kernel ? request->kernel : "";
    if (!__atomic_load_n(&shared->has_ring, __ATOMIC_RELAXED) || request->digest_only ||
        !request->output || einsum_client_check_request(request, NULL) != EINSUM_CLIENT_OK ||
        strlen(request->weight) >= sizeof call->weight || strlen(kernel) >= sizeof call->kernel ||
        (request->equation && strcmp(request->equation, "bhr,hdr->bhd") != 0))
        return false;
    uint64_t epoch = 0;
    strcpy(call->weight, request->weight);
    strcpy(call->kernel, kernel);
    call->submission.kernel = 0;
    if (!einsum_client_shared_number(shared, EINSUM_SHARED_WEIGHT, call->weight,
                                     &call->submission.weight, &call->epoch) ||
        (kernel[0] && !einsum_client_shared_number(shared, EINSUM_SHARED_KERNEL, kernel,
                                                   &call->submission.kernel, &epoch)))
        return false;
    call->expected = einsum_client_expected_of(client, request);
    if (!einsum_client_place(client, request, &call->expected.place))
        return false;
    struct einsum_ring_submission *submission = &call->submission;
    const struct einsum_client_place *place = &call->expected.place;
    submission->op = request->operation == EINSUM_CLIENT_OUTPUT_PROJECT ? EINSUM_RING_OUTPUT_PROJECT
                                                                        : EINSUM_RING_EINSUM;
    submission->recipe = (uint32_t)request->recipe;
    submission->activation_layout = (uint32_t)request->activation_layout;
    submission->scale_layout = (uint32_t)request->scale_layout;
    submission->scale_type = (uint32_t)request->scale_type;
    submission->output_type = (uint32_t)request->output_type;
    submission->priority = (uint32_t)request->priority;
    submission->tokens = request->tokens;
    submission->group_begin = request->group_begin;
    submission->group_end = request->group_end;
    submission->activations_offset = place->activations_offset;
    submission->activations_bytes = place->activations_bytes;
    submission->scales_offset = place->scales_offset;
    submission->scales_bytes = place->scales_bytes;
    submission->output_offset = place->output_offset;
    submission->output_bytes = place->output_bytes;
    const struct einsum_client_sums sums = einsum_client_sums_of(client, request, place);
    submission->checksums =
        sums.given ? EINSUM_RING_SUM_FIRST | EINSUM_RING_SUM_SECOND | EINSUM_RING_SUM_OUTPUT : 0;
    submission->first_crc32c = sums.first;
    submission->second_crc32c = sums.second;
    uint32_t deadline_ms =
        request->deadline_ms ? request->deadline_ms : client->options.deadline_ms;
    call->started_ns = einsum_client_now_ns();
    call->deadline_ns = einsum_client_deadline_after(deadline_ms);
    return true;
}

static uint64_t take_ticket(struct einsum_client *client)
{
    pthread_mutex_lock(&client->lock);
    uint64_t ticket = client->next_ticket++;
    pthread_mutex_unlock(&client->lock);
    return ticket;
}

bool einsum_client_ring_start(struct einsum_client *client,
                              const struct einsum_client_request *request,
                              einsum_client_on_response *on_response, void *context,
                              uint64_t *ticket, enum einsum_client_status *status,
                              struct einsum_client_error *error)
{
    struct einsum_client_shared *shared = client->shared;
    if (!__atomic_load_n(&shared->has_ring, __ATOMIC_RELAXED))
        return false;
    struct einsum_client_ring_call *call = calloc(1, sizeof *call);
    if (!call) {
        *status = einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
        return true;
    }
    if (!prepare(client, request, call)) {
        free(call);
        return false;
    }
    call->on_response = on_response;
    call->context = context;
    if (ticket)
        *ticket = call->ticket = take_ticket(client);
    pthread_mutex_lock(&shared->lock);
    bool stopping = shared->stopping;
    if (!stopping) {
        launch_locked(shared, call);
        if (shared->reaper == REAPER_NONE)
            pthread_cond_signal(&shared->changed);
    }
    pthread_mutex_unlock(&shared->lock);
    *status = EINSUM_CLIENT_OK;
    if (stopping) {
        einsum_client_unplace(client, &call->expected.place, true);
        free(call);
        *status = einsum_client_error_set(error, EINSUM_CLIENT_CANCELLED,
                                          "the client is being destroyed");
    }
    return true;
}

static bool is_done(struct einsum_client_ring_call *call)
{
    return atomic_load_explicit(&call->done, memory_order_acquire) != 0;
}

// Reads completions until its own call's, then leaves the rest to the thread.
static void reap_own(struct einsum_client_shared *shared, struct einsum_client_ring_call *call)
{
    pthread_mutex_lock(&shared->lock);
    shared->own = call;
    // A call that pauses is not in flight; the thread will start it again, and finish it.
    while (!is_done(call) && shared->in_flight > 0) {
        if (reap_locked(shared) > 0 || !shared->has_ring)
            continue;
        pthread_mutex_unlock(&shared->lock);
        wait_for_completion(shared, SLICE_NS);
        pthread_mutex_lock(&shared->lock);
    }
    shared->reaper = REAPER_NONE;
    shared->own = NULL;
    if (shared->in_flight > 0 || shared->ready || shared->paused)
        pthread_cond_signal(&shared->changed);
    pthread_mutex_unlock(&shared->lock);
}

bool einsum_client_ring_einsum(struct einsum_client *client,
                               const struct einsum_client_request *request,
                               struct einsum_client_response *response,
                               enum einsum_client_status *status, struct einsum_client_error *error)
{
    struct einsum_client_shared *shared = client->shared;
    struct einsum_client_ring_call call;
    memset(&call, 0, sizeof call);
    if (!prepare(client, request, &call))
        return false;
    pthread_mutex_lock(&shared->lock);
    bool reaps = shared->reaper == REAPER_NONE && shared->in_flight == 0;
    if (reaps)
        shared->reaper = REAPER_CALLER;
    launch_locked(shared, &call);
    if (shared->reaper == REAPER_NONE)
        pthread_cond_signal(&shared->changed);
    pthread_mutex_unlock(&shared->lock);
    if (reaps)
        reap_own(shared, &call);
    while (!is_done(&call))
        futex_sleep((uint32_t *)&call.done, 0, false, SLICE_NS);
    // The one that finished it has let go of the lock, and with it of the call.
    pthread_mutex_lock(&shared->lock);
    pthread_mutex_unlock(&shared->lock);
    bool quiet = call.error.status == EINSUM_CLIENT_OK || call.error.from_server || !call.submitted;
    einsum_client_unplace(client, &call.expected.place, quiet);
    *status = call.error.status;
    if (call.error.status == EINSUM_CLIENT_OK)
        *response = call.response;
    else if (error)
        *error = call.error;
    return true;
}

// Takes one that has not been submitted, or all, off a list.
static struct einsum_client_ring_call *take_off(struct einsum_client_ring_call **list,
                                                uint64_t ticket)
{
    for (struct einsum_client_ring_call **at = list; *at; at = &(*at)->next) {
        struct einsum_client_ring_call *call = *at;
        if (ticket != UINT64_MAX && call->ticket != ticket)
            continue;
        *at = call->next;
        return call;
    }
    return NULL;
}

// What has been submitted is answered soon enough, since the daemon knows no deadline longer.
void einsum_client_ring_cancel(struct einsum_client *client, uint64_t ticket)
{
    struct einsum_client_shared *shared = client->shared;
    struct einsum_client_ring_call *call;
    pthread_mutex_lock(&shared->lock);
    while ((call = take_off(&shared->pending, ticket)) ||
           (call = take_off(&shared->paused, ticket))) {
        shared->pending_end = &shared->pending;
        while (*shared->pending_end)
            shared->pending_end = &(*shared->pending_end)->next;
        fail_locked(shared, call, EINSUM_CLIENT_CANCELLED, "cancelled before it was sent");
    }
    pthread_mutex_unlock(&shared->lock);
}
