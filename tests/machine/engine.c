// The numbers that requests are answered with, and an engine that ends batches when chance has it.
#include <stdlib.h>
#include <string.h>

#include "kernels/attention.h"
#include "machine.h"
#include "simulated.h"

struct engine engine;

// ---- numbers

uint64_t mix(uint64_t sum, uint64_t value)
{
    sum = (sum ^ value) * 0x9e3779b97f4a7c15;
    return sum ^ sum >> 29;
}

static uint64_t mix_bytes(uint64_t sum, const uint8_t *bytes, uint64_t n)
{
    for (uint64_t word; n >= sizeof word; bytes += sizeof word, n -= sizeof word) {
        memcpy(&word, bytes, sizeof word);
        sum = mix(sum, word);
    }
    for (; n > 0; n--)
        sum = mix(sum, *bytes++);
    return sum;
}

// Of one token's row, from what the operand says that it is.
static uint64_t row_sum(const struct weight *weight, const struct einsum_operand *operand,
                        bool attention, uint32_t t, uint32_t g)
{
    const uint8_t *activations = operand->activations;
    uint64_t sum = (uint64_t)(weight - weights), dim = weight->format.reduced_dim;
    if (attention) {
        sum = mix_bytes(sum, activations + (t * operand->groups + g) * dim * 2, dim * 2);
        return mix_bytes(sum, (const uint8_t *)&operand->rotations[t], sizeof *operand->rotations);
    }
    sum = mix_bytes(sum,
                    activations + einsum_activation_offset(operand->activation_layout,
                                                           operand->tokens, operand->groups, dim, t,
                                                           g),
                    dim);
    struct einsum_scale_strides strides = einsum_scale_strides(&weight->format, operand);
    for (uint32_t k = 0; k < dim / weight->format.block_r; k++)
        sum = mix_bytes(sum,
                        (const uint8_t *)operand->scales + t * strides.token + g * strides.group +
                            k / 4 * strides.word + k % 4 * strides.byte,
                        einsum_scale_element_bytes(operand->scale_type));
    return sum;
}

void compute(const struct weight *weight, const struct einsum_operand *operand, bool attention,
             uint8_t *output)
{
    uint64_t row_bytes = einsum_output_bytes(operand->output_type, 1, 1, OUTPUT_DIM);
    for (uint32_t t = 0; t < operand->tokens; t++)
        for (uint32_t g = 0; g < operand->groups; g++, output += row_bytes) {
            uint64_t sum = row_sum(weight, operand, attention, t, g);
            for (uint64_t at = 0; at < row_bytes; at += sizeof sum, sum = mix(sum, at))
                memcpy(output + at, &sum, sizeof sum);
        }
}

// ---- batches

static enum status fake_memory_alloc(struct engine *of, uint64_t bytes, void **memory,
                                     struct error *err)
{
    (void)err;
    *memory = aligned_alloc(CACHE_LINE_BYTES, align_up(bytes, CACHE_LINE_BYTES));
    ASSERT(*memory);
    memset(*memory, 0x5a, bytes);
    of->allocated++;
    return STATUS_OK;
}

static void fake_memory_free(struct engine *of, void *memory, uint64_t bytes)
{
    (void)bytes;
    of->allocated--;
    free(memory);
}

static const struct weight *weight_of(const struct engine_segment *segment)
{
    return (const struct weight *)(const void *)segment->weight;
}

// What lies in callers' memory goes by way of the room that the segment has for it.
static void compute_staged(const struct engine_segment *segment)
{
    const struct weight *weight = weight_of(segment);
    struct einsum_operand operand = segment->operand;
    bool attention = operand.activation_layout == EINSUM_ACTIVATIONS_IN_PLACE;
    uint64_t bytes = (attention ? 2 : 1) * einsum_activation_bytes(operand.tokens, operand.groups,
                                                                   weight->format.reduced_dim);
    if (segment->staged_input) {
        uint8_t *room = (uint8_t *)(uintptr_t)segment->staged_input;
        memcpy(room, operand.activations, bytes);
        if (!attention) {
            uint8_t *second = room + align_up(bytes, CACHE_LINE_BYTES);
            memcpy(second, operand.scales,
                   einsum_scale_bytes(operand.scale_layout, operand.scale_type, operand.tokens,
                                      operand.groups,
                                      weight->format.reduced_dim / weight->format.block_r));
            operand.scales = second;
        }
        operand.activations = room;
    }
    void *output = segment->staged_output ? segment->staged_output : operand.output;
    compute(weight, &operand, attention, output);
    if (segment->staged_output)
        memcpy(
            segment->operand.output, output,
            einsum_output_bytes(operand.output_type, operand.tokens, operand.groups, OUTPUT_DIM));
}

static void engine_finish(uint32_t lane, enum status status)
{
    const struct engine_batch *batch = engine.lanes[lane];
    for (uint32_t i = 0; i < batch->segments_n && status == STATUS_OK; i++)
        compute_staged(&batch->segments[i]);
    engine.status[lane] = status;
    engine.done[lane] = true;
    run.progress = true;
}

static void fake_submit(struct engine *of, uint32_t lane, const struct engine_batch *batch)
{
    model_submitted(lane, batch);
    of->lanes[lane] = batch;
    of->done[lane] = false;
    of->started_ns[lane] = sim_time();
    if (sim_chance(run.quick_engine)) {
        engine_finish(lane, engine.lost ? STATUS_UNAVAILABLE : STATUS_OK);
        if (!run.ops.polled)
            batcher_wake(&waker);
    }
    totals.batches++;
}

static bool fake_poll(struct engine *of, uint32_t lane, struct engine_result *result)
{
    model_polled();
    if (!of->lanes[lane] || !of->done[lane])
        return false;
    *result = (struct engine_result){
        .status = of->status[lane],
        .started_ns = of->started_ns[lane],
        .ended_ns = sim_time(),
    };
    if (result->status)
        error_set(&result->error, result->status, "fake failure");
    model_finished(lane, result->status);
    of->lanes[lane] = NULL;
    return true;
}

bool engine_step(void)
{
    uint32_t from = sim_below(MODEL_LANES_MAX);
    for (uint32_t i = 0; i < MODEL_LANES_MAX; i++) {
        uint32_t lane = (from + i) % MODEL_LANES_MAX;
        if (!engine.lanes[lane] || engine.done[lane])
            continue;
        enum status status = sim_chance(run.failures) ? STATUS_INTERNAL : STATUS_OK;
        engine.lost = engine.lost || (run.device_fails && !run.draining && sim_below(150) == 0);
        engine_finish(lane, engine.lost ? STATUS_UNAVAILABLE : status);
        if (!run.ops.polled)
            batcher_wake(&waker);
        return true;
    }
    return false;
}

const struct engine_ops machine_engine = {
    .name = "simulated",
    .memory_alloc = fake_memory_alloc,
    .memory_free = fake_memory_free,
    .submit = fake_submit,
    .poll = fake_poll,
};
