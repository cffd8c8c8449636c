#include "backlog.h"

#include <grpc/grpc.h>
#include <grpc/support/alloc.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"

enum { NUMBERS_TRIED = 16 }; // whatever else gRPC makes takes numbers, too

// The number behind `key` in gRPC's text, where it is text itself; those that are 0 are left out. Without
// a parser, which would need memory fifty times a second.
static uint64_t number(const char *text, const char *key)
{
    const char *found = text ? strstr(text, key) : NULL;
    return found ? strtoull(found + strlen(key), NULL, 10) : 0;
}

uint64_t backlog_calls_started(void)
{
    char *servers = grpc_channelz_get_servers(0);
    uint64_t started = number(servers, "\"callsStarted\":\"");
    gpr_free(servers);
    return started;
}

int64_t backlog_find_socket(int64_t last, int fd)
{
    for (int64_t id = last + NUMBERS_TRIED; id > 0 && id > last - NUMBERS_TRIED; id--) {
        char *text = grpc_channelz_get_socket(id);
        const char *name = text ? strstr(text, "\"name\":\"") : NULL;
        const char *named = name ? strstr(name, "fd:") : NULL; // as who comes by a socket of ours
        bool found = named && strtol(named + 3, NULL, 10) == fd;
        gpr_free(text);
        if (found)
            return id;
    }
    return 0;
}

uint64_t backlog_streams_started(int64_t socket)
{
    char *text = socket ? grpc_channelz_get_socket(socket) : NULL;
    uint64_t started = number(text, "\"streamsStarted\":\"");
    gpr_free(text);
    return started;
}
