#include "connections.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

struct connection {
    uint32_t next;                      // in the queue; guarded by `adding`
    _Atomic(struct access_peer *) peer; // owned; NULL: none has had this number
    _Atomic uint32_t calls;             // open, with LEAVES
    _Atomic uint64_t began;             // calls since it was expected
    _Atomic uint64_t began_at_look;     // the last one of connections_leave_idle
    _Atomic uint32_t admitted;          // calls that are not being refused
    _Atomic uint32_t requests;          // in flight
    _Atomic uint64_t settled_bytes;
    _Atomic uint64_t faults;
    _Atomic(_Atomic uint64_t *) faults_beside; // counts them too; or NULL
    _Atomic int64_t channelz;
};

struct connections {
    size_t numbers;
    _Atomic bool closing;
    // The queue, from the first to the last; 0: none. Changed under `adding`.
    _Atomic uint32_t first;
    uint32_t last;
    size_t used; // no number from here on has been added
    pthread_mutex_t adding;
    struct connection of[];
};

// In the count of a connection's calls: it is about to end.
static const uint32_t LEAVES = UINT32_C(1) << 31;

struct connections *connections_create(size_t numbers)
{
    struct connections *connections =
        calloc(1, sizeof *connections + numbers * sizeof connections->of[0]);
    if (!connections)
        return NULL;
    connections->numbers = numbers;
    pthread_mutex_init(&connections->adding, NULL);
    return connections;
}

void connections_destroy(struct connections *connections)
{
    pthread_mutex_destroy(&connections->adding);
    for (size_t i = 0; i < connections->used; i++)
        access_peer_free(connections->of[i].peer);
    free(connections);
}

static struct connection *find(struct connections *connections, uint32_t number)
{
    return number < connections->numbers ? &connections->of[number] : NULL;
}

static const struct connection *look_up(const struct connections *connections, uint32_t number)
{
    return number < connections->numbers ? &connections->of[number] : NULL;
}

// ---- coming

void connections_expect(struct connections *connections, uint32_t number, _Atomic uint64_t *beside)
{
    struct connection *connection = find(connections, number);
    if (!connection)
        return;
    atomic_store_explicit(&connection->began, 0, memory_order_relaxed);
    atomic_store_explicit(&connection->faults, 0, memory_order_relaxed);
    atomic_store_explicit(&connection->faults_beside, beside, memory_order_relaxed);
}

bool connections_add(struct connections *connections, uint32_t number, struct access_peer *peer)
{
    struct connection *connection = find(connections, number);
    if (!connection) {
        access_peer_free(peer);
        return false;
    }
    access_peer_free(atomic_exchange_explicit(&connection->peer, peer, memory_order_acq_rel));
    atomic_fetch_and(&connection->calls, ~LEAVES); // of the last one of this number
    atomic_store_explicit(&connection->channelz, 0, memory_order_relaxed);
    atomic_store_explicit(&connection->began_at_look, UINT64_MAX, memory_order_relaxed);
    pthread_mutex_lock(&connections->adding);
    if (connections->used <= number)
        connections->used = (size_t)number + 1;
    connection->next = 0;
    if (connections_waiting(connections))
        connections->of[connections->last].next = number;
    else
        atomic_store_explicit(&connections->first, number, memory_order_relaxed);
    connections->last = number;
    pthread_mutex_unlock(&connections->adding);
    return true;
}

bool connections_waiting(const struct connections *connections)
{
    return atomic_load_explicit(&connections->first, memory_order_relaxed) != 0;
}

uint32_t connections_next(struct connections *connections)
{
    if (!connections_waiting(connections))
        return 0;
    pthread_mutex_lock(&connections->adding);
    uint32_t number = atomic_load_explicit(&connections->first, memory_order_relaxed);
    if (number)
        atomic_store_explicit(&connections->first, connections->of[number].next,
                              memory_order_relaxed);
    pthread_mutex_unlock(&connections->adding);
    return number;
}

struct access_peer *connections_peer(const struct connections *connections, uint32_t number)
{
    const struct connection *connection = look_up(connections, number);
    return connection ? atomic_load_explicit(&connection->peer, memory_order_acquire) : NULL;
}

void connections_set_channelz(struct connections *connections, uint32_t number, int64_t channelz)
{
    struct connection *connection = find(connections, number);
    if (connection)
        atomic_store_explicit(&connection->channelz, channelz, memory_order_relaxed);
}

int64_t connections_channelz(const struct connections *connections, uint32_t number)
{
    const struct connection *connection = look_up(connections, number);
    return connection ? atomic_load_explicit(&connection->channelz, memory_order_relaxed) : 0;
}

// ---- going

void connections_close(struct connections *connections)
{
    atomic_store(&connections->closing, true);
}

// False: its calls are not as many, or it has been claimed.
static bool claim(struct connection *connection, uint32_t calls)
{
    return atomic_compare_exchange_strong(&connection->calls, &calls, calls | LEAVES);
}

enum connections_call connections_call_began(struct connections *connections, uint32_t number,
                                             bool through_proxy)
{
    struct connection *connection = find(connections, number);
    if (!connection)
        return CONNECTION_STAYS;
    uint32_t before = atomic_fetch_add(&connection->calls, 1);
    atomic_fetch_add_explicit(&connection->began, 1, memory_order_relaxed);
    if (before & LEAVES)
        return CONNECTION_LEAVES;
    bool ends = through_proxy && atomic_load(&connections->closing) && claim(connection, 1);
    return ends ? CONNECTION_ENDS : CONNECTION_STAYS;
}

// The order between the count and `closing` is what makes sure that whoever looks at them, this thread
// or the main one, sees the end of the last call.
bool connections_call_ended(struct connections *connections, uint32_t number, bool through_proxy)
{
    struct connection *connection = find(connections, number);
    return connection && atomic_fetch_sub(&connection->calls, 1) == 1 && !through_proxy &&
           atomic_load(&connections->closing) && claim(connection, 0);
}

bool connections_leave_idle(struct connections *connections, uint32_t number)
{
    struct connection *connection = find(connections, number);
    if (!connection)
        return false;
    uint64_t began = atomic_load_explicit(&connection->began, memory_order_relaxed);
    uint64_t before =
        atomic_exchange_explicit(&connection->began_at_look, began, memory_order_relaxed);
    if (began != before || !claim(connection, 0))
        return false;
    if (atomic_load_explicit(&connection->began, memory_order_relaxed) == began)
        return true;
    atomic_fetch_and(&connection->calls, ~LEAVES); // one has come and gone since
    return false;
}

uint64_t connections_calls(const struct connections *connections, uint32_t number)
{
    const struct connection *connection = look_up(connections, number);
    return connection ? atomic_load_explicit(&connection->began, memory_order_relaxed) : 0;
}

// ---- what is open

uint32_t connections_admit(struct connections *connections, uint32_t number)
{
    struct connection *connection = find(connections, number);
    return connection ? atomic_fetch_add_explicit(&connection->admitted, 1, memory_order_relaxed)
                      : 0;
}

void connections_unadmit(struct connections *connections, uint32_t number)
{
    struct connection *connection = find(connections, number);
    if (connection)
        atomic_fetch_sub_explicit(&connection->admitted, 1, memory_order_relaxed);
}

uint32_t connections_admitted(const struct connections *connections, uint32_t number)
{
    const struct connection *connection = look_up(connections, number);
    return connection ? atomic_load_explicit(&connection->admitted, memory_order_relaxed) : 0;
}

uint32_t connections_request_began(struct connections *connections, uint32_t number)
{
    struct connection *connection = find(connections, number);
    return connection ? atomic_fetch_add_explicit(&connection->requests, 1, memory_order_relaxed)
                      : 0;
}

void connections_request_ended(struct connections *connections, uint32_t number)
{
    struct connection *connection = find(connections, number);
    if (connection)
        atomic_fetch_sub_explicit(&connection->requests, 1, memory_order_relaxed);
}

// ---- what came

void connections_settle(struct connections *connections, uint32_t number, uint64_t bytes)
{
    struct connection *connection = find(connections, number);
    if (connection)
        atomic_fetch_add_explicit(&connection->settled_bytes, bytes, memory_order_relaxed);
}

uint64_t connections_settled(const struct connections *connections, uint32_t number)
{
    const struct connection *connection = look_up(connections, number);
    return connection ? atomic_load_explicit(&connection->settled_bytes, memory_order_relaxed)
                      : UINT64_MAX;
}

void connections_fault(struct connections *connections, uint32_t number)
{
    struct connection *connection = find(connections, number);
    if (!connection)
        return;
    atomic_fetch_add_explicit(&connection->faults, 1, memory_order_relaxed);
    _Atomic uint64_t *beside =
        atomic_load_explicit(&connection->faults_beside, memory_order_relaxed);
    if (beside)
        atomic_fetch_add_explicit(beside, 1, memory_order_relaxed);
}

uint64_t connections_faults(const struct connections *connections, uint32_t number)
{
    const struct connection *connection = look_up(connections, number);
    return connection ? atomic_load_explicit(&connection->faults, memory_order_relaxed) : 0;
}
