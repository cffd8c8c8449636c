// TLS in front of gRPC. A stranger fails in the handshake, before gRPC sees a byte of him:
//
//     wire --handshake thread: TLS 1.2 or 1.3, ALPN h2, client certificate--> on_ready: gRPC gets
//                                                                             its end of the tunnel
//     wire <==ciphertext== carrying thread ==plain text==> tunnel <====> gRPC
//
// gRPC 1.51 takes sockets of ours in plain text only; hence the pair of sockets (listener.h), and a
// thread that carries between them. Handshakes have a thread of their own, so that a flood of them
// does not stop who is in already.
#pragma once

#include "access.h"
#include "listener.h"

struct tls;

struct tls_options {
    const char *certificate, *key; // PEM files; borrowed, as the next
    const char *client_ca;         // "": no certificate is asked for
    uint32_t handshake_ms;
    uint32_t threads; // that carry
    // On the handshake thread: takes `fd`, the server's end, and `peer`.
    void (*on_ready)(void *context, int fd, struct access_peer *peer);
    void *context;
};

// Main thread, all of these. Reads the files.
NODISCARD enum status tls_create(const struct tls_options *options, struct tls **tls,
                                 struct error *err);
NODISCARD enum status tls_start(struct tls *tls, struct error *err);
// Takes a connection with a tunnel.
void tls_take(struct tls *tls, const struct listener_taken *taken);

// Reads the files again, in two steps, so that others can join: connections from the commit on have
// what they say. Preparing is any thread's, and committing cannot fail.
struct tls_prepared;
NODISCARD enum status tls_prepare(struct tls *tls, struct tls_prepared **prepared,
                                  struct error *err);
void tls_commit(struct tls_prepared *prepared);
void tls_prepared_destroy(struct tls_prepared *prepared); // any thread; NULL: nothing
// All of it if a file has changed since; logs what came of it. On failure what was stays.
void tls_look(struct tls *tls);

// From its return on_ready is not called any more. Again is harmless.
void tls_stop(struct tls *tls);
// When gRPC has closed its ends: what it has written still goes out, within a second.
void tls_destroy(struct tls *tls);

struct tls_stats {
    uint32_t connections; // with the handshake done
    uint64_t handshakes, handshakes_failed, handshakes_late;
    int64_t certificate_expires; // seconds since 1970
};
struct tls_stats tls_stats(const struct tls *tls); // any thread
