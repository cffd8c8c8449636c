// What each connection has, by its number: whose it is, the calls and requests that are open on it, its
// faults, and whether it is about to end. And the queue in which new ones wait for an rpc thread. Any
// thread, but where it says main.
//
// A number is that of a socket, as the listener gives it to gRPC, and another's some time after its end. For
// a number that no socket can have nothing is counted, and all that is asked is 0.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "access.h"

struct connections;

static inline uint32_t connection_number(int fd)
{
    return (uint32_t)fd + 1; // 0 is none
}

static inline int connection_fd(uint32_t number)
{
    return (int)number - 1;
}

// For numbers below `numbers`, of which pages that are never reached are never touched. NULL: no memory.
struct connections *connections_create(size_t numbers);
void connections_destroy(struct connections *connections);

// ---- coming

// Before it is added: faults and calls begin at 0; faults are counted in `beside` too, if not NULL, also
// once it has ended, as long as `connections` is there.
void connections_expect(struct connections *connections, uint32_t number, _Atomic uint64_t *beside);
// Takes `peer`, whose the connection is, also if it fails, and puts the connection at the end of the queue.
// False: there is no such number.
bool connections_add(struct connections *connections, uint32_t number, struct access_peer *peer);
// The first in the queue, once; 0: none.
uint32_t connections_next(struct connections *connections);
bool connections_waiting(const struct connections *connections); // anybody in the queue
// NULL: unknown.
struct access_peer *connections_peer(const struct connections *connections, uint32_t number);
// gRPC's own number for it, see backlog.h; 0 as long as it has none.
void connections_set_channelz(struct connections *connections, uint32_t number, int64_t channelz);
int64_t connections_channelz(const struct connections *connections, uint32_t number);

// ---- going
//
// Once closing, a connection ends with its last call. Not so if that came through a proxy, which may take
// an end that reaches it together with a reply for the loss of that reply, as nginx does when it has a ping
// to answer first: that connection ends when it has been idle for a while, or instead of the reply to the
// next call. Nothing is lost by it: the client, or the proxy itself, asks elsewhere. Streams are told to end
// when closing begins, see rpc_close.

void connections_close(struct connections *connections);

enum connections_call {
    CONNECTION_STAYS,
    CONNECTION_LEAVES, // the reply could be lost: the call must be refused
    CONNECTION_ENDS    // and so it must, but before that the caller ends the connection
};
enum connections_call connections_call_began(struct connections *connections, uint32_t number,
                                             bool through_proxy);
// True: the connection is the caller's to end.
bool connections_call_ended(struct connections *connections, uint32_t number, bool through_proxy);
// Main thread, now and then. True: it has had no call since the last time, and is the caller's to end.
bool connections_leave_idle(struct connections *connections, uint32_t number);
// How many have begun since it was expected.
uint64_t connections_calls(const struct connections *connections, uint32_t number);

// ---- what is open: how many there were before, and there are

uint32_t connections_admit(struct connections *connections, uint32_t number);
void connections_unadmit(struct connections *connections, uint32_t number);
uint32_t connections_admitted(const struct connections *connections, uint32_t number);
uint32_t connections_request_began(struct connections *connections, uint32_t number);
void connections_request_ended(struct connections *connections, uint32_t number);

// ---- what came

// So many bytes of what it has sent came as whole messages, or are what calls cost beside these. What it has
// sent beyond is what gRPC holds of it, or has wasted its time with. UINT64_MAX: no such number.
void connections_settle(struct connections *connections, uint32_t number, uint64_t bytes);
uint64_t connections_settled(const struct connections *connections, uint32_t number);
// A call that came to nothing by its client's doing: reset before its answer had left, or wrong.
void connections_fault(struct connections *connections, uint32_t number);
uint64_t connections_faults(const struct connections *connections, uint32_t number);
