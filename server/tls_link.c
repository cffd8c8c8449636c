// One connection. OpenSSL meets the wire through a BIO of ours, which has both directions in large
// buffers: one system call takes or gives many records, and OpenSSL asks for what it needs of them.
//
//     wire --recv--> received --SSL_read--> up --send--> tunnel
//     wire <--send-- down <--SSL_write-- (the thread's `plain`) <--recv-- tunnel
//
// Each stage begins only when the one behind it is empty, so a side that does not read holds up the
// other, and nothing grows. Buffers are the thread's, and a link has one only while bytes wait in it.
#include <errno.h>
#include <openssl/err.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tls_internal.h"

// ---- sockets

// A short read has emptied the socket, and what comes next is told; but not if the peer's end was
// told already.
static ssize_t receive(struct tls_end *end, void *bytes, size_t n)
{
    if (!end->readable) {
        errno = EAGAIN;
        return -1;
    }
    ssize_t got;
    do
        got = recv(end->fd, bytes, n, 0);
    while (got < 0 && errno == EINTR);
    if (got < 0 && errno == EAGAIN)
        end->readable = false;
    if (got > 0 && (size_t)got < n && !end->hung_up)
        end->readable = false;
    return got;
}

// Gives what is in the buffer, and the buffer back when that is all. false: the peer is gone.
static bool send_buffer(struct tls_end *end, struct tls_buffer **buffer)
{
    struct tls_buffer *from = *buffer;
    while (end->writable && from->begin < from->end) {
        ssize_t sent =
            send(end->fd, from->bytes + from->begin, from->end - from->begin, MSG_NOSIGNAL);
        if (sent >= 0)
            from->begin += (size_t)sent;
        else if (errno == EAGAIN)
            end->writable = false;
        else if (errno != EINTR)
            return false;
    }
    if (from->begin == from->end)
        tls_buffer_give(end->link->thread, buffer);
    return true;
}

// ---- the BIO

static bool fill_received(struct tls_link *link)
{
    if (link->received)
        return true;
    if (!link->wire.readable) {
        BIO_set_retry_read(link->bio);
        return false;
    }
    link->received = tls_buffer_take(link->thread);
    if (!link->received)
        return false;
    ssize_t got = receive(&link->wire, link->received->bytes, TLS_BUFFER_BYTES);
    if (got > 0) {
        link->received->end = (size_t)got;
        return true;
    }
    tls_buffer_give(link->thread, &link->received);
    if (got == 0)
        link->at_end = true;
    else if (errno == EAGAIN)
        BIO_set_retry_read(link->bio);
    return false;
}

static int bio_read(BIO *bio, char *to, int wanted)
{
    struct tls_link *link = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    if (wanted <= 0 || !fill_received(link))
        return link->at_end ? 0 : -1;
    struct tls_buffer *from = link->received;
    size_t n = from->end - from->begin;
    if (n > (size_t)wanted)
        n = (size_t)wanted;
    memcpy(to, from->bytes + from->begin, n);
    from->begin += n;
    if (from->begin == from->end)
        tls_buffer_give(link->thread, &link->received);
    return (int)n;
}

static int bio_write(BIO *bio, const char *bytes, int n)
{
    struct tls_link *link = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    if (!link->down)
        link->down = tls_buffer_take(link->thread);
    if (!link->down || n <= 0)
        return -1;
    struct tls_buffer *to = link->down;
    if ((size_t)n > TLS_BUFFER_BYTES - to->end) {
        BIO_set_retry_write(bio); // of what the peer makes us send while it does not read
        return -1;
    }
    memcpy(to->bytes + to->end, bytes, (size_t)n);
    to->end += (size_t)n;
    return n;
}

static long bio_control(BIO *bio, int command, long number, void *pointer)
{
    (void)number, (void)pointer;
    const struct tls_link *link = BIO_get_data(bio);
    return command == BIO_CTRL_FLUSH || (command == BIO_CTRL_EOF && link->at_end);
}

static BIO_METHOD *bio_method;

static bool init_module(void)
{
    if (bio_method)
        return true;
    bio_method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "einsumd");
    return bio_method && BIO_meth_set_read(bio_method, bio_read) &&
           BIO_meth_set_write(bio_method, bio_write) && BIO_meth_set_ctrl(bio_method, bio_control);
}

void tls_link_deinit_module(void)
{
    BIO_meth_free(bio_method);
    bio_method = NULL;
}

// ---- create

struct tls_link *tls_link_create(SSL_CTX *context, const struct listener_taken *taken)
{
    struct tls_link *link = calloc(1, sizeof *link);
    if (!link || !init_module())
        goto free_link;
    link->ssl = SSL_new(context);
    link->bio = link->ssl ? BIO_new(bio_method) : NULL;
    if (!link->bio)
        goto free_ssl;
    BIO_set_data(link->bio, link);
    BIO_set_init(link->bio, 1);
    SSL_set_bio(link->ssl, link->bio, link->bio); // takes it
    SSL_set_accept_state(link->ssl);
    link->wire = (struct tls_end){.link = link, .fd = taken->wire};
    link->tunnel = (struct tls_end){.link = link, .fd = taken->tunnel};
    link->server_fd = taken->fd;
    return link;

free_ssl:
    SSL_free(link->ssl);
free_link:
    ERR_clear_error();
    free(link);
    return NULL;
}

void tls_link_destroy(struct tls_link *link)
{
    tls_buffer_give(link->thread, &link->received);
    tls_buffer_give(link->thread, &link->up);
    tls_buffer_give(link->thread, &link->down);
    SSL_free(link->ssl);
    close(link->wire.fd);
    close(link->tunnel.fd);
    if (link->server_fd >= 0)
        close(link->server_fd);
    free(link);
}

// ---- the handshake

// Whatever still comes is dropped. Closing a socket with unread bytes would reset it before the peer
// has all of what was sent. true: he has closed it.
static bool drop_received(struct tls_link *link)
{
    ssize_t got;
    do
        got = receive(&link->wire, link->thread->plain, sizeof link->thread->plain);
    while (got > 0);
    return got == 0 || errno != EAGAIN;
}

enum tls_step tls_link_refuse(struct tls_link *link)
{
    if (!link->failed)
        shutdown(link->wire.fd, SHUT_WR);
    link->failed = true;
    return drop_received(link) ? TLS_DONE : TLS_WAITS;
}

enum tls_step tls_link_shake(struct tls_link *link)
{
    ERR_clear_error();
    int done = SSL_do_handshake(link->ssl);
    int error = done == 1 ? SSL_ERROR_NONE : SSL_get_error(link->ssl, done);
    if (link->down && !send_buffer(&link->wire, &link->down)) // of a failure too: the alert
        return TLS_FAILED;
    if (done == 1)
        return TLS_DONE;
    return error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? TLS_WAITS : TLS_FAILED;
}

// ---- from the wire to gRPC

// false: the connection is broken.
static bool decrypt(struct tls_link *link, size_t *moved)
{
    struct tls_buffer *to = link->up = tls_buffer_take(link->thread);
    if (!to)
        return false;
    while (to->end < TLS_PLAIN_BYTES) {
        size_t got;
        ERR_clear_error();
        if (SSL_read_ex(link->ssl, to->bytes + to->end, TLS_PLAIN_BYTES - to->end, &got)) {
            to->end += got;
            continue;
        }
        int error = SSL_get_error(link->ssl, 0);
        if (error == SSL_ERROR_ZERO_RETURN)
            link->up_ended = true;
        else if (error != SSL_ERROR_WANT_READ) // to write, while all our room is full: an abuse
            return false;
        break;
    }
    *moved += to->end;
    if (to->end == 0)
        tls_buffer_give(link->thread, &link->up);
    return true;
}

static void let_server_go(struct tls_link *link)
{
    if (link->server_gone)
        return;
    link->server_gone = true;
    link->up_shut = true;
    tls_buffer_give(link->thread, &link->up);
    tls_link_time(link, TLS_LINGER_MS);
}

// Without news from a socket; likewise the next.
static bool can_carry_up(const struct tls_link *link)
{
    return !link->server_gone && !link->up && !link->up_ended &&
           (link->wire.readable || link->received || SSL_pending(link->ssl) > 0);
}

static bool can_carry_down(const struct tls_link *link)
{
    return !link->down && !link->down_ended && link->tunnel.readable;
}

static bool carry_up(struct tls_link *link, size_t *moved)
{
    if (link->server_gone) {
        link->up_ended |= link->down_shut && drop_received(link);
        return true;
    }
    if (can_carry_up(link) && !decrypt(link, moved))
        return false;
    if (link->up && !send_buffer(&link->tunnel, &link->up))
        let_server_go(link);
    if (link->up_ended && !link->up && !link->up_shut) {
        shutdown(link->tunnel.fd, SHUT_WR);
        link->up_shut = true;
    }
    return true;
}

// ---- from gRPC to the wire

static bool encrypt(struct tls_link *link, size_t *moved)
{
    uint8_t *plain = link->thread->plain;
    ssize_t got = receive(&link->tunnel, plain, TLS_PLAIN_BYTES);
    if (got < 0)
        return errno == EAGAIN || (link->down_ended = true);
    ERR_clear_error();
    if (got == 0) {
        link->down_ended = true;
        SSL_shutdown(link->ssl); // our end of it, into `down`
        return true;
    }
    size_t written;
    *moved += (size_t)got;
    return SSL_write_ex(link->ssl, plain, (size_t)got, &written) == 1;
}

static bool carry_down(struct tls_link *link, size_t *moved)
{
    if (can_carry_down(link) && !encrypt(link, moved))
        return false;
    if (link->down && !send_buffer(&link->wire, &link->down))
        return false;
    if (link->down_ended && !link->down && !link->down_shut) {
        shutdown(link->wire.fd, SHUT_WR);
        link->down_shut = true;
    }
    return true;
}

enum tls_step tls_link_carry(struct tls_link *link)
{
    size_t moved = 0;
    do {
        if (!carry_down(link, &moved) || !carry_up(link, &moved))
            return TLS_FAILED;
        if (link->tunnel.gone && link->down_ended)
            let_server_go(link);
        if (link->down_shut && link->up_shut && (link->up_ended || !link->server_gone))
            return TLS_DONE;
        if (moved >= TLS_TURN_BYTES)
            return TLS_MORE;
    } while (can_carry_up(link) || can_carry_down(link));
    return TLS_WAITS;
}
