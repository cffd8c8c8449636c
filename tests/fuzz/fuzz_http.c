// Fuzzes the HTTP admin interface of a daemon that runs: an input is one byte that says how it is
// sent, and the bytes of a connection.
//
// Besides not crashing: what comes back is HTTP, sockets are closed, and others are answered beside it.
#include "tests/fuzz/daemon_site.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SILENT_MS = 4, CHECK_EVERY = 128 };

static size_t talk(const uint8_t *bytes, size_t n, uint8_t how, uint8_t *reply, size_t reply_bytes)
{
    size_t received = 0;
    int fd = site_connect("http.sock");
    bool whole = site_send(fd, bytes, n, how & 1 ? 1 + how / 8 : 65536);
    if (how & 2 && whole)
        shutdown(fd, SHUT_WR);
    if (!(how & 4))
        site_receive(fd, SILENT_MS, reply, reply_bytes, &received);
    close(fd);
    return received;
}

static void check_others(void)
{
    static const char request[] = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n";
    static const char expected[] = "HTTP/1.1 200 OK\r\n";
    uint8_t reply[1024];
    size_t received;
    int fd = site_connect("http.sock");
    ASSERT(site_send(fd, (const uint8_t *)request, strlen(request), 65536));
    bool ended = site_receive(fd, SITE_PATIENCE_MS, reply, sizeof reply, &received);
    ASSERT(ended && received > strlen(expected));
    ASSERT(memcmp(reply, expected, strlen(expected)) == 0);
    close(fd);
    site_check_sockets();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (site.inputs == 0)
        site_start();
    if (site.inputs++ % CHECK_EVERY == 0)
        check_others();
    if (size < 2)
        return 0;
    uint8_t reply[64];
    size_t received = talk(data + 1, size - 1, data[0], reply, sizeof reply);
    ASSERT(received == 0 || (received >= 12 && memcmp(reply, "HTTP/1.", 7) == 0));
    return 0;
}
