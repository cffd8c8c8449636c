#include "backlog.h"

#include <grpc/grpc.h>
#include <grpc/support/alloc.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"

enum { NUMBERS_TRIED = 16 }; // whatever else gRPC makes takes numbers, too

// Takes gRPC's text; NULL: none, or not to be read.
static json_t *parse(char *text)
{
    if (!text)
        return NULL;
    json_t *json = json_loads(text, 0, NULL);
    gpr_free(text);
    return json;
}

// Numbers of 64 bits are text, and those that are 0 are left out.
static uint64_t number(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? strtoull(text, NULL, 10) : 0;
}

uint64_t backlog_calls_started(void)
{
    json_t *servers = parse(grpc_channelz_get_servers(0));
    const json_t *server = json_array_get(json_object_get(servers, "server"), 0);
    uint64_t started = number(json_object_get(server, "data"), "callsStarted");
    json_decref(servers);
    return started;
}

int64_t backlog_find_socket(int64_t last, int fd)
{
    for (int64_t id = last + 1; id <= last + NUMBERS_TRIED; id++) {
        json_t *json = parse(grpc_channelz_get_socket(id));
        const json_t *ref = json_object_get(json_object_get(json, "socket"), "ref");
        const char *name = json_string_value(json_object_get(ref, "name"));
        const char *named = name ? strstr(name, "fd:") : NULL; // as who comes by a socket of ours
        bool found = named && strtol(named + 3, NULL, 10) == fd;
        json_decref(json);
        if (found)
            return id;
    }
    return 0;
}

uint64_t backlog_streams_started(int64_t socket)
{
    json_t *json = socket ? parse(grpc_channelz_get_socket(socket)) : NULL;
    const json_t *data = json_object_get(json_object_get(json, "socket"), "data");
    uint64_t started = number(data, "streamsStarted");
    json_decref(json);
    return started;
}
