// Who may do what. A caller's scopes are those of the way it came by, of its certificate, and of
// the bearer token that it sends with the call:
//
//     way (unix, TCP, health) --.
//     certificate's names ------+--> scopes --has what the method needs?--> served
//     authorization: Bearer ----'                                     '---> refused, counted, logged
//
// Which scope a method needs stands in its row of the service's table (call.h). Tokens and
// certificates are listed in `tokens_file`, which holds no token, only their SHA-256:
//
//     {"tokens": [{"name": "front-end", "sha256": "9f86...", "scopes": ["infer", "read"],
//                  "expires": "2027-01-01T00:00:00Z"}],
//      "certificates": [{"name": "front-end.example", "scopes": ["infer"]}]}
//
// The file is read again when it changes; a table that is not good is refused as a whole, and the
// one in force stays.
#pragma once

#include <stdatomic.h>

#include "metrics.h"

// Bits. A row of a table of methods has one of them; 0 is none, and rpc_create refuses that.
enum access_scope {
    ACCESS_INFER = 1, // projections
    ACCESS_READ = 2,  // what is resident and how it goes
    ACCESS_ADMIN = 4, // loading and unloading
    ACCESS_OPEN = 8,  // no credential is asked for: health
    ACCESS_ALL = ACCESS_INFER | ACCESS_READ | ACCESS_ADMIN,
};

enum { ACCESS_NAMES_MAX = 32, ACCESS_SCOPES_TEXT = 32 };

enum access_way { ACCESS_UNIX, ACCESS_TCP, ACCESS_HEALTH };

// Whose connection it is. One for each connection with a certificate; the others share three.
struct access_peer {
    enum access_way way;
    bool shared; // static; access_peer_free lets it be
    // The certificate's common name and alternative names. 0: no certificate.
    size_t names_n;
    char *names[ACCESS_NAMES_MAX];
    // Of the certificate: the generation of the table they were looked up in, and the scopes.
    _Atomic uint64_t looked_up;
};
extern struct access_peer access_peer_unix, access_peer_tcp, access_peer_health;

// NULL: no memory. Names past the last that fits are left out, and so give nothing.
struct access_peer *access_peer_create(const char *const *names, size_t names_n);
void access_peer_free(struct access_peer *peer);

struct access_options {
    const char *tokens_file;     // "": none; borrowed
    uint32_t unix_scopes;        // of every caller by a unix socket
    uint32_t tcp_scopes;         // of every caller by TCP
    uint32_t certificate_scopes; // of every caller with a certificate
    struct metrics *metrics;
};

struct access;

// Reads the file, if there is one.
NODISCARD enum status access_create(const struct access_options *options, struct access **access,
                                    struct error *err);
void access_destroy(struct access *access);

// Reads the file again, in two steps, so that others can join. Preparing is any thread's; committing,
// the main thread's, puts all of it in force and cannot fail.
struct access_prepared;
NODISCARD enum status access_prepare(struct access *access, struct access_prepared **prepared,
                                     struct error *err);
void access_commit(struct access_prepared *prepared);
void access_prepared_destroy(struct access_prepared *prepared); // any thread; NULL: nothing
// Main thread. All of it if the file has changed since; logs what came of it. On failure what was stays.
void access_look(struct access *access);

// What a call brings. `authorizations_n` counts the headers of that name; `authorization` is one.
struct access_call {
    const char *method;
    enum access_scope needs;
    struct access_peer *peer; // NULL: not known, and nothing is allowed
    const char *authorization;
    size_t authorization_bytes, authorizations_n;
};

// Any thread. Whether the way and the certificate alone give `needs`.
bool access_given(struct access *access, struct access_peer *peer, enum access_scope needs);
// Any thread. With the token; UNAUTHENTICATED or PERMISSION_DENIED, counted and logged.
NODISCARD enum status access_check(struct access *access, const struct access_call *call,
                                   struct error *err);

// "infer,read"; "none".
const char *access_scopes_text(uint32_t scopes, char text[ACCESS_SCOPES_TEXT]);
// 0: no such scope.
enum access_scope access_scope_of(const char *name);
// Seconds since 1970 of "2027-01-01T00:00:00Z" and its like; false: it is not one.
bool access_parse_time(const char *text, int64_t *seconds);

enum { ACCESS_SHA256_BYTES = 32 };
void access_sha256(const void *bytes, size_t bytes_n, uint8_t digest[ACCESS_SHA256_BYTES]);
