// The CPU engine, failing on demand: linked in place of the null engine into einsumd_faults, whose
// configuration asks for it by "engine": "null". What fails says the file that is named by
// ENGINE_FAULTS, one fault a line, read again whenever the engine is asked for something:
//
//     open | weight_load | memory_alloc | batch   STATUS       fails with that number of gRPC's
//     batch slow MS     ends so much later            batch hang     does not end
//     submit hang       does not return
//
// A batch that is held ends once the file no longer holds it: nothing but time passes here.
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/engine.h"

enum { LANES_MAX = 16, TICK_US = 2000, FILE_BYTES = 1024 };

struct engine {
    struct engine *cpu;
    void (*wake)(void *context);
    void *wake_context;
    uint64_t submitted_ns[LANES_MAX]; // 0: nothing is in flight
    struct engine_result results[LANES_MAX];
    bool ended[LANES_MAX]; // the CPU's, with that result
    _Atomic bool stopping;
    pthread_t ticker;
};

// The word behind `stage` in the file, or "".
static void read_fault(const char *stage, char action[32], unsigned long *argument)
{
    const char *path = getenv("ENGINE_FAULTS");
    char text[FILE_BYTES] = "";
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        ssize_t got = read(fd, text, sizeof text - 1);
        text[got > 0 ? got : 0] = '\0';
        close(fd);
    }
    action[0] = '\0';
    *argument = 0;
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        size_t bytes = strlen(stage);
        if (strncmp(line, stage, bytes) != 0 || line[bytes] != ' ')
            continue;
        const char *word = line + bytes + 1;
        size_t word_bytes = strcspn(word, " ");
        snprintf(action, 32, "%.*s", (int)word_bytes, word);
        *argument = strtoul(word + word_bytes, NULL, 10);
        return;
    }
}

static bool stage_is(const char *stage, const char *word, unsigned long *argument)
{
    char action[32];
    read_fault(stage, action, argument);
    return strcmp(action, word) == 0;
}

static enum status stage_status(const char *stage, struct error *err)
{
    char action[32];
    unsigned long unused;
    read_fault(stage, action, &unused);
    if (action[0] < '1' || action[0] > '9')
        return STATUS_OK;
    return error_set(err, (enum status)strtoul(action, NULL, 10), "injected: %s", stage);
}

// Whoever holds batches must be asked again.
static void *tick(void *argument)
{
    struct engine *engine = argument;
    while (!atomic_load(&engine->stopping)) {
        usleep(TICK_US);
        engine->wake(engine->wake_context);
    }
    return NULL;
}

static enum status faulty_open(const struct engine_options *options, struct engine **out,
                               struct error *err)
{
    ASSERT(options->lanes <= LANES_MAX);
    enum status status = stage_status("open", err);
    if (status)
        return status;
    struct engine *engine = calloc(1, sizeof *engine);
    ASSERT(engine);
    engine->wake = options->wake;
    engine->wake_context = options->wake_context;
    status = engine_cpu.open(options, &engine->cpu, err);
    if (status) {
        free(engine);
        return status;
    }
    ASSERT(pthread_create(&engine->ticker, NULL, tick, engine) == 0);
    *out = engine;
    return STATUS_OK;
}

static void faulty_close(struct engine *engine)
{
    atomic_store(&engine->stopping, true);
    pthread_join(engine->ticker, NULL);
    engine_cpu.close(engine->cpu);
    free(engine);
}

static void faulty_describe(const struct engine *engine, struct engine_info *info)
{
    engine_cpu.describe(engine->cpu, info);
}

static enum status faulty_weight_load(struct engine *engine,
                                      const struct engine_weight_source *source,
                                      struct engine_weight **weight, struct error *err)
{
    enum status status = stage_status("weight_load", err);
    return status ? status : engine_cpu.weight_load(engine->cpu, source, weight, err);
}

static void faulty_weight_free(struct engine *engine, struct engine_weight *weight)
{
    engine_cpu.weight_free(engine->cpu, weight);
}

static uint64_t faulty_weight_bytes(const struct engine_weight *weight)
{
    return engine_cpu.weight_bytes(weight);
}

static enum status faulty_memory_alloc(struct engine *engine, uint64_t bytes, void **memory,
                                       struct error *err)
{
    enum status status = stage_status("memory_alloc", err);
    return status ? status : engine_cpu.memory_alloc(engine->cpu, bytes, memory, err);
}

static void faulty_memory_free(struct engine *engine, void *memory, uint64_t bytes)
{
    engine_cpu.memory_free(engine->cpu, memory, bytes);
}

static void faulty_submit(struct engine *engine, uint32_t lane, const struct engine_batch *batch)
{
    unsigned long unused;
    while (stage_is("submit", "hang", &unused))
        usleep(TICK_US);
    engine->submitted_ns[lane] = now_ns();
    engine->ended[lane] = false;
    engine_cpu.submit(engine->cpu, lane, batch);
}

static bool faulty_poll(struct engine *engine, uint32_t lane, struct engine_result *result)
{
    if (engine->submitted_ns[lane] == 0)
        return false;
    if (!engine->ended[lane])
        engine->ended[lane] = engine_cpu.poll(engine->cpu, lane, &engine->results[lane]);
    unsigned long ms;
    if (!engine->ended[lane] || stage_is("batch", "hang", &ms) ||
        (stage_is("batch", "slow", &ms) && now_ns() - engine->submitted_ns[lane] < ms * 1000000u))
        return false;
    *result = engine->results[lane];
    enum status status = stage_status("batch", &result->error);
    if (status)
        result->status = status;
    engine->submitted_ns[lane] = 0;
    return true;
}

const struct engine_ops engine_null = {
    .name = "null",
    .lanes_default = 2,
    .serial = true,
    .open = faulty_open,
    .close = faulty_close,
    .describe = faulty_describe,
    .weight_load = faulty_weight_load,
    .weight_free = faulty_weight_free,
    .weight_bytes = faulty_weight_bytes,
    .memory_alloc = faulty_memory_alloc,
    .memory_free = faulty_memory_free,
    .memory_register = engine_host_memory_register,
    .memory_unregister = engine_host_memory_unregister,
    .submit = faulty_submit,
    .poll = faulty_poll,
};
