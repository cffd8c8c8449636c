#include "gate.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "log.h"
#include "tls.h"

struct gate {
    const struct config *config;
    struct access *access;
    struct tls *tls; // NULL: none
    struct listener *listener;
    struct listener *health_listener;   // NULL: none
    struct guard *guard, *health_guard; // of these
    struct guard_traffic traffic;       // of both
    uv_loop_t *loop;
    struct rpc *rpc;
    uv_timer_t look;
};

// ---- create

NODISCARD static enum status bind_all(struct gate *gate, uv_loop_t *loop, struct error *err)
{
    const struct config *config = gate->config;
    const struct listener_options listen = {
        .key = "listen",
        .addresses = (const char *const *)config->listen,
        .addresses_n = config->listen_n,
        .unix_socket_mode = config->unix_socket_mode,
        .connections_max = config->connections_max,
        .loopback_only = !config->insecure_listen && !config->tokens_file[0] && !gate->tls,
        .tunnel = gate->tls != NULL,
        .renumber = true,
    };
    enum status status = listener_create(loop, &listen, &gate->listener, err);
    if (status != STATUS_OK || config->health_listen_n == 0)
        return status;
    const struct listener_options health = {
        .key = "health_listen",
        .addresses = (const char *const *)config->health_listen,
        .addresses_n = config->health_listen_n,
        .unix_socket_mode = config->unix_socket_mode,
        .connections_max = config->connections_max,
        .renumber = true,
    };
    return listener_create(loop, &health, &gate->health_listener, err);
}

NODISCARD static enum status create_access(struct gate *gate, struct metrics *metrics,
                                           struct error *err)
{
    const struct config *config = gate->config;
    const struct access_options options = {
        .tokens_file = config->tokens_file,
        .unix_scopes = config_scopes(config->unix_scopes, config->unix_scopes_n),
        .tcp_scopes = config_tcp_scopes(config),
        .certificate_scopes = config_scopes(config->tls_client_scopes, config->tls_client_scopes_n),
        .metrics = metrics,
    };
    return access_create(&options, &gate->access, err);
}

static void take_secured(void *context, int fd, struct access_peer *peer)
{
    struct gate *gate = context;
    rpc_add_connection(gate->rpc, fd, peer);
}

NODISCARD static enum status create_tls(struct gate *gate, struct error *err)
{
    const struct config *config = gate->config;
    if (config->tls_certificate[0] == '\0')
        return STATUS_OK;
    const struct tls_options options = {
        .certificate = config->tls_certificate,
        .key = config->tls_key,
        .client_ca = config->tls_client_ca,
        .handshake_ms = config->tls_handshake_ms,
        .threads = config->tls_threads,
        .on_ready = take_secured,
        .context = gate,
    };
    return tls_create(&options, &gate->tls, err);
}

enum status gate_create(uv_loop_t *loop, const struct config *config, struct metrics *metrics,
                        struct gate **out, struct error *err)
{
    struct gate *gate = calloc(1, sizeof *gate);
    if (!gate)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    gate->config = config;
    gate->loop = loop;
    uv_timer_init(loop, &gate->look);
    *out = gate; // what is there, whoever stops the daemon takes down
    enum status status = create_access(gate, metrics, err);
    if (status == STATUS_OK)
        status = create_tls(gate, err);
    return status == STATUS_OK ? bind_all(gate, loop, err) : status;
}

// ---- reload

static void on_look(uv_timer_t *timer)
{
    struct gate *gate = CONTAINER_OF(timer, struct gate, look);
    access_look(gate->access);
    if (gate->tls)
        tls_look(gate->tls);
}

// ---- start

static void take(void *context, const struct listener_taken *taken)
{
    struct gate *gate = context;
    if (taken->wire < 0) {
        guard_take(gate->guard, taken->fd, taken->is_unix ? &access_peer_unix : &access_peer_tcp);
    } else if (guard_admits(gate->guard, taken->wire, taken->fd)) {
        tls_take(gate->tls, taken);
    } else {
        close(taken->fd);
        close(taken->wire);
        close(taken->tunnel);
    }
}

static void take_health(void *context, const struct listener_taken *taken)
{
    struct gate *gate = context;
    guard_take(gate->health_guard, taken->fd, &access_peer_health);
}

NODISCARD static enum status create_guard(struct gate *gate, struct listener *listener,
                                          struct guard **guard, struct error *err)
{
    const struct config *config = gate->config;
    const struct guard_options options = {
        .loop = gate->loop,
        .listener = listener,
        .handshake_ms = config->handshake_ms,
        .streams_max = config->connection_requests_max,
        .faults_max = config->connection_faults_max,
        .penalty_ms = config->penalty_ms,
        .connection_bytes_max = config->connection_bytes_max,
        .bytes_max = config->transport_bytes_max / 4 * 3, // gRPC's own way is to drop anybody's
        .rpc = gate->rpc,
        .traffic = &gate->traffic,
    };
    return guard_create(&options, guard, err);
}

static const char *credential_of(const struct config *config,
                                 const struct listener_address *address)
{
    bool certificate = config->tls_client_ca[0], token = config->tokens_file[0];
    if (address->is_unix)
        return "the socket's mode";
    if (certificate)
        return token ? "certificate, token" : "certificate";
    return token ? "token" : "none";
}

static void log_address(const struct gate *gate, const struct listener_address *address)
{
    const struct config *config = gate->config;
    uint32_t scopes = address->is_unix ? config_scopes(config->unix_scopes, config->unix_scopes_n)
                                       : config_tcp_scopes(config);
    char text[ACCESS_SCOPES_TEXT];
    LOG(INFO, "listens", LOG_STR("listen", address->text),
        LOG_STR("transport", address->is_unix ? "unix"
                             : gate->tls      ? "TLS"
                                              : "plain text"),
        LOG_STR("credential", credential_of(config, address)),
        LOG_STR("scopes_without", access_scopes_text(scopes, text)));
    if (address->is_unix || address->is_loopback || config->tls_client_ca[0])
        return;
    if (!gate->tls && config->tokens_file[0])
        LOG(WARN, "tokens cross the network in plain text: set tls_certificate and tls_key",
            LOG_STR("listen", address->text));
    if (scopes != 0)
        LOG(WARN, "whoever reaches this address may call, without a credential",
            LOG_STR("listen", address->text), LOG_STR("scopes", text));
}

static void log_addresses(const struct gate *gate)
{
    for (size_t i = 0; i < listener_addresses_n(gate->listener); i++) {
        struct listener_address address = listener_address(gate->listener, i);
        log_address(gate, &address);
    }
    for (size_t i = 0; gate->health_listener && i < listener_addresses_n(gate->health_listener);
         i++)
        LOG(INFO, "listens for health alone",
            LOG_STR("listen", listener_address(gate->health_listener, i).text),
            LOG_STR("transport", "plain text"));
}

enum status gate_start(struct gate *gate, struct rpc *rpc, struct error *err)
{
    gate->rpc = rpc;
    log_addresses(gate);
    uv_timer_start(&gate->look, on_look, gate->config->access_look_ms,
                   gate->config->access_look_ms);
    enum status status = create_guard(gate, gate->listener, &gate->guard, err);
    if (status == STATUS_OK && gate->health_listener)
        status = create_guard(gate, gate->health_listener, &gate->health_guard, err);
    if (status == STATUS_OK && gate->tls)
        status = tls_start(gate->tls, err);
    if (status == STATUS_OK)
        status = listener_start(gate->listener, take, gate, err);
    if (status == STATUS_OK && gate->health_listener)
        status = listener_start(gate->health_listener, take_health, gate, err);
    return status;
}

// ---- stop

static bool busy(void *context, int fd)
{
    const struct gate *gate = context;
    return !connections_leave_idle(rpc_connections(gate->rpc), connection_number(fd));
}

void gate_close(struct gate *gate)
{
    listener_stop(gate->listener);
    rpc_close(gate->rpc);
    listener_end_idle(gate->listener, busy, gate);
}

void gate_end_connection(struct gate *gate, int fd)
{
    listener_end_connection(gate->listener, fd);
    if (gate->health_listener)
        listener_end_connection(gate->health_listener, fd);
}

struct guard_stats gate_guard_stats(const struct gate *gate)
{
    struct guard_stats stats = guard_stats(gate->guard);
    if (!gate->health_guard)
        return stats;
    struct guard_stats health = guard_stats(gate->health_guard);
    for (size_t i = 0; i < GUARD_REASONS; i++)
        stats.ended[i] += health.ended[i];
    stats.owed_bytes += health.owed_bytes;
    return stats;
}

void gate_stop(struct gate *gate)
{
    if (gate->listener)
        listener_stop(gate->listener);
    if (gate->health_listener)
        listener_stop(gate->health_listener);
    if (gate->guard)
        guard_stop(gate->guard);
    if (gate->health_guard)
        guard_stop(gate->health_guard);
    if (gate->tls)
        tls_stop(gate->tls);
    uv_timer_stop(&gate->look);
}

void gate_drop_connections(struct gate *gate)
{
    if (gate->listener)
        listener_drop_connections(gate->listener);
    if (gate->health_listener)
        listener_drop_connections(gate->health_listener);
}

void gate_destroy(struct gate *gate)
{
    if (gate->listener)
        listener_destroy(gate->listener);
    if (gate->health_listener)
        listener_destroy(gate->health_listener);
    guard_destroy(gate->guard);
    guard_destroy(gate->health_guard);
    tls_destroy(gate->tls);
    access_destroy(gate->access);
    free(gate);
}

struct tls *gate_tls(struct gate *gate)
{
    return gate->tls;
}

struct access *gate_access(struct gate *gate)
{
    return gate->access;
}

struct listener *gate_listener(struct gate *gate)
{
    return gate->listener;
}

struct listener *gate_health_listener(struct gate *gate)
{
    return gate->health_listener;
}
