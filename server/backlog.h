// Calls that gRPC has begun to parse and that have not come to us: they wait in a list of its own that
// has no bound. Who keeps to HTTP/2's limit has a few hundred there at most; who resets calls as fast as it
// opens them has as many as fit into memory. gRPC tells of them by channelz alone, in JSON.
#pragma once

#include <stdint.h>

// Of the only server in this process, since it began; 0: it does not say.
uint64_t backlog_calls_started(void);

// Channelz's number for the connection that has just been added as `fd`, where `last` is the greatest so
// far; 0: not found.
int64_t backlog_find_socket(int64_t last, int fd);
// Of a connection that is still there; 0: it does not say.
uint64_t backlog_streams_started(int64_t socket);
