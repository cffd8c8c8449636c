// See guard.h. A greeting is over within a round trip: HTTP/2 lets a client send 64 KiB of a request
// before it has heard from us, so what is looked through is short. Where it has not all come, it is looked
// at again after a pause that doubles, since a socket with something in it is always readable.
#include "guard.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "labour.h"
#include "listener.h"
#include "log.h"
#include "rpc.h"
#include "suspects.h"

enum {
    PEEK_BYTES = 256 << 10,
    PAUSE_MS_MAX = 64,
    WATCH_MS = 5, // in which gRPC takes a thousand calls
    // A look is a system call for each connection. Where there are many, it comes rarer than
    // every turn, but twice a second at least.
    LOOKED_AT_A_TURN = 64,
    TURNS_MAX = 100,
    // Beyond what HTTP/2 lets a client have: calls that end just now are there, too.
    BACKLOG_TIMES = 4,
    SUSPECTS_BACKLOG_TIMES = 2,
    // Forgiven a second to each connection: what keeping it alive costs, and what calls cost more than
    // was reckoned.
    FORGIVEN_BYTES_A_SECOND = 64 << 10,
    HTTP2_SETTINGS = 4,
    HTTP2_ACK = 1,
    HTTP2_MAX_CONCURRENT_STREAMS = 3,
    FRAME_HEAD_BYTES = 9,
    SUSPECTS_BUFFER_BYTES = 64 << 10,
    // A connection that owes more than a little and ends is worth so many of faults_max, for its address.
    ENDED_OWING_PART = 4,
};

static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
enum { PREFACE_BYTES = sizeof preface - 1 };

// To who speaks HTTP/1: a browser, a probe, a scraper of metrics on the wrong port.
static const char http1_answer[] =
    "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    "this port speaks gRPC over HTTP/2; metrics and probes are at http_listen\n";

const char *const guard_reason_names[GUARD_REASONS] = {
    [GUARD_HANDSHAKE] = "handshake",
    [GUARD_NOT_HTTP2] = "not_http2",
    [GUARD_CONNECTION_BYTES] = "connection_bytes",
    [GUARD_TRANSPORT_BYTES] = "transport_bytes",
    [GUARD_FAULTS] = "connection_faults",
    [GUARD_BACKLOG] = "connection_backlog",
    [GUARD_STUCK] = "connection_stuck",
    [GUARD_PENALTY] = "penalty",
};
static const char *const reason_keys[GUARD_REASONS] = {
    [GUARD_HANDSHAKE] = "handshake_ms",
    [GUARD_NOT_HTTP2] = "no HTTP/2",
    [GUARD_CONNECTION_BYTES] = "connection_bytes_max",
    [GUARD_TRANSPORT_BYTES] = "transport_bytes_max",
    [GUARD_FAULTS] = "connection_faults_max",
    [GUARD_BACKLOG] = "connection_requests_max",
    [GUARD_STUCK] = "100 ms of CPU",
    [GUARD_PENALTY] = "penalty_ms",
};

struct greeting {
    struct guard *guard;
    int fd;
    struct access_peer *peer;
    uv_poll_t readable;
    uv_timer_t timer; // until it is looked at again, or has taken too long
    uint8_t open_handles;
    uint64_t pause_ms, ends_ms; // on the loop's clock
    size_t seen;                // bytes that hold whole frames, from the start
    bool is_tcp;                // what the kernel can hold back is; of others the preface must do
    bool told;                  // our SETTINGS are sent
    struct greeting *next, *previous;
};

struct guard {
    struct guard_options options;
    struct connections *connections; // the rpc's
    struct greeting *greetings;
    uv_timer_t watch;
    uint64_t watched_ns, moved_before;
    uint32_t turns; // since
    bool stopped;
    int owes_most;                          // found by a visit: its fd; -1: nobody
    struct listener_notes *owes_most_notes; // its, for as long as the visit's turn
    uint64_t owed_most, owed;
    uint8_t *peeked; // PEEK_BYTES, of one greeting at a time
    _Atomic uint64_t ended[GUARD_REASONS];
    _Atomic uint64_t owed_bytes;
    struct labour *labours;        // of each rpc thread
    struct rpc_progress *progress; // and where it is
    struct suspects suspects;
};

static void count_ended(struct guard *guard, enum guard_reason reason)
{
    uint64_t ended = atomic_fetch_add_explicit(&guard->ended[reason], 1, memory_order_relaxed) + 1;
    if ((ended & (ended - 1)) == 0) // the 1st, 2nd, 4th ...
        LOG(WARN, "connection cut off", LOG_STR("reason", guard_reason_names[reason]),
            LOG_STR("limit", reason_keys[reason]), LOG_U64("cut_off", ended));
}

static void cut(struct guard *guard, int fd, const struct sockaddr_storage *peer,
                enum guard_reason reason)
{
    if (!listener_cut_connection(guard->options.listener, fd))
        return;
    suspects_punish(&guard->suspects, peer, now_ns());
    count_ended(guard, reason);
}

// ---- greeting

static void on_greeting_closed(uv_handle_t *handle)
{
    struct greeting *greeting = handle->data;
    if (--greeting->open_handles == 0)
        free(greeting);
}

// What becomes of the socket is the caller's.
static void end_greeting(struct greeting *greeting)
{
    if (greeting->previous)
        greeting->previous->next = greeting->next;
    else
        greeting->guard->greetings = greeting->next;
    if (greeting->next)
        greeting->next->previous = greeting->previous;
    uv_close((uv_handle_t *)&greeting->readable, on_greeting_closed);
    uv_close((uv_handle_t *)&greeting->timer, on_greeting_closed);
}

// The listener's duplicate ends with it.
static void drop_socket(int fd)
{
    shutdown(fd, SHUT_RDWR);
    close(fd);
}

static void refuse(struct greeting *greeting, enum guard_reason reason)
{
    count_ended(greeting->guard, reason);
    int fd = greeting->fd;
    end_greeting(greeting);
    drop_socket(fd);
}

static void tell_settings(struct greeting *greeting)
{
    uint32_t streams = greeting->guard->options.streams_max;
    const uint8_t settings[FRAME_HEAD_BYTES + 6] = {
        0,
        0,
        6,
        HTTP2_SETTINGS,
        [FRAME_HEAD_BYTES] = 0,
        HTTP2_MAX_CONCURRENT_STREAMS,
        (uint8_t)(streams >> 24),
        (uint8_t)(streams >> 16),
        (uint8_t)(streams >> 8),
        (uint8_t)streams,
    };
    greeting->told = true;
    // Nothing has been sent before, so that there is room; or it is gone, and the next look says so.
    (void)!send(greeting->fd, settings, sizeof settings, MSG_NOSIGNAL);
}

enum verdict { VERDICT_MORE, VERDICT_GREETED, VERDICT_NOT_HTTP2 };

// Goes on from `seen`, in the first `bytes` of what the client has sent.
static enum verdict judge(struct greeting *greeting, const uint8_t *sent, size_t bytes)
{
    size_t compared = bytes < PREFACE_BYTES ? bytes : PREFACE_BYTES;
    if (memcmp(sent, preface, compared) != 0)
        return VERDICT_NOT_HTTP2;
    if (bytes < PREFACE_BYTES)
        return VERDICT_MORE;
    if (!greeting->is_tcp)
        return VERDICT_GREETED;
    if (!greeting->told)
        tell_settings(greeting);
    if (greeting->seen == 0)
        greeting->seen = PREFACE_BYTES;
    while (bytes - greeting->seen >= FRAME_HEAD_BYTES) {
        const uint8_t *head = sent + greeting->seen;
        size_t payload = (size_t)head[0] << 16 | (size_t)head[1] << 8 | head[2];
        bool settings = head[3] == HTTP2_SETTINGS;
        bool acknowledges = settings && (head[4] & HTTP2_ACK);
        if (greeting->seen == PREFACE_BYTES && (!settings || acknowledges))
            return VERDICT_NOT_HTTP2; // a client's own SETTINGS come first
        if (acknowledges)
            return payload == 0 ? VERDICT_GREETED : VERDICT_NOT_HTTP2;
        if (bytes - greeting->seen - FRAME_HEAD_BYTES < payload)
            break;
        greeting->seen += FRAME_HEAD_BYTES + payload;
    }
    return bytes == PEEK_BYTES ? VERDICT_NOT_HTTP2 : VERDICT_MORE;
}

// What gRPC takes for an acknowledgement of its own settings must not come to it before it has sent
// these, or would count for none: until then the kernel tells nobody that there is something to read, up to
// more than HTTP/2 lets a client send by then. It makes the receive buffer twice as large.
static void hand_over(struct greeting *greeting)
{
    struct rpc *rpc = greeting->guard->options.rpc;
    int fd = greeting->fd, held_back = PEEK_BYTES;
    struct access_peer *peer = greeting->peer;
    bool is_tcp = greeting->is_tcp;
    end_greeting(greeting);
    if (is_tcp)
        setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &held_back, sizeof held_back);
    rpc_add_connection(rpc, fd, peer);
}

static void on_timer(uv_timer_t *timer);

static void look_again_later(struct greeting *greeting)
{
    uint64_t now = uv_now(greeting->guard->options.loop);
    uv_poll_stop(&greeting->readable);
    uint64_t left = greeting->ends_ms > now ? greeting->ends_ms - now : 0;
    uv_timer_start(&greeting->timer, on_timer,
                   greeting->pause_ms < left ? greeting->pause_ms : left, 0);
    greeting->pause_ms = greeting->pause_ms < PAUSE_MS_MAX ? greeting->pause_ms * 2 : PAUSE_MS_MAX;
}

static bool says_no_more(int fd)
{
    struct pollfd ended = {.fd = fd, .events = POLLRDHUP};
    return poll(&ended, 1, 0) == 1;
}

static void look(struct greeting *greeting)
{
    struct guard *guard = greeting->guard;
    int fd = greeting->fd;
    bool is_all = says_no_more(fd); // which what has come would hide
    ssize_t got = recv(fd, guard->peeked, PEEK_BYTES, MSG_PEEK | MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return; // there will be something to read
    enum verdict verdict = got > 0 ? judge(greeting, guard->peeked, (size_t)got) : VERDICT_MORE;
    if (got <= 0 || (verdict == VERDICT_MORE && is_all) || rpc_caller_is_gone(fd)) {
        end_greeting(greeting);
        drop_socket(fd);
        return;
    }
    switch (verdict) {
    case VERDICT_MORE:
        look_again_later(greeting);
        break;
    case VERDICT_GREETED:
        hand_over(greeting);
        break;
    case VERDICT_NOT_HTTP2:
        // What is left unread would have the kernel reset the connection, and the answer with it.
        (void)!recv(fd, guard->peeked, PEEK_BYTES, MSG_DONTWAIT);
        if (!greeting->told)
            (void)!send(fd, http1_answer, sizeof http1_answer - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
        refuse(greeting, GUARD_NOT_HTTP2);
        break;
    }
}

static void on_readable(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    look(poll->data);
}

static void on_timer(uv_timer_t *timer)
{
    struct greeting *greeting = timer->data;
    if (uv_now(greeting->guard->options.loop) >= greeting->ends_ms)
        refuse(greeting, GUARD_HANDSHAKE);
    else
        look(greeting);
}

static bool is_tcp(int fd)
{
    int protocol = 0;
    socklen_t bytes = sizeof protocol;
    return getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &bytes) == 0 &&
           protocol == IPPROTO_TCP;
}

bool guard_admits(struct guard *guard, int socket, int fd)
{
    struct sockaddr_storage peer = {0};
    socklen_t bytes = sizeof peer;
    (void)getpeername(socket, (struct sockaddr *)&peer, &bytes); // else of no family
    struct suspects *suspects = &guard->suspects;
    uint64_t now = now_ns();
    connections_expect(guard->connections, connection_number(fd),
                       suspects_faults(suspects, &peer, now));
    enum suspects_standing standing = suspects_standing(suspects, &peer, now);
    bool kept_out = standing == STANDING_KEPT_OUT, suspect = standing == STANDING_SUSPECT;
    if (!kept_out && !suspects_has_too_many(suspects, &peer, suspect, now)) {
        if (suspect) // gRPC parses all that it has read before it is told of a connection's end
            setsockopt(socket, SOL_SOCKET, SO_RCVBUF, &(int){SUSPECTS_BUFFER_BYTES}, sizeof(int));
        return true;
    }
    count_ended(guard, kept_out ? GUARD_PENALTY : GUARD_FAULTS);
    if (!kept_out)
        suspects_punish(suspects, &peer, now);
    return false;
}

void guard_take(struct guard *guard, int fd, struct access_peer *peer)
{
    if (!guard_admits(guard, fd, fd)) {
        drop_socket(fd);
        return;
    }
    struct greeting *greeting = guard->stopped ? NULL : calloc(1, sizeof *greeting);
    if (!greeting) {
        drop_socket(fd);
        return;
    }
    uv_loop_t *loop = guard->options.loop;
    greeting->guard = guard;
    greeting->fd = fd;
    greeting->peer = peer;
    greeting->pause_ms = 1;
    greeting->is_tcp = is_tcp(fd);
    greeting->ends_ms = uv_now(loop) + guard->options.handshake_ms;
    greeting->readable.data = greeting->timer.data = greeting;
    if (uv_poll_init(loop, &greeting->readable, fd) != 0) {
        free(greeting);
        drop_socket(fd);
        return;
    }
    uv_timer_init(loop, &greeting->timer);
    greeting->open_handles = 2;
    greeting->next = guard->greetings;
    if (greeting->next)
        greeting->next->previous = greeting;
    guard->greetings = greeting;
    uv_poll_start(&greeting->readable, UV_READABLE, on_readable);
    uv_timer_start(&greeting->timer, on_timer, guard->options.handshake_ms, 0);
}

// ---- watching

// What the kernel has received on a TCP connection since it was made, and what has been acknowledged of what
// was sent; false: it does not say, as of unix sockets.
static bool bytes_moved(int socket, uint64_t *received, uint64_t *sent)
{
    // The C library's structure ends where the kernel's had reached in its first years.
    struct {
        struct tcp_info first;
        uint64_t pacing_rate, pacing_rate_max, bytes_acked, bytes_received;
    } info = {0};
    _Static_assert(offsetof(__typeof__(info), bytes_received) == 128, "as in linux/tcp.h");
    socklen_t length = sizeof info;
    if (getsockopt(socket, IPPROTO_TCP, TCP_INFO, &info, &length) != 0 || length < sizeof info)
        return false;
    *received = info.bytes_received;
    *sent = info.bytes_acked;
    return true;
}

struct visit {
    struct guard *guard;
    uint64_t now_ns, forgiven;
    bool backlog; // gRPC has more calls than all ought to have
    struct {
        int fd;
        const struct sockaddr_storage *peer; // its notes'
        enum guard_reason reason;
    } over[16]; // what is past its limit; those beyond come next time
    size_t over_n;
};

static void note_over(struct visit *visit, int fd, struct listener_notes *notes,
                      enum guard_reason reason)
{
    if (visit->over_n == ARRAY_LEN(visit->over))
        return;
    notes->cut = true;
    visit->over[visit->over_n].fd = fd;
    visit->over[visit->over_n].peer = &notes->peer;
    visit->over[visit->over_n++].reason = reason;
}

static uint64_t backlog_max(const struct guard *guard, bool suspect)
{
    uint64_t times = suspect ? SUSPECTS_BACKLOG_TIMES : BACKLOG_TIMES;
    return times * guard->options.streams_max;
}

// What gRPC holds of it, in bytes: sent, and no message yet.
static void count_owed(const struct guard *guard, int fd, uint64_t received, uint64_t forgiven,
                       struct listener_notes *notes)
{
    uint64_t settled = connections_settled(guard->connections, connection_number(fd));
    if (notes->received_bytes == 0) // the number's figures are those of who had it before, too
        notes->settled_bytes = settled;
    // What TLS adds to each record is no message's.
    uint64_t more = received - notes->received_bytes;
    notes->owed_bytes += notes->by_tls ? more / 16 * 15 : more;
    uint64_t paid = settled - notes->settled_bytes + forgiven;
    notes->owed_bytes -= paid < notes->owed_bytes ? paid : notes->owed_bytes;
    notes->received_bytes = received;
    notes->settled_bytes = settled;
}

static void look_at_bytes(struct visit *visit, int fd, uint64_t received, uint64_t sent,
                          struct listener_notes *notes)
{
    struct guard *guard = visit->guard;
    guard->options.traffic->moved += received - notes->received_bytes + sent - notes->sent_bytes;
    if (sent != notes->sent_bytes)
        notes->sent_ns = visit->now_ns;
    notes->sent_bytes = sent;
    count_owed(guard, fd, received, visit->forgiven, notes);
    guard->owed += notes->owed_bytes;
    if (notes->owed_bytes > guard->owed_most) {
        guard->owed_most = notes->owed_bytes;
        guard->owes_most = fd;
        guard->owes_most_notes = notes;
    }
    if (notes->owed_bytes > guard->options.connection_bytes_max)
        note_over(visit, fd, notes, GUARD_CONNECTION_BYTES);
}

// Past connection_faults_max; by itself, or with all of its address.
static bool has_too_many(const struct visit *visit, int fd, struct listener_notes *notes,
                         bool suspect)
{
    struct suspects *suspects = &visit->guard->suspects;
    uint64_t faults = connections_faults(visit->guard->connections, connection_number(fd));
    if (faults == notes->faults.last)
        return false;
    return rate_within_a_second(&notes->faults, faults, visit->now_ns) >
               suspects_faults_max(suspects, suspect) ||
           suspects_has_too_many(suspects, &notes->peer, suspect, visit->now_ns);
}

// Or kept out: connections that it had before are still there.
static bool is_suspect(const struct guard *guard, const struct listener_notes *notes,
                       uint64_t now_ns)
{
    return suspects_standing(&guard->suspects, &notes->peer, now_ns) != STANDING_GOOD;
}

static void look_at(void *argument, int socket, int fd, struct listener_notes *notes)
{
    struct visit *visit = argument;
    struct guard *guard = visit->guard;
    uint64_t received = 0, sent = 0;
    bool counted = bytes_moved(socket, &received, &sent);
    bool has_sent = !counted || received > notes->received_bytes;
    if (notes->cut)
        return;
    if (counted)
        look_at_bytes(visit, fd, received, sent, notes);
    else
        guard->options.traffic->uncounted_ns = visit->now_ns;
    bool suspect = is_suspect(guard, notes, visit->now_ns);
    if (has_too_many(visit, fd, notes, suspect) && !notes->cut)
        note_over(visit, fd, notes, GUARD_FAULTS);
    if (visit->backlog && has_sent && !notes->cut &&
        rpc_connection_backlog(guard->options.rpc, fd) > backlog_max(guard, suspect))
        note_over(visit, fd, notes, GUARD_BACKLOG);
}

// Where gRPC has had enough of a connection it ends it, and takes its time with what it has read: who opens
// the next at once makes it hold gigabytes.
static void look_at_ended(void *argument, int socket, int fd, struct listener_notes *notes)
{
    struct guard *guard = argument;
    _Atomic uint64_t *address_faults = suspects_faults(&guard->suspects, &notes->peer, now_ns());
    uint64_t received, sent;
    if (notes->cut || !address_faults || !bytes_moved(socket, &received, &sent))
        return;
    count_owed(guard, fd, received, 0, notes);
    uint64_t faults = connections_calls(guard->connections,
                                        connection_number(fd)) == 0; // opened for nothing
    if (notes->owed_bytes > LABOUR_OWED_LITTLE_BYTES)
        faults += guard->options.faults_max / ENDED_OWING_PART;
    if (faults > 0)
        atomic_fetch_add_explicit(address_faults, faults, memory_order_relaxed);
}

// Whether the one that owes most of all is this guard's.
static bool has_most(const struct guard *guard)
{
    struct guard_traffic *traffic = guard->options.traffic;
    if (traffic->most == guard || guard->owed_most > traffic->most_owed_bytes) {
        traffic->most = guard;
        traffic->most_owed_bytes = guard->owed_most;
    }
    return traffic->most == guard;
}

static bool is_stuck(struct guard *guard, uint64_t now_ns)
{
    uint32_t threads = rpc_threads(guard->options.rpc);
    for (uint32_t i = 0; i < threads; i++)
        guard->progress[i] = rpc_progress(guard->options.rpc, i);
    const struct listener_notes *most = guard->owes_most_notes;
    bool owed = guard->owes_most >= 0;
    const struct labour_look look = {
        .progress = guard->progress,
        .traffic = guard->options.traffic,
        .owed_bytes = guard->owed_most,
        .sent_ns = owed ? most->sent_ns : 0,
        .suspect = owed && is_suspect(guard, most, now_ns),
        .now_ns = now_ns,
    };
    return labour_is_stuck(guard->labours, threads, &look);
}

static void cut_most(struct guard *guard, enum guard_reason reason)
{
    guard->owes_most_notes->cut = true; // the next in line is somebody else
    cut(guard, guard->owes_most, &guard->owes_most_notes->peer, reason);
}

static void on_watch(uv_timer_t *timer)
{
    struct guard *guard = timer->data;
    rpc_take_added(guard->options.rpc);
    uint64_t connections = listener_stats(guard->options.listener).connections;
    guard->turns++;
    if (guard->turns < TURNS_MAX &&
        (connections == 0 || guard->turns * LOOKED_AT_A_TURN < connections))
        return;
    guard->turns = 0;
    uint64_t now = now_ns();
    const struct guard_traffic *traffic = guard->options.traffic;
    bool moves =
        traffic->moved != guard->moved_before || traffic->uncounted_ns == guard->watched_ns;
    guard->moved_before = traffic->moved;
    struct visit visit = {
        .guard = guard,
        .forgiven = (now - guard->watched_ns) * FORGIVEN_BYTES_A_SECOND / 1000000000u,
        .now_ns = now,
    };
    if (moves) // else nobody opens calls, and the question costs more than the rest of a look
        visit.backlog = rpc_backlog(guard->options.rpc) >
                        backlog_max(guard, suspects_any(&guard->suspects, now));
    guard->watched_ns = now;
    guard->owed = guard->owed_most = 0;
    guard->owes_most = -1;
    listener_visit(guard->options.listener, look_at, &visit);
    bool most = has_most(guard);
    atomic_store_explicit(&guard->owed_bytes, guard->owed, memory_order_relaxed);
    for (size_t i = 0; i < visit.over_n; i++)
        cut(guard, visit.over[i].fd, visit.over[i].peer, visit.over[i].reason);
    if (visit.over_n == 0 && guard->owed > guard->options.bytes_max && guard->owes_most >= 0)
        cut_most(guard, GUARD_TRANSPORT_BYTES);
    else if (is_stuck(guard, now) && most)
        cut_most(guard, GUARD_STUCK);
}

// ---- create, destroy

enum status guard_create(const struct guard_options *options, struct guard **out, struct error *err)
{
    struct guard *guard = calloc(1, sizeof *guard);
    uint8_t *peeked = malloc(PEEK_BYTES);
    struct labour *labours = calloc(rpc_threads(options->rpc), sizeof *labours);
    struct rpc_progress *progress = calloc(rpc_threads(options->rpc), sizeof *progress);
    if (!guard || !peeked || !labours || !progress) {
        free(guard);
        free(peeked);
        free(labours);
        free(progress);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for greeting connections");
    }
    guard->options = *options;
    guard->connections = rpc_connections(options->rpc);
    guard->peeked = peeked;
    guard->labours = labours;
    guard->progress = progress;
    guard->watched_ns = now_ns();
    uint64_t seed;
    if (getrandom(&seed, sizeof seed, GRND_NONBLOCK) < 0)
        seed = guard->watched_ns;
    suspects_init(&guard->suspects, options->penalty_ms, options->faults_max, seed);
    uv_timer_init(options->loop, &guard->watch);
    guard->watch.data = guard;
    uv_timer_start(&guard->watch, on_watch, WATCH_MS, WATCH_MS);
    listener_visit_ended(options->listener, look_at_ended, guard);
    *out = guard;
    return STATUS_OK;
}

void guard_stop(struct guard *guard)
{
    guard->stopped = true;
    uv_timer_stop(&guard->watch);
    listener_visit_ended(guard->options.listener, NULL, NULL);
    while (guard->greetings) {
        int fd = guard->greetings->fd;
        end_greeting(guard->greetings);
        drop_socket(fd);
    }
}

void guard_destroy(struct guard *guard)
{
    if (!guard)
        return;
    free(guard->progress);
    free(guard->labours);
    free(guard->peeked);
    free(guard);
}

struct guard_stats guard_stats(const struct guard *guard)
{
    struct guard_stats stats = {0};
    for (size_t i = 0; i < GUARD_REASONS; i++)
        stats.ended[i] = atomic_load_explicit(&guard->ended[i], memory_order_relaxed);
    stats.owed_bytes = atomic_load_explicit(&guard->owed_bytes, memory_order_relaxed);
    return stats;
}
