// The configuration: from JSON to struct config, by way of one table. What comes out is read-only,
// but for the numbers of keys that are RELOADABLE: see config_now.
//
//     table row: name, kind, where in the struct, range, default, unit, meaning
//          |
//          +-- read    apply_table: the file's value, or the default, through the same setter
//          +-- refuse  describe_expected: what the row takes, in every error and in the help
//          +-- print   table_to_json, config_print_help
//          +-- reload  tables_equal, config_check_change
//          +-- free    table_free
//
// Invariant: a key is spelled like its member in struct config, and only its row knows it; what
// ties several keys together is in check_together.
#include "config.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "access.h"
#include "json_limited.h"
#include "kernels/einsum.h"
#include "rope.h"
#include "selftest.h"
#include "sharing.h"

enum {
    FILE_BYTES_MAX = 1 << 20,
    STRING_BYTES_MAX = PATH_MAX - 1,
    PATH_BYTES = 128,     // "weights[63].tensor_parallel_rank"; an unknown key may be cut
    EXPECTED_BYTES = 192, // what a row takes, in words
    FOUND_BYTES = 64,     // what came instead
    KEY_NEAR_BYTES = 64,  // longer unknown keys get no suggestion
    DAY_MS = 24 * 60 * 60 * 1000,
};

enum kind {
    KIND_BOOL,
    KIND_U32,
    KIND_U64,
    KIND_REAL,
    KIND_MODE, // uint32_t, written as an octal string
    KIND_STRING,
    KIND_CHOICE, // char *, one of `choices`
    KIND_ENUM,   // an enum whose values are the indices of `choices`
    KIND_OBJECT, // a struct with a table of its own
};

struct key {
    const char *name;
    enum kind kind;
    size_t offset; // in the struct that the table describes
    // A list if items_max is set: so many values side by side, and how many of them are in use.
    size_t items_min, items_max, items_n_offset;
    uint64_t min, max;          // of each value; of a string, its bytes
    const char *const *choices; // ends with NULL
    const struct table *object;
    const char *default_json; // NULL: must be given
    const char *unit;
    const char *section; // set on the first key of a section
    bool reloadable;     // may change while serving
    const char *meaning;
};

struct table {
    const struct key *keys;
    size_t keys_n;
    size_t struct_bytes;
};

static const char *const engines[] = {"auto", "cpu", "cuda", "null", NULL};
static const char *const log_levels[] = {
    [LOG_LEVEL_DEBUG] = "debug", [LOG_LEVEL_INFO] = "info",    [LOG_LEVEL_WARN] = "warn",
    [LOG_LEVEL_ERROR] = "error", [LOG_LEVEL_ERROR + 1] = NULL,
};
static const char *const request_logs[] = {
    [CONFIG_REQUEST_LOG_OFF] = "off",
    [CONFIG_REQUEST_LOG_ERRORS] = "errors",
    [CONFIG_REQUEST_LOG_ALL] = "all",
    [CONFIG_REQUEST_LOG_ALL + 1] = NULL,
};
static const char *const log_formats[] = {
    [LOG_FORMAT_PLAIN] = "plain",
    [LOG_FORMAT_JSON] = "json",
    [LOG_FORMAT_JSON + 1] = NULL,
};

static const char *const scopes[] = {
    [CONFIG_SCOPE_INFER] = "infer",
    [CONFIG_SCOPE_READ] = "read",
    [CONFIG_SCOPE_ADMIN] = "admin",
    [CONFIG_SCOPE_ADMIN + 1] = NULL,
};
static const char *const tcp_scopes[] = {
    [CONFIG_SCOPE_INFER] = "infer", [CONFIG_SCOPE_READ] = "read",   [CONFIG_SCOPE_ADMIN] = "admin",
    [CONFIG_SCOPE_AUTO] = "auto",   [CONFIG_SCOPE_AUTO + 1] = NULL,
};

// Rows of a table for `struct OF`. Of a range both ends belong to it.
#define AT(member) .name = #member, .offset = offsetof(struct OF, member)
#define LIST(least, most, member)                                                                  \
    .items_min = (least), .items_max = (most), .items_n_offset = offsetof(struct OF, member##_n)
#define U32(member, least, most, preset, of, means)                                                \
    AT(member), .kind = KIND_U32, .min = (least), .max = (most), .default_json = (preset),         \
                .unit = (of), .meaning = (means)
#define U64(member, least, most, preset, of, means)                                                \
    AT(member), .kind = KIND_U64, .min = (least), .max = (most), .default_json = (preset),         \
                .unit = (of), .meaning = (means)
#define REAL(member, least, most, preset, of, means)                                               \
    AT(member), .kind = KIND_REAL, .min = (least), .max = (most), .default_json = (preset),        \
                .unit = (of), .meaning = (means)
#define MODE(member, preset, means)                                                                \
    AT(member), .kind = KIND_MODE, .max = 0777, .default_json = (preset), .meaning = (means)
#define BOOL(member, preset, means)                                                                \
    AT(member), .kind = KIND_BOOL, .default_json = (preset), .meaning = (means)
#define STRING(member, least, most, preset, means)                                                 \
    AT(member), .kind = KIND_STRING, .min = (least), .max = (most), .default_json = (preset),      \
                .meaning = (means)
#define CHOICE(member, names, preset, means)                                                       \
    AT(member), .kind = KIND_CHOICE, .choices = (names), .default_json = (preset),                 \
                .meaning = (means)
#define ENUM(member, names, preset, means)                                                         \
    AT(member), .kind = KIND_ENUM, .choices = (names), .default_json = (preset), .meaning = (means)
#define OBJECT(member, table, preset, means)                                                       \
    AT(member), .kind = KIND_OBJECT, .object = (table), .default_json = (preset), .meaning = (means)
#define SECTION(title) .section = (title)
#define RELOADABLE .reloadable = true

#define OF config_weights
static const struct key weights_keys[] = {
    {STRING(path, 1, STRING_BYTES_MAX, NULL,
            "a checkpoint's folder or one .safetensors file; relative to the first root")},
    {LIST(0, CONFIG_TENSORS_MAX, tensors),
     STRING(tensors, 1, 255, "[]", "shell patterns of tensor names; none: \"*.attn.wo_a.weight\"")},
    {STRING(name_prefix, 0, 127, "\"\"",
            "put before each name, so that two models can be resident together")},
    {STRING(checksums, 0, STRING_BYTES_MAX, "\"\"",
            "SHA-256 of its files, as sha256sum lists them; read whole; \"\": none")},
    {U32(tensor_parallel_rank, 0, EINSUM_GROUPS_MAX - 1, "0", NULL,
         "which share of the groups to hold, counted from 0")},
    {U32(tensor_parallel_size, 1, EINSUM_GROUPS_MAX, "1", NULL,
         "how many shares the groups are cut into")},
    {U32(output_dim, 1, EINSUM_DIM_MAX, "1024", "rows", "D of weights stored 2-D as [G*D, R]")},
};
#undef OF
static const struct table weights_table = {weights_keys, ARRAY_LEN(weights_keys),
                                           sizeof(struct config_weights)};

#define OF config_rope
static const struct key rope_keys[] = {
    {STRING(weights, 1, 255, NULL,
            "shell pattern of weight names; the first entry that matches a weight is its rope")},
    {REAL(theta, 0, ROPE_THETA_MAX, "0", NULL, "base of the frequencies; 0: see cache")},
    {REAL(factor, 0, ROPE_FACTOR_MAX, "0", NULL, "YaRN's; 0 or 1: no YaRN")},
    {U32(original_positions_max, 0, ROPE_POSITIONS_MAX, "0", "positions",
         "of YaRN: what the model was first trained with")},
    {REAL(beta_fast, 0, 1000000, "0", "turns", "of YaRN; 0: 32")},
    {REAL(beta_slow, 0, 1000000, "0", "turns", "of YaRN; 0: 1")},
    {U32(positions_max, 0, ROPE_POSITIONS_MAX, "0", "positions",
         "from which on positions are refused; 0: 1048576, or all of the cache")},
    {STRING(cache, 0, STRING_BYTES_MAX, "\"\"",
            "in place of theta: a .safetensors file; relative to the first root")},
    {STRING(cache_tensor, 0, ROPE_TENSOR_BYTES - 1, "\"\"",
            "its tensor, F32 [positions, 64], cos then sin; \"\": \"" ROPE_CACHE_TENSOR "\"")},
};
#undef OF
static const struct table rope_table = {rope_keys, ARRAY_LEN(rope_keys),
                                        sizeof(struct config_rope)};

#define OF config
static const struct key config_keys[] = {
    {SECTION("where callers come in"), LIST(1, CONFIG_LISTEN_MAX, listen),
     STRING(listen, 1, 511, "[\"127.0.0.1:50061\"]",
            "\"HOST:PORT\", \"[V6]:PORT\" (port 0: any free one) or \"unix:/PATH\"")},
    {MODE(unix_socket_mode, "\"0660\"", "permissions of unix sockets")},
    {RELOADABLE, U32(connections_max, 1, 65536, "1024", "connections",
                     "open at once; past these, new ones are closed")},
    {U32(connection_requests_max, 1, 65536, "256", "requests",
         "open at once on one connection (HTTP/2 streams)")},
    {U32(calls_max, 1, 1 << 20, "4096", "calls",
         "of any kind open at once; past these, RESOURCE_EXHAUSTED")},
    {RELOADABLE, U32(stream_requests_max, 1, 65536, "64", "requests",
                     "in flight on one EinsumStream; past these it is not read")},
    {U64(transport_bytes_max, 0, 1ull << 40, "0", "bytes",
         "in gRPC's own buffers, a last resort; 0: 1 GiB and 64 of the largest requests")},
    {U32(rpc_threads, 0, 256, "0", "threads", "that serve gRPC; 0: one per 4 cores, at least 1")},

    {SECTION("who gets in"), STRING(tls_certificate, 0, STRING_BYTES_MAX, "\"\"",
                                    "PEM file, the server's own first; TCP in listen then speaks "
                                    "TLS alone; \"\": plain text")},
    {STRING(tls_key, 0, STRING_BYTES_MAX, "\"\"", "PEM file of its private key")},
    {STRING(
        tls_client_ca, 0, STRING_BYTES_MAX, "\"\"",
        "PEM file; callers by TLS need a certificate by one of these; \"\": none is asked for")},
    {U32(tls_handshake_ms, 100, DAY_MS, "10000", "milliseconds",
         "after which a TLS handshake that is not done is given up")},
    {U32(tls_threads, 0, 256, "0", "threads", "that encrypt; 0: one per 4 cores, at least 1")},
    {U32(access_look_ms, 50, DAY_MS, "2000", "milliseconds",
         "after which these files and tokens_file are looked at again; what has changed is read")},
    {STRING(
        tokens_file, 0, STRING_BYTES_MAX, "\"\"",
        "JSON file: SHA-256 of bearer tokens, names of certificates, scopes of each; \"\": none")},
    {LIST(0, CONFIG_SCOPES_MAX, unix_scopes),
     ENUM(unix_scopes, scopes, "[\"infer\", \"read\", \"admin\"]",
          "of every caller by a unix socket, whose mode is the credential")},
    {LIST(0, CONFIG_SCOPES_MAX, tcp_scopes),
     ENUM(tcp_scopes, tcp_scopes, "[\"auto\"]",
          "of every caller by TCP; auto: infer, read; none with tokens_file or tls_client_ca")},
    {LIST(0, CONFIG_SCOPES_MAX, tls_client_scopes),
     ENUM(tls_client_scopes, scopes, "[\"infer\", \"read\"]",
          "of every caller with a certificate by tls_client_ca; tokens_file may name more")},
    {BOOL(insecure_listen, "false",
          "listen beyond loopback without TLS or tokens: whoever reaches the port may call")},
    {LIST(0, CONFIG_LISTEN_MAX, health_listen),
     STRING(health_listen, 1, 511, "[]",
            "as listen, in plain text, of grpc.health.v1 alone: for probes beside TLS")},
    {SECTION("what callers may do"), U32(in_flight_max, 1, 1 << 24, "16384", "requests",
                                         "of all calls and streams, until their replies have left; "
                                         "past these, RESOURCE_EXHAUSTED")},
    {U32(connection_in_flight_max, 1, 1 << 24, "4096", "requests",
         "of one connection; past these, RESOURCE_EXHAUSTED")},
    {U64(message_bytes_max, 0, INT32_MAX, "0", "bytes",
         "of one request; larger ones are RESOURCE_EXHAUSTED; 0: what request_tokens_max needs")},
    {U32(metadata_bytes_max, 1024, 1 << 20, "8192", "bytes",
         "of one call's headers, 32 more for each; past these, RESOURCE_EXHAUSTED")},
    {U64(connection_bytes_max, 0, 1ull << 40, "0", "bytes",
         "a TCP connection may be ahead of its messages, or is cut off; 0: 64 MiB and four "
         "requests")},
    {U32(
        connection_faults_max, 1, 1 << 20, "1000", "calls",
        "that a connection may reset, or make wrongly, within a second; past these it is cut off")},
    {U32(penalty_ms, 0, DAY_MS, "2000", "milliseconds",
         "that new connections from the address of one that was cut off are closed; doubled each "
         "time again; 0: none")},
    {U32(handshake_ms, 1, DAY_MS, "10000", "milliseconds",
         "until a connection must have spoken HTTP/2")},
    {U32(keepalive_ms, 0, DAY_MS, "60000", "milliseconds",
         "of silence, after which a peer is asked whether it lives; 0: never")},
    {U32(keepalive_timeout_ms, 1, DAY_MS, "20000", "milliseconds",
         "that it has to answer; then its connection is closed")},
    {U32(connection_idle_ms, 0, DAY_MS, "0", "milliseconds",
         "without a call, after which a connection is closed; 0: never")},
    {U32(connection_age_ms, 0, DAY_MS, "0", "milliseconds",
         "and up to a tenth more or less, after which a client is sent to open another; 0: never")},
    {U32(connection_age_grace_ms, 1, DAY_MS, "60000", "milliseconds",
         "that calls have to end then; long streams are cut off after it")},

    {SECTION("shared memory, for callers on this host"),
     STRING(shared_memory_listen, 0, 511, "\"\"",
            "\"unix:/PATH\" of a socket over which callers register memory; \"\": none is shared")},
    {U32(shared_connections_max, 1, 65536, "64", "connections",
         "to that socket open at once; past these, new ones are closed")},
    {U32(shared_connection_regions_max, 1, SHARING_CONNECTION_REGIONS_MAX, "4", "regions",
         "that one connection may have registered; past these, RESOURCE_EXHAUSTED")},
    {U32(shared_regions_max, 1, 65536, "64", "regions",
         "of all connections together; past these, RESOURCE_EXHAUSTED")},
    {U64(shared_region_bytes_max, 4096, 1ull << 40, "268435456", "bytes",
         "of one region; larger ones are RESOURCE_EXHAUSTED")},
    {U64(shared_bytes_max, 4096, 1ull << 40, "1073741824", "bytes",
         "of all regions together; past these, RESOURCE_EXHAUSTED")},
    {BOOL(shared_memory_cuda, "false",
          "take CUDA memory of callers by handle: trusts them not to free it while it is in use")},
    {U32(ring_entries_max, 1, 4096, "1024", "requests",
         "that one ring may have in flight, a power of two; one thread serves all rings")},
    {U32(ring_spin_us, 0, 10000, "50", "microseconds",
         "that it looks for more before it sleeps, while requests come that fast; 0: none")},

    {SECTION("for those who look on"),
     STRING(http_listen, 0, 511, "\"\"",
            "\"HOST:PORT\" or \"unix:/PATH\" of /metrics, /livez and /readyz, by plain HTTP; \"\": "
            "none")},
    {U32(http_connections_max, 1, 65536, "64", "connections",
         "to it open at once, each for one request; past these, new ones are closed")},
    {RELOADABLE,
     ENUM(request_log, request_logs, "\"off\"",
          "which requests have a line of their own in the log, in log_format, whatever log_level")},
    {RELOADABLE, U32(request_log_sample, 1, 1 << 30, "1", "requests",
                     "that went well, of which one is logged; those that did not all are")},
    {STRING(trace_endpoint, 0, 511, "\"\"",
            "\"http://HOST:PORT/v1/traces\" of a collector that takes OTLP over HTTP; \"\": no "
            "tracing")},
    {RELOADABLE,
     U32(trace_sample, 0, 1 << 30, "0", "requests",
         "that came without a sampled traceparent, of which one is traced; 0: none is")},

    {SECTION("the engine"),
     CHOICE(engine, engines, "\"auto\"",
            "what computes; auto: the best that this build and machine have")},
    {STRING(kernel, 1, 63, "\"auto\"", "a kernel's name; auto: the best that the device supports")},
    {U32(compute_threads, 0, 1024, "0", "threads", "of the CPU engine; 0: one per core")},
    {U32(lanes, 0, 16, "0", "batches", "in flight on the device; 0: the engine's own choice")},
    {U32(phase_sample, 0, 1 << 20, "16", "batches",
         "of which one is timed phase by phase, for ServerInfo; 0: none is")},

    {SECTION("batching"), U32(request_tokens_max, 1, EINSUM_TOKENS_MAX, "8192", "tokens",
                              "of one request; past batch_tokens_max it is cut into parts")},
    {U32(batch_tokens_max, 2, EINSUM_TOKENS_MAX, "512", "tokens",
         "of one batch, all its requests together")},
    {LIST(0, CONFIG_BUCKETS_MAX, buckets),
     U32(buckets, 1, EINSUM_TOKENS_MAX, "[]", "tokens",
         "ascending, what batches are padded to, the last batch_tokens_max; none: powers of two")},
    {U32(batch_requests_max, 1, 65536, "256", "requests", "of one batch")},
    {RELOADABLE,
     U32(max_queue_delay_us, 0, 1000000, "0", "microseconds",
         "that a batch may wait for company after its first request; 0: it leaves at once")},
    {U32(batches, 0, 64, "0", "buffers",
         "of batches running, forming and being answered; 0: lanes + 3")},
    {U64(batch_input_bytes, 0, 1ull << 40, "0", "bytes",
         "of input in one buffer; 0: batch_tokens_max of the largest weight at start")},
    {U64(batch_output_bytes, 0, 1ull << 40, "0", "bytes", "of output in one buffer; 0: likewise")},
    {RELOADABLE, U32(queue_requests_max, 1, 1 << 20, "1024", "requests",
                     "decoded and not yet launched; past these, RESOURCE_EXHAUSTED")},
    {U64(queue_tokens_max, 0, 1ull << 40, "0", "tokens",
         "of these; past these, RESOURCE_EXHAUSTED; 0: no limit of their own")},
    {U64(queue_bytes_max, 0, 1ull << 40, "0", "bytes",
         "of those that wait for a buffer; past these, RESOURCE_EXHAUSTED; 0: as many as all "
         "buffers hold")},
    {U64(cut_bytes_max, 0, 1ull << 40, "0", "bytes",
         "held by all requests that are cut; past these, RESOURCE_EXHAUSTED; 0: four of the "
         "largest")},
    {RELOADABLE, U32(deadline_ms_max, 1, DAY_MS, "60000", "milliseconds",
                     "cap on any request's deadline, and the deadline of those without")},
    {RELOADABLE, U32(reply_timeout_ms, 1, DAY_MS, "10000", "milliseconds",
                     "after which a caller that does not read its reply is cut off")},

    {SECTION("weights"), LIST(0, CONFIG_ROOTS_MAX, weights_roots),
     STRING(weights_roots, 1, STRING_BYTES_MAX, "[]",
            "the only directories from which weights are read, at start and by LoadWeights")},
    {RELOADABLE, LIST(0, CONFIG_WEIGHTS_MAX, weights),
     OBJECT(weights, &weights_table, "[]", "what to load at start")},
    {RELOADABLE, LIST(0, CONFIG_ROPES_MAX, ropes),
     OBJECT(ropes, &rope_table, "[]",
            "how positions turn; OutputProject needs one for its weight")},
    {U32(scrub_seconds, 0, 30 * (DAY_MS / 1000), "3600", "seconds",
         "in which, while idle, all weights are read again from the device and compared with what "
         "was "
         "loaded; 0: never")},
    {U32(nan_sample, 0, 1 << 20, "16", "requests",
         "of which one is looked at for NaN in its output, for /metrics and the log; 0: none is")},
    {U32(load_threads, 0, 256, "0", "threads", "that load weights at start; 0: one per core")},

    {SECTION("running"), RELOADABLE,
     U32(drain_grace_ms, 0, DAY_MS, "30000", "milliseconds",
         "after SIGTERM, for requests in flight")},
    {RELOADABLE,
     U32(lame_duck_ms, 0, DAY_MS, "0", "milliseconds",
         "after SIGTERM, of serving on as NOT_SERVING; halfway the port and idle connections "
         "close")},
    {U32(watchdog_ms, 0, DAY_MS, "30000", "milliseconds",
         "that a batch or thread may hang, then NOT_SERVING, and soon exit status 4; 0: no watch")},
    {BOOL(self_test_at_start, "true",
          "compare every weight with known answers, by every kernel, before serving")},
    {BOOL(self_test_at_load, "true",
          "the same for weights that are loaded later, before they become visible")},
    {BOOL(core_dumps, "false", "leave one on a crash; callers' tensors and all secrets are in it")},
    {RELOADABLE, ENUM(log_level, log_levels, "\"info\"", "the least that is logged")},
    {RELOADABLE, ENUM(log_format, log_formats, "\"plain\"", "of the lines on standard error")},
};
#undef OF
static const struct table config_table = {config_keys, ARRAY_LEN(config_keys),
                                          sizeof(struct config)};

static size_t value_bytes(const struct key *key)
{
    switch (key->kind) {
    case KIND_BOOL:
        return sizeof(bool);
    case KIND_U32:
    case KIND_MODE:
        return sizeof(uint32_t);
    case KIND_U64:
        return sizeof(uint64_t);
    case KIND_REAL:
        return sizeof(double);
    case KIND_STRING:
    case KIND_CHOICE:
        return sizeof(char *);
    case KIND_ENUM:
        return sizeof(unsigned);
    case KIND_OBJECT:
        return key->object->struct_bytes;
    }
    ASSERT(false && "unknown kind of key");
}
_Static_assert(sizeof(enum log_level) == sizeof(unsigned), "enums are stored as unsigned");
_Static_assert(sizeof(enum log_format) == sizeof(unsigned), "enums are stored as unsigned");
_Static_assert(sizeof(enum config_scope) == sizeof(unsigned), "enums are stored as unsigned");
_Static_assert(sizeof(enum config_request_log) == sizeof(unsigned), "enums are stored as unsigned");

static void *value_at(const struct key *key, void *base, size_t index)
{
    return (char *)base + key->offset + index * value_bytes(key);
}

static const void *value_at_const(const struct key *key, const void *base, size_t index)
{
    return (const char *)base + key->offset + index * value_bytes(key);
}

static size_t *items_n_at(const struct key *key, void *base)
{
    return (size_t *)(void *)((char *)base + key->items_n_offset);
}

// How many values of a key are in use: of a list its items, otherwise one.
static size_t values_n(const struct key *key, const void *base)
{
    if (!key->items_max)
        return 1;
    return *(const size_t *)(const void *)((const char *)base + key->items_n_offset);
}

// -- what a key takes, in words -------------------------------------------------------------------

PRINTF_LIKE(3, 4)
static void append(char *text, size_t bytes, const char *format, ...)
{
    size_t used = strlen(text);
    va_list args;
    va_start(args, format);
    if (vsnprintf(text + used, bytes - used, format, args) < 0)
        text[used] = '\0';
    va_end(args);
}

static void append_expected_value(const struct key *key, char text[EXPECTED_BYTES])
{
    unsigned long long min = key->min, max = key->max;
    switch (key->kind) {
    case KIND_BOOL:
        append(text, EXPECTED_BYTES, "true or false");
        return;
    case KIND_U32:
    case KIND_U64:
        append(text, EXPECTED_BYTES, "an integer from %llu to %llu%s%s", min, max,
               key->unit ? " " : "", key->unit ? key->unit : "");
        return;
    case KIND_REAL:
        append(text, EXPECTED_BYTES, "a number from %llu to %llu%s%s", min, max,
               key->unit ? " " : "", key->unit ? key->unit : "");
        return;
    case KIND_MODE:
        append(text, EXPECTED_BYTES, "an octal mode from \"%04llo\" to \"%04llo\"", min, max);
        return;
    case KIND_STRING:
        append(text, EXPECTED_BYTES, "a string of %llu to %llu bytes", min, max);
        return;
    case KIND_CHOICE:
    case KIND_ENUM:
        for (const char *const *choice = key->choices; *choice; choice++)
            append(text, EXPECTED_BYTES, "%s\"%s\"", choice == key->choices ? "one of " : ", ",
                   *choice);
        return;
    case KIND_OBJECT:
        append(text, EXPECTED_BYTES, "an object");
        return;
    }
    ASSERT(false && "unknown kind of key");
}

static void describe_expected(const struct key *key, char text[EXPECTED_BYTES])
{
    text[0] = '\0';
    if (key->items_max)
        append(text, EXPECTED_BYTES, "a list of %zu to %zu, each ", key->items_min, key->items_max);
    append_expected_value(key, text);
}

static void describe_found(const json_t *value, char text[FOUND_BYTES])
{
    if (json_is_array(value)) {
        snprintf(text, FOUND_BYTES, "a list of %zu", json_array_size(value));
    } else if (json_is_object(value)) {
        snprintf(text, FOUND_BYTES, "an object");
    } else {
        char *dump = json_dumps(value, JSON_ENCODE_ANY | JSON_ENSURE_ASCII);
        int shown = FOUND_BYTES - 8;
        bool cut = dump && strlen(dump) > (size_t)shown;
        snprintf(text, FOUND_BYTES, "%.*s%s", shown, dump ? dump : "something else",
                 cut ? "..." : "");
        free(dump);
    }
}

// The one way to refuse a value. `whole` is the list itself, otherwise one value of it.
static enum status refuse(const struct key *key, bool whole, const char *path, const json_t *value,
                          struct error *err)
{
    char expected[EXPECTED_BYTES] = "", found[FOUND_BYTES];
    if (whole)
        describe_expected(key, expected);
    else
        append_expected_value(key, expected);
    describe_found(value, found);
    return error_field(err, STATUS_INVALID_ARGUMENT, path, "expected %s, got %s", expected, found);
}

// -- from JSON ------------------------------------------------------------------------------------

static enum status out_of_memory(struct error *err)
{
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory reading the configuration");
}

static bool in_range(const struct key *key, uint64_t value)
{
    return value >= key->min && value <= key->max;
}

static bool to_integer(const struct key *key, const json_t *value, uint64_t *integer)
{
    json_int_t found = json_integer_value(value);
    if (!json_is_integer(value) || found < 0 || !in_range(key, (uint64_t)found))
        return false;
    *integer = (uint64_t)found;
    return true;
}

static bool to_real(const struct key *key, const json_t *value, double *real)
{
    *real = json_number_value(value);
    return json_is_number(value) && *real >= (double)key->min && *real <= (double)key->max;
}

// Digits 0 to 7 alone: strtoul would take signs and blanks.
static bool to_mode(const struct key *key, const json_t *value, uint32_t *mode)
{
    const char *digits = json_string_value(value);
    if (!digits || !*digits || strlen(digits) > 8 || strspn(digits, "01234567") != strlen(digits))
        return false;
    unsigned long found = strtoul(digits, NULL, 8);
    *mode = (uint32_t)found;
    return in_range(key, found);
}

static bool to_choice(const struct key *key, const json_t *value, unsigned *index)
{
    const char *name = json_string_value(value);
    for (unsigned i = 0; name && key->choices[i]; i++) {
        if (strcmp(name, key->choices[i]) == 0) {
            *index = i;
            return true;
        }
    }
    return false;
}

static enum status apply_table(const struct table *table, void *base, const char *prefix,
                               json_t *object, struct error *err);

static enum status set_string(char **to, const json_t *value, struct error *err)
{
    *to = strdup(json_string_value(value));
    return *to ? STATUS_OK : out_of_memory(err);
}

static enum status set_value(const struct key *key, void *to, const char *path, json_t *value,
                             struct error *err)
{
    uint64_t integer;
    double real;
    uint32_t mode;
    unsigned choice;
    switch (key->kind) {
    case KIND_BOOL:
        if (!json_is_boolean(value))
            break;
        *(bool *)to = json_is_true(value);
        return STATUS_OK;
    case KIND_U32:
        if (!to_integer(key, value, &integer))
            break;
        *(uint32_t *)to = (uint32_t)integer;
        return STATUS_OK;
    case KIND_U64:
        if (!to_integer(key, value, &integer))
            break;
        *(uint64_t *)to = integer;
        return STATUS_OK;
    case KIND_REAL:
        if (!to_real(key, value, &real))
            break;
        *(double *)to = real;
        return STATUS_OK;
    case KIND_MODE:
        if (!to_mode(key, value, &mode))
            break;
        *(uint32_t *)to = mode;
        return STATUS_OK;
    case KIND_STRING:
        if (!json_is_string(value) || !in_range(key, json_string_length(value)))
            break;
        return set_string(to, value, err);
    case KIND_CHOICE:
        if (!to_choice(key, value, &choice))
            break;
        return set_string(to, value, err);
    case KIND_ENUM:
        if (!to_choice(key, value, &choice))
            break;
        *(unsigned *)to = choice;
        return STATUS_OK;
    case KIND_OBJECT:
        if (!json_is_object(value))
            break;
        return apply_table(key->object, to, path, value, err);
    }
    return refuse(key, false, path, value, err);
}

static enum status set_list(const struct key *key, void *base, const char *path, json_t *list,
                            struct error *err)
{
    size_t items_n = json_array_size(list);
    if (!json_is_array(list) || items_n < key->items_min || items_n > key->items_max)
        return refuse(key, true, path, list, err);
    // At once, so that what the items before a bad one hold is freed with the rest.
    *items_n_at(key, base) = items_n;
    for (size_t i = 0; i < items_n; i++) {
        char item_path[PATH_BYTES];
        snprintf(item_path, sizeof item_path, "%.*s[%zu]", PATH_BYTES - 24, path, i);
        enum status status =
            set_value(key, value_at(key, base, i), item_path, json_array_get(list, i), err);
        if (status)
            return status;
    }
    return STATUS_OK;
}

static enum status set_key(const struct key *key, void *base, const char *path, json_t *value,
                           struct error *err)
{
    return key->items_max ? set_list(key, base, path, value, err)
                          : set_value(key, value_at(key, base, 0), path, value, err);
}

// A default is JSON text and comes in by the same door, so that it cannot break its own range.
static enum status set_default(const struct key *key, void *base, const char *path,
                               struct error *err)
{
    if (!key->default_json)
        return error_field(err, STATUS_INVALID_ARGUMENT, path, "must be given");
    bool no_memory;
    json_t *value = json_load_whole(key->default_json, strlen(key->default_json), JSON_DECODE_ANY,
                                    NULL, &no_memory);
    if (!value)
        return out_of_memory(err);
    enum status status = set_key(key, base, path, value, err);
    json_decref(value);
    return status;
}

// How many single-byte changes lead from one key to the other (Levenshtein). Both at most
// KEY_NEAR_BYTES long.
static size_t edit_distance(const char *from, const char *to)
{
    size_t to_bytes = strlen(to), row[KEY_NEAR_BYTES + 1];
    for (size_t j = 0; j <= to_bytes; j++)
        row[j] = j;
    for (size_t i = 1; from[i - 1]; i++) {
        size_t diagonal = row[0]; // the row above, one to the left
        row[0] = i;
        for (size_t j = 1; j <= to_bytes; j++) {
            size_t above = row[j];
            size_t best = diagonal + (from[i - 1] != to[j - 1]);
            if (above + 1 < best)
                best = above + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            row[j] = best;
            diagonal = above;
        }
    }
    return row[to_bytes];
}

// A key of the table that `name` may be a slip of; NULL if none is near.
static const char *nearest_key(const struct table *table, const char *name)
{
    size_t name_bytes = strlen(name);
    if (name_bytes > KEY_NEAR_BYTES)
        return NULL;
    const char *nearest = NULL;
    size_t best = name_bytes / 3 < 3 ? name_bytes / 3 : 3; // farther is another word
    for (size_t i = 0; i < table->keys_n; i++) {
        size_t distance = edit_distance(name, table->keys[i].name);
        if (distance <= best && (!nearest || distance < best)) {
            nearest = table->keys[i].name;
            best = distance;
        }
    }
    return nearest;
}

static void make_path(char path[PATH_BYTES], const char *prefix, const char *name)
{
    snprintf(path, PATH_BYTES, "%.*s%s%.*s", PATH_BYTES / 2, prefix, *prefix ? "." : "",
             PATH_BYTES / 2 - 2, name);
}

static enum status refuse_unknown_keys(const struct table *table, const char *prefix,
                                       json_t *object, struct error *err)
{
    const char *name;
    json_t *value;
    json_object_foreach(object, name, value)
    {
        bool known = false;
        for (size_t i = 0; i < table->keys_n && !known; i++)
            known = strcmp(name, table->keys[i].name) == 0;
        if (known)
            continue;
        char path[PATH_BYTES];
        make_path(path, prefix, name);
        const char *nearest = nearest_key(table, name);
        if (nearest)
            return error_field(err, STATUS_INVALID_ARGUMENT, path,
                               "unknown key; did you mean \"%s\"?", nearest);
        return error_field(err, STATUS_INVALID_ARGUMENT, path, "unknown key");
    }
    return STATUS_OK;
}

// Sets every member that the table describes: from `object` what it has, the rest by default.
// `object` may be NULL.
static enum status apply_table(const struct table *table, void *base, const char *prefix,
                               json_t *object, struct error *err)
{
    enum status status = refuse_unknown_keys(table, prefix, object, err);
    for (size_t i = 0; i < table->keys_n && !status; i++) {
        const struct key *key = &table->keys[i];
        char path[PATH_BYTES];
        make_path(path, prefix, key->name);
        json_t *value = json_object_get(object, key->name);
        status = value ? set_key(key, base, path, value, err) : set_default(key, base, path, err);
    }
    return status;
}

static void table_free(const struct table *table, void *base)
{
    for (size_t i = 0; i < table->keys_n; i++) {
        const struct key *key = &table->keys[i];
        for (size_t j = 0; j < values_n(key, base); j++) {
            if (key->kind == KIND_STRING || key->kind == KIND_CHOICE)
                free(*(char **)value_at(key, base, j));
            else if (key->kind == KIND_OBJECT)
                table_free(key->object, value_at(key, base, j));
        }
    }
}

void config_deinit(struct config *config)
{
    table_free(&config_table, config);
    memset(config, 0, sizeof *config);
}

// -- what ties keys together ----------------------------------------------------------------------

static bool is_port(const char *port)
{
    size_t digits = strspn(port, "0123456789");
    return digits >= 1 && digits <= 5 && !port[digits] && strtoul(port, NULL, 10) <= UINT16_MAX;
}

// `text` as far as `bytes` consists of letters, digits and `others`.
static bool is_made_of(const char *text, size_t bytes, const char *others)
{
    for (size_t i = 0; i < bytes; i++) {
        char c = text[i];
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!plain && !strchr(others, c))
            return false;
    }
    return true;
}

// "V6" or "V6%ZONE" up to `end`.
static bool is_v6(const char *text, const char *end)
{
    const char *zone = memchr(text, '%', (size_t)(end - text));
    const char *address_end = zone ? zone : end;
    char address[INET6_ADDRSTRLEN];
    size_t bytes = (size_t)(address_end - text);
    if (bytes >= sizeof address)
        return false;
    memcpy(address, text, bytes);
    address[bytes] = '\0';
    struct in6_addr parsed;
    if (inet_pton(AF_INET6, address, &parsed) != 1)
        return false;
    return !zone || (end - zone > 1 && is_made_of(zone + 1, (size_t)(end - zone - 1), "._-"));
}

static enum status check_listen(const char *path, const char *address, struct error *err)
{
    static const size_t socket_path_max = sizeof((struct sockaddr_un *)0)->sun_path - 1;
    if (strncmp(address, "unix:", strlen("unix:")) == 0) {
        const char *file = address + strlen("unix:");
        if (file[0] != '/' || !file[1])
            return error_field(err, STATUS_INVALID_ARGUMENT, path,
                               "expected \"unix:\" and an absolute path, got \"%.200s\"", address);
        if (strlen(file) > socket_path_max)
            return error_field(err, STATUS_INVALID_ARGUMENT, path,
                               "a unix socket's path has at most %zu bytes, got %zu: \"%.200s\"",
                               socket_path_max, strlen(file), file);
        return STATUS_OK;
    }
    const char *colon = strrchr(address, ':');
    bool valid = colon && colon > address && is_port(colon + 1);
    if (valid && address[0] == '[')
        valid = colon[-1] == ']' && is_v6(address + 1, colon - 1);
    else if (valid)
        valid = is_made_of(address, (size_t)(colon - address), ".-_");
    if (!valid)
        return error_field(err, STATUS_INVALID_ARGUMENT, path,
                           "expected \"HOST:PORT\", \"[V6]:PORT\" or \"unix:/PATH\", "
                           "got \"%.200s\"",
                           address);
    return STATUS_OK;
}

// Any free port may be asked for more than once.
static bool is_port_0(const char *address)
{
    const char *port = strrchr(address, ':') + 1;
    return strncmp(address, "unix:", strlen("unix:")) != 0 && port[strspn(port, "0")] == '\0';
}

static enum status check_listens(const struct config *config, struct error *err)
{
    for (size_t i = 0; i < config->listen_n; i++) {
        char path[PATH_BYTES];
        snprintf(path, sizeof path, "listen[%zu]", i);
        enum status status = check_listen(path, config->listen[i], err);
        if (status)
            return status;
        for (size_t j = 0; j < i; j++)
            if (strcmp(config->listen[j], config->listen[i]) == 0 && !is_port_0(config->listen[i]))
                return error_field(err, STATUS_INVALID_ARGUMENT, path,
                                   "the same as listen[%zu]: \"%.200s\"", j, config->listen[i]);
    }
    return STATUS_OK;
}

// That no other key has the address.
static enum status check_alone(const struct config *config, const char *path, const char *address,
                               struct error *err)
{
    if (is_port_0(address))
        return STATUS_OK;
    for (size_t i = 0; i < config->listen_n; i++)
        if (strcmp(config->listen[i], address) == 0)
            return error_field(err, STATUS_INVALID_ARGUMENT, path,
                               "the same as listen[%zu]: \"%.200s\"", i, address);
    if (strcmp(config->shared_memory_listen, address) == 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, path,
                           "the same as shared_memory_listen: \"%.200s\"", address);
    return STATUS_OK;
}

static enum status check_health(const struct config *config, struct error *err)
{
    for (size_t i = 0; i < config->health_listen_n; i++) {
        const char *address = config->health_listen[i];
        char path[PATH_BYTES];
        snprintf(path, sizeof path, "health_listen[%zu]", i);
        enum status status = check_listen(path, address, err);
        if (status == STATUS_OK)
            status = check_alone(config, path, address, err);
        if (status != STATUS_OK)
            return status;
        if (!is_port_0(address) && strcmp(config->http_listen, address) == 0)
            return error_field(err, STATUS_INVALID_ARGUMENT, path,
                               "the same as http_listen: \"%.200s\"", address);
    }
    return STATUS_OK;
}

uint32_t config_scopes(const enum config_scope *list, size_t n)
{
    _Static_assert(ACCESS_INFER == 1 << CONFIG_SCOPE_INFER, "the bits are in this order");
    _Static_assert(ACCESS_READ == 1 << CONFIG_SCOPE_READ, "the bits are in this order");
    _Static_assert(ACCESS_ADMIN == 1 << CONFIG_SCOPE_ADMIN, "the bits are in this order");
    uint32_t bits = 0;
    for (size_t i = 0; i < n; i++)
        bits |= 1u << list[i];
    return bits;
}

uint32_t config_tcp_scopes(const struct config *config)
{
    uint32_t bits = config_scopes(config->tcp_scopes, config->tcp_scopes_n);
    if (!(bits & 1u << CONFIG_SCOPE_AUTO))
        return bits;
    return config->tokens_file[0] || config->tls_client_ca[0] ? 0 : ACCESS_INFER | ACCESS_READ;
}

static enum status check_access(const struct config *config, struct error *err)
{
    if (config->tls_certificate[0] && !config->tls_key[0])
        return error_field(err, STATUS_INVALID_ARGUMENT, "tls_key",
                           "must be given with tls_certificate");
    if (config->tls_key[0] && !config->tls_certificate[0])
        return error_field(err, STATUS_INVALID_ARGUMENT, "tls_certificate",
                           "must be given with tls_key");
    if (config->tls_client_ca[0] && !config->tls_certificate[0])
        return error_field(err, STATUS_INVALID_ARGUMENT, "tls_client_ca",
                           "needs tls_certificate and tls_key");
    uint32_t tcp = config_scopes(config->tcp_scopes, config->tcp_scopes_n);
    if ((tcp & 1u << CONFIG_SCOPE_AUTO) && config->tcp_scopes_n > 1)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tcp_scopes",
                           "expected \"auto\" alone or no \"auto\"");
    if (config->shared_memory_listen[0] &&
        !(config_scopes(config->unix_scopes, config->unix_scopes_n) & ACCESS_INFER))
        return error_field(err, STATUS_INVALID_ARGUMENT, "shared_memory_listen",
                           "needs \"infer\" in unix_scopes, it is a unix socket");
    return STATUS_OK;
}

static enum status check_shared(const struct config *config, struct error *err)
{
    static const char key[] = "shared_memory_listen";
    const char *address = config->shared_memory_listen;
    if (address[0] == '\0')
        return STATUS_OK;
    if (strncmp(address, "unix:", strlen("unix:")) != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, key,
                           "expected \"unix:/PATH\", got \"%.200s\"", address);
    for (size_t i = 0; i < config->listen_n; i++)
        if (strcmp(config->listen[i], address) == 0)
            return error_field(err, STATUS_INVALID_ARGUMENT, key,
                               "the same as listen[%zu]: \"%.200s\"", i, address);
    return check_listen(key, address, err);
}

static enum status check_http(const struct config *config, struct error *err)
{
    static const char key[] = "http_listen";
    const char *address = config->http_listen;
    if (address[0] == '\0')
        return STATUS_OK;
    enum status status = check_listen(key, address, err);
    return status == STATUS_OK ? check_alone(config, key, address, err) : status;
}

static enum status check_trace(const struct config *config, struct error *err)
{
    const char *endpoint = config->trace_endpoint;
    if (endpoint[0] && strncmp(endpoint, "http://", 7) != 0 &&
        strncmp(endpoint, "https://", 8) != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "trace_endpoint",
                           "expected \"http://HOST:PORT/PATH\" or \"https://...\", got \"%.200s\"",
                           endpoint);
    return STATUS_OK;
}

static void fill_buckets(struct config *config)
{
    uint32_t bucket = 1;
    for (; bucket < config->batch_tokens_max; bucket *= 2)
        config->buckets[config->buckets_n++] = bucket;
    config->buckets[config->buckets_n++] = config->batch_tokens_max;
}
_Static_assert(EINSUM_TOKENS_MAX <= 1 << 30 && CONFIG_BUCKETS_MAX >= 32,
               "powers of two up to any batch_tokens_max have room");

static enum status check_buckets(const struct config *config, struct error *err)
{
    for (size_t i = 1; i < config->buckets_n; i++)
        if (config->buckets[i] <= config->buckets[i - 1])
            return error_field(err, STATUS_INVALID_ARGUMENT, "buckets",
                               "must ascend, got %u after %u", config->buckets[i],
                               config->buckets[i - 1]);
    uint32_t last = config->buckets[config->buckets_n - 1];
    if (last != config->batch_tokens_max)
        return error_field(err, STATUS_INVALID_ARGUMENT, "buckets",
                           "the last must be batch_tokens_max (%u), got %u",
                           config->batch_tokens_max, last);
    return STATUS_OK;
}

static enum status check_ropes(const struct config *config, struct error *err)
{
    for (size_t i = 0; i < config->ropes_n; i++) {
        const struct config_rope *rope = &config->ropes[i];
        char path[PATH_BYTES];
        snprintf(path, sizeof path, "ropes[%zu].theta", i);
        if ((rope->theta > 0) == (rope->cache[0] != '\0'))
            return error_field(err, STATUS_INVALID_ARGUMENT, path,
                               "expected exactly one of theta and cache, got %s",
                               rope->cache[0] ? "both" : "neither");
        snprintf(path, sizeof path, "ropes[%zu].cache", i);
        if (rope->cache[0] && !config->weights_roots_n)
            return error_field(err, STATUS_INVALID_ARGUMENT, path,
                               "needs weights_roots, the only directories that are read");
    }
    return STATUS_OK;
}

static enum status check_together(const struct config *config, struct error *err)
{
    enum status status = check_listens(config, err);
    if (status == STATUS_OK)
        status = check_shared(config, err);
    if (status == STATUS_OK)
        status = check_http(config, err);
    if (status == STATUS_OK)
        status = check_health(config, err);
    if (status == STATUS_OK)
        status = check_access(config, err);
    if (status == STATUS_OK)
        status = check_trace(config, err);
    if (status)
        return status;
    status = check_buckets(config, err);
    if (status)
        return status;
    if (config->batches && config->batches < config->lanes)
        return error_field(err, STATUS_INVALID_ARGUMENT, "batches",
                           "must be at least lanes (%u), got %u", config->lanes, config->batches);
    if (config->weights_n && !config->weights_roots_n)
        return error_field(err, STATUS_INVALID_ARGUMENT, "weights_roots",
                           "must name the directory that weights are read from");
    status = check_ropes(config, err);
    if (status)
        return status;
    for (size_t i = 0; i < config->weights_n; i++) {
        const struct config_weights *weights = &config->weights[i];
        if (weights->tensor_parallel_rank < weights->tensor_parallel_size)
            continue;
        char path[PATH_BYTES];
        snprintf(path, sizeof path, "weights[%zu].tensor_parallel_rank", i);
        return error_field(err, STATUS_INVALID_ARGUMENT, path,
                           "must be below tensor_parallel_size (%u), got %u",
                           weights->tensor_parallel_size, weights->tensor_parallel_rank);
    }
    return STATUS_OK;
}

// -- in ------------------------------------------------------------------------------------------

// `object` NULL: the defaults alone.
static enum status from_object(struct config *config, json_t *object, struct error *err)
{
    memset(config, 0, sizeof *config);
    enum status status = apply_table(&config_table, config, "", object, err);
    if (status)
        goto free_strings;
    if (config->buckets_n == 0)
        fill_buckets(config);
    status = check_together(config, err);
    if (status)
        goto free_strings;
    return STATUS_OK;

free_strings:
    config_deinit(config);
    return status;
}

enum status config_init(struct config *config, struct error *err)
{
    return from_object(config, NULL, err);
}

enum status config_parse(struct config *config, const char *text, size_t bytes, struct error *err)
{
    memset(config, 0, sizeof *config);
    json_error_t where;
    bool no_memory;
    json_t *json = json_load_whole(text, bytes, JSON_REJECT_DUPLICATES, &where, &no_memory);
    if (no_memory)
        return out_of_memory(err);
    if (!json)
        return error_set(err, STATUS_INVALID_ARGUMENT, "line %d, column %d: %s", where.line,
                         where.column, where.text);
    enum status status = json_is_object(json)
                             ? from_object(config, json, err)
                             : error_set(err, STATUS_INVALID_ARGUMENT,
                                         "expected an object of keys and values, got a list");
    json_decref(json);
    return status;
}

static enum status file_failed(const char *path, struct error *err)
{
    enum status status = errno == ENOENT || errno == ENOTDIR ? STATUS_NOT_FOUND
                         : errno == EACCES || errno == EPERM ? STATUS_PERMISSION_DENIED
                                                             : STATUS_FAILED_PRECONDITION;
    return error_set(err, status, "could not read the configuration %.300s: %s", path,
                     strerror(errno));
}

// Reads all of `fd`, which may be a pipe, into memory for the caller to free.
static enum status read_file(int fd, const char *path, char **text, size_t *bytes,
                             struct error *err)
{
    char *buffer = malloc(FILE_BYTES_MAX + 1);
    if (!buffer)
        return out_of_memory(err);
    size_t used = 0;
    while (used <= FILE_BYTES_MAX) {
        ssize_t got = read(fd, buffer + used, FILE_BYTES_MAX + 1 - used);
        if (got == 0) {
            *text = buffer;
            *bytes = used;
            return STATUS_OK;
        }
        if (got > 0)
            used += (size_t)got;
        else if (errno != EINTR)
            break;
    }
    enum status status =
        used > FILE_BYTES_MAX
            ? error_set(err, STATUS_INVALID_ARGUMENT,
                        "the configuration %.300s is larger than %d bytes", path, FILE_BYTES_MAX)
            : file_failed(path, err); // a directory ends here: EISDIR
    free(buffer);
    return status;
}

enum status config_load(struct config *config, const char *path, struct error *err)
{
    memset(config, 0, sizeof *config);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return file_failed(path, err);
    char *text = NULL;
    size_t bytes = 0;
    enum status status = read_file(fd, path, &text, &bytes, err);
    close(fd);
    if (status)
        return status;

    struct error found;
    status = config_parse(config, text, bytes, &found);
    free(text);
    if (status) {
        (void)error_set(err, status, "%.150s: %s", path, found.text);
        if (err)
            memcpy(err->field, found.field, sizeof err->field);
    }
    return status;
}

// -- change --------------------------------------------------------------------------------------

static json_t *key_to_json(const struct key *key, const void *base);
static bool tables_equal(const struct table *table, const void *a, const void *b);

static bool values_equal(const struct key *key, const void *a, const void *b)
{
    switch (key->kind) {
    case KIND_BOOL:
    case KIND_U32:
    case KIND_U64:
    case KIND_REAL:
    case KIND_MODE:
    case KIND_ENUM:
        return memcmp(a, b, value_bytes(key)) == 0;
    case KIND_STRING:
    case KIND_CHOICE:
        return strcmp(*(char *const *)a, *(char *const *)b) == 0;
    case KIND_OBJECT:
        return tables_equal(key->object, a, b);
    }
    ASSERT(false && "unknown kind of key");
}

static bool keys_equal(const struct key *key, const void *a, const void *b)
{
    bool equal = values_n(key, a) == values_n(key, b);
    for (size_t i = 0; equal && i < values_n(key, a); i++)
        equal = values_equal(key, value_at_const(key, a, i), value_at_const(key, b, i));
    return equal;
}

static bool tables_equal(const struct table *table, const void *a, const void *b)
{
    bool equal = true;
    for (size_t i = 0; equal && i < table->keys_n; i++)
        equal = keys_equal(&table->keys[i], a, b);
    return equal;
}

bool config_weights_equal(const struct config_weights *a, const struct config_weights *b)
{
    return tables_equal(&weights_table, a, b);
}

bool config_ropes_equal(const struct config *a, const struct config *b)
{
    bool equal = a->ropes_n == b->ropes_n;
    for (size_t i = 0; equal && i < a->ropes_n; i++)
        equal = tables_equal(&rope_table, &a->ropes[i], &b->ropes[i]);
    return equal;
}

static void describe_key(const struct key *key, const void *base, char text[FOUND_BYTES])
{
    json_t *json = key_to_json(key, base);
    describe_found(json, text);
    json_decref(json);
}

enum status config_check_change(const struct config *now, const struct config *next,
                                char changed[CONFIG_CHANGED_BYTES], struct error *err)
{
    changed[0] = '\0';
    for (size_t i = 0; i < config_table.keys_n; i++) {
        const struct key *key = &config_table.keys[i];
        if (keys_equal(key, now, next))
            continue;
        if (!key->reloadable) {
            char is[FOUND_BYTES], got[FOUND_BYTES];
            describe_key(key, now, is);
            describe_key(key, next, got);
            return error_field(err, STATUS_FAILED_PRECONDITION, key->name,
                               "needs a restart: %s is in force, got %s", is, got);
        }
        append(changed, CONFIG_CHANGED_BYTES, "%s%s", *changed ? ", " : "", key->name);
    }
    return STATUS_OK;
}

void config_take_reloadable(struct config *config, const struct config *next)
{
    for (size_t i = 0; i < config_table.keys_n; i++) {
        const struct key *key = &config_table.keys[i];
        if (!key->reloadable || key->items_max)
            continue;
        void *to = value_at(key, config, 0);
        const void *from = value_at_const(key, next, 0);
        if (key->kind == KIND_BOOL) {
            __atomic_store_n((bool *)to, *(const bool *)from, __ATOMIC_RELAXED);
        } else {
            ASSERT(value_bytes(key) == sizeof(uint32_t) && key->kind != KIND_STRING);
            __atomic_store_n((uint32_t *)to, *(const uint32_t *)from, __ATOMIC_RELAXED);
        }
    }
}

static enum status copy_strings(const struct table *table, void *base, struct error *err)
{
    enum status status = STATUS_OK;
    for (size_t i = 0; i < table->keys_n; i++) {
        const struct key *key = &table->keys[i];
        for (size_t j = 0; j < values_n(key, base); j++) {
            void *value = value_at(key, base, j);
            // All of them, whatever fails: none may be left that belongs to the original.
            if (key->kind == KIND_OBJECT && copy_strings(key->object, value, err) != STATUS_OK)
                status = STATUS_RESOURCE_EXHAUSTED;
            if (key->kind != KIND_STRING && key->kind != KIND_CHOICE)
                continue;
            char *copy = strdup(*(char **)value);
            *(char **)value = copy;
            if (!copy)
                status = out_of_memory(err);
        }
    }
    return status;
}

enum status config_copy(struct config *to, const struct config *from, struct error *err)
{
    *to = *from;
    enum status status = copy_strings(&config_table, to, err);
    if (status != STATUS_OK)
        config_deinit(to);
    return status;
}

// -- out -----------------------------------------------------------------------------------------

static json_t *table_to_json(const struct table *table, const void *base);

static json_t *value_to_json(const struct key *key, const void *value)
{
    char mode[16];
    switch (key->kind) {
    case KIND_BOOL:
        return json_boolean(*(const bool *)value);
    case KIND_U32:
        return json_integer(*(const uint32_t *)value);
    case KIND_U64:
        return json_integer((json_int_t) * (const uint64_t *)value);
    case KIND_REAL:
        return json_real(*(const double *)value);
    case KIND_MODE:
        snprintf(mode, sizeof mode, "%04o", *(const uint32_t *)value);
        return json_string(mode);
    case KIND_STRING:
    case KIND_CHOICE:
        return json_string(*(char *const *)value);
    case KIND_ENUM:
        return json_string(key->choices[*(const unsigned *)value]);
    case KIND_OBJECT:
        return table_to_json(key->object, value);
    }
    ASSERT(false && "unknown kind of key");
}

// NULL, here as in jansson: out of memory.
static json_t *key_to_json(const struct key *key, const void *base)
{
    if (!key->items_max)
        return value_to_json(key, value_at_const(key, base, 0));
    json_t *list = json_array();
    for (size_t i = 0; i < values_n(key, base); i++) {
        if (json_array_append_new(list, value_to_json(key, value_at_const(key, base, i)))) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

static json_t *table_to_json(const struct table *table, const void *base)
{
    json_t *object = json_object();
    for (size_t i = 0; i < table->keys_n; i++) {
        const struct key *key = &table->keys[i];
        if (json_object_set_new(object, key->name, key_to_json(key, base))) {
            json_decref(object);
            return NULL;
        }
    }
    return object;
}

void config_print(const struct config *config)
{
    json_t *json = table_to_json(&config_table, config);
    if (!json || json_dumpf(json, stdout, JSON_INDENT(2)))
        LOG(ERROR, "the configuration could not be printed");
    else
        putchar('\n');
    json_decref(json);
}

static void print_help_of(const struct table *table, const char *prefix)
{
    for (size_t i = 0; i < table->keys_n; i++) {
        const struct key *key = &table->keys[i];
        char path[PATH_BYTES], expected[EXPECTED_BYTES];
        make_path(path, prefix, key->name);
        describe_expected(key, expected);
        if (key->section)
            printf("\n%s\n", key->section);
        printf("  %-30s %-20s %s\n", path, key->default_json ? key->default_json : "(required)",
               expected);
        printf("      %s%s\n", key->meaning, key->reloadable ? " [reloadable]" : "");
        if (key->object) {
            char inner[PATH_BYTES];
            snprintf(inner, sizeof inner, "%.*s[]", PATH_BYTES - 8, path);
            print_help_of(key->object, inner);
        }
    }
}

void config_print_help(void)
{
    printf(
        "The configuration is one JSON object; every key is optional unless it says (required).\n"
        "SIGHUP reads it again: keys marked [reloadable] may have changed.\n"
        "\n"
        "  %-30s %-20s %s\n"
        "      meaning\n",
        "key", "default", "value");
    print_help_of(&config_table, "");
}
