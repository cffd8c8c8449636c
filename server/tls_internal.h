// What the files of tls share:
//
//     tls.c           the module: files, threads, taking and stopping
//     tls_context.c   the files as an SSL_CTX, and a certificate's names
//     tls_link.c      one connection: its handshake, and carrying its bytes
#pragma once

#include <openssl/ssl.h>
#include <pthread.h>
#include <stdatomic.h>

#include "tls.h"

enum {
    TLS_PLAIN_BYTES = 256 << 10,               // carried in one go
    TLS_BUFFER_BYTES = TLS_PLAIN_BYTES + 8192, // room for what TLS adds
    TLS_TURN_BYTES = 4 * TLS_PLAIN_BYTES,      // of a connection, then others have theirs
    TLS_LINGER_MS = 10000, // for a peer to take the last bytes, once gRPC has let go
    TLS_SPARE_BUFFERS = 16,
};

struct tls_buffer {
    struct tls_buffer *next; // spare
    size_t begin, end;
    uint8_t bytes[TLS_BUFFER_BYTES];
};

// One side of a link, as far as its thread has been told (edge-triggered).
struct tls_end {
    struct tls_link *link;
    int fd;
    bool readable, writable;
    bool hung_up; // no more will come after what can be read
    bool gone;    // and nothing is taken any more
};

struct tls_link {
    struct tls_thread *thread; // has it until it is handed on or dead
    SSL *ssl;
    BIO *bio;
    struct tls_end wire, tunnel;
    int server_fd; // gRPC's end of the tunnel, until on_ready; -1
    bool at_end;   // of the wire
    bool failed;   // the handshake has; what is left is to let the peer read why
    // Where bytes wait: off the wire and not decrypted; decrypted, for gRPC; encrypted, for the
    // wire. NULL: none do.
    struct tls_buffer *received, *up, *down;
    bool up_ended, up_shut;     // nothing more comes by the wire; gRPC has been told
    bool down_ended, down_shut; // nothing more comes from gRPC; the peer has been told
    bool server_gone;           // gRPC has closed its end
    bool ready, dead;
    struct tls_link *next_ready; // of those with something to do
    struct tls_link *next_given; // of those that come to a thread; of the dead
    bool timed;
    uint64_t deadline_ns; // if timed
    struct tls_link *next_timed, *previous_timed;
    struct tls_link *next, *previous; // of its thread
};

struct tls_thread {
    struct tls *tls;
    pthread_t pthread;
    bool started;
    int epoll_fd, wake_fd;
    pthread_mutex_t lock;
    struct tls_link *arrived; // guarded by lock
    bool stopping;            // guarded by lock

    // The thread's own.
    struct tls_link *links, *dead;
    struct tls_link *ready, **ready_last;
    struct tls_link *timed, *timed_last; // the one that is due first is the first
    struct tls_buffer *spare;
    size_t spare_n;
    uint8_t plain[TLS_PLAIN_BYTES];
};

// ---- tls_context.c

// INVALID_ARGUMENT or FAILED_PRECONDITION, with the key of the configuration at fault.
NODISCARD enum status tls_context_create(const struct tls_options *options, SSL_CTX **context,
                                         int64_t *expires, struct error *err);
// Of the peer's certificate; the one that all share if there is none. NULL: no memory.
struct access_peer *tls_peer_of(SSL *ssl);
// What OpenSSL says went wrong on this thread, and forgets it.
const char *tls_error(const SSL *ssl, char *text, size_t bytes);

// ---- tls_link.c

// NULL: no memory. Takes the sockets only if it succeeds.
struct tls_link *tls_link_create(SSL_CTX *context, const struct listener_taken *taken);
void tls_link_destroy(struct tls_link *link);
void tls_link_deinit_module(void);

enum tls_step {
    TLS_WAITS, // for a socket
    TLS_MORE,  // there is more to do, after others
    TLS_DONE,  // the handshake is, or the link
    TLS_FAILED,
};
enum tls_step tls_link_shake(struct tls_link *link);
enum tls_step tls_link_refuse(struct tls_link *link); // after a failed handshake, until it is done
enum tls_step tls_link_carry(struct tls_link *link);

// ---- tls.c, on the link's thread

struct tls_buffer *tls_buffer_take(struct tls_thread *thread); // NULL: no memory
void tls_buffer_give(struct tls_thread *thread, struct tls_buffer **buffer);
void tls_link_time(struct tls_link *link, uint32_t ms); // once
