#include "labour.h"

#include "guard.h"
#include "rpc.h"

enum {
    STUCK_MS = 100,
    SUSPECT_STUCK_MS = 5,
    UNCOUNTED_STUCK_MS = 1000,    // where it may labour on the messages of unix sockets
    STUCK_BYTES_A_MS = 512 << 10, // headers move 200 to 500 KiB; messages 2 MiB and more, mostly
    LAST_STUCK_MS = 1000,         // also with one that is sent something
    LAST_STUCK_BYTES_A_MS = 64 << 10,
    IDLE_PART = 50,
};

static uint64_t stuck_ms(const struct labour_look *look)
{
    if (look->now_ns - look->traffic->uncounted_ns < 1000000000u)
        return UNCOUNTED_STUCK_MS;
    return look->suspect ? SUSPECT_STUCK_MS : STUCK_MS;
}

// What each thread has moved by itself nobody knows, so all of them are taken together.
bool labour_is_stuck(struct labour *threads, uint32_t threads_n, const struct labour_look *look)
{
    uint64_t longest_ms = 0, spent_ms = 0, moved = 0, all_moved = look->traffic->moved;
    uint64_t since_ns = look->now_ns; // of the longest
    for (uint32_t i = 0; i < threads_n; i++) {
        struct labour *labour = &threads[i];
        const struct rpc_progress *now = &look->progress[i];
        bool idle =
            now->cpu_ns - labour->last_cpu_ns < (look->now_ns - labour->last_ns) / IDLE_PART;
        labour->last_cpu_ns = now->cpu_ns;
        labour->last_ns = look->now_ns;
        if (!now->within_grpc || now->events != labour->events || idle) {
            labour->events = now->events;
            labour->cpu_ns = now->cpu_ns;
            labour->moved = all_moved;
            labour->since_ns = look->now_ns;
            continue;
        }
        uint64_t spent = (now->cpu_ns - labour->cpu_ns) / 1000000u;
        uint64_t since = all_moved - labour->moved;
        spent_ms += spent;
        if (spent > longest_ms) {
            longest_ms = spent;
            since_ns = labour->since_ns;
        }
        moved = since > moved ? since : moved;
    }
    bool silent = look->sent_ns <= since_ns;
    bool stuck = silent && longest_ms >= stuck_ms(look) && moved < spent_ms * STUCK_BYTES_A_MS;
    bool stuck_after_all = longest_ms >= LAST_STUCK_MS && moved < spent_ms * LAST_STUCK_BYTES_A_MS;
    return look->owed_bytes > LABOUR_OWED_LITTLE_BYTES && (stuck || stuck_after_all);
}
