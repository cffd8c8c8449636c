#include "listener.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "log.h"

enum {
    BACKLOG = 1024,
    ACCEPTS_A_TURN = 64, // then the loop may do something else
    SOCKET_BUFFER_BYTES =
        1 << 20, // unix sockets: the default of 208 KiB costs a third of the speed at 1 MB messages
    PAUSE_MS = 100,  // without file descriptors there is no use in asking again at once
    NUMBER_MIN = 64, // of sockets that are numbered in turn
    NUMBER_MAX = 65536,
    ADDRESS_BYTES = 160,
};

struct connection {
    uv_poll_t hangup; // of a duplicate of the socket that gRPC owns
    int fd;
    int wire;        // a duplicate of the socket itself, where `fd` is of a tunnel's end; else -1
    int taken_fd;    // the number that gRPC knows it by; another's, once gRPC has closed it
    bool ended, cut; // guarded by the listener's lock
    struct listener_notes notes;
    struct listener *listener;
    struct connection *next, *previous;
};

struct endpoint {
    struct listener *listener;
    uv_poll_t readable;
    int fd;      // -1: closed
    int lock_fd; // of a unix socket's lock file; -1: none
    bool polled; // `readable` has been initialised
    bool is_loopback;
    char text[ADDRESS_BYTES];
    char path[sizeof((struct sockaddr_un *)0)->sun_path]; // empty: not a unix socket
    dev_t device; // of the socket file that we made, so that we unlink no other
    ino_t inode;
};

struct listener {
    uv_loop_t *loop;
    uv_timer_t pause;
    const char *key; // of the configuration
    listener_take *take;
    void *context;
    listener_visitor *visit_ended; // NULL: nobody wants to know
    void *ended_context;
    bool loopback_only, tunnel;
    struct endpoint *endpoints;
    size_t endpoints_n;
    pthread_mutex_t lock;
    struct connection *live; // guarded by lock; changed by the main thread alone
    uint32_t connections_max;
    int number_next; // of a socket; 0: as the kernel gives it
    uint64_t accept_failures;
    bool stopped;
    _Atomic uint32_t connections;
    _Atomic uint64_t accepted, refused, accept_errors;
};

// ---- connections

// The socket that the caller is at the other end of.
static int looked_at(const struct connection *connection)
{
    return connection->wire >= 0 ? connection->wire : connection->fd;
}

static void close_duplicates(const struct connection *connection)
{
    close(connection->fd);
    if (connection->wire >= 0)
        close(connection->wire);
}

static void on_connection_closed(uv_handle_t *handle)
{
    struct connection *connection = CONTAINER_OF(handle, struct connection, hangup);
    close_duplicates(connection);
    free(connection);
}

static void drop_connection(struct connection *connection)
{
    struct listener *listener = connection->listener;
    if (listener->visit_ended)
        listener->visit_ended(listener->ended_context, looked_at(connection), connection->taken_fd,
                              &connection->notes);
    pthread_mutex_lock(&listener->lock);
    if (connection->previous)
        connection->previous->next = connection->next;
    else
        listener->live = connection->next;
    if (connection->next)
        connection->next->previous = connection->previous;
    pthread_mutex_unlock(&listener->lock);
    atomic_fetch_sub_explicit(&listener->connections, 1, memory_order_relaxed);
    uv_close((uv_handle_t *)&connection->hangup, on_connection_closed);
}

static void on_hangup(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    drop_connection(CONTAINER_OF(poll, struct connection, hangup));
}

// The lowest number that is free from the next on, round and round.
static int renumber(struct listener *listener, int fd)
{
    if (listener->number_next == 0)
        return fd;
    int other = fcntl(fd, F_DUPFD_CLOEXEC, listener->number_next);
    if (other < 0) {
        listener->number_next = NUMBER_MIN;
        other = fcntl(fd, F_DUPFD_CLOEXEC, listener->number_next);
    }
    if (other < 0)
        return fd;
    close(fd);
    listener->number_next = other + 1 < NUMBER_MAX ? other + 1 : NUMBER_MIN;
    return other;
}

static bool watch_connection(struct listener *listener, const struct listener_taken *taken)
{
    struct connection *connection = calloc(1, sizeof *connection);
    if (!connection)
        return false;
    connection->listener = listener;
    connection->taken_fd = taken->fd;
    connection->notes.by_tls = taken->wire >= 0;
    socklen_t bytes = sizeof connection->notes.peer;
    int caller = taken->wire >= 0 ? taken->wire : taken->fd;
    if (getpeername(caller, (struct sockaddr *)&connection->notes.peer, &bytes) != 0)
        connection->notes.peer.ss_family = AF_UNSPEC; // it is gone
    connection->fd = fcntl(taken->fd, F_DUPFD_CLOEXEC, 0);
    if (connection->fd < 0)
        goto free_connection;
    connection->wire = taken->wire >= 0 ? fcntl(taken->wire, F_DUPFD_CLOEXEC, 0) : -1;
    if (taken->wire >= 0 && connection->wire < 0)
        goto close_duplicate;
    if (uv_poll_init(listener->loop, &connection->hangup, connection->fd) != 0)
        goto close_duplicate;
    uv_poll_start(&connection->hangup, UV_DISCONNECT, on_hangup);
    pthread_mutex_lock(&listener->lock);
    connection->next = listener->live;
    if (connection->next)
        connection->next->previous = connection;
    listener->live = connection;
    pthread_mutex_unlock(&listener->lock);
    atomic_fetch_add_explicit(&listener->connections, 1, memory_order_relaxed);
    return true;

close_duplicate:
    close_duplicates(connection);
free_connection:
    free(connection);
    return false;
}

static void set_send_buffer(int fd)
{
    int bytes = SOCKET_BUFFER_BYTES;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

// The pair for a connection by TCP: the server gets one end, and its end is seen there.
static bool make_tunnel(struct listener *listener, struct listener_taken *taken)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) != 0)
        return false;
    set_send_buffer(ends[0]);
    set_send_buffer(ends[1]);
    taken->wire = taken->fd;
    taken->fd = renumber(listener, ends[0]);
    taken->tunnel = ends[1];
    return true;
}

static void close_taken(const struct listener_taken *taken)
{
    close(taken->fd);
    if (taken->wire >= 0) {
        close(taken->wire);
        close(taken->tunnel);
    }
}

static void take_connection(struct endpoint *endpoint, int fd)
{
    struct listener *listener = endpoint->listener;
    struct listener_taken taken = {.fd = renumber(listener, fd),
                                   .is_unix = endpoint->path[0] != '\0',
                                   .wire = -1,
                                   .tunnel = -1};
    bool full = atomic_load_explicit(&listener->connections, memory_order_relaxed) >=
                listener->connections_max;
    bool tunnelled = listener->tunnel && !taken.is_unix;
    if (full || (tunnelled && !make_tunnel(listener, &taken)) ||
        !watch_connection(listener, &taken)) {
        uint64_t refused = atomic_fetch_add_explicit(&listener->refused, 1, memory_order_relaxed);
        if ((refused & (refused + 1)) ==
            0) // the 1st, 2nd, 4th, 8th ...: a flood must not fill the log
            LOG(WARN, "connection refused", LOG_STR("listen", endpoint->text),
                LOG_STR("reason", full ? "connections_max" : "no file descriptors or memory"),
                LOG_U64("refused", refused + 1));
        close_taken(&taken);
        return;
    }
    if (taken.is_unix) {
        set_send_buffer(fd);
    } else {
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    atomic_fetch_add_explicit(&listener->accepted, 1, memory_order_relaxed);
    listener->take(listener->context, &taken);
}

static void on_readable(uv_poll_t *poll, int status, int events);

static void on_pause_over(uv_timer_t *timer)
{
    struct listener *listener = CONTAINER_OF(timer, struct listener, pause);
    for (size_t i = 0; i < listener->endpoints_n; i++)
        if (listener->endpoints[i].fd >= 0)
            uv_poll_start(&listener->endpoints[i].readable, UV_READABLE, on_readable);
}

// Once, not each time that it is tried again: the reason lasts, and the log has other uses.
static void on_accept_failed(struct endpoint *endpoint, int reason)
{
    struct listener *listener = endpoint->listener;
    uint64_t failures = ++listener->accept_failures;
    if ((failures & (failures - 1)) == 0)
        LOG(WARN, "accept failed", LOG_STR("listen", endpoint->text),
            LOG_STR("reason", strerror(reason)), LOG_U64("failures", failures));
    atomic_fetch_add_explicit(&listener->accept_errors, 1, memory_order_relaxed);
    uv_poll_stop(&endpoint->readable);
    uv_timer_start(&listener->pause, on_pause_over, PAUSE_MS, 0);
}

static void on_readable(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    struct endpoint *endpoint = CONTAINER_OF(poll, struct endpoint, readable);
    for (int i = 0; i < ACCEPTS_A_TURN; i++) {
        int fd = accept4(endpoint->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            take_connection(endpoint, fd);
            continue;
        }
        if (errno == ECONNABORTED || errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            on_accept_failed(endpoint, errno);
        return;
    }
}

// ---- binding

NODISCARD static enum status bind_failed(const struct endpoint *endpoint, struct error *err)
{
    const char *key = endpoint->listener->key;
    if (errno == EADDRINUSE)
        return error_field(err, STATUS_ALREADY_EXISTS, key, "%s is in use by another process",
                           endpoint->text);
    return error_field(err, STATUS_FAILED_PRECONDITION, key, "%s cannot be bound: %s",
                       endpoint->text, strerror(errno));
}

// A socket file outlives a killed daemon, and binding over a living one would silently take its
// place: the lock tells which it is. The lock file itself stays, since removing it would race with
// the next daemon.
NODISCARD static enum status lock_path(struct endpoint *endpoint, struct error *err)
{
    char lock[sizeof endpoint->path + 8];
    snprintf(lock, sizeof lock, "%s.lock", endpoint->path);
    endpoint->lock_fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (endpoint->lock_fd < 0)
        return error_field(err, STATUS_FAILED_PRECONDITION, endpoint->listener->key,
                           "%s cannot be opened: %s", lock, strerror(errno));
    if (flock(endpoint->lock_fd, LOCK_EX | LOCK_NB) != 0)
        return error_field(err, STATUS_ALREADY_EXISTS, endpoint->listener->key,
                           "unix:%s is in use by another process", endpoint->path);
    return STATUS_OK;
}

NODISCARD static enum status bind_unix(struct endpoint *endpoint, const char *path, uint32_t mode,
                                       struct error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return error_field(err, STATUS_INVALID_ARGUMENT, endpoint->listener->key,
                           "unix:%s is longer than %zu characters", path,
                           sizeof address.sun_path - 1);
    strcpy(address.sun_path, path);
    strcpy(endpoint->path, path);
    snprintf(endpoint->text, sizeof endpoint->text, "unix:%s", path);
    enum status status = lock_path(endpoint, err);
    if (status != STATUS_OK)
        return status;
    struct stat stale;
    if (lstat(path, &stale) == 0) {
        if (!S_ISSOCK(stale.st_mode))
            return error_field(err, STATUS_ALREADY_EXISTS, endpoint->listener->key,
                               "unix:%s is there already and is not a socket", path);
        unlink(path);
    }
    endpoint->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (endpoint->fd < 0)
        return bind_failed(endpoint, err);
    mode_t mask = umask(0777); // nobody gets in between bind and chmod
    int bound = bind(endpoint->fd, (struct sockaddr *)&address, sizeof address);
    int bind_errno = errno;
    umask(mask);
    errno = bind_errno;
    if (bound != 0)
        return bind_failed(endpoint, err);
    struct stat made;
    if (chmod(path, mode) != 0 || lstat(path, &made) != 0)
        return bind_failed(endpoint, err);
    endpoint->device = made.st_dev;
    endpoint->inode = made.st_ino;
    return STATUS_OK;
}

static bool is_loopback(const struct sockaddr *address)
{
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)(const void *)address;
        return ntohl(v4->sin_addr.s_addr) >> 24 == IN_LOOPBACKNET;
    }
    const struct in6_addr *v6 = &((const struct sockaddr_in6 *)(const void *)address)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(v6) ||
           (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr[12] == IN_LOOPBACKNET);
}

static void describe_tcp(struct endpoint *endpoint)
{
    struct sockaddr_storage address = {0};
    socklen_t bytes = sizeof address;
    char host[80], port[16];
    if (getsockname(endpoint->fd, (struct sockaddr *)&address, &bytes) != 0 ||
        getnameinfo((struct sockaddr *)&address, bytes, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return; // keeps the configured text
    const char *format = address.ss_family == AF_INET6 ? "[%s]:%s" : "%s:%s";
    snprintf(endpoint->text, sizeof endpoint->text, format, host, port);
}

NODISCARD static enum status bind_tcp(struct endpoint *endpoint, const char *text,
                                      struct error *err)
{
    snprintf(endpoint->text, sizeof endpoint->text, "%s", text);
    char host[ADDRESS_BYTES];
    snprintf(host, sizeof host, "%s", text[0] == '[' ? text + 1 : text);
    char *colon = strrchr(host, ':');
    if (!colon)
        return error_field(err, STATUS_INVALID_ARGUMENT, endpoint->listener->key, "%s has no port",
                           text);
    *colon = '\0';
    if (text[0] == '[' && colon > host && colon[-1] == ']')
        colon[-1] = '\0';
    struct addrinfo hints = {
        .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *found = NULL;
    int error = getaddrinfo(host[0] ? host : NULL, colon + 1, &hints, &found);
    if (error != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, endpoint->listener->key, "%s: %s", text,
                           gai_strerror(error));
    endpoint->is_loopback = is_loopback(found->ai_addr);
    if (endpoint->listener->loopback_only && !endpoint->is_loopback) {
        freeaddrinfo(found);
        return error_field(err, STATUS_FAILED_PRECONDITION, endpoint->listener->key,
                           "%s is open to other machines, and nothing says who may call: set "
                           "tls_certificate, tls_key and tls_client_ca, or tokens_file, or "
                           "insecure_listen if the network itself keeps strangers out",
                           text);
    }
    endpoint->fd = socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    // REUSEADDR lets a restarted daemon pass its own connections in TIME_WAIT; it does not let two
    // listen.
    int on = 1;
    bool bound = endpoint->fd >= 0 &&
                 setsockopt(endpoint->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0 &&
                 bind(endpoint->fd, found->ai_addr, found->ai_addrlen) == 0;
    int bind_errno = errno;
    freeaddrinfo(found);
    errno = bind_errno;
    if (!bound)
        return bind_failed(endpoint, err);
    describe_tcp(endpoint);
    return STATUS_OK;
}

static void on_endpoint_closed(uv_handle_t *handle)
{
    struct endpoint *endpoint = CONTAINER_OF(handle, struct endpoint, readable);
    close(endpoint->fd);
    endpoint->fd = -1;
}

static void unlink_socket(const struct endpoint *endpoint)
{
    struct stat now;
    if (endpoint->inode != 0 && lstat(endpoint->path, &now) == 0 &&
        now.st_dev == endpoint->device && now.st_ino == endpoint->inode)
        unlink(endpoint->path);
}

static void close_endpoint(struct endpoint *endpoint)
{
    if (endpoint->path[0])
        unlink_socket(endpoint);
    if (endpoint->fd >= 0)
        shutdown(endpoint->fd, SHUT_RD); // at once, not when the loop comes to close it
    if (endpoint->polled)
        uv_close((uv_handle_t *)&endpoint->readable, on_endpoint_closed);
    else if (endpoint->fd >= 0)
        close(endpoint->fd);
    if (endpoint->lock_fd >= 0)
        close(endpoint->lock_fd);
    endpoint->lock_fd = -1;
}

enum status listener_create(uv_loop_t *loop, const struct listener_options *options,
                            struct listener **out, struct error *err)
{
    struct listener *listener = calloc(1, sizeof *listener);
    struct endpoint *endpoints = calloc(options->addresses_n, sizeof *endpoints);
    if (!listener || !endpoints) {
        free(listener);
        free(endpoints);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the listeners");
    }
    pthread_mutex_init(&listener->lock, NULL);
    listener->loop = loop;
    listener->endpoints = endpoints;
    listener->key = options->key;
    listener->connections_max = options->connections_max;
    listener->loopback_only = options->loopback_only;
    listener->tunnel = options->tunnel;
    listener->number_next = options->renumber ? NUMBER_MIN : 0;
    enum status status = STATUS_OK;
    for (size_t i = 0; i < options->addresses_n; i++) {
        struct endpoint *endpoint = &endpoints[i];
        *endpoint = (struct endpoint){.listener = listener, .fd = -1, .lock_fd = -1};
        listener->endpoints_n++;
        const char *address = options->addresses[i];
        bool is_unix = strncmp(address, "unix:", 5) == 0;
        status = is_unix ? bind_unix(endpoint, address + 5, options->unix_socket_mode, err)
                         : bind_tcp(endpoint, address, err);
        if (status != STATUS_OK)
            goto close_endpoints;
    }
    uv_timer_init(loop, &listener->pause);
    *out = listener;
    return STATUS_OK;

close_endpoints:
    for (size_t i = 0; i < listener->endpoints_n; i++)
        close_endpoint(&endpoints[i]);
    listener_destroy(listener);
    return status;
}

enum status listener_start(struct listener *listener, listener_take *take, void *context,
                           struct error *err)
{
    listener->take = take;
    listener->context = context;
    for (size_t i = 0; i < listener->endpoints_n; i++) {
        struct endpoint *endpoint = &listener->endpoints[i];
        if (listen(endpoint->fd, BACKLOG) != 0) // a port bound by two is found out only here
            return bind_failed(endpoint, err);
        int error = uv_poll_init(listener->loop, &endpoint->readable, endpoint->fd);
        if (error != 0)
            return error_field(err, STATUS_FAILED_PRECONDITION, endpoint->listener->key,
                               "%s cannot be polled: %s", endpoint->text, uv_strerror(error));
        endpoint->polled = true;
        uv_poll_start(&endpoint->readable, UV_READABLE, on_readable);
    }
    return STATUS_OK;
}

void listener_set_connections_max(struct listener *listener, uint32_t connections_max)
{
    listener->connections_max = connections_max;
}

void listener_stop(struct listener *listener)
{
    if (listener->stopped)
        return;
    listener->stopped = true;
    uv_timer_stop(&listener->pause);
    for (size_t i = 0; i < listener->endpoints_n; i++)
        close_endpoint(&listener->endpoints[i]);
}

// Half a close: a whole one would answer what the peer still sends, be it window updates, with a
// reset that takes unsent replies with it.
static void end_connection_locked(struct connection *connection)
{
    if (!connection->ended)
        shutdown(connection->fd, SHUT_WR);
    connection->ended = true;
}

void listener_end_connection(struct listener *listener, int fd)
{
    pthread_mutex_lock(&listener->lock);
    for (struct connection *each = listener->live; each; each = each->next) {
        if (each->taken_fd == fd)
            end_connection_locked(each);
    }
    pthread_mutex_unlock(&listener->lock);
}

// What the peer has sent and nobody has read is gone as well, megabytes of it: a shutdown leaves them.
static void disconnect(int socket)
{
    const struct sockaddr none = {.sa_family = AF_UNSPEC};
    if (connect(socket, &none, sizeof none) != 0) // not TCP's
        shutdown(socket, SHUT_RDWR);
}

bool listener_cut_connection(struct listener *listener, int fd)
{
    bool cut = false;
    pthread_mutex_lock(&listener->lock);
    for (struct connection *each = listener->live; each && !cut; each = each->next) {
        if (each->taken_fd != fd || each->cut)
            continue;
        each->cut = each->ended = cut = true;
        disconnect(looked_at(each));
        if (each->wire >= 0)
            shutdown(each->fd, SHUT_RDWR);
    }
    pthread_mutex_unlock(&listener->lock);
    return cut;
}

void listener_visit(struct listener *listener, listener_visitor *visit, void *context)
{
    for (struct connection *each = listener->live; each; each = each->next)
        visit(context, looked_at(each), each->taken_fd, &each->notes);
}

void listener_visit_ended(struct listener *listener, listener_visitor *visit, void *context)
{
    listener->visit_ended = visit;
    listener->ended_context = context;
}

void listener_end_idle(struct listener *listener, bool (*busy)(void *context, int fd),
                       void *context)
{
    pthread_mutex_lock(&listener->lock);
    for (struct connection *each = listener->live; each; each = each->next) {
        if (!busy(context, each->taken_fd))
            end_connection_locked(each);
    }
    pthread_mutex_unlock(&listener->lock);
}

void listener_drop_connections(struct listener *listener)
{
    while (listener->live)
        drop_connection(listener->live);
}

void listener_destroy(struct listener *listener)
{
    pthread_mutex_destroy(&listener->lock);
    free(listener->endpoints);
    free(listener);
}

void listener_addresses(const struct listener *listener, char *text, size_t bytes)
{
    size_t used = 0;
    text[0] = '\0';
    for (size_t i = 0; i < listener->endpoints_n && used < bytes; i++) {
        int printed = snprintf(text + used, bytes - used, "%s%s", i > 0 ? "," : "",
                               listener->endpoints[i].text);
        used += printed > 0 ? (size_t)printed : 0;
    }
}

size_t listener_addresses_n(const struct listener *listener)
{
    return listener->endpoints_n;
}

struct listener_address listener_address(const struct listener *listener, size_t index)
{
    const struct endpoint *endpoint = &listener->endpoints[index];
    return (struct listener_address){.text = endpoint->text,
                                     .is_unix = endpoint->path[0] != '\0',
                                     .is_loopback = endpoint->is_loopback};
}

struct listener_stats listener_stats(const struct listener *listener)
{
    return (struct listener_stats){
        .connections = atomic_load_explicit(&listener->connections, memory_order_relaxed),
        .accepted = atomic_load_explicit(&listener->accepted, memory_order_relaxed),
        .refused = atomic_load_explicit(&listener->refused, memory_order_relaxed),
        .accept_errors = atomic_load_explicit(&listener->accept_errors, memory_order_relaxed),
    };
}
