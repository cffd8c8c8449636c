#include "placement.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <string.h>

#include "../kernels/attention.h"
#include "request.h"
#include "rope.h"

enum { POSITIONS_AT_A_TIME = 64 };

static uint64_t output_bytes(const struct job *job, uint64_t tokens)
{
    const struct einsum_operand *operand = &job->operand;
    return einsum_output_bytes(operand->output_type, tokens, operand->groups,
                               job->weight->format.output_dim);
}

NODISCARD static enum status check_output(const struct wire_range *output, bool digest_only,
                                          const struct job *job, struct error *err)
{
    uint64_t needed = output_bytes(job, job->operand.tokens);
    if (digest_only && output->bytes > 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "shared.output_bytes",
                           "%" PRIu64 ", but with digest_only there is no output", output->bytes);
    if (!digest_only && output->bytes < needed)
        return error_field(err, STATUS_INVALID_ARGUMENT, "shared.output_bytes",
                           "expected room for at least %" PRIu64 ", got %" PRIu64, needed,
                           output->bytes);
    return STATUS_OK;
}

NODISCARD static enum status check(const struct region *region, const struct wire_shared *shared,
                                   bool digest_only, const struct job *job, struct error *err)
{
    if (job->attention && region->on_device) // its positions would have to be read here
        return error_field(err, STATUS_UNIMPLEMENTED, "shared.region",
                           "attention cannot lie in CUDA memory, nor its positions");
    enum status status = check_output(&shared->output, digest_only, job, err);
    if (status == STATUS_OK)
        status = region_check(region, "shared.activations_offset", shared->activations.offset,
                              shared->activations.bytes, REGION_ALIGNMENT, err);
    if (status == STATUS_OK)
        status = region_check(region, "shared.scales_offset", shared->scales.offset,
                              shared->scales.bytes, REGION_ALIGNMENT, err);
    if (status == STATUS_OK)
        status = region_check(region, "shared.output_offset", shared->output.offset,
                              shared->output.bytes, REGION_ALIGNMENT, err);
    return status;
}

enum status placement_set(struct placement *placement, struct region *region,
                          const struct wire_shared *shared, bool digest_only, struct job *job,
                          struct error *err)
{
    *placement = (struct placement){
        .region = region,
        .activations = shared->activations,
        .scales = shared->scales,
        .output = shared->output,
    };
    enum status status = check(region, shared, digest_only, job, err);
    if (status != STATUS_OK) {
        placement_drop(placement);
        return status;
    }
    // Attention is quantised where it lies, which must not be seen by its caller.
    job->input_given = region->direct && (!job->attention || region->staged);
    job->output_given = region->direct && !digest_only;
    job->staged = region->staged;
    if (job->input_given)
        job->operand.activations = region->memory + shared->activations.offset;
    if (job->input_given && !job->attention)
        job->operand.scales = region->memory + shared->scales.offset;
    if (job->output_given)
        job->operand.output = region->memory + shared->output.offset;
    return STATUS_OK;
}

// Copies a few positions out of the region, and looks at the copies alone.
NODISCARD static enum status fill_rotations(const int64_t *positions, const struct job *job,
                                            struct error *err)
{
    // Batch memory is the daemon's to write; the operand calls it const since engines only read it.
    struct attention_rotation *rotations = (void *)(uintptr_t)job->operand.rotations;
    uint32_t tokens = job->operand.tokens;
    enum status status = STATUS_OK;
    for (uint32_t t = 0, n; t < tokens && status == STATUS_OK; t += n) {
        int64_t copied[POSITIONS_AT_A_TIME];
        n = tokens - t < POSITIONS_AT_A_TIME ? tokens - t : POSITIONS_AT_A_TIME;
        memcpy(copied, positions + t, n * sizeof *copied);
        for (uint32_t i = 0; i < n && status == STATUS_OK; i++) {
            // A barrier: the compiler must not read from the region again.
            __asm__ volatile("" : "+m"(copied[i]));
            status = request_check_position(copied[i], job->first_token + t + i, job->weight, err);
        }
        if (status == STATUS_OK)
            status = rope_rotations(job->weight->rope, copied, n, rotations + t, err);
    }
    return status;
}

static void count(_Atomic uint64_t *counter, uint64_t bytes)
{
    atomic_fetch_add_explicit(counter, bytes, memory_order_relaxed);
}

// Batch memory is the daemon's to write; the operand calls it const since engines only read it.
static void copy_runs(const struct job_runs *runs, const uint8_t *from, const void *to)
{
    for (uint32_t i = 0; i < runs->n; i++)
        memcpy((uint8_t *)(uintptr_t)to + i * runs->to_stride,
               from + runs->offset + i * runs->from_stride, runs->bytes);
}

enum status placement_fill(const struct placement *placement, const struct job *job,
                           struct copy_counters *copies, struct error *err)
{
    const uint8_t *memory = placement->region->memory;
    const uint8_t *scales = memory + placement->scales.offset;
    const struct einsum_operand *operand = &job->operand;
    const struct job_runs rows = job_activation_runs(job), second = job_scale_runs(job);
    if (job->attention) {
        enum status status = fill_rotations((const void *)(scales + second.offset), job, err);
        if (status != STATUS_OK)
            return status;
        count(&copies->in_bytes, second.n * second.bytes);
    }
    if (job->input_given)
        return STATUS_OK;
    if (placement->region->on_device)
        return error_field(err, STATUS_UNIMPLEMENTED, "shared.region",
                           "of more tokens than a batch holds, only layouts TGR and TGK can lie "
                           "in CUDA memory");
    if (!job->attention) {
        copy_runs(&second, scales, operand->scales);
        count(&copies->in_bytes, second.n * second.bytes);
    }
    copy_runs(&rows, memory + placement->activations.offset, operand->activations);
    count(&copies->in_bytes, rows.n * rows.bytes);
    return STATUS_OK;
}

void placement_finish(const struct placement *placement, const struct job *job,
                      struct copy_counters *copies)
{
    if (job->output_given || placement->output.bytes == 0)
        return;
    uint64_t bytes = output_bytes(job, job->operand.tokens);
    memcpy(placement->region->memory + placement->output.offset +
               output_bytes(job, job->first_token),
           job->operand.output, bytes);
    count(&copies->out_bytes, bytes);
}

void placement_drop(struct placement *placement)
{
    if (placement->region)
        region_unref(placement->region);
    placement->region = NULL;
}
