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

#include "listener.h"
#include "log.h"
#include "rpc.h"

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
    // A thread that has spent so much in gRPC without an event, on few bytes, has met a header that never
    // ends: gRPC copies all of it again with every frame. A large message takes it far less.
    STUCK_MS = 100,
    SUSPECT_STUCK_MS = 5,
    UNCOUNTED_STUCK_MS = 1000,    // where it may labour on the messages of unix sockets
    STUCK_BYTES_A_MS = 512 << 10, // headers move 200 to 500 KiB; messages 2 MiB and more
    IDLE_PART = 50,
    ADDRESSES = 64, // remembered; the oldest gives way
    FAULT_COUNTS_LOG2 = 10,
    // How far a penalty may grow, and for how many times its length its address is a suspect.
    PENALTY_TIMES_MAX = 32,
    SUSPECT_TIMES = 8,
    // Of faults_max an address has so much for its connections together, and a suspect so little.
    ADDRESS_FAULTS_TIMES = 4,
    SUSPECTS_FAULTS_PART = 8,
    SUSPECTS_BUFFER_BYTES = 64 << 10,
    // What is no message yet is little up to here. A connection that owes more and ends is worth so many
    // of faults_max, for its address.
    OWING_LITTLE_BYTES = 1 << 20,
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

// An address from which a connection was cut off lately.
struct address {
    struct in6_addr address;         // of IPv4 as mapped into IPv6's
    uint64_t penalty_ns;             // doubled each time again
    uint64_t until_ns, forgotten_ns; // kept out; a suspect
};

struct fault_count {
    _Atomic uint64_t faults; // of all time
    struct listener_rate rate;
};

struct guard {
    struct guard_options options;
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
    struct labour {
        uint64_t events, cpu_ns, moved; // when it last got anywhere, or had nothing to do
        uint64_t last_cpu_ns, last_ns;  // of the last look
    } * labours;                        // of each rpc thread
    uint64_t suspects_until_ns;         // the last one's forgotten_ns
    struct address addresses[ADDRESSES];
    uint32_t address_next;
    // Of addresses, by hash: two that meet are taken for one.
    uint64_t hash_seed;
    struct fault_count fault_counts[1 << FAULT_COUNTS_LOG2];
};

static void count_ended(struct guard *guard, enum guard_reason reason)
{
    uint64_t ended = atomic_fetch_add_explicit(&guard->ended[reason], 1, memory_order_relaxed) + 1;
    if ((ended & (ended - 1)) == 0) // the 1st, 2nd, 4th ...
        LOG(WARN, "connection cut off", LOG_STR("reason", guard_reason_names[reason]),
            LOG_STR("limit", reason_keys[reason]), LOG_U64("cut_off", ended));
}

// False: of another family than TCP's.
static bool address_of(const struct sockaddr_storage *peer, struct in6_addr *address)
{
    if (peer->ss_family == AF_INET6) {
        *address = ((const struct sockaddr_in6 *)peer)->sin6_addr;
        return true;
    }
    if (peer->ss_family != AF_INET)
        return false;
    *address = (struct in6_addr){.s6_addr = {[10] = 0xff, [11] = 0xff}};
    memcpy(&address->s6_addr[12], &((const struct sockaddr_in *)peer)->sin_addr, 4);
    return true;
}

// The one that is kept out or a suspect; NULL: neither.
static struct address *find_address(struct guard *guard, const struct in6_addr *address,
                                    uint64_t now)
{
    for (size_t i = 0; i < ADDRESSES; i++) {
        struct address *each = &guard->addresses[i];
        if (each->forgotten_ns > now && memcmp(&each->address, address, sizeof *address) == 0)
            return each;
    }
    return NULL;
}

static struct fault_count *fault_count_of(struct guard *guard, const struct in6_addr *address)
{
    uint64_t halves[2];
    memcpy(halves, address, sizeof halves);
    uint64_t hash = guard->hash_seed;
    for (size_t i = 0; i < ARRAY_LEN(halves); i++) {
        hash = (hash ^ halves[i]) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
    }
    // The high bits of a product are of all that was multiplied.
    return &guard->fault_counts[hash >> (64 - FAULT_COUNTS_LOG2)];
}

// How much a number that only grows has grown in the second that it falls into, of which the first look
// begins one.
static uint64_t within_a_second(struct listener_rate *rate, uint64_t number, uint64_t now)
{
    if (now - rate->since_ns > 1000000000u) {
        rate->before = rate->last;
        rate->since_ns = now;
    }
    rate->last = number;
    return number - rate->before;
}

static uint64_t faults_max(const struct guard *guard, bool suspect)
{
    return guard->options.faults_max / (suspect ? SUSPECTS_FAULTS_PART : 1);
}

// Who is past HTTP/2's limits loses the connection by gRPC, and opens the next: hence all of an address.
static bool too_many_from(struct guard *guard, const struct in6_addr *from, bool suspect,
                          uint64_t now)
{
    struct fault_count *count = fault_count_of(guard, from);
    uint64_t faults = atomic_load_explicit(&count->faults, memory_order_relaxed);
    return within_a_second(&count->rate, faults, now) >
           ADDRESS_FAULTS_TIMES * faults_max(guard, suspect);
}

static void punish(struct guard *guard, const struct sockaddr_storage *peer)
{
    struct in6_addr from;
    if (!address_of(peer, &from))
        return;
    uint64_t now = now_ns(), least = guard->options.penalty_ms * 1000000ull;
    struct address *address = find_address(guard, &from, now);
    if (!address) {
        address = &guard->addresses[guard->address_next++ % ADDRESSES];
        *address = (struct address){.address = from, .penalty_ns = least};
    } else if (address->until_ns <= now && address->penalty_ns < PENALTY_TIMES_MAX * least) {
        address->penalty_ns *= 2;
    }
    address->until_ns = now + address->penalty_ns;
    address->forgotten_ns = address->until_ns + SUSPECT_TIMES * address->penalty_ns;
    if (guard->suspects_until_ns < address->forgotten_ns)
        guard->suspects_until_ns = address->forgotten_ns;
}

static void cut(struct guard *guard, int fd, const struct sockaddr_storage *peer,
                enum guard_reason reason)
{
    if (!listener_cut_connection(guard->options.listener, fd))
        return;
    punish(guard, peer);
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
// these, or would count for none: until then the kernel tells nobody that there is something to read.
static void hand_over(struct greeting *greeting)
{
    struct rpc *rpc = greeting->guard->options.rpc;
    int fd = greeting->fd, held_back = INT32_MAX;
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
    struct in6_addr from;
    bool known =
        getpeername(socket, (struct sockaddr *)&peer, &bytes) == 0 && address_of(&peer, &from);
    rpc_expect_connection(guard->options.rpc, fd,
                          known ? &fault_count_of(guard, &from)->faults : NULL);
    if (!known)
        return true;
    uint64_t now = now_ns();
    const struct address *address = find_address(guard, &from, now);
    bool kept_out = address && address->until_ns > now;
    if (!kept_out && !too_many_from(guard, &from, address != NULL, now)) {
        if (address) // gRPC parses all that it has read before it is told of a connection's end
            setsockopt(socket, SOL_SOCKET, SO_RCVBUF, &(int){SUSPECTS_BUFFER_BYTES}, sizeof(int));
        return true;
    }
    count_ended(guard, kept_out ? GUARD_PENALTY : GUARD_FAULTS);
    if (!kept_out)
        punish(guard, &peer);
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
    bool suspects; // whether there may be any
    bool backlog;  // gRPC has more calls than all ought to have
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
    uint64_t settled = rpc_settled_bytes(guard->options.rpc, fd);
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
                         const struct in6_addr *from, bool suspect)
{
    struct guard *guard = visit->guard;
    uint64_t faults = rpc_connection_faults(guard->options.rpc, fd);
    if (faults == notes->faults.last)
        return false;
    return within_a_second(&notes->faults, faults, visit->now_ns) > faults_max(guard, suspect) ||
           (from && too_many_from(guard, from, suspect, visit->now_ns));
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
    struct in6_addr address, *from = address_of(&notes->peer, &address) ? &address : NULL;
    bool suspect = visit->suspects && from && find_address(guard, from, visit->now_ns);
    if (has_too_many(visit, fd, notes, from, suspect) && !notes->cut)
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
    struct in6_addr from;
    uint64_t received, sent;
    if (notes->cut || !address_of(&notes->peer, &from) || !bytes_moved(socket, &received, &sent))
        return;
    count_owed(guard, fd, received, 0, notes);
    uint64_t faults = rpc_connection_calls(guard->options.rpc, fd) == 0; // opened for nothing
    if (notes->owed_bytes > OWING_LITTLE_BYTES)
        faults += guard->options.faults_max / ENDED_OWING_PART;
    if (faults > 0)
        atomic_fetch_add_explicit(&fault_count_of(guard, &from)->faults, faults,
                                  memory_order_relaxed);
}

static uint64_t stuck_ms(struct guard *guard, uint64_t now_ns)
{
    struct in6_addr from;
    if (now_ns - guard->options.traffic->uncounted_ns < 1000000000u)
        return UNCOUNTED_STUCK_MS;
    bool suspect =
        address_of(&guard->owes_most_notes->peer, &from) && find_address(guard, &from, now_ns);
    return suspect ? SUSPECT_STUCK_MS : STUCK_MS;
}

// Whether threads labour on bytes that are too few for it. What each has moved by itself nobody knows, so
// all of them are taken together.
static bool watch_labour(struct guard *guard, uint64_t now_ns)
{
    uint64_t longest_ms = 0, spent_ms = 0, moved = 0, all_moved = guard->options.traffic->moved;
    for (uint32_t i = 0; i < rpc_threads(guard->options.rpc); i++) {
        struct labour *labour = &guard->labours[i];
        struct rpc_progress now = rpc_progress(guard->options.rpc, i);
        bool idle = now.cpu_ns - labour->last_cpu_ns < (now_ns - labour->last_ns) / IDLE_PART;
        labour->last_cpu_ns = now.cpu_ns;
        labour->last_ns = now_ns;
        if (!now.within_grpc || now.events != labour->events || idle) {
            labour->events = now.events;
            labour->cpu_ns = now.cpu_ns;
            labour->moved = all_moved;
            continue;
        }
        uint64_t spent = (now.cpu_ns - labour->cpu_ns) / 1000000u;
        uint64_t since = all_moved - labour->moved;
        spent_ms += spent;
        longest_ms = spent > longest_ms ? spent : longest_ms;
        moved = since > moved ? since : moved;
    }
    return guard->owed_most > OWING_LITTLE_BYTES && longest_ms >= stuck_ms(guard, now_ns) &&
           moved < spent_ms * STUCK_BYTES_A_MS;
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
        .suspects = guard->suspects_until_ns > now,
    };
    if (moves) // else nobody opens calls, and the question costs more than the rest of a look
        visit.backlog = rpc_backlog(guard->options.rpc) > backlog_max(guard, visit.suspects);
    guard->watched_ns = now;
    guard->owed = guard->owed_most = 0;
    guard->owes_most = -1;
    listener_visit(guard->options.listener, look_at, &visit);
    atomic_store_explicit(&guard->owed_bytes, guard->owed, memory_order_relaxed);
    for (size_t i = 0; i < visit.over_n; i++)
        cut(guard, visit.over[i].fd, visit.over[i].peer, visit.over[i].reason);
    if (visit.over_n == 0 && guard->owed > guard->options.bytes_max && guard->owes_most >= 0)
        cut_most(guard, GUARD_TRANSPORT_BYTES);
    else if (watch_labour(guard, now))
        cut_most(guard, GUARD_STUCK);
}

// ---- create, destroy

enum status guard_create(const struct guard_options *options, struct guard **out, struct error *err)
{
    struct guard *guard = calloc(1, sizeof *guard);
    uint8_t *peeked = malloc(PEEK_BYTES);
    struct labour *labours = calloc(rpc_threads(options->rpc), sizeof *labours);
    if (!guard || !peeked || !labours) {
        free(guard);
        free(peeked);
        free(labours);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for greeting connections");
    }
    guard->options = *options;
    guard->peeked = peeked;
    guard->labours = labours;
    guard->watched_ns = now_ns();
    if (getrandom(&guard->hash_seed, sizeof guard->hash_seed, GRND_NONBLOCK) < 0)
        guard->hash_seed = guard->watched_ns;
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
