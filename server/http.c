// libmicrohttpd (MHD) in its external mode: it watches its sockets by an epoll descriptor, which the
// loop polls, and says when it wants to be run again.
//
//     listener --socket--> MHD --epoll descriptor--> uv_poll --> MHD_run --> answer()
//                           '--its next timeout----> uv_timer ------^
//
// MHD's own timeout starts anew with each byte, so a caller who sends one now and then could stay
// for ever: a sweep ends connections by their age. Each serves one request. Main thread only.
#include "http.h"

#include <jansson.h>
#include <microhttpd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine.h"
#include "listener.h"
#include "log.h"
#include "scrape.h"
#include "service.h"

enum {
    HEADER_BYTES_MAX = 16 << 10, // of a request line and its headers; past it MHD answers 431
    SWEEP_MS = 250,
};

struct connection {
    int fd;
    uint64_t started_ns;
    struct connection *next, *previous;
};

struct http {
    struct http_options options;
    struct MHD_Daemon *daemon;
    uv_poll_t readable; // MHD's epoll descriptor
    uv_timer_t again, sweep;
    struct connection *live;
};

// ---- answers

NODISCARD static enum MHD_Result respond(struct MHD_Connection *connection, unsigned status,
                                         const char *content_type, char *body, size_t bytes,
                                         enum MHD_ResponseMemoryMode mode)
{
    struct MHD_Response *response = MHD_create_response_from_buffer(bytes, body, mode);
    if (!response) {
        if (mode == MHD_RESPMEM_MUST_FREE)
            free(body);
        return MHD_NO; // MHD closes the connection
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, content_type);
    MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
    if (status == MHD_HTTP_METHOD_NOT_ALLOWED)
        MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
    enum MHD_Result result = MHD_queue_response(connection, status, response);
    MHD_destroy_response(response);
    return result;
}

NODISCARD static enum MHD_Result respond_text(struct MHD_Connection *connection, unsigned status,
                                              const char *text)
{
    return respond(connection, status, "text/plain; charset=utf-8", (char *)(uintptr_t)text,
                   strlen(text), MHD_RESPMEM_MUST_COPY);
}

NODISCARD static enum MHD_Result answer_metrics(struct http *http,
                                                struct MHD_Connection *connection)
{
    const char *accept =
        MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_ACCEPT);
    enum page_format format = accept && strstr(accept, "application/openmetrics-text")
                                  ? PAGE_OPENMETRICS
                                  : PAGE_PROMETHEUS;
    char *text;
    size_t bytes;
    struct error err;
    if (scrape_write(http->options.context, format, &text, &bytes, &err) != STATUS_OK)
        return respond_text(connection, MHD_HTTP_INTERNAL_SERVER_ERROR, err.text);
    return respond(connection, MHD_HTTP_OK, page_content_types[format], text, bytes,
                   MHD_RESPMEM_MUST_FREE);
}

NODISCARD static enum MHD_Result answer_live(struct http *http, struct MHD_Connection *connection)
{
    (void)http;
    return respond_text(connection, MHD_HTTP_OK, "live\n");
}

NODISCARD static enum MHD_Result answer_ready(struct http *http, struct MHD_Connection *connection)
{
    const char *reason = service_not_ready(http->options.context);
    char text[64];
    snprintf(text, sizeof text, "%s%s\n", reason ? "not ready: " : "ready", reason ? reason : "");
    return respond_text(connection, reason ? MHD_HTTP_SERVICE_UNAVAILABLE : MHD_HTTP_OK, text);
}

NODISCARD static enum MHD_Result answer_build(struct http *http, struct MHD_Connection *connection)
{
    const struct service_context *context = http->options.context;
    struct engine_info engine;
    context->engine_ops->describe(context->engine, &engine);
    json_t *json =
        json_pack("{s:s, s:s, s:s, s:s}", "version", EINSUMD_VERSION, "engine",
                  context->engine_ops->name, "device", engine.device, "kernel", engine.kernel);
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    json_decref(json);
    if (!text)
        return respond_text(connection, MHD_HTTP_INTERNAL_SERVER_ERROR, "out of memory\n");
    return respond(connection, MHD_HTTP_OK, "application/json", text, strlen(text),
                   MHD_RESPMEM_MUST_FREE);
}

static const struct route {
    const char *path;
    enum MHD_Result (*answer)(struct http *http, struct MHD_Connection *connection);
} routes[] = {
    {"/metrics", answer_metrics},
    {"/livez", answer_live},
    {"/readyz", answer_ready},
    {"/buildinfo", answer_build},
};

// Called once the headers are here. Answering now, before any body, makes MHD close the connection
// without reading one.
static enum MHD_Result answer(void *argument, struct MHD_Connection *connection, const char *path,
                              const char *method, const char *version, const char *body,
                              size_t *body_bytes, // NOLINT(readability-*): MHD's signature
                              void **state)
{
    (void)version, (void)body, (void)body_bytes, (void)state;
    if (strcmp(method, MHD_HTTP_METHOD_GET) != 0 && strcmp(method, MHD_HTTP_METHOD_HEAD) != 0)
        return respond_text(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET and HEAD\n");
    for (size_t i = 0; i < ARRAY_LEN(routes); i++)
        if (strcmp(path, routes[i].path) == 0)
            return routes[i].answer(argument, connection);
    return respond_text(connection, MHD_HTTP_NOT_FOUND,
                        "there are /metrics, /livez, /readyz and /buildinfo\n");
}

// No path of ours has anything to unescape, and "%00" must not end one.
static size_t leave_escaped(void *unused, struct MHD_Connection *connection, char *text)
{
    (void)unused, (void)connection;
    return strlen(text);
}

// ---- connections

static void on_connection(void *argument, struct MHD_Connection *handle, void **state,
                          enum MHD_ConnectionNotificationCode code)
{
    struct http *http = argument;
    struct connection *connection = *state;
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *info =
            MHD_get_connection_info(handle, MHD_CONNECTION_INFO_CONNECTION_FD);
        connection = calloc(1, sizeof *connection);
        if (!connection) {
            shutdown(info->connect_fd, SHUT_RDWR);
            return;
        }
        connection->fd = info->connect_fd;
        connection->started_ns = now_ns();
        connection->next = http->live;
        if (connection->next)
            connection->next->previous = connection;
        http->live = connection;
        *state = connection;
        return;
    }
    if (!connection)
        return;
    // MHD closes its descriptor; the listener, who has a duplicate, must hear of the end.
    shutdown(connection->fd, SHUT_RDWR);
    if (connection->previous)
        connection->previous->next = connection->next;
    else
        http->live = connection->next;
    if (connection->next)
        connection->next->previous = connection->previous;
    free(connection);
    *state = NULL;
}

// ---- the loop

static void on_again(uv_timer_t *timer);

static void run(struct http *http)
{
    MHD_run(http->daemon);
    MHD_UNSIGNED_LONG_LONG wait_ms;
    if (MHD_get_timeout(http->daemon, &wait_ms) == MHD_YES)
        uv_timer_start(&http->again, on_again, wait_ms, 0);
    else
        uv_timer_stop(&http->again);
}

static void on_again(uv_timer_t *timer)
{
    run(CONTAINER_OF(timer, struct http, again));
}

static void on_readable(uv_poll_t *poll, int status, int events)
{
    (void)status, (void)events;
    run(CONTAINER_OF(poll, struct http, readable));
}

static void on_sweep(uv_timer_t *timer)
{
    struct http *http = CONTAINER_OF(timer, struct http, sweep);
    uint64_t now = now_ns(), limit_ns = (uint64_t)http->options.timeout_ms * 1000000u;
    for (struct connection *connection = http->live; connection; connection = connection->next)
        if (now - connection->started_ns > limit_ns)
            shutdown(connection->fd, SHUT_RDWR); // MHD finds it closed
    if (!http->live)
        uv_timer_stop(timer);
}

void http_take(void *argument, const struct listener_taken *taken)
{
    struct http *http = argument;
    int fd = taken->fd;
    struct sockaddr_storage address = {0};
    socklen_t bytes = sizeof address;
    if (getpeername(fd, (struct sockaddr *)&address, &bytes) != 0) {
        close(fd); // gone already
        return;
    }
    // It closes the socket itself if it fails, but the listener has a duplicate.
    if (MHD_add_connection(http->daemon, fd, (struct sockaddr *)&address, bytes) != MHD_YES) {
        listener_end_connection(http->options.context->http_listener, fd);
        return;
    }
    if (!uv_is_active((uv_handle_t *)&http->sweep))
        uv_timer_start(&http->sweep, on_sweep, SWEEP_MS, SWEEP_MS);
    run(http);
}

// ---- create, destroy

PRINTF_LIKE(2, 0) static void on_log(void *unused, const char *format, va_list args)
{
    (void)unused;
    char text[256];
    vsnprintf(text, sizeof text, format, args);
    text[strcspn(text, "\n")] = '\0';
    LOG(DEBUG, "http", LOG_STR("text", text));
}

enum status http_create(const struct http_options *options, struct http **out, struct error *err)
{
    struct http *http = calloc(1, sizeof *http);
    if (!http)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the HTTP server");
    http->options = *options;
    unsigned timeout_s = (options->timeout_ms + 999) / 1000;
    http->daemon =
        MHD_start_daemon(MHD_USE_EPOLL | MHD_USE_NO_LISTEN_SOCKET | MHD_USE_ERROR_LOG, 0, NULL,
                         NULL, answer, http, MHD_OPTION_UNESCAPE_CALLBACK, leave_escaped, NULL, //
                         MHD_OPTION_EXTERNAL_LOGGER, on_log, NULL,                              //
                         MHD_OPTION_CONNECTION_LIMIT, options->connections_max,                 //
                         MHD_OPTION_CONNECTION_TIMEOUT, timeout_s,                              //
                         MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HEADER_BYTES_MAX,          //
                         MHD_OPTION_NOTIFY_CONNECTION, on_connection, http,                     //
                         MHD_OPTION_STRICT_FOR_CLIENT, 1,                                       //
                         MHD_OPTION_END);
    const union MHD_DaemonInfo *info =
        http->daemon ? MHD_get_daemon_info(http->daemon, MHD_DAEMON_INFO_EPOLL_FD) : NULL;
    if (!info || uv_poll_init(options->loop, &http->readable, info->epoll_fd) != 0) {
        if (http->daemon)
            MHD_stop_daemon(http->daemon);
        free(http);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "the HTTP server cannot be started");
    }
    uv_timer_init(options->loop, &http->again);
    uv_timer_init(options->loop, &http->sweep);
    uv_poll_start(&http->readable, UV_READABLE, on_readable);
    *out = http;
    return STATUS_OK;
}

void http_stop(struct http *http)
{
    uv_timer_stop(&http->again);
    uv_timer_stop(&http->sweep);
    uv_poll_stop(&http->readable); // before its descriptor is closed
    MHD_stop_daemon(http->daemon);
}

void http_destroy(struct http *http)
{
    free(http);
}
