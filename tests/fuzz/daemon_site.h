// The whole daemon in the fuzzer's process, as main.c runs it, on sockets in a directory of its own:
// one small weight, whose numbers nobody computes. It outlives every input.
#pragma once

#include <check.h>
#include <dirent.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "client/checkpoint.h"
#include "server/daemon.h"
#include "tests/folder.h"

enum { SITE_PATIENCE_MS = 5000 };

static struct {
    char directory[64];
    struct config config;
    pthread_t thread;
    uint64_t inputs;
    int sockets; // open, with no connection
} site;

static void *site_serve(void *unused)
{
    enum daemon_exit code = daemon_run(&site.config, NULL);
    fprintf(stderr, "the daemon has ended with %d\n", (int)code);
    abort();
    return unused;
}

static void site_write_checkpoint(void)
{
    struct error err;
    struct checkpoint_options checkpoint;
    ASSERT(checkpoint_options_init(&checkpoint, "v4-flash", &err) == STATUS_OK);
    checkpoint.directory = site.directory;
    checkpoint.layers = checkpoint.shards = 1;
    checkpoint.format.groups = 4;
    checkpoint.format.output_dim = 128;
    checkpoint.format.reduced_dim = 512;
    ASSERT(checkpoint_write(&checkpoint, &err) == STATUS_OK);
}

static void site_configure(void)
{
    char text[1024];
    struct error err = {.text = ""};
    int bytes = snprintf(text, sizeof text,
                         "{\"listen\": [\"unix:%s/grpc.sock\"], \"http_listen\": "
                         "\"unix:%s/http.sock\", \"engine\": \"null\", \"rpc_threads\": 1, "
                         "\"weights_roots\": [\"%s\"], \"weights\": [{\"path\": \"%s\", "
                         "\"output_dim\": 128}], \"ropes\": [{\"weights\": \"*\", \"theta\": "
                         "10000}], \"batch_tokens_max\": 64, \"request_tokens_max\": 256, "
                         "\"self_test_at_start\": false, \"log_level\": \"error\"}",
                         site.directory, site.directory, site.directory, site.directory);
    enum status status = config_parse(&site.config, text, (size_t)bytes, &err);
    if (status != STATUS_OK)
        fprintf(stderr, "%s: %s\n", err.field, err.text);
    ASSERT(status == STATUS_OK);
    log_configure(site.config.log_level, site.config.log_format);
}

static void site_remove(void)
{
    nftw(site.directory, folder_remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

// -1: it could not be had.
static int site_try_connect(const char *socket_name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", site.directory, socket_name);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ASSERT(fd >= 0);
    if (connect(fd, (const struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    close(fd);
    return -1;
}

static int site_connect(const char *socket_name)
{
    int fd = -1;
    for (int ms = 0; fd < 0 && ms < SITE_PATIENCE_MS; ms++) {
        fd = site_try_connect(socket_name);
        if (fd < 0)
            usleep(1000);
    }
    ASSERT(fd >= 0 && "the daemon takes no connection");
    return fd;
}

// Sockets alone: libFuzzer opens files of its own.
static int site_sockets(void)
{
    int n = 0;
    char target[16];
    DIR *directory = opendir("/proc/self/fd");
    ASSERT(directory);
    for (const struct dirent *entry; (entry = readdir(directory));)
        n += readlinkat(dirfd(directory), entry->d_name, target, sizeof target) > 7 &&
             memcmp(target, "socket:", 7) == 0;
    closedir(directory);
    return n;
}

static void site_start(void)
{
    snprintf(site.directory, sizeof site.directory, "/tmp/fuzz_site.XXXXXX");
    ASSERT(mkdtemp(site.directory));
    atexit(site_remove);
    signal(SIGPIPE, SIG_IGN);
    site_write_checkpoint();
    site_configure();
    ASSERT(pthread_create(&site.thread, NULL, site_serve, NULL) == 0);
    close(site_connect("grpc.sock"));
    close(site_connect("http.sock"));
    usleep(100000);
    site.sockets = site_sockets();
}

// Writes as much as the peer takes, in pieces of so many bytes. False: it has hung up.
static bool site_send(int fd, const uint8_t *bytes, size_t n, size_t piece)
{
    while (n > 0) {
        struct pollfd writable = {.fd = fd, .events = POLLOUT};
        if (poll(&writable, 1, 100) != 1 || (writable.revents & (POLLERR | POLLHUP)))
            return false; // it reads no more, since it has replies that nobody has read
        ssize_t sent = send(fd, bytes, n < piece ? n : piece, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent <= 0)
            return false;
        bytes += sent;
        n -= (size_t)sent;
    }
    return true;
}

// Reads until the peer hangs up (true), or is silent for so long. At most `n` bytes are kept.
static bool site_receive(int fd, int silent_ms, uint8_t *bytes, size_t n, size_t *received)
{
    static uint8_t dropped[65536];
    *received = 0;
    for (;;) {
        struct pollfd readable = {.fd = fd, .events = POLLIN};
        if (poll(&readable, 1, silent_ms) != 1)
            return false;
        bool keep = *received < n;
        ssize_t got = recv(fd, keep ? bytes + *received : dropped,
                           keep ? n - *received : sizeof dropped, MSG_DONTWAIT);
        if (got <= 0)
            return true;
        if (keep)
            *received += (size_t)got;
    }
}

// Connections that have ended have left nothing open.
static void site_check_sockets(void)
{
    int sockets = 0;
    for (int ms = 0; ms < SITE_PATIENCE_MS; ms++) {
        sockets = site_sockets();
        if (sockets <= site.sockets)
            return;
        usleep(1000);
    }
    fprintf(stderr, "%d sockets are open, %d were\n", sockets, site.sockets);
    abort();
}
