// The module: the files in force, the threads, and how links come to them.
//
// A link is one thread's at a time. It comes to the handshake thread from the main one, and from
// there to a carrying one, each time by `arrived`; its sockets are in the epoll of whoever has it.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "log.h"
#include "stamp.h"
#include "tls_internal.h"

enum { EVENTS = 64, STOP_MS = 1000, FILES = 3 };

struct tls {
    struct tls_options options;
    SSL_CTX *context; // the main thread's
    struct stamp stamps[FILES];
    struct tls_thread *threads[1 + 256]; // the first shakes hands
    size_t threads_n;
    size_t next; // of the carrying ones, the handshake thread's
    pthread_mutex_t lock;
    bool stopped; // guarded by lock
    _Atomic uint32_t connections;
    _Atomic uint64_t handshakes, handshakes_failed, handshakes_late;
    _Atomic int64_t certificate_expires;
};

// ---- what a thread has

struct tls_buffer *tls_buffer_take(struct tls_thread *thread)
{
    struct tls_buffer *buffer = thread->spare;
    if (buffer) {
        thread->spare = buffer->next;
        thread->spare_n--;
    } else {
        buffer = malloc(sizeof *buffer);
        if (!buffer)
            return NULL;
    }
    buffer->begin = buffer->end = 0;
    return buffer;
}

void tls_buffer_give(struct tls_thread *thread, struct tls_buffer **buffer)
{
    struct tls_buffer *given = *buffer;
    *buffer = NULL;
    if (!given)
        return;
    if (thread->spare_n >= TLS_SPARE_BUFFERS) {
        free(given);
        return;
    }
    given->next = thread->spare;
    thread->spare = given;
    thread->spare_n++;
}

static void make_ready(struct tls_link *link)
{
    struct tls_thread *thread = link->thread;
    if (link->ready || link->dead)
        return;
    link->ready = true;
    link->next_ready = NULL;
    *thread->ready_last = link;
    thread->ready_last = &link->next_ready;
}

static struct tls_link *take_ready(struct tls_thread *thread)
{
    struct tls_link *all = thread->ready;
    thread->ready = NULL;
    thread->ready_last = &thread->ready;
    return all;
}

// All links of a thread are given the same time, so that who is added last is due last.
void tls_link_time(struct tls_link *link, uint32_t ms)
{
    struct tls_thread *thread = link->thread;
    link->timed = true;
    link->deadline_ns = now_ns() + (uint64_t)ms * 1000000u;
    link->next_timed = NULL;
    link->previous_timed = thread->timed_last;
    if (thread->timed_last)
        thread->timed_last->next_timed = link;
    else
        thread->timed = link;
    thread->timed_last = link;
}

static void untime(struct tls_link *link)
{
    struct tls_thread *thread = link->thread;
    if (!link->timed)
        return;
    link->timed = false;
    if (link->previous_timed)
        link->previous_timed->next_timed = link->next_timed;
    else
        thread->timed = link->next_timed;
    if (link->next_timed)
        link->next_timed->previous_timed = link->previous_timed;
    else
        thread->timed_last = link->previous_timed;
}

static void add_link(struct tls_thread *thread, struct tls_link *link)
{
    link->previous = NULL;
    link->next = thread->links;
    if (link->next)
        link->next->previous = link;
    thread->links = link;
}

static void remove_link(struct tls_link *link)
{
    untime(link);
    if (link->previous)
        link->previous->next = link->next;
    else
        link->thread->links = link->next;
    if (link->next)
        link->next->previous = link->previous;
}

// It may stand in the events at hand, so it goes when they are done. Closing alone does not take a socket
// out of an epoll: the listener has a duplicate of it.
static void end_link(struct tls_link *link)
{
    struct tls_thread *thread = link->thread;
    remove_link(link);
    epoll_ctl(thread->epoll_fd, EPOLL_CTL_DEL, link->wire.fd, NULL);
    epoll_ctl(thread->epoll_fd, EPOLL_CTL_DEL, link->tunnel.fd, NULL);
    link->dead = true;
    link->next_given = thread->dead;
    thread->dead = link;
}

static void free_dead(struct tls_thread *thread)
{
    while (thread->dead) {
        struct tls_link *link = thread->dead;
        thread->dead = link->next_given;
        if (link->server_fd < 0)
            atomic_fetch_sub_explicit(&thread->tls->connections, 1, memory_order_relaxed);
        tls_link_destroy(link);
    }
}

// ---- handing on

static void wake(struct tls_thread *thread)
{
    uint64_t one = 1;
    ssize_t written = write(thread->wake_fd, &one, sizeof one);
    (void)written; // full: it will wake anyway
}

static void give(struct tls_thread *thread, struct tls_link *link)
{
    pthread_mutex_lock(&thread->lock);
    link->thread = thread;
    link->next_given = thread->arrived;
    thread->arrived = link;
    pthread_mutex_unlock(&thread->lock);
    wake(thread);
}

static bool watch(struct tls_thread *thread, struct tls_end *end)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                                .data.ptr = end};
    return epoll_ctl(thread->epoll_fd, EPOLL_CTL_ADD, end->fd, &event) == 0;
}

static bool shakes_hands(const struct tls_thread *thread)
{
    return thread == thread->tls->threads[0];
}

static void take_arrived(struct tls_thread *thread, bool *stopping)
{
    uint64_t count;
    ssize_t got = read(thread->wake_fd, &count, sizeof count);
    (void)got;
    pthread_mutex_lock(&thread->lock);
    struct tls_link *arrived = thread->arrived;
    thread->arrived = NULL;
    *stopping = thread->stopping;
    pthread_mutex_unlock(&thread->lock);
    while (arrived) {
        struct tls_link *link = arrived;
        arrived = link->next_given;
        add_link(thread, link);
        bool handshake = shakes_hands(thread);
        if (handshake)
            tls_link_time(link, thread->tls->options.handshake_ms);
        if (!watch(thread, &link->wire) || (!handshake && !watch(thread, &link->tunnel)))
            end_link(link);
        else
            make_ready(link); // bytes may wait in it already
    }
}

// The 1st, 2nd, 4th, 8th ... of a kind: a flood must not fill the log.
static void log_failure(_Atomic uint64_t *counter, const char *reason)
{
    uint64_t before = atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
    if ((before & (before + 1)) == 0)
        LOG(WARN, "TLS handshake failed", LOG_STR("reason", reason), LOG_U64("failed", before + 1));
}

static void hand_on(struct tls_link *link)
{
    struct tls *tls = link->thread->tls;
    struct access_peer *peer = tls_peer_of(link->ssl);
    pthread_mutex_lock(&tls->lock);
    if (!peer || tls->stopped) {
        pthread_mutex_unlock(&tls->lock);
        access_peer_free(peer);
        end_link(link);
        return;
    }
    atomic_fetch_add_explicit(&tls->handshakes, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&tls->connections, 1, memory_order_relaxed);
    tls->options.on_ready(tls->options.context, link->server_fd, peer);
    pthread_mutex_unlock(&tls->lock);
    link->server_fd = -1;
    remove_link(link);
    epoll_ctl(link->thread->epoll_fd, EPOLL_CTL_DEL, link->wire.fd, NULL);
    give(tls->threads[1 + tls->next++ % (tls->threads_n - 1)], link);
}

// ---- a thread

static enum tls_step step_handshake(struct tls_link *link)
{
    if (link->failed)
        return tls_link_refuse(link);
    enum tls_step step = tls_link_shake(link);
    if (step != TLS_FAILED) {
        if (step == TLS_DONE)
            hand_on(link); // now it is another thread's
        return TLS_WAITS;
    }
    char reason[128];
    log_failure(&link->thread->tls->handshakes_failed, tls_error(link->ssl, reason, sizeof reason));
    return tls_link_refuse(link);
}

static void run_ready(struct tls_thread *thread)
{
    struct tls_link *link = take_ready(thread);
    while (link) {
        struct tls_link *next = link->next_ready;
        link->ready = false;
        enum tls_step step = link->dead             ? TLS_WAITS
                             : shakes_hands(thread) ? step_handshake(link)
                                                    : tls_link_carry(link);
        if (step == TLS_MORE)
            make_ready(link);
        else if (step != TLS_WAITS)
            end_link(link);
        link = next;
    }
}

static void end_late(struct tls_thread *thread)
{
    uint64_t now = thread->timed ? now_ns() : 0;
    while (thread->timed && thread->timed->deadline_ns <= now) {
        struct tls_link *link = thread->timed;
        if (shakes_hands(thread) && !link->failed)
            log_failure(&thread->tls->handshakes_late, "not done within tls_handshake_ms");
        end_link(link);
    }
}

static void note(struct tls_end *end, uint32_t events)
{
    bool gone = events & (EPOLLHUP | EPOLLERR);
    end->gone |= gone;
    end->hung_up |= gone || (events & EPOLLRDHUP);
    end->readable |= end->hung_up || (events & EPOLLIN);
    end->writable |= gone || (events & EPOLLOUT);
    make_ready(end->link);
}

static int wait_ms(const struct tls_thread *thread, uint64_t until_ns)
{
    if (thread->ready)
        return 0;
    if (thread->timed && thread->timed->deadline_ns < until_ns)
        until_ns = thread->timed->deadline_ns;
    if (until_ns == UINT64_MAX)
        return -1;
    uint64_t now = now_ns();
    return until_ns <= now ? 0 : (int)((until_ns - now) / 1000000u) + 1;
}

static void *thread_main(void *argument)
{
    struct tls_thread *thread = argument;
    uint64_t until_ns = UINT64_MAX; // to stop
    bool stopping = false;
    while (!stopping || (thread->links && !shakes_hands(thread) && now_ns() < until_ns)) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(thread->epoll_fd, events, EVENTS, wait_ms(thread, until_ns));
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr)
                note(events[i].data.ptr, events[i].events);
            else
                take_arrived(thread, &stopping);
        }
        if (stopping && until_ns == UINT64_MAX)
            until_ns = now_ns() + (uint64_t)STOP_MS * 1000000u;
        run_ready(thread);
        end_late(thread);
        free_dead(thread);
    }
    while (thread->links)
        end_link(thread->links);
    free_dead(thread);
    return NULL;
}

static void destroy_thread(struct tls_thread *thread)
{
    while (thread->arrived) {
        struct tls_link *link = thread->arrived;
        thread->arrived = link->next_given;
        tls_link_destroy(link);
    }
    while (thread->spare) {
        struct tls_buffer *buffer = thread->spare;
        thread->spare = buffer->next;
        free(buffer);
    }
    if (thread->epoll_fd >= 0)
        close(thread->epoll_fd);
    if (thread->wake_fd >= 0)
        close(thread->wake_fd);
    pthread_mutex_destroy(&thread->lock);
    free(thread);
}

NODISCARD static enum status start_thread(struct tls *tls, size_t index, struct error *err)
{
    struct tls_thread *thread = calloc(1, sizeof *thread);
    if (!thread)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for TLS");
    tls->threads[tls->threads_n++] = thread;
    thread->tls = tls;
    thread->ready_last = &thread->ready;
    pthread_mutex_init(&thread->lock, NULL);
    thread->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    thread->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN};
    if (thread->epoll_fd < 0 || thread->wake_fd < 0 ||
        epoll_ctl(thread->epoll_fd, EPOLL_CTL_ADD, thread->wake_fd, &event) != 0)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no descriptors for TLS: %s",
                         strerror(errno));
    if (pthread_create(&thread->pthread, NULL, thread_main, thread) != 0)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no TLS thread could be started");
    thread->started = true;
    char name[16];
    if (index == 0)
        snprintf(name, sizeof name, "tls-shake");
    else
        snprintf(name, sizeof name, "tls%zu", (index - 1) % 1000);
    pthread_setname_np(thread->pthread, name);
    return STATUS_OK;
}

// ---- the main thread's side

static bool renew_stamps(struct tls *tls)
{
    const struct tls_options *options = &tls->options;
    const char *const paths[FILES] = {options->certificate, options->key, options->client_ca};
    bool changed = false;
    for (size_t i = 0; i < FILES; i++)
        changed |= paths[i][0] && stamp_renew(&tls->stamps[i], paths[i]);
    return changed;
}

struct tls_prepared {
    struct tls *tls;
    SSL_CTX *context; // after the commit the one before
    int64_t expires;
};

enum status tls_prepare(struct tls *tls, struct tls_prepared **out, struct error *err)
{
    struct tls_prepared *prepared = calloc(1, sizeof *prepared);
    if (!prepared)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for TLS");
    prepared->tls = tls;
    enum status status =
        tls_context_create(&tls->options, &prepared->context, &prepared->expires, err);
    if (status == STATUS_OK)
        *out = prepared;
    else
        free(prepared);
    return status;
}

void tls_commit(struct tls_prepared *prepared)
{
    struct tls *tls = prepared->tls;
    SSL_CTX *before = tls->context; // connections have references of their own
    tls->context = prepared->context;
    prepared->context = before;
    atomic_store(&tls->certificate_expires, prepared->expires);
    LOG(INFO, "certificate read", LOG_STR("path", tls->options.certificate),
        LOG_U64("expires", (uint64_t)prepared->expires),
        LOG_STR("client_ca", tls->options.client_ca));
}

void tls_prepared_destroy(struct tls_prepared *prepared)
{
    if (!prepared)
        return;
    SSL_CTX_free(prepared->context);
    free(prepared);
}

NODISCARD static enum status read_files(struct tls *tls, struct error *err)
{
    struct tls_prepared *prepared = NULL;
    enum status status = tls_prepare(tls, &prepared, err);
    if (status != STATUS_OK)
        return status;
    tls_commit(prepared);
    tls_prepared_destroy(prepared);
    return STATUS_OK;
}

void tls_look(struct tls *tls)
{
    struct error err;
    // The stamps before the files: what changes meanwhile is seen next time.
    if (renew_stamps(tls) && read_files(tls, &err) != STATUS_OK)
        LOG(ERROR, "certificate not read, the one in force stays", LOG_STR("reason", err.text));
}

enum status tls_create(const struct tls_options *options, struct tls **out, struct error *err)
{
    struct tls *tls = calloc(1, sizeof *tls);
    if (!tls)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for TLS");
    tls->options = *options;
    pthread_mutex_init(&tls->lock, NULL);
    renew_stamps(tls);
    enum status status = read_files(tls, err);
    if (status != STATUS_OK) {
        tls_destroy(tls);
        return status;
    }
    *out = tls;
    return STATUS_OK;
}

enum status tls_start(struct tls *tls, struct error *err)
{
    enum status status = STATUS_OK;
    for (size_t i = 0; i <= tls->options.threads && status == STATUS_OK; i++)
        status = start_thread(tls, i, err);
    return status;
}

void tls_take(struct tls *tls, const struct listener_taken *taken)
{
    struct tls_link *link = tls_link_create(tls->context, taken);
    if (link) {
        give(tls->threads[0], link);
        return;
    }
    log_failure(&tls->handshakes_failed, "no memory");
    close(taken->fd);
    close(taken->wire);
    close(taken->tunnel);
}

void tls_stop(struct tls *tls)
{
    pthread_mutex_lock(&tls->lock);
    tls->stopped = true;
    pthread_mutex_unlock(&tls->lock);
}

void tls_destroy(struct tls *tls)
{
    if (!tls)
        return;
    tls_stop(tls);
    // The handshake thread first, since it hands on to the others.
    for (size_t i = 0; i < tls->threads_n; i++) {
        struct tls_thread *thread = tls->threads[i];
        pthread_mutex_lock(&thread->lock);
        thread->stopping = true;
        pthread_mutex_unlock(&thread->lock);
        wake(thread);
        if (thread->started)
            pthread_join(thread->pthread, NULL);
    }
    for (size_t i = 0; i < tls->threads_n; i++)
        destroy_thread(tls->threads[i]);
    SSL_CTX_free(tls->context);
    tls_link_deinit_module();
    pthread_mutex_destroy(&tls->lock);
    free(tls);
}

struct tls_stats tls_stats(const struct tls *tls)
{
    return (struct tls_stats){
        .connections = atomic_load_explicit(&tls->connections, memory_order_relaxed),
        .handshakes = atomic_load_explicit(&tls->handshakes, memory_order_relaxed),
        .handshakes_failed = atomic_load_explicit(&tls->handshakes_failed, memory_order_relaxed),
        .handshakes_late = atomic_load_explicit(&tls->handshakes_late, memory_order_relaxed),
        .certificate_expires =
            atomic_load_explicit(&tls->certificate_expires, memory_order_relaxed),
    };
}
