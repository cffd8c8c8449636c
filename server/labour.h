// Whether gRPC labours for nothing: an rpc thread that has spent so much in it without an event, on few
// bytes, has met a header that never ends, all of which gRPC copies again with every frame. A large message
// takes it far less, but on memory that the machine is slow to give; then again its sender is sent a window
// update every 4 MiB, and who sends a header nothing. Told all that it goes by, asks nobody.
#pragma once

#include "base.h"

struct guard_traffic;
struct rpc_progress;

// What is no message yet is little up to here: nobody's labour.
enum { LABOUR_OWED_LITTLE_BYTES = 1 << 20 };

struct labour {                     // of a thread; zero at first
    uint64_t events, cpu_ns, moved; // when it last got anywhere, or had nothing to do
    uint64_t since_ns;              // at that look
    uint64_t last_cpu_ns, last_ns;  // of the last look
};

struct labour_look {
    const struct rpc_progress *progress; // of each thread
    const struct guard_traffic *traffic;
    uint64_t owed_bytes; // by who owes most
    uint64_t sent_ns;    // and the look that last found that one had been sent something
    bool suspect;        // that one
    uint64_t now_ns;
};
// For every look. Whether who owes most is to be cut off.
bool labour_is_stuck(struct labour *threads, uint32_t threads_n, const struct labour_look *look);
