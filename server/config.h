// The configuration: one JSON object, one table of keys (config.c). A key is spelled like its
// member below, and none is nested but those of "weights" and "ropes":
//
//     {"listen": ["unix:/run/einsumd.sock"], "weights_roots": ["/models"],
//      "weights": [{"path": "deepseek-v4-flash"}], "ropes": [{"weights": "*", "theta": 10000}],
//      "log_format": "json"}
//
// Every key has a unit, a range and a default in the table, and `einsumd --help-config` prints it.
// Unknown keys, duplicates and values out of range are errors that name the line or the key.
#pragma once

#include "log.h"
#include "status.h"

enum config_request_log {
    CONFIG_REQUEST_LOG_OFF,
    CONFIG_REQUEST_LOG_ERRORS,
    CONFIG_REQUEST_LOG_ALL
};

enum config_scope { // of access.h
    CONFIG_SCOPE_INFER,
    CONFIG_SCOPE_READ,
    CONFIG_SCOPE_ADMIN,
    CONFIG_SCOPE_AUTO // of tcp_scopes alone
};

enum {
    CONFIG_SCOPES_MAX = 3,
    CONFIG_LISTEN_MAX = 16,
    CONFIG_ROOTS_MAX = 16,
    CONFIG_WEIGHTS_MAX = 64,
    CONFIG_ROPES_MAX = 64,
    CONFIG_TENSORS_MAX = 16,
    CONFIG_BUCKETS_MAX = 64,
    CONFIG_CHANGED_BYTES = 512,
};

struct config_weights { // one entry of "weights": what to load at start; as LoadWeightsRequest
    char *path;
    char *tensors[CONFIG_TENSORS_MAX];
    size_t tensors_n;
    char *name_prefix; // never NULL
    char *checksums;   // likewise
    uint32_t tensor_parallel_rank;
    uint32_t tensor_parallel_size;
    uint32_t output_dim;
};

struct config_rope { // one entry of "ropes": how attention's output of some weights was rotated
    char *weights;   // shell pattern of weight names; the first entry that matches a weight is its
    double theta;    // the rest as struct rope_options; 0 and "": not given
    double factor;
    uint32_t original_positions_max;
    double beta_fast, beta_slow;
    uint32_t positions_max;
    char *cache, *cache_tensor; // never NULL
};

// Of a daemon that serves: read-only, but for reloadable keys, which are read by config_now. Its
// lists of weights and ropes are those of the start; reload.h has the current ones.
struct config {
    // where callers come in
    // "HOST:PORT", "[V6]:PORT" (port 0: any free one) or "unix:/PATH"; default "127.0.0.1:50061"
    char *listen[CONFIG_LISTEN_MAX];
    size_t listen_n;
    uint32_t unix_socket_mode;        // octal string in JSON; default 0660
    uint32_t connections_max;         // default 1024
    uint32_t connection_requests_max; // HTTP/2 streams open at once on one connection; default 256
    uint32_t calls_max;               // of any kind open at once; default 4096
    uint32_t stream_requests_max;     // in flight on one EinsumStream; default 64
    uint64_t transport_bytes_max;     // in gRPC's own buffers; 0 (default): automatic
    uint32_t rpc_threads;             // gRPC completion queues; 0: one per 4 cores, at least 1

    // who gets in
    char *tls_certificate, *tls_key; // PEM files; "" (default): no TLS
    char *tls_client_ca;             // PEM; "" (default): no certificate is asked for
    uint32_t tls_handshake_ms;       // default 10000
    uint32_t tls_threads;            // 0 (default): one per 4 cores, at least 1
    uint32_t access_look_ms;         // how often the files are looked at; default 2000
    char *tokens_file;               // see access.h; "" (default): none
    enum config_scope unix_scopes[CONFIG_SCOPES_MAX]; // default all
    size_t unix_scopes_n;
    enum config_scope tcp_scopes[CONFIG_SCOPES_MAX]; // "auto" (default): see config_tcp_scopes
    size_t tcp_scopes_n;
    enum config_scope tls_client_scopes[CONFIG_SCOPES_MAX]; // default infer and read
    size_t tls_client_scopes_n;
    bool insecure_listen;                   // default false
    char *health_listen[CONFIG_LISTEN_MAX]; // of health alone, never TLS; default none
    size_t health_listen_n;
    // what callers may do
    uint32_t in_flight_max;            // requests, of calls and streams; default 16384
    uint32_t connection_in_flight_max; // of one connection; default 4096
    uint64_t message_bytes_max;        // of one request; 0 (default): what the largest one needs
    uint32_t metadata_bytes_max;       // of one call; default 8192
    uint64_t
        connection_bytes_max; // sent and no whole message yet; 0 (default): four of the largest
    uint32_t connection_faults_max; // reset or wrong, a second; default 1000
    uint32_t penalty_ms;            // that the address of who was cut off is kept out; default 2000
    uint32_t handshake_ms;          // until a connection must speak HTTP/2; default 10000
    uint32_t keepalive_ms;          // of silence, until it is asked whether it lives; 0: never;
                                    // default 60000
    uint32_t keepalive_timeout_ms;  // for the answer; default 20000
    uint32_t connection_idle_ms;    // without calls, then it is closed; 0 (default): never
    uint32_t connection_age_ms;     // then it is closed between calls; 0 (default): never
    uint32_t connection_age_grace_ms; // for calls that are still open then; default 60000

    // shared memory, for callers on this host
    char *shared_memory_listen;      // "unix:/PATH" of the control socket; "" (default): none
    uint32_t shared_connections_max; // default 64
    uint32_t shared_connection_regions_max; // default 4
    uint32_t shared_regions_max;            // of all connections; default 64
    uint64_t shared_region_bytes_max;       // of one region; default 256 MiB
    uint64_t shared_bytes_max;              // of all regions; default 1 GiB
    bool shared_memory_cuda;                // whether CUDA memory is taken; default false
    uint32_t ring_entries_max;              // of one ring; default 1024
    uint32_t ring_spin_us; // that the ring thread waits before it sleeps; default 50

    // for those who look on
    char *http_listen; // "HOST:PORT" or "unix:/PATH": /metrics and probes; "" (default): none
    uint32_t http_connections_max; // default 64
    enum config_request_log
        request_log;             // a line for each request: "off" (default), "errors", "all"
    uint32_t request_log_sample; // of those that went well one in so many; default 1: each
    char *trace_endpoint;        // "http://HOST:PORT/v1/traces", of OTLP; "" (default): no tracing
    uint32_t trace_sample; // of requests without traceparent one in so many; 0 (default): none

    // the engine
    char *engine;             // "auto" (default), "cpu", "cuda", "null"
    char *kernel;             // "auto" (default) or a kernel's name
    uint32_t compute_threads; // CPU engine; 0 (default): one per core
    uint32_t lanes;           // batches in flight; 0 (default): the engine's own choice
    uint32_t phase_sample;    // one batch in so many is timed phase by phase; 0: none

    // batching
    uint32_t request_tokens_max;          // default 8192; past batch_tokens_max it is cut
    uint32_t batch_tokens_max;            // default 512: the largest bucket
    uint32_t buckets[CONFIG_BUCKETS_MAX]; // ascending; default: powers of two up to
                                          // batch_tokens_max
    size_t buckets_n;
    uint32_t batch_requests_max; // segments in a batch; default 256
    uint32_t max_queue_delay_us; // default 0: an idle daemon adds no delay
    uint32_t batches; // batch buffers: running, forming and being answered; 0 (default): lanes + 3
    uint64_t batch_input_bytes; // of one buffer; 0 (default): batch_tokens_max of the largest
                                // weight at start
    uint64_t batch_output_bytes;
    uint32_t queue_requests_max; // decoded and not yet launched; default 1024
    uint64_t queue_tokens_max;   // theirs; 0 (default): no limit of its own
    uint64_t queue_bytes_max;    // of those that wait for a buffer; 0 (default): all buffers' input
    uint64_t cut_bytes_max;    // of all requests that are cut; 0 (default): of four of the largest
    uint32_t deadline_ms_max;  // cap on any request's deadline, and the deadline of those without;
                               // default 60000
    uint32_t reply_timeout_ms; // a caller that does not read its reply for so long is cut off;
                               // default 10000

    // weights
    char *weights_roots[CONFIG_ROOTS_MAX];
    size_t weights_roots_n;
    struct config_weights weights[CONFIG_WEIGHTS_MAX];
    size_t weights_n;
    struct config_rope ropes[CONFIG_ROPES_MAX]; // of weights loaded at start and by LoadWeights
    size_t ropes_n;
    uint32_t scrub_seconds; // of a pass over all weights in memory; 0: none; default 3600
    uint32_t nan_sample;    // requests, of which one is looked at; 0: none; default 16
    uint32_t load_threads;  // at start; 0 (default): one per core

    // running
    uint32_t drain_grace_ms;    // after SIGTERM, for requests in flight; default 30000
    uint32_t lame_duck_ms;      // after SIGTERM, serving on as NOT_SERVING; default 0
    uint32_t watchdog_ms;       // see watchdog.h; 0: off; default 30000
    bool self_test_at_start;    // default true
    bool self_test_at_load;     // default true
    bool core_dumps;            // default false
    enum log_level log_level;   // "debug", "info" (default), "warn", "error"
    enum log_format log_format; // "plain" (default), "json"
};

// A list of scopes as bits of access.h.
uint32_t config_scopes(const enum config_scope *scopes, size_t scopes_n);
// tcp_scopes; "auto" is infer and read if nothing else says who gets in, otherwise none.
uint32_t config_tcp_scopes(const struct config *config);

// The defaults alone.
NODISCARD enum status config_init(struct config *config, struct error *err);
// Defaults, overlaid by a file or by text (for tests and the fuzzer). On failure `config` holds
// nothing to free.
NODISCARD enum status config_load(struct config *config, const char *path, struct error *err);
NODISCARD enum status config_parse(struct config *config, const char *text, size_t bytes,
                                   struct error *err);
// A copy has strings of its own.
NODISCARD enum status config_copy(struct config *to, const struct config *from, struct error *err);
void config_deinit(struct config *config);

// The value of a reloadable key of the configuration in force, which the main thread may be
// changing: any thread.
#define config_now(config, key) __atomic_load_n(&(config)->key, __ATOMIC_RELAXED)
// Both as they came from a file. FAILED_PRECONDITION names a key that differs and is not
// reloadable; `changed` gets the names of those that differ and are.
NODISCARD enum status config_check_change(const struct config *now, const struct config *next,
                                          char changed[CONFIG_CHANGED_BYTES], struct error *err);
// Stores what `next` has for reloadable keys, but for lists. Main thread.
void config_take_reloadable(struct config *config, const struct config *next);
bool config_weights_equal(const struct config_weights *a, const struct config_weights *b);
bool config_ropes_equal(const struct config *a, const struct config *b);

// Prints every key: type, unit, range, default, meaning.
void config_print_help(void);
// Prints the configuration in force as JSON that config_load accepts.
void config_print(const struct config *config);
