// ring.c, with the caller played here: requests that go round, every way in which one can be wrong,
// callers that break the rules, scribble over everything and leave at any moment, and memory that
// stays for as long as an engine may touch it.
#include <check.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/einsum_shared.h"
#include "shared_site.h"

enum {
    ENTRIES = 8,
    REGION_BYTES = 1 << 20,
    RING_OFFSET = 4096,
    // Where the tensors of the request number `slot` lie.
    SLOTS = 16,
    SLOT_BYTES = 48 << 10,
    SLOTS_OFFSET = 128 << 10,
    SCALES_OFFSET = TOKENS_MAX * GROUPS * REDUCED_DIM,
    OUTPUT_OFFSET = SCALES_OFFSET + 1024,
};

// ---- the caller's side

struct caller {
    struct region *region;
    uint8_t *memory; // mapped anew: the daemon's own mapping may be gone when ours is not
    struct ring *ring;
    int doorbell;
    uint32_t entries, weight;
    struct einsum_ring_header *header;
    struct einsum_ring_submission *submissions;
    struct einsum_ring_completion *completions;
    uint32_t submitted, read;
};

static struct region *make_region(uint8_t **memory)
{
    struct error err;
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ck_assert_int_eq(ftruncate(fd, REGION_BYTES), 0);
    ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
    struct region *region;
    ck_assert_int_eq(regions_add(site.context.regions, fd, REGION_BYTES, &region, &err), STATUS_OK);
    *memory = mmap(NULL, REGION_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(*memory, MAP_FAILED);
    close(fd);
    return region;
}

static struct caller enter(uint32_t entries)
{
    struct caller caller = {.entries = entries};
    struct error err;
    caller.region = make_region(&caller.memory);
    ck_assert_msg(ring_open(site.context.rings, caller.region, RING_OFFSET, entries, &caller.ring,
                            &caller.doorbell, &err) == STATUS_OK,
                  "%s", err.text);
    ring_set_region(caller.ring, 0, caller.region);
    ck_assert_int_eq(ring_add_weight(caller.ring, name, &caller.weight, &err), STATUS_OK);
    caller.header = (void *)(caller.memory + RING_OFFSET);
    caller.submissions = (void *)(caller.header + 1);
    caller.completions = (void *)(caller.submissions + entries);
    return caller;
}

static void leave(struct caller *caller)
{
    ring_close(caller->ring);
    regions_remove(site.context.regions, caller->region);
    munmap(caller->memory, REGION_BYTES);
}

static uint32_t load(const struct einsum_ring_word *word)
{
    return __atomic_load_n(&word->value, __ATOMIC_SEQ_CST);
}

static void store(struct einsum_ring_word *word, uint32_t value)
{
    __atomic_store_n(&word->value, value, __ATOMIC_SEQ_CST);
}

static struct einsum_ring_submission good(const struct caller *caller, uint64_t id)
{
    uint64_t slot = SLOTS_OFFSET + id % SLOTS * SLOT_BYTES;
    uint32_t tokens = 1 + (uint32_t)id % 3;
    return (struct einsum_ring_submission){
        .id = id,
        .weight = caller->weight,
        .recipe = EINSUM_RECIPE_1_128_128,
        .activation_layout = EINSUM_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_SCALES_TGK,
        .scale_type = EINSUM_SCALE_FP32,
        .output_type = EINSUM_OUTPUT_BF16,
        .tokens = tokens,
        .activations_offset = slot,
        .activations_bytes = (uint64_t)tokens * GROUPS * REDUCED_DIM,
        .scales_offset = slot + SCALES_OFFSET,
        .scales_bytes = (uint64_t)tokens * GROUPS * (REDUCED_DIM / 128) * 4,
        .output_offset = slot + OUTPUT_OFFSET,
        .output_bytes = (uint64_t)tokens * GROUPS * OUTPUT_DIM * 2,
    };
}

static void ring_doorbell(const struct caller *caller)
{
    uint64_t one = 1;
    ck_assert_int_eq(write(caller->doorbell, &one, sizeof one), sizeof one);
}

static void submit(struct caller *caller, const struct einsum_ring_submission *submission)
{
    caller->memory[submission->activations_offset % REGION_BYTES] = (uint8_t)submission->id;
    caller->submissions[caller->submitted++ & (caller->entries - 1)] = *submission;
    store(&caller->header->submit_tail, caller->submitted);
    if (load(&caller->header->daemon_sleeps))
        ring_doorbell(caller);
}

static struct einsum_ring_completion next(struct caller *caller)
{
    WAIT_FOR(load(&caller->header->complete_tail) != caller->read);
    struct einsum_ring_completion completion =
        caller->completions[caller->read++ & (caller->entries - 1)];
    store(&caller->header->complete_head, caller->read);
    return completion;
}

static struct einsum_ring_completion ask(struct caller *caller,
                                         const struct einsum_ring_submission *submission)
{
    submit(caller, submission);
    struct einsum_ring_completion completion = next(caller);
    ck_assert_uint_eq(completion.id, submission->id);
    return completion;
}

static void expect_good(const struct caller *caller,
                        const struct einsum_ring_completion *completion)
{
    struct einsum_ring_submission was = good(caller, completion->id);
    ck_assert_msg(completion->status == STATUS_OK, "%s", completion->text);
    ck_assert_uint_eq(completion->tokens, was.tokens);
    ck_assert_uint_eq(completion->groups, GROUPS);
    ck_assert_uint_eq(completion->output_dim, OUTPUT_DIM);
    ck_assert_uint_ge(completion->batch_requests, 1);
    const uint8_t *output = caller->memory + was.output_offset;
    ck_assert_uint_eq(output[0], (uint8_t)was.id);
    ck_assert_mem_eq(output, output + 1, was.output_bytes - 1); // all alike
}

static void expect_serves(struct caller *caller)
{
    struct einsum_ring_submission submission = good(caller, 77);
    struct einsum_ring_completion completion = ask(caller, &submission);
    expect_good(caller, &completion);
}

// ---- what is right

START_TEST(requests_go_round)
{
    start_with(_i == 0);
    struct caller caller = enter(ENTRIES);
    uint64_t in = 0, out = 0;
    for (uint64_t id = 0; id < 1000; id++) { // wraps around many times
        struct einsum_ring_submission submission = good(&caller, id);
        struct einsum_ring_completion completion = ask(&caller, &submission);
        expect_good(&caller, &completion);
        in += submission.activations_bytes + submission.scales_bytes;
        out += submission.output_bytes;
    }
    // No byte of a tensor is copied, unless the engine cannot reach it.
    ck_assert_uint_eq(site.context.copies.in_bytes, _i == 0 ? 0 : in);
    ck_assert_uint_eq(site.context.copies.out_bytes, _i == 0 ? 0 : out);
    struct metrics_values values;
    metrics_read(site.context.metrics, &values);
    ck_assert_uint_eq(values.received, 1000);
    ck_assert_uint_eq(metrics_ends(&values).answered, 1000);
    ck_assert_uint_eq(values.shared, 1000);
    ck_assert_uint_eq(rings_stats(site.context.rings).requests, 1000);
    ck_assert_uint_eq(rings_stats(site.context.rings).rings, 1);
    leave(&caller);
    stop();
}
END_TEST

enum { LARGE_TOKENS = 5 * TOKENS_MAX - 3, LARGE_BYTES = 128 << 10, LARGE_SLOTS = 6 };

// One that is cut into five parts, or, of the other layouts, whose parts' rows lie apart.
static struct einsum_ring_submission large(const struct caller *caller, uint64_t id, bool apart)
{
    uint64_t at = SLOTS_OFFSET + id % LARGE_SLOTS * LARGE_BYTES;
    struct einsum_ring_submission submission = good(caller, id);
    submission.tokens = LARGE_TOKENS;
    submission.activations_offset = at;
    submission.activations_bytes = LARGE_TOKENS * GROUPS * REDUCED_DIM;
    submission.scales_offset = align_up(at + submission.activations_bytes, 64);
    submission.scales_bytes = LARGE_TOKENS * GROUPS * (REDUCED_DIM / 128) * 4;
    if (apart) {
        submission.activation_layout = EINSUM_ACTIVATIONS_GTR;
        submission.scale_layout = EINSUM_SCALES_GKT;
        submission.scales_bytes = align_up(LARGE_TOKENS, 4) * GROUPS * (REDUCED_DIM / 128) * 4;
    }
    submission.output_offset = align_up(submission.scales_offset + submission.scales_bytes, 64);
    submission.output_bytes = LARGE_TOKENS * GROUPS * OUTPUT_DIM * 2;
    ASSERT(submission.output_offset + submission.output_bytes <= at + LARGE_BYTES);
    memset(caller->memory + at, (uint8_t)id, submission.activations_bytes);
    return submission;
}

static void expect_large(const struct caller *caller,
                         const struct einsum_ring_completion *completion,
                         const struct einsum_ring_submission *was)
{
    ck_assert_msg(completion->status == STATUS_OK, "%s", completion->text);
    ck_assert_uint_eq(completion->tokens, LARGE_TOKENS);
    ck_assert_uint_eq(completion->parts, 5);
    ck_assert_uint_eq(completion->batch_bucket, TOKENS_MAX);
    const uint8_t *output = caller->memory + was->output_offset;
    ck_assert_uint_eq(output[0], (uint8_t)was->id);
    ck_assert_mem_eq(output, output + 1, was->output_bytes - 1); // all alike
}

// _i: whether the engine reaches regions, and whether a part's rows lie apart.
START_TEST(large_requests_go_round)
{
    bool direct = _i & 1, apart = _i & 2;
    start_with(direct);
    site.config.request_tokens_max = LARGE_TOKENS;
    struct caller caller = enter(ENTRIES);
    uint64_t tensors = 0, out = 0;
    for (uint64_t id = 0; id < 200; id++) {
        struct einsum_ring_submission submission = large(&caller, id, apart);
        submit(&caller, &submission);
        if (id % 3 == 0) { // beside a small one
            struct einsum_ring_submission small = good(&caller, 14);
            submit(&caller, &small);
            out += small.output_bytes;
        }
        for (uint64_t i = 0; i < 1 + (id % 3 == 0); i++) {
            struct einsum_ring_completion completion = next(&caller);
            if (completion.id == id)
                expect_large(&caller, &completion, &submission);
            ck_assert_uint_eq(completion.status, STATUS_OK);
            ck_assert_uint_eq(completion.parts, completion.id == id ? 5 : 0);
        }
        tensors += LARGE_TOKENS * GROUPS * (REDUCED_DIM + REDUCED_DIM / 128 * 4);
        out += submission.output_bytes;
    }
    if (direct)
        ck_assert_uint_eq(site.context.copies.in_bytes, apart ? tensors : 0);
    ck_assert_uint_eq(site.context.copies.out_bytes, direct ? 0 : out);
    struct einsum_ring_submission submission = large(&caller, 1, apart);
    submission.tokens++;
    struct einsum_ring_completion completion = ask(&caller, &submission);
    ck_assert_uint_eq(completion.status, STATUS_INVALID_ARGUMENT);
    leave(&caller);
    stop();
}
END_TEST

// As many as the ring has entries, again and again, completed in any order, each once.
START_TEST(many_are_in_flight)
{
    struct caller caller = enter(ENTRIES);
    uint64_t sent = 0, got = 0;
    while (got < 20000) {
        uint32_t burst = 1 + (uint32_t)(sent * 7 % ENTRIES);
        for (uint32_t i = 0; i < burst && sent - got < ENTRIES; i++, sent++) {
            struct einsum_ring_submission submission = good(&caller, sent);
            submit(&caller, &submission);
        }
        bool seen[SLOTS] = {false};
        for (uint64_t until = sent; got < until; got++) {
            struct einsum_ring_completion completion = next(&caller);
            ck_assert_uint_lt(completion.id, until);
            ck_assert(!seen[completion.id % SLOTS]);
            seen[completion.id % SLOTS] = true;
            expect_good(&caller, &completion);
        }
    }
    leave(&caller);
}
END_TEST

static void *run_caller(void *argument)
{
    struct caller *caller = argument;
    for (uint64_t id = 0; id < 3000; id++) {
        struct einsum_ring_submission submission = good(caller, id);
        submit(caller, &submission);
        uint32_t waits = 0;
        while (load(&caller->header->complete_tail) == caller->read)
            if (++waits > 100)
                sched_yield();
        ASSERT(caller->completions[caller->read & (caller->entries - 1)].id == id);
        ASSERT(caller->completions[caller->read & (caller->entries - 1)].status == STATUS_OK);
        store(&caller->header->complete_head, ++caller->read);
    }
    return NULL;
}

START_TEST(several_callers_share_the_thread)
{
    enum { N = 3 };
    struct caller callers[N];
    pthread_t threads[N];
    for (int i = 0; i < N; i++)
        callers[i] = enter(ENTRIES);
    for (int i = 0; i < N; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, run_caller, &callers[i]), 0);
    for (int i = 0; i < N; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < N; i++)
        leave(&callers[i]);
}
END_TEST

START_TEST(an_idle_thread_sleeps_until_the_doorbell)
{
    struct caller caller = enter(ENTRIES);
    for (uint64_t id = 0; id < 50; id++) {
        WAIT_FOR(load(&caller.header->daemon_sleeps) == 1);
        struct einsum_ring_submission submission = good(&caller, id);
        struct einsum_ring_completion completion = ask(&caller, &submission);
        expect_good(&caller, &completion);
    }
    leave(&caller);
}
END_TEST

START_TEST(no_tokens_need_no_engine)
{
    struct caller caller = enter(ENTRIES);
    struct einsum_ring_submission submission = good(&caller, 1);
    submission.tokens = 0;
    submission.activations_bytes = submission.scales_bytes = submission.output_bytes = 0;
    struct einsum_ring_completion completion = ask(&caller, &submission);
    ck_assert_uint_eq(completion.status, STATUS_OK);
    ck_assert_uint_eq(completion.tokens, 0);
    ck_assert_uint_eq(completion.groups, GROUPS);
    ck_assert_uint_eq(completion.batch_requests, 0);
    leave(&caller);
}
END_TEST

START_TEST(requests_wait_for_room)
{
    struct caller caller = enter(ENTRIES_MAX);
    atomic_store(&held, true);
    for (uint64_t id = 0; id < 40; id++) { // the batches have room for 12
        struct einsum_ring_submission submission = good(&caller, id % SLOTS);
        submit(&caller, &submission);
    }
    struct batcher_stats stats;
    WAIT_FOR((batcher_stats(site.context.batcher, &stats), stats.jobs == 40));
    atomic_store(&held, false);
    batcher_wake(&site.waker);
    for (int i = 0; i < 40; i++)
        ck_assert_uint_eq(next(&caller).status, STATUS_OK);
    leave(&caller);
}
END_TEST

// ---- what is wrong

static const struct {
    size_t offset; // of a member
    uint64_t value;
    enum status status;
    const char *field;
} wrong[] = {
#define MEMBER(member) offsetof(struct einsum_ring_submission, member)
    {MEMBER(op), 2, STATUS_UNIMPLEMENTED, "op"},
    {MEMBER(op), UINT32_MAX, STATUS_UNIMPLEMENTED, "op"},
    {MEMBER(op), EINSUM_RING_OUTPUT_PROJECT, STATUS_FAILED_PRECONDITION, "weight"}, // no rope
    {MEMBER(weight), 1, STATUS_INVALID_ARGUMENT, "weight"},
    {MEMBER(weight), UINT32_MAX, STATUS_INVALID_ARGUMENT, "weight"},
    {MEMBER(kernel), 1, STATUS_INVALID_ARGUMENT, "kernel"},
    {MEMBER(kernel), UINT32_MAX, STATUS_INVALID_ARGUMENT, "kernel"},
    {MEMBER(region), 1, STATUS_NOT_FOUND, "region"},
    {MEMBER(region), 15, STATUS_NOT_FOUND, "region"},
    {MEMBER(region), 16, STATUS_NOT_FOUND, "region"},
    {MEMBER(region), UINT32_MAX, STATUS_NOT_FOUND, "region"},
    {MEMBER(recipe), 0, STATUS_INVALID_ARGUMENT, "recipe"},
    {MEMBER(recipe), 3, STATUS_INVALID_ARGUMENT, "recipe"},
    {MEMBER(recipe), UINT32_MAX, STATUS_UNIMPLEMENTED, "recipe"},
    {MEMBER(activation_layout), 3, STATUS_UNIMPLEMENTED, "activation_layout"},
    {MEMBER(scale_layout), UINT32_MAX, STATUS_UNIMPLEMENTED, "scale_layout"},
    {MEMBER(scale_type), 0x80000001u, STATUS_UNIMPLEMENTED, "scale_type"},
    {MEMBER(output_type), 0, STATUS_INVALID_ARGUMENT, "output_type"},
    {MEMBER(output_type), EINSUM_OUTPUT_FP32, STATUS_INVALID_ARGUMENT, "shared.output_bytes"},
    {MEMBER(tokens), TOKENS_MAX + 1, STATUS_INVALID_ARGUMENT, "tokens"},
    {MEMBER(tokens), UINT32_MAX, STATUS_INVALID_ARGUMENT, "tokens"},
    {MEMBER(group_begin), 4, STATUS_INVALID_ARGUMENT, "group_end"},
    {MEMBER(group_end), 5, STATUS_INVALID_ARGUMENT, "group_end"},
    {MEMBER(activations_bytes), 0, STATUS_INVALID_ARGUMENT, "activations"},
    {MEMBER(activations_bytes), UINT64_MAX, STATUS_INVALID_ARGUMENT, "activations"},
    {MEMBER(activations_offset), 1, STATUS_INVALID_ARGUMENT, "shared.activations_offset"},
    {MEMBER(activations_offset), REGION_BYTES, STATUS_INVALID_ARGUMENT,
     "shared.activations_offset"},
    {MEMBER(activations_offset), UINT64_MAX - 63, STATUS_INVALID_ARGUMENT,
     "shared.activations_offset"},
    {MEMBER(scales_bytes), 1, STATUS_INVALID_ARGUMENT, "activation_scales"},
    {MEMBER(scales_offset), REGION_BYTES - 64, STATUS_INVALID_ARGUMENT, "shared.scales_offset"},
    {MEMBER(output_bytes), 1, STATUS_INVALID_ARGUMENT, "shared.output_bytes"},
    {MEMBER(output_bytes), UINT64_MAX, STATUS_INVALID_ARGUMENT, "shared.output_offset"},
    {MEMBER(output_offset), UINT64_MAX, STATUS_INVALID_ARGUMENT, "shared.output_offset"},
#undef MEMBER
};

START_TEST(a_wrong_request_is_told_what_is_wrong)
{
    struct caller caller = enter(ENTRIES);
    struct einsum_ring_submission submission = good(&caller, 2);
    bool wide = wrong[_i].offset == offsetof(struct einsum_ring_submission, id) ||
                wrong[_i].offset >= offsetof(struct einsum_ring_submission, timeout_ns);
    memcpy((char *)&submission + wrong[_i].offset, &wrong[_i].value, wide ? 8 : 4);
    struct einsum_ring_completion completion = ask(&caller, &submission);
    ck_assert_uint_eq(completion.status, wrong[_i].status);
    ck_assert_str_eq(completion.field, wrong[_i].field);
    ck_assert_int_eq(strncmp(completion.text, wrong[_i].field, strlen(wrong[_i].field)), 0);
    expect_serves(&caller);
    leave(&caller);
}
END_TEST

START_TEST(late_requests_are_told_so)
{
    struct caller caller = enter(ENTRIES);
    atomic_store(&held, true);
    for (uint64_t id = 0; id < 5; id++) { // both lanes are taken: what follows waits
        struct einsum_ring_submission submission = good(&caller, id);
        submission.timeout_ns = id < 4 ? 0 : 1;
        submit(&caller, &submission);
        struct batcher_stats stats;
        WAIT_FOR((batcher_stats(site.context.batcher, &stats), stats.jobs == id + 1));
    }
    atomic_store(&held, false);
    batcher_wake(&site.waker);
    bool late = false;
    for (int i = 0; i < 5; i++) {
        struct einsum_ring_completion completion = next(&caller);
        bool this_one = completion.id == 4;
        ck_assert_uint_eq(completion.status, this_one ? STATUS_DEADLINE_EXCEEDED : STATUS_OK);
        late = late || this_one;
    }
    ck_assert(late);
    struct metrics_values values;
    metrics_read(site.context.metrics, &values);
    ck_assert_uint_eq(metrics_ends(&values).expired, 1);
    leave(&caller);
}
END_TEST

START_TEST(a_weight_that_goes_is_not_found)
{
    struct caller caller = enter(ENTRIES);
    struct error err;
    uint32_t number;
    expect_serves(&caller);
    ck_assert_int_eq(ring_add_weight(caller.ring, name, &number, &err), STATUS_OK);
    ck_assert_uint_eq(number, caller.weight);
    ck_assert_int_eq(ring_add_weight(caller.ring, "none", &number, &err), STATUS_NOT_FOUND);
    ck_assert_int_eq(weights_unload(site.context.weights, name, NULL, NULL, &err), STATUS_OK);
    struct einsum_ring_submission submission = good(&caller, 1);
    struct einsum_ring_completion completion = ask(&caller, &submission);
    ck_assert_uint_eq(completion.status, STATUS_NOT_FOUND);
    ck_assert_str_eq(completion.field, "weight");
    // Its number is good again when it is back.
    const struct weights_load load_again = {.path = site.directory, .output_dim = OUTPUT_DIM};
    ck_assert_int_eq(weights_load(site.context.weights, &load_again, NULL, &err), STATUS_OK);
    expect_serves(&caller);
    leave(&caller);
}
END_TEST

START_TEST(a_draining_daemon_takes_nothing_new)
{
    struct caller caller = enter(ENTRIES);
    atomic_store(&held, true);
    struct einsum_ring_submission submission = good(&caller, 1);
    submit(&caller, &submission);
    struct batcher_stats stats;
    WAIT_FOR((batcher_stats(site.context.batcher, &stats), stats.jobs == 1));
    rings_drain(site.context.rings);
    submission = good(&caller, 2);
    struct einsum_ring_completion completion = ask(&caller, &submission);
    ck_assert_uint_eq(completion.status, STATUS_UNAVAILABLE);
    atomic_store(&held, false);
    batcher_wake(&site.waker);
    rings_wait_idle(site.context.rings, PATIENCE_MS);
    completion = next(&caller);
    ck_assert_uint_eq(completion.id, 1);
    expect_good(&caller, &completion);
    leave(&caller);
}
END_TEST

START_TEST(rings_are_checked)
{
    static const struct {
        uint64_t offset;
        uint32_t entries;
        const char *field;
    } cases[] = {
        {0, 0, "entries"},
        {0, 3, "entries"},
        {0, ENTRIES_MAX * 2, "entries"},
        {0, UINT32_MAX, "entries"},
        {0, 1u << 31, "entries"},
        {32, 1, "offset"},
        {REGION_BYTES - 512, 1, "offset"},
        {REGION_BYTES, 1, "offset"},
        {UINT64_MAX - 63, 1, "offset"},
    };
    uint8_t *memory;
    struct region *region = make_region(&memory);
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct ring *ring;
        int doorbell;
        struct error err;
        ck_assert_int_eq(ring_open(site.context.rings, region, cases[i].offset, cases[i].entries,
                                   &ring, &doorbell, &err),
                         STATUS_INVALID_ARGUMENT);
        ck_assert_str_eq(err.field, cases[i].field);
    }
    regions_remove(site.context.regions, region);
    munmap(memory, REGION_BYTES);
}
END_TEST

// ---- hostile callers

// A count that cannot be: more submitted than there are entries, or more read than was completed.
START_TEST(counts_that_cannot_be_break_the_ring)
{
    static const uint32_t jumps[] = {ENTRIES + 1, 1000, 1u << 31, UINT32_MAX - ENTRIES - 1};
    struct caller caller = enter(ENTRIES), honest = enter(ENTRIES);
    expect_serves(&caller);
    uint32_t jump = jumps[_i / 2];
    if (_i % 2 == 0) {
        store(&caller.header->submit_tail, caller.submitted + jump);
    } else {
        store(&caller.header->complete_head, caller.read + jump);
        store(&caller.header->submit_tail, caller.submitted + 1);
    }
    ring_doorbell(&caller);
    WAIT_FOR(atomic_load(&site.broken) == 1);
    ck_assert(ring_broken(caller.ring));
    ck_assert_uint_eq(load(&caller.header->closed), 1);
    expect_serves(&honest);
    ck_assert(!ring_broken(honest.ring));
    leave(&caller);
    leave(&honest);
}
END_TEST

// What the daemon itself writes there, it does not read back.
START_TEST(the_daemons_own_counts_are_not_believed)
{
    struct caller caller = enter(ENTRIES);
    for (uint32_t i = 0; i < 20; i++) {
        store(&caller.header->submit_head, i * 12345);
        store(&caller.header->complete_tail, caller.read);
        store(&caller.header->closed, 1);
        expect_serves(&caller);
    }
    ck_assert_int_eq(atomic_load(&site.broken), 0);
    leave(&caller);
}
END_TEST

// Never more in flight than can be completed; nothing is lost when they are read at last.
START_TEST(who_does_not_read_completions_is_not_served_on)
{
    struct caller caller = enter(ENTRIES);
    for (uint64_t id = 0; id < ENTRIES; id++) {
        struct einsum_ring_submission submission = good(&caller, id);
        submit(&caller, &submission);
    }
    WAIT_FOR(load(&caller.header->complete_tail) == ENTRIES);
    for (uint64_t id = ENTRIES; id < 2 * ENTRIES; id++) {
        struct einsum_ring_submission submission = good(&caller, id);
        submit(&caller, &submission);
    }
    usleep(20000);
    ck_assert_uint_eq(load(&caller.header->complete_tail), ENTRIES);
    ck_assert_uint_eq(load(&caller.header->submit_head), ENTRIES);
    for (uint64_t id = 0; id < ENTRIES; id++)
        ck_assert_uint_lt(next(&caller).id, ENTRIES);
    ring_doorbell(&caller);
    for (uint64_t id = 0; id < ENTRIES; id++)
        ck_assert_uint_ge(next(&caller).id, ENTRIES);
    leave(&caller);
}
END_TEST

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

// Over entries that are being read, and tensors that are being used; a process of its own.
static void scribble(uint8_t *memory)
{
    uint64_t random = now_ns() | 1;
    for (;;) {
        uint64_t dice = random_next(&random), at = dice >> 8;
        if (dice % 4 == 0)
            memory[SLOTS_OFFSET + at % (SLOTS * SLOT_BYTES)] = (uint8_t)dice;
        else
            memory[RING_OFFSET + sizeof(struct einsum_ring_header) +
                   at % (ENTRIES * sizeof(struct einsum_ring_submission))] =
                (uint8_t)random_next(&random);
    }
}

START_TEST(scribbling_over_entries_hurts_nobody)
{
    struct caller caller = enter(ENTRIES), honest = enter(ENTRIES);
    pid_t scribbler = fork();
    ck_assert_int_ge(scribbler, 0);
    if (scribbler == 0)
        scribble(caller.memory);
    uint32_t statuses[17] = {0};
    for (uint64_t id = 0; id < 20000; id++) {
        struct einsum_ring_submission submission = good(&caller, id);
        submit(&caller, &submission);
        uint32_t status = next(&caller).status;
        ck_assert_uint_lt(status, ARRAY_LEN(statuses));
        statuses[status]++;
        if (id % 1000 == 0)
            expect_serves(&honest);
    }
    kill(scribbler, SIGKILL);
    waitpid(scribbler, NULL, 0);
    ck_assert_uint_gt(statuses[STATUS_OK], 0);
    ck_assert_uint_gt(statuses[STATUS_INVALID_ARGUMENT], 0);
    ck_assert_int_eq(atomic_load(&site.broken), 0);
    expect_serves(&honest);
    leave(&caller);
    leave(&honest);
}
END_TEST

START_TEST(scribbling_over_the_header_hurts_nobody)
{
    struct caller honest = enter(ENTRIES);
    uint64_t random = now_ns() | 1;
    for (int round = 0; round < 50; round++) {
        struct caller caller = enter(ENTRIES);
        for (uint64_t id = 0; id < ENTRIES; id++) {
            caller.submissions[id] = good(&caller, id);
        }
        for (int i = 0; i < 2000; i++) {
            uint64_t dice = random_next(&random);
            struct einsum_ring_word *words = &caller.header->submit_tail;
            uint32_t value =
                dice >> 60 ? (uint32_t)(dice >> 20) % (2 * ENTRIES) : (uint32_t)(dice >> 20);
            store(&words[dice % 8], value);
            if (dice >> 8 & 1)
                ring_doorbell(&caller);
        }
        expect_serves(&honest);
        leave(&caller);
        regions_collect(site.context.regions);
        WAIT_FOR(regions_stats(site.context.regions).regions == 1 ||
                 (regions_collect(site.context.regions), false));
    }
    ck_assert(!ring_broken(honest.ring));
    leave(&honest);
}
END_TEST

static bool only_unused(void)
{
    regions_collect(site.context.regions);
    return regions_stats(site.context.regions).regions == 0;
}

// The engine is at work when the caller goes: its memory stays until the work is done.
START_TEST(a_caller_that_leaves_takes_its_memory_when_the_engine_is_done)
{
    struct caller caller = enter(ENTRIES);
    atomic_store(&held, true);
    for (uint64_t id = 0; id < ENTRIES; id++) {
        struct einsum_ring_submission submission = good(&caller, id);
        submit(&caller, &submission);
    }
    struct batcher_stats stats;
    WAIT_FOR(
        (batcher_stats(site.context.batcher, &stats), stats.jobs == ENTRIES && stats.batches > 0));
    leave(&caller);
    usleep(5000);
    ck_assert(!only_unused());
    ck_assert_uint_eq(rings_stats(site.context.rings).rings, 0);
    atomic_store(&held, false);
    batcher_wake(&site.waker);
    WAIT_FOR(only_unused());
    batcher_stats(site.context.batcher, &stats);
    ck_assert_uint_eq(stats.jobs, 0);
    ck_assert_uint_eq(stats.requests + stats.cancelled, ENTRIES);
}
END_TEST

START_TEST(callers_may_leave_at_any_moment)
{
    for (uint32_t round = 0; round < 300; round++) {
        struct caller caller = enter(ENTRIES);
        for (uint64_t id = 0; id < round % (ENTRIES + 1); id++) {
            struct einsum_ring_submission submission = good(&caller, id);
            submit(&caller, &submission);
        }
        if (round % 3 == 0)
            usleep(round % 50);
        leave(&caller);
        if (round % 4 == 0)
            regions_collect(site.context.regions);
        WAIT_FOR(regions_stats(site.context.regions).regions < 4 || only_unused());
    }
    WAIT_FOR(only_unused());
}
END_TEST

// Between two parts, while some wait for room; now and then the engine is at work.
START_TEST(callers_of_large_requests_may_leave_at_any_moment)
{
    site.config.request_tokens_max = LARGE_TOKENS;
    for (uint32_t round = 0; round < 300; round++) {
        struct caller caller = enter(ENTRIES);
        atomic_store(&held, round % 5 == 0);
        for (uint64_t id = 0; id < round % (LARGE_SLOTS + 1); id++) {
            struct einsum_ring_submission submission = large(&caller, id, round % 2);
            submit(&caller, &submission);
        }
        if (round % 3 == 0)
            usleep(round % 50 * 10);
        leave(&caller);
        atomic_store(&held, false);
        batcher_wake(&site.waker);
        WAIT_FOR(regions_stats(site.context.regions).regions < 4 || only_unused());
    }
    WAIT_FOR(only_unused());
    struct batcher_stats stats;
    batcher_stats(site.context.batcher, &stats);
    ck_assert_uint_eq(stats.jobs, 0);
}
END_TEST

START_TEST(a_region_may_be_taken_away_meanwhile)
{
    struct caller caller = enter(ENTRIES);
    uint8_t *memory;
    struct region *other = make_region(&memory);
    ring_set_region(caller.ring, 3, other);
    struct einsum_ring_submission submission = good(&caller, 5);
    submission.region = 3;
    memory[submission.activations_offset] = 99;
    struct einsum_ring_completion completion = ask(&caller, &submission);
    ck_assert_uint_eq(completion.status, STATUS_OK);
    ck_assert_uint_eq(memory[submission.output_offset], 99);
    atomic_store(&held, true);
    submit(&caller, &submission);
    struct batcher_stats stats;
    WAIT_FOR((batcher_stats(site.context.batcher, &stats), stats.jobs == 1 && stats.batches == 2));
    ring_set_region(caller.ring, 3, NULL);
    regions_remove(site.context.regions, other);
    memset(memory + submission.output_offset, 0, submission.output_bytes);
    atomic_store(&held, false);
    batcher_wake(&site.waker);
    ck_assert_uint_eq(next(&caller).status, STATUS_OK);
    ck_assert_uint_eq(memory[submission.output_offset], 99);
    completion = ask(&caller, &submission);
    ck_assert_uint_eq(completion.status, STATUS_NOT_FOUND);
    munmap(memory, REGION_BYTES);
    leave(&caller);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ring");
    TCase *engines = tcase_create("engines");
    tcase_set_timeout(engines, 120);
    tcase_add_loop_test(engines, requests_go_round, 0, 2);
    tcase_add_loop_test(engines, large_requests_go_round, 0, 4);
    suite_add_tcase(suite, engines);
    TCase *rules = tcase_create("rules");
    tcase_set_timeout(rules, 120);
    tcase_add_checked_fixture(rules, start, stop);
    tcase_add_test(rules, many_are_in_flight);
    tcase_add_test(rules, several_callers_share_the_thread);
    tcase_add_test(rules, an_idle_thread_sleeps_until_the_doorbell);
    tcase_add_test(rules, no_tokens_need_no_engine);
    tcase_add_test(rules, requests_wait_for_room);
    tcase_add_loop_test(rules, a_wrong_request_is_told_what_is_wrong, 0, ARRAY_LEN(wrong));
    tcase_add_test(rules, late_requests_are_told_so);
    tcase_add_test(rules, a_weight_that_goes_is_not_found);
    tcase_add_test(rules, a_draining_daemon_takes_nothing_new);
    tcase_add_test(rules, rings_are_checked);
    suite_add_tcase(suite, rules);
    TCase *hostile = tcase_create("hostile");
    tcase_set_timeout(hostile, 120);
    tcase_add_checked_fixture(hostile, start, stop);
    tcase_add_loop_test(hostile, counts_that_cannot_be_break_the_ring, 0, 8);
    tcase_add_test(hostile, the_daemons_own_counts_are_not_believed);
    tcase_add_test(hostile, who_does_not_read_completions_is_not_served_on);
    tcase_add_test(hostile, scribbling_over_entries_hurts_nobody);
    tcase_add_test(hostile, scribbling_over_the_header_hurts_nobody);
    tcase_add_test(hostile, a_caller_that_leaves_takes_its_memory_when_the_engine_is_done);
    tcase_add_test(hostile, callers_may_leave_at_any_moment);
    tcase_add_test(hostile, callers_of_large_requests_may_leave_at_any_moment);
    tcase_add_test(hostile, a_region_may_be_taken_away_meanwhile);
    suite_add_tcase(suite, hostile);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed > 0;
}
