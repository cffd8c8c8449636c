// The HTTP admin interface, for those who look on: libmicrohttpd on the main loop.
//
//     GET /metrics    Prometheus's text, or OpenMetrics if the caller accepts that
//     GET /livez      200 as long as the process turns its loop
//     GET /readyz     200, or 503 and why not: draining, or the device is lost
//     GET /buildinfo  JSON: version, engine, device, kernel
//
// Nothing here changes anything. Connections come from a listener (listener.h), which counts and
// limits them; requests are limited in method and size, and a connection in time, whether its owner
// is slow or hostile. It answers on while the daemon drains.
#pragma once

#include <uv.h>

#include "listener.h"
#include "status.h"

struct http;
struct service_context;

struct http_options {
    uv_loop_t *loop;
    struct service_context *context;
    uint32_t connections_max;
    uint32_t timeout_ms; // from a connection's start to its end
};

NODISCARD enum status http_create(const struct http_options *options, struct http **http,
                                  struct error *err);
// Takes a connected socket; a listener's `take`.
void http_take(void *http, const struct listener_taken *taken);
// Ends all connections, before the loop runs for the last time; destroy comes after it.
void http_stop(struct http *http);
void http_destroy(struct http *http);
