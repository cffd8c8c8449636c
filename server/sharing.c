// One connection, from accept to close:
//
//     reading --whole request--> answered at once ---------------------------> reading
//                  |
//                  +-- REGION, CUDA --> working: a pool thread maps it ------> reading
//                  +-- FORGET of CUDA memory --> working: or closes it ------> reading
//
// While it works the socket is not read. A peer that breaks the protocol or does not read its
// replies is cut off; nothing that a peer does makes us wait for it.
#include "sharing.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../client/einsum_shared.h"
#include "listener.h"
#include "log.h"

_Static_assert((int)EINSUM_SHARED_NAME_BYTES == (int)REGION_NAME_BYTES, "the same names");
_Static_assert((int)EINSUM_SHARED_ALIGNMENT == (int)REGION_ALIGNMENT, "the same alignment");
_Static_assert((int)EINSUM_SHARED_HANDLE_BYTES == (int)ENGINE_HANDLE_BYTES, "the same handles");

struct connection {
    struct sharing *sharing;
    struct connection *next, *previous;
    int fd;
    uv_poll_t readable;
    bool closing; // its handle is being closed; freed once that is done and it does not work

    struct einsum_shared_request request; // so far `request_bytes` of it
    size_t request_bytes;
    int received_fd; // that came with the request; -1: none
    bool too_many_fds;

    struct region *regions[SHARING_CONNECTION_REGIONS_MAX]; // by number; NULL: free
    struct ring *ring;                                      // NULL: none yet

    uv_work_t work;
    bool working, closed;
    // Written by the pool thread.
    struct region *added; // NULL: `error` tells why
    struct error error;
};

struct sharing {
    struct sharing_options options;
    struct listener *listener;
    struct regions *regions;
    struct rings *rings;
    struct connection *connections;
    uv_async_t unused, broken;
    uv_work_t collect;
    bool collecting, collect_again, started;
};

// ---- the end of a connection

static void free_if_over(struct connection *connection)
{
    if (!connection->closed || connection->working)
        return;
    if (connection->added)
        regions_remove(connection->sharing->regions, connection->added);
    if (connection->received_fd >= 0)
        close(connection->received_fd);
    free(connection);
}

static void on_closed(uv_handle_t *handle)
{
    struct connection *connection = CONTAINER_OF(handle, struct connection, readable);
    close(connection->fd);
    connection->closed = true;
    free_if_over(connection);
}

static void end_connection(struct connection *connection)
{
    if (connection->closing)
        return;
    connection->closing = true;
    struct sharing *sharing = connection->sharing;
    if (connection->ring)
        ring_close(connection->ring);
    for (uint32_t i = 0; i < sharing->options.connection_regions_max; i++)
        if (connection->regions[i])
            regions_remove(sharing->regions, connection->regions[i]);
    if (connection->previous)
        connection->previous->next = connection->next;
    else
        sharing->connections = connection->next;
    if (connection->next)
        connection->next->previous = connection->previous;
    shutdown(connection->fd, SHUT_RDWR); // the listener has a duplicate
    uv_close((uv_handle_t *)&connection->readable, on_closed);
}

// ---- replies

// What goes with a reply that is no error.
struct answer {
    uint32_t number;
    const uint8_t *name; // of a region; NULL: none
    int fd;              // -1: none; stays ours
};
static const struct answer nothing = {.fd = -1};

static void reply(struct connection *connection, const struct answer *answer,
                  const struct error *err)
{
    struct einsum_shared_reply reply = {
        .magic = EINSUM_SHARED_MAGIC,
        .op = connection->request.op,
        .status = err ? err->status : STATUS_OK,
        .number = answer->number,
    };
    if (answer->name)
        memcpy(reply.name, answer->name, sizeof reply.name);
    if (err) {
        snprintf(reply.field, sizeof reply.field, "%.*s", (int)sizeof reply.field - 1, err->field);
        snprintf(reply.text, sizeof reply.text, "%.*s", (int)sizeof reply.text - 1, err->text);
    }
    // MSG_DONTWAIT: who does not read its replies is cut off.
    if (!einsum_shared_send(connection->fd, &reply, sizeof reply, answer->fd, MSG_DONTWAIT))
        end_connection(connection);
}

// ---- requests

static void on_readable(uv_poll_t *poll, int status, int events);

static void read_on(struct connection *connection)
{
    connection->request_bytes = 0;
    connection->too_many_fds = false;
    if (!connection->closing)
        uv_poll_start(&connection->readable, UV_READABLE | UV_DISCONNECT, on_readable);
}

// In the pool. What has been forgotten is closed here, before its owner hears of it.
static void work_on_region(uv_work_t *work)
{
    struct connection *connection = CONTAINER_OF(work, struct connection, work);
    const struct einsum_shared_request *request = &connection->request;
    struct regions *regions = connection->sharing->regions;
    if (request->op == EINSUM_SHARED_FORGET) {
        regions_collect(regions);
        return;
    }
    enum status status =
        request->op == EINSUM_SHARED_CUDA
            ? regions_import(regions, (const uint8_t *)request->text, request->bytes,
                             &connection->added, &connection->error)
            : regions_add(regions, connection->received_fd, request->bytes, &connection->added,
                          &connection->error);
    if (status != STATUS_OK)
        connection->added = NULL;
}

// CUDA gives one address to all who open the same memory. From one connection that is a mistake: its
// tensors would be there under two numbers.
static void refuse_if_known(struct connection *connection)
{
    struct region *added = connection->added;
    for (uint32_t i = 0; added && i < SHARING_CONNECTION_REGIONS_MAX; i++) {
        const struct region *other = connection->regions[i];
        if (!other || !added->on_device || other->memory != added->memory)
            continue;
        error_field(&connection->error, STATUS_ALREADY_EXISTS, "handle",
                    "this connection has opened that memory already, as region %" PRIu32, i);
        connection->added = NULL;
        regions_remove(connection->sharing->regions, added);
        return;
    }
}

static void on_region_worked(uv_work_t *work, int unused)
{
    (void)unused;
    struct connection *connection = CONTAINER_OF(work, struct connection, work);
    connection->working = false;
    if (connection->received_fd >= 0)
        close(connection->received_fd);
    connection->received_fd = -1;
    if (connection->closing) {
        free_if_over(connection);
        return;
    }
    refuse_if_known(connection);
    struct region *region = connection->added;
    connection->added = NULL;
    if (connection->request.op == EINSUM_SHARED_FORGET) {
        reply(connection, &nothing, NULL);
    } else if (!region) {
        reply(connection, &nothing, &connection->error);
    } else {
        struct answer answer = {.name = region->name, .fd = -1};
        while (connection->regions[answer.number])
            answer.number++;
        connection->regions[answer.number] = region;
        if (connection->ring)
            ring_set_region(connection->ring, answer.number, region);
        reply(connection, &answer, NULL);
    }
    read_on(connection);
}

static void start_work(struct connection *connection)
{
    uv_poll_stop(&connection->readable);
    connection->working = true;
    uv_queue_work(connection->sharing->options.loop, &connection->work, work_on_region,
                  on_region_worked);
}

NODISCARD static enum status start_region(struct connection *connection, struct error *err)
{
    uint32_t most = connection->sharing->options.connection_regions_max, used = 0;
    for (uint32_t i = 0; i < most; i++)
        used += connection->regions[i] != NULL;
    if (connection->request.op == EINSUM_SHARED_REGION && connection->received_fd < 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "fd", "a region needs one, none came");
    if (used == most)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "this connection has %" PRIu32
                         " regions, no more may be (shared_connection_regions_max)",
                         used);
    start_work(connection);
    return STATUS_OK;
}

// The region that the request names.
NODISCARD static enum status find_region(struct connection *connection, struct region **region,
                                         struct error *err)
{
    uint32_t number = connection->request.region;
    *region = number < SHARING_CONNECTION_REGIONS_MAX ? connection->regions[number] : NULL;
    if (!*region)
        return error_field(err, STATUS_NOT_FOUND, "region",
                           "this connection has no region of number %" PRIu32, number);
    return STATUS_OK;
}

NODISCARD static enum status forget_region(struct connection *connection, struct error *err)
{
    struct region *region;
    enum status status = find_region(connection, &region, err);
    if (status != STATUS_OK)
        return status;
    if (connection->ring)
        ring_set_region(connection->ring, connection->request.region, NULL);
    connection->regions[connection->request.region] = NULL;
    bool on_device = region->on_device;
    regions_remove(connection->sharing->regions, region);
    if (on_device) // its owner may free it then
        start_work(connection);
    return STATUS_OK;
}

NODISCARD static enum status make_ring(struct connection *connection, struct answer *answer,
                                       struct error *err)
{
    struct sharing *sharing = connection->sharing;
    if (!sharing->rings)
        return error_set(err, STATUS_UNIMPLEMENTED, "this server has no rings");
    if (connection->ring)
        return error_set(err, STATUS_ALREADY_EXISTS, "this connection has a ring");
    struct region *region;
    enum status status = find_region(connection, &region, err);
    if (status == STATUS_OK)
        status = ring_open(sharing->rings, region, connection->request.offset,
                           connection->request.entries, &connection->ring, &answer->fd, err);
    if (status != STATUS_OK)
        return status;
    for (uint32_t i = 0; i < SHARING_CONNECTION_REGIONS_MAX; i++)
        if (connection->regions[i])
            ring_set_region(connection->ring, i, connection->regions[i]);
    return STATUS_OK;
}

NODISCARD static enum status number_name(struct connection *connection, struct answer *answer,
                                         struct error *err)
{
    const struct einsum_shared_request *request = &connection->request;
    if (!memchr(request->text, '\0', sizeof request->text))
        return error_field(err, STATUS_INVALID_ARGUMENT, "text", "%d bytes without an end",
                           EINSUM_SHARED_TEXT_BYTES);
    if (!connection->ring)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "this connection has no ring, which numbers are for");
    if (request->op == EINSUM_SHARED_WEIGHT)
        return ring_add_weight(connection->ring, request->text, &answer->number, err);
    return rings_find_kernel(connection->sharing->rings, request->text, &answer->number, err);
}

// A whole request has come. On failure `*fatal` tells that there is no use in going on.
NODISCARD static enum status carry_out(struct connection *connection, struct answer *answer,
                                       bool *fatal, struct error *err)
{
    const struct einsum_shared_request *request = &connection->request;
    *fatal = true;
    if (request->magic != EINSUM_SHARED_MAGIC)
        return error_field(err, STATUS_INVALID_ARGUMENT, "magic", "expected 0x%x, got 0x%x",
                           EINSUM_SHARED_MAGIC, request->magic);
    if (connection->too_many_fds)
        return error_field(err, STATUS_INVALID_ARGUMENT, "fd",
                           "more than one came, or there is no room for another");
    *fatal = false;
    switch (request->op) {
    case EINSUM_SHARED_REGION:
    case EINSUM_SHARED_CUDA:
        return start_region(connection, err);
    case EINSUM_SHARED_FORGET:
        return forget_region(connection, err);
    case EINSUM_SHARED_RING:
        return make_ring(connection, answer, err);
    case EINSUM_SHARED_WEIGHT:
    case EINSUM_SHARED_KERNEL:
        return number_name(connection, answer, err);
    default:
        return error_field(err, STATUS_UNIMPLEMENTED, "op", "%" PRIu32 " is not supported",
                           request->op);
    }
}

static void on_request(struct connection *connection)
{
    struct error err;
    bool fatal;
    struct answer answer = nothing;
    enum status status = carry_out(connection, &answer, &fatal, &err);
    if (connection->working)
        return;
    if (connection->received_fd >= 0)
        close(connection->received_fd);
    connection->received_fd = -1;
    reply(connection, &answer, status == STATUS_OK ? NULL : &err);
    if (status != STATUS_OK && fatal)
        end_connection(connection);
    else
        read_on(connection);
}

// Keeps the first descriptor of a request and closes all others.
static void take_fds(struct connection *connection, struct msghdr *message)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t fds_n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < fds_n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (connection->received_fd < 0) {
                connection->received_fd = fd;
            } else {
                close(fd);
                connection->too_many_fds = true;
            }
        }
    }
    if (message->msg_flags & MSG_CTRUNC) // the kernel has closed those beyond, or had no numbers
        connection->too_many_fds = true;
}

static void on_readable(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events; // a hang-up shows as the end of what can be read
    struct connection *connection = CONTAINER_OF(poll, struct connection, readable);
    size_t left = sizeof connection->request - connection->request_bytes;
    struct iovec piece = {(char *)&connection->request + connection->request_bytes, left};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))];
    struct msghdr message = {.msg_iov = &piece,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t got = recvmsg(connection->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        end_connection(connection);
        return;
    }
    take_fds(connection, &message);
    connection->request_bytes += (size_t)got;
    if (connection->request_bytes == sizeof connection->request)
        on_request(connection);
}

static void take_connection(void *context, const struct listener_taken *taken)
{
    struct sharing *sharing = context;
    int fd = taken->fd;
    struct connection *connection = calloc(1, sizeof *connection);
    if (!connection || uv_poll_init(sharing->options.loop, &connection->readable, fd) != 0) {
        free(connection);
        shutdown(fd, SHUT_RDWR);
        close(fd);
        return;
    }
    connection->sharing = sharing;
    connection->fd = fd;
    connection->received_fd = -1;
    connection->next = sharing->connections;
    if (connection->next)
        connection->next->previous = connection;
    sharing->connections = connection;
    read_on(connection);
}

// ---- what is used no more

static void collect(uv_work_t *work)
{
    regions_collect(CONTAINER_OF(work, struct sharing, collect)->regions);
}

static void on_unused(uv_async_t *handle);

static void on_collected(uv_work_t *work, int unused)
{
    (void)unused;
    struct sharing *sharing = CONTAINER_OF(work, struct sharing, collect);
    sharing->collecting = false;
    if (sharing->collect_again)
        on_unused(&sharing->unused);
}

static void on_unused(uv_async_t *handle)
{
    struct sharing *sharing = CONTAINER_OF(handle, struct sharing, unused);
    sharing->collect_again = sharing->collecting;
    if (sharing->collecting)
        return;
    sharing->collecting = true;
    uv_queue_work(sharing->options.loop, &sharing->collect, collect, on_collected);
}

// Callers that break the ring's rules lose their connection.
static void on_broken(uv_async_t *handle)
{
    struct sharing *sharing = CONTAINER_OF(handle, struct sharing, broken);
    for (struct connection *connection = sharing->connections, *next; connection;
         connection = next) {
        next = connection->next;
        if (!connection->ring || !ring_broken(connection->ring))
            continue;
        LOG(WARN, "ring broken by its caller, connection closed");
        end_connection(connection);
    }
}

void sharing_on_broken(void *context)
{
    struct sharing *sharing = context;
    uv_async_send(&sharing->broken);
}

void sharing_on_unused(void *context)
{
    struct sharing *sharing = context;
    uv_async_send(&sharing->unused);
}

// ---- create, destroy

enum status sharing_create(const struct sharing_options *options, struct sharing **out,
                           struct error *err)
{
    struct sharing *sharing = calloc(1, sizeof *sharing);
    if (!sharing)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the control socket");
    sharing->options = *options;
    const struct listener_options listen = {
        .key = "shared_memory_listen",
        .addresses = &options->address,
        .addresses_n = 1,
        .unix_socket_mode = options->unix_socket_mode,
        .connections_max = options->connections_max,
    };
    enum status status = listener_create(options->loop, &listen, &sharing->listener, err);
    if (status != STATUS_OK) {
        free(sharing);
        return status;
    }
    uv_async_init(options->loop, &sharing->unused, on_unused);
    uv_async_init(options->loop, &sharing->broken, on_broken);
    *out = sharing;
    return STATUS_OK;
}

enum status sharing_start(struct sharing *sharing, struct regions *regions, struct rings *rings,
                          struct error *err)
{
    sharing->regions = regions;
    sharing->rings = rings;
    return listener_start(sharing->listener, take_connection, sharing, err);
}

void sharing_stop(struct sharing *sharing)
{
    listener_stop(sharing->listener);
}

void sharing_drop_connections(struct sharing *sharing)
{
    while (sharing->connections)
        end_connection(sharing->connections);
    listener_drop_connections(sharing->listener);
}

void sharing_destroy(struct sharing *sharing)
{
    listener_destroy(sharing->listener);
    free(sharing);
}

struct sharing_stats sharing_stats(const struct sharing *sharing)
{
    struct listener_stats stats = listener_stats(sharing->listener);
    return (struct sharing_stats){
        .connections = stats.connections,
        .connections_refused = stats.refused,
    };
}
