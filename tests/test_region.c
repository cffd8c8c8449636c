// region.c and sharing.c: which files are taken as shared memory, how they are found and let go of,
// and a control socket whose callers are hostile: files of every wrong kind, descriptors by the
// dozen, requests byte by byte or never whole, connections cut at every moment.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/einsum_shared.h"
#include "folder.h"
#include "server/sharing.h"

enum {
    PAGE_BYTES = 4096,
    BYTES = 4 * PAGE_BYTES,
    REGIONS_MAX = 3,
    REGION_BYTES_MAX = 8 * PAGE_BYTES,
    BYTES_MAX = 10 * PAGE_BYTES,
    CONNECTIONS_MAX = 4,
    CONNECTION_REGIONS_MAX = 2,
    SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL,
};

static int memory_file(uint64_t bytes, int seals)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, (off_t)bytes), 0);
    if (seals)
        ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

// ---- an engine that counts

static _Atomic int registered, refuse_next;

static enum status count_register(struct engine *engine, void *memory, uint64_t bytes,
                                  struct error *err)
{
    (void)engine;
    ASSERT(memory && bytes > 0);
    if (atomic_exchange(&refuse_next, 0))
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "the device takes no more");
    atomic_fetch_add(&registered, 1);
    return STATUS_OK;
}

static void count_unregister(struct engine *engine, void *memory, uint64_t bytes)
{
    (void)engine;
    (void)memory;
    (void)bytes;
    atomic_fetch_sub(&registered, 1);
}

static const struct engine_ops counting = {
    .name = "counting",
    .memory_register = count_register,
    .memory_unregister = count_unregister,
};
static const struct engine_ops copying = {.name = "copying"};

static struct regions *make_regions(const struct engine_ops *ops)
{
    struct regions *regions;
    const struct regions_options options = {
        .ops = ops,
        .regions_max = REGIONS_MAX,
        .region_bytes_max = REGION_BYTES_MAX,
        .bytes_max = BYTES_MAX,
    };
    ck_assert_int_eq(regions_create(&options, &regions, NULL), STATUS_OK);
    return regions;
}

static struct region *add(struct regions *regions, uint64_t bytes)
{
    int fd = memory_file(bytes, SEALS);
    struct region *region;
    struct error err;
    ck_assert_msg(regions_add(regions, fd, bytes, &region, &err) == STATUS_OK, "%s", err.text);
    close(fd);
    return region;
}

static void refuse(struct regions *regions, int fd, uint64_t bytes, enum status status,
                   const char *text)
{
    struct region *region;
    struct error err;
    ck_assert_int_eq(regions_add(regions, fd, bytes, &region, &err), status);
    ck_assert_msg(strstr(err.text, text) != NULL, "\"%s\" lacks \"%s\"", err.text, text);
    ck_assert_uint_eq(regions_stats(regions).regions, 0);
    ck_assert_uint_eq(regions_stats(regions).bytes, 0);
}

// ---- files

START_TEST(a_file_is_mapped_and_shared)
{
    struct regions *regions = make_regions(&counting);
    int fd = memory_file(BYTES, SEALS);
    struct region *region;
    ck_assert_int_eq(regions_add(regions, fd, BYTES, &region, NULL), STATUS_OK);
    uint8_t *ours = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(ours, MAP_FAILED);
    ours[BYTES - 1] = 42;
    ck_assert_uint_eq(region->memory[BYTES - 1], 42);
    region->memory[0] = 43;
    ck_assert_uint_eq(ours[0], 43);
    ck_assert(region->direct);
    ck_assert_int_eq(registered, 1);
    // Its seals hold for everybody: what is mapped stays.
    ck_assert_int_ne(ftruncate(fd, PAGE_BYTES), 0);
    regions_remove(regions, region);
    regions_collect(regions);
    ck_assert_int_eq(registered, 0);
    munmap(ours, BYTES);
    close(fd);
    regions_destroy(regions);
}
END_TEST

START_TEST(files_that_could_shrink_are_refused)
{
    static const int seals[] = {0, F_SEAL_SHRINK, F_SEAL_SHRINK | F_SEAL_GROW,
                                F_SEAL_GROW | F_SEAL_SEAL, F_SEAL_SEAL};
    struct regions *regions = make_regions(&counting);
    for (size_t i = 0; i < ARRAY_LEN(seals); i++) {
        int fd = memory_file(BYTES, seals[i]);
        refuse(regions, fd, BYTES, STATUS_FAILED_PRECONDITION, "expected the seals");
        close(fd);
    }
    int unsealable = memfd_create("test", MFD_CLOEXEC);
    ck_assert_int_eq(ftruncate(unsealable, BYTES), 0);
    refuse(regions, unsealable, BYTES, STATUS_FAILED_PRECONDITION, "expected the seals");
    close(unsealable);
    regions_destroy(regions);
}
END_TEST

START_TEST(files_of_other_kinds_are_refused)
{
    struct regions *regions = make_regions(&counting);
    char directory[64], path[96];
    folder_make(directory, sizeof directory, "test_region");
    snprintf(path, sizeof path, "%s/file", directory);
    int pipe_ends[2], sockets[2];
    ck_assert_int_eq(pipe2(pipe_ends, O_CLOEXEC), 0);
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
    int others[] = {
        open(path, O_RDWR | O_CREAT, 0600),
        open(directory, O_RDONLY),
        open("/dev/zero", O_RDWR),
        pipe_ends[0],
        sockets[0],
        -1,
    };
    ck_assert_int_eq(ftruncate(others[0], BYTES), 0);
    // On a tmpfs the kernel knows seals of the first, and that it has none of ours.
    bool on_tmpfs = fcntl(others[0], F_GET_SEALS) >= 0;
    for (size_t i = 0; i < ARRAY_LEN(others); i++)
        refuse(regions, others[i], BYTES, STATUS_FAILED_PRECONDITION,
               i == 0 && on_tmpfs ? "expected the seals" : "not a memory file");
    // Huge pages can be sealed all the same. Where there are none, the file cannot be made.
    int huge = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB);
    if (huge >= 0 && ftruncate(huge, 2 << 20) == 0 && fcntl(huge, F_ADD_SEALS, SEALS) == 0)
        refuse(regions, huge, 2 << 20, STATUS_FAILED_PRECONDITION, "not a memory file");
    // One that nobody may write to.
    int read_only = memory_file(BYTES, SEALS & ~F_SEAL_SEAL);
    ck_assert_int_eq(fcntl(read_only, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SEAL), 0);
    refuse(regions, read_only, BYTES, STATUS_FAILED_PRECONDITION, "cannot be mapped to write");
    close(read_only);
    read_only = memory_file(BYTES, SEALS);
    snprintf(path, sizeof path, "/proc/self/fd/%d", read_only);
    int opened_to_read = open(path, O_RDONLY);
    ck_assert_int_ge(opened_to_read, 0);
    refuse(regions, opened_to_read, BYTES, STATUS_FAILED_PRECONDITION, "cannot be mapped to write");
    folder_remove(directory);
    regions_destroy(regions);
}
END_TEST

START_TEST(sizes_must_be_true_and_within_limits)
{
    struct regions *regions = make_regions(&counting);
    int fd = memory_file(BYTES, SEALS), odd = memory_file(BYTES + 1, SEALS);
    int empty = memory_file(0, SEALS), large = memory_file(REGION_BYTES_MAX + PAGE_BYTES, SEALS);
    refuse(regions, fd, BYTES - PAGE_BYTES, STATUS_INVALID_ARGUMENT, "for a file of 16384");
    refuse(regions, fd, BYTES + PAGE_BYTES, STATUS_INVALID_ARGUMENT, "for a file of 16384");
    refuse(regions, fd, UINT64_MAX, STATUS_INVALID_ARGUMENT, "for a file of 16384");
    refuse(regions, odd, BYTES + 1, STATUS_INVALID_ARGUMENT, "in whole pages");
    refuse(regions, empty, 0, STATUS_INVALID_ARGUMENT, "in whole pages");
    refuse(regions, large, REGION_BYTES_MAX + PAGE_BYTES, STATUS_RESOURCE_EXHAUSTED,
           "shared_region_bytes_max");
    close(fd), close(odd), close(empty), close(large);
    regions_destroy(regions);
}
END_TEST

// Served all the same, by copies.
START_TEST(what_the_engine_cannot_reach_is_mapped_alone)
{
    struct regions *regions = make_regions(&counting);
    atomic_store(&refuse_next, 1);
    struct region *region = add(regions, BYTES);
    ck_assert(!region->direct && !region->staged);
    region->memory[BYTES - 1] = 42;
    ck_assert_int_eq(registered, 0);
    regions_remove(regions, region);
    regions_collect(regions);
    ck_assert_int_eq(registered, 0); // nor unregistered
    regions_destroy(regions);

    struct engine_ops staging = counting;
    staging.stages = true;
    regions = make_regions(&staging);
    region = add(regions, BYTES);
    ck_assert(region->direct && region->staged && !region->on_device);
    regions_remove(regions, region);
    regions_destroy(regions);
}
END_TEST

START_TEST(limits_of_all_count_what_is_still_used)
{
    struct regions *regions = make_regions(&counting);
    struct region *first = add(regions, 8 * PAGE_BYTES), *other;
    struct error err;
    int fd = memory_file(BYTES, SEALS);
    ck_assert_int_eq(regions_add(regions, fd, BYTES, &other, &err), STATUS_RESOURCE_EXHAUSTED);
    ck_assert_msg(strstr(err.text, "shared_bytes_max") != NULL, "%s", err.text);

    region_ref(first); // a job's
    regions_remove(regions, first);
    regions_collect(regions);
    ck_assert_int_eq(regions_add(regions, fd, BYTES, &other, &err), STATUS_RESOURCE_EXHAUSTED);
    first->memory[0] = 1; // still there
    region_unref(first);
    regions_collect(regions);
    ck_assert_int_eq(regions_add(regions, fd, BYTES, &other, &err), STATUS_OK);
    close(fd);

    struct region *more[REGIONS_MAX - 1];
    for (size_t i = 0; i < ARRAY_LEN(more); i++)
        more[i] = add(regions, PAGE_BYTES);
    fd = memory_file(PAGE_BYTES, SEALS);
    struct region *none;
    ck_assert_int_eq(regions_add(regions, fd, PAGE_BYTES, &none, &err), STATUS_RESOURCE_EXHAUSTED);
    ck_assert_msg(strstr(err.text, "shared_regions_max") != NULL, "%s", err.text);
    close(fd);
    regions_remove(regions, other);
    for (size_t i = 0; i < ARRAY_LEN(more); i++)
        regions_remove(regions, more[i]);
    regions_destroy(regions);
    ck_assert_int_eq(registered, 0);
}
END_TEST

START_TEST(only_the_right_name_finds_a_region)
{
    struct regions *regions = make_regions(&copying);
    struct region *region = add(regions, BYTES), *other = add(regions, BYTES);
    ck_assert(!region->direct);
    ck_assert_mem_ne(region->name + 4, other->name + 4, REGION_NAME_BYTES - 4);
    ck_assert_ptr_eq(region_find(regions, region->name), region);
    region_unref(region);
    for (size_t bit = 0; bit < 8 * REGION_NAME_BYTES; bit++) {
        uint8_t name[REGION_NAME_BYTES];
        memcpy(name, region->name, sizeof name);
        name[bit / 8] ^= (uint8_t)(1u << bit % 8);
        ck_assert_ptr_null(region_find(regions, name));
    }
    uint8_t name[REGION_NAME_BYTES];
    memcpy(name, region->name, sizeof name);
    regions_remove(regions, region);
    ck_assert_ptr_null(region_find(regions, name));
    regions_remove(regions, other);
    regions_destroy(regions);
}
END_TEST

START_TEST(places_are_checked_without_overflow)
{
    struct regions *regions = make_regions(&counting);
    struct region *region = add(regions, BYTES);
    static const struct {
        uint64_t offset, bytes;
        bool good;
    } places[] = {
        {0, BYTES, true},
        {0, 0, true},
        {BYTES, 0, true},
        {BYTES - 64, 64, true},
        {0, BYTES + 1, false},
        {64, BYTES, false},
        {BYTES - 64, 65, false},
        {BYTES, 1, false},
        {BYTES + 64, 0, false},
        {64, UINT64_MAX, false},
        {64, UINT64_MAX - 63, false}, // the sum is 0
        {UINT64_MAX - 63, 64, false}, // likewise
        {UINT64_MAX - 63, UINT64_MAX, false},
        {1, 1, false},
        {63, 1, false},
    };
    for (size_t i = 0; i < ARRAY_LEN(places); i++) {
        struct error err = {0};
        enum status status =
            region_check(region, "here", places[i].offset, places[i].bytes, 64, &err);
        ck_assert_msg((status == STATUS_OK) == places[i].good, "case %zu", i);
        if (status)
            ck_assert_str_eq(err.field, "here");
    }
    regions_remove(regions, region);
    regions_destroy(regions);
}
END_TEST

// ---- the socket

static struct {
    char directory[64], address[128];
    uv_loop_t loop;
    uv_async_t stop;
    pthread_t thread;
    struct sharing *sharing;
    struct regions *regions;
} site;

static void on_stop(uv_async_t *handle)
{
    sharing_stop(site.sharing);
    sharing_drop_connections(site.sharing);
    uv_close((uv_handle_t *)handle, NULL);
    uv_stop(&site.loop);
}

static void *run_loop(void *unused)
{
    uv_run(&site.loop, UV_RUN_DEFAULT);
    return unused;
}

static void start_site(void)
{
    folder_make(site.directory, sizeof site.directory, "test_sharing");
    snprintf(site.address, sizeof site.address, "unix:%s/shared.sock", site.directory);
    ck_assert_int_eq(uv_loop_init(&site.loop), 0);
    uv_async_init(&site.loop, &site.stop, on_stop);
    const struct sharing_options options = {
        .loop = &site.loop,
        .address = site.address,
        .unix_socket_mode = 0600,
        .connections_max = CONNECTIONS_MAX,
        .connection_regions_max = CONNECTION_REGIONS_MAX,
    };
    struct error err;
    ck_assert_msg(sharing_create(&options, &site.sharing, &err) == STATUS_OK, "%s", err.text);
    const struct regions_options regions = {
        .ops = &counting,
        .regions_max = REGIONS_MAX,
        .region_bytes_max = REGION_BYTES_MAX,
        .bytes_max = BYTES_MAX,
        .on_unused = sharing_on_unused,
        .context = site.sharing,
    };
    ck_assert_int_eq(regions_create(&regions, &site.regions, &err), STATUS_OK);
    ck_assert_int_eq(sharing_start(site.sharing, site.regions, NULL, &err), STATUS_OK);
    ck_assert_int_eq(pthread_create(&site.thread, NULL, run_loop, NULL), 0);
}

static void close_handle(uv_handle_t *handle, void *unused)
{
    (void)unused;
    if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

static void stop_site(void)
{
    uv_async_send(&site.stop);
    pthread_join(site.thread, NULL);
    uv_walk(&site.loop, close_handle, NULL);
    uv_run(&site.loop, UV_RUN_DEFAULT);
    ck_assert_int_eq(uv_loop_close(&site.loop), 0);
    sharing_destroy(site.sharing);
    regions_destroy(site.regions);
    ck_assert_int_eq(registered, 0);
    folder_remove(site.directory);
}

static int connect_site(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, site.address + strlen("unix:"));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

// Sends `bytes` of a request with `fds_n` descriptors. false: the other side has closed.
static bool send_with(int socket, const void *bytes, size_t n, const int *fds, size_t fds_n)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(64 * sizeof(int))] = {0};
    struct iovec piece = {(void *)(uintptr_t)bytes, n};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    if (fds_n > 0) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(fds_n * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(fds_n * sizeof(int));
        memcpy(CMSG_DATA(header), fds, fds_n * sizeof(int));
    }
    return sendmsg(socket, &message, MSG_NOSIGNAL) == (ssize_t)n;
}

// false: the other side has closed.
static bool receive(int socket, struct einsum_shared_reply *reply)
{
    ssize_t got = recv(socket, reply, sizeof *reply, MSG_WAITALL);
    ck_assert(got == (ssize_t)sizeof *reply || got <= 0);
    if (got > 0)
        ck_assert_uint_eq(reply->magic, EINSUM_SHARED_MAGIC);
    return got > 0;
}

static struct einsum_shared_request request_of(enum einsum_shared_op op)
{
    return (struct einsum_shared_request){.magic = EINSUM_SHARED_MAGIC, .op = op, .bytes = BYTES};
}

static struct einsum_shared_reply ask(int socket, struct einsum_shared_request request, int fd)
{
    struct einsum_shared_reply reply;
    ck_assert(send_with(socket, &request, sizeof request, &fd, fd >= 0));
    ck_assert(receive(socket, &reply));
    ck_assert_uint_eq(reply.op, request.op);
    return reply;
}

static struct einsum_shared_reply register_file(int socket)
{
    int fd = memory_file(BYTES, SEALS);
    struct einsum_shared_reply reply = ask(socket, request_of(EINSUM_SHARED_REGION), fd);
    close(fd);
    return reply;
}

static bool is_found(const struct einsum_shared_reply *reply)
{
    struct region *region = region_find(site.regions, reply->name);
    if (region)
        region_unref(region);
    return region != NULL;
}

#define WAIT_FOR(condition)                                                                        \
    do {                                                                                           \
        for (int wait = 0; wait < 10000 && !(condition); wait++)                                   \
            usleep(1000);                                                                          \
        ck_assert_msg(condition, "did not come true: " #condition);                                \
    } while (0)

static bool all_gone(void)
{
    return regions_stats(site.regions).regions == 0 && registered == 0;
}

START_TEST(a_region_lives_as_long_as_its_connection)
{
    int socket = connect_site();
    struct einsum_shared_reply reply = register_file(socket);
    ck_assert_uint_eq(reply.status, STATUS_OK);
    ck_assert(is_found(&reply));
    struct region *used = region_find(site.regions, reply.name); // by a job
    close(socket);
    WAIT_FOR(!is_found(&reply));
    ck_assert_uint_eq(regions_stats(site.regions).regions, 1);
    used->memory[0] = 1;
    region_unref(used);
    WAIT_FOR(all_gone());
}
END_TEST

START_TEST(regions_are_forgotten_by_number)
{
    int socket = connect_site();
    struct einsum_shared_reply first = register_file(socket), second = register_file(socket);
    ck_assert_uint_eq(first.number, 0);
    ck_assert_uint_eq(second.number, 1);
    struct einsum_shared_reply third = register_file(socket);
    ck_assert_uint_eq(third.status, STATUS_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(third.text, "shared_connection_regions_max"));
    struct einsum_shared_request forget = request_of(EINSUM_SHARED_FORGET);
    ck_assert_uint_eq(ask(socket, forget, -1).status, STATUS_OK);
    ck_assert(!is_found(&first));
    ck_assert(is_found(&second));
    ck_assert_uint_eq(ask(socket, forget, -1).status, STATUS_NOT_FOUND);
    static const uint32_t never[] = {2, 15, 16, 17, UINT32_MAX};
    for (size_t i = 0; i < ARRAY_LEN(never); i++) {
        forget.region = never[i];
        ck_assert_uint_eq(ask(socket, forget, -1).status, STATUS_NOT_FOUND);
    }
    WAIT_FOR(regions_stats(site.regions).regions == 1);
    ck_assert_uint_eq(register_file(socket).number, 0);
    close(socket);
    WAIT_FOR(all_gone());
}
END_TEST

START_TEST(what_cannot_be_shared_is_refused_with_its_reason)
{
    int socket = connect_site();
    struct einsum_shared_reply reply = ask(socket, request_of(EINSUM_SHARED_REGION), -1);
    ck_assert_uint_eq(reply.status, STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(reply.field, "fd");
    int unsealed = memory_file(BYTES, 0), zero = open("/dev/zero", O_RDWR);
    reply = ask(socket, request_of(EINSUM_SHARED_REGION), unsealed);
    ck_assert_uint_eq(reply.status, STATUS_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(reply.text, "F_SEAL_SHRINK"));
    ck_assert_uint_eq(ask(socket, request_of(EINSUM_SHARED_REGION), zero).status,
                      STATUS_FAILED_PRECONDITION);
    ck_assert_uint_eq(ask(socket, request_of((enum einsum_shared_op)99), -1).status,
                      STATUS_UNIMPLEMENTED);
    ck_assert_uint_eq(register_file(socket).status, STATUS_OK); // none of it did harm
    close(socket), close(unsealed), close(zero);
    WAIT_FOR(all_gone());
}
END_TEST

START_TEST(requests_may_come_byte_by_byte)
{
    int socket = connect_site(), fd = memory_file(BYTES, SEALS);
    struct einsum_shared_request request = request_of(EINSUM_SHARED_REGION);
    const char *bytes = (const char *)&request;
    struct einsum_shared_reply reply;
    for (size_t i = 0; i < sizeof request; i++) // the descriptor with one in the middle
        ck_assert(send_with(socket, bytes + i, 1, &fd, i == 100));
    ck_assert(receive(socket, &reply));
    ck_assert_uint_eq(reply.status, STATUS_OK);
    // Two at once, of which the second waits for the first.
    struct einsum_shared_request both[2] = {request_of(EINSUM_SHARED_FORGET),
                                            request_of(EINSUM_SHARED_FORGET)};
    ck_assert(send_with(socket, both, sizeof both, NULL, 0));
    ck_assert(receive(socket, &reply));
    ck_assert_uint_eq(reply.status, STATUS_OK);
    ck_assert(receive(socket, &reply));
    ck_assert_uint_eq(reply.status, STATUS_NOT_FOUND);
    close(socket), close(fd);
    WAIT_FOR(all_gone());
}
END_TEST

static size_t open_fds(void)
{
    size_t n = 0;
    for (int fd = 0; fd < 1024; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

START_TEST(descriptors_beyond_the_first_end_the_connection)
{
    size_t before = open_fds();
    static const size_t counts[] = {2, 4, 5, 64};
    for (size_t i = 0; i < ARRAY_LEN(counts); i++) {
        int socket = connect_site(), fds[64];
        for (size_t f = 0; f < counts[i]; f++)
            fds[f] = memory_file(BYTES, SEALS);
        struct einsum_shared_request request = request_of(EINSUM_SHARED_REGION);
        struct einsum_shared_reply reply;
        ck_assert(send_with(socket, &request, sizeof request, fds, counts[i]));
        ck_assert(receive(socket, &reply));
        ck_assert_uint_eq(reply.status, STATUS_INVALID_ARGUMENT);
        ck_assert_str_eq(reply.field, "fd");
        ck_assert(!receive(socket, &reply));
        close(socket);
        for (size_t f = 0; f < counts[i]; f++)
            close(fds[f]);
    }
    // One with each byte of a request, which never becomes whole.
    int socket = connect_site(), fd = memory_file(BYTES, SEALS);
    for (size_t i = 0; i < 100; i++)
        ck_assert(send_with(socket, "x", 1, &fd, 1));
    close(socket), close(fd);
    WAIT_FOR(open_fds() == before);
    WAIT_FOR(all_gone());
}
END_TEST

START_TEST(another_protocol_ends_the_connection)
{
    int socket = connect_site();
    char http[sizeof(struct einsum_shared_request)] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    struct einsum_shared_reply reply;
    ck_assert(send_with(socket, http, sizeof http, NULL, 0));
    ck_assert(receive(socket, &reply));
    ck_assert_uint_eq(reply.status, STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(reply.field, "magic");
    ck_assert(!receive(socket, &reply));
    close(socket);
}
END_TEST

START_TEST(who_does_not_read_replies_is_cut_off)
{
    int socket = connect_site();
    struct einsum_shared_request forget = request_of(EINSUM_SHARED_FORGET);
    size_t sent = 0;
    while (sent < 100000 && send_with(socket, &forget, sizeof forget, NULL, 0))
        sent++;
    ck_assert_uint_lt(sent, 100000);
    close(socket);
    WAIT_FOR(sharing_stats(site.sharing).connections == 0);
}
END_TEST

START_TEST(connections_are_limited)
{
    int sockets[CONNECTIONS_MAX];
    for (size_t i = 0; i < CONNECTIONS_MAX; i++) {
        sockets[i] = connect_site();
        ck_assert_uint_eq(ask(sockets[i], request_of(EINSUM_SHARED_FORGET), -1).status,
                          STATUS_NOT_FOUND);
    }
    int late = connect_site();
    struct einsum_shared_reply reply;
    ck_assert(!receive(late, &reply));
    ck_assert_uint_eq(sharing_stats(site.sharing).connections_refused, 1);
    close(late);
    close(sockets[0]);
    WAIT_FOR(sharing_stats(site.sharing).connections == CONNECTIONS_MAX - 1);
    late = connect_site();
    ck_assert_uint_eq(register_file(late).status, STATUS_OK);
    close(late);
    for (size_t i = 1; i < CONNECTIONS_MAX; i++)
        close(sockets[i]);
    WAIT_FOR(all_gone());
}
END_TEST

// Cut at every moment: before a request, within it, while its file is being mapped, after.
START_TEST(connections_may_end_at_any_moment)
{
    size_t before = open_fds();
    for (size_t i = 0; i < 200; i++) {
        WAIT_FOR(sharing_stats(site.sharing).connections < CONNECTIONS_MAX);
        int socket = connect_site(), fd = memory_file(BYTES, SEALS);
        struct einsum_shared_request request = request_of(EINSUM_SHARED_REGION);
        size_t n = i % 4 == 0 ? 1 + i % sizeof request : sizeof request;
        if (i % 4 != 3)
            send_with(socket, &request, n, &fd, 1);
        if (i % 8 == 2)
            usleep((useconds_t)(i % 100));
        close(socket), close(fd);
    }
    WAIT_FOR(open_fds() == before);
    WAIT_FOR(all_gone());
}
END_TEST

START_TEST(a_killed_caller_leaves_nothing)
{
    int told[2];
    ck_assert_int_eq(pipe(told), 0);
    pid_t caller = fork();
    if (caller == 0) {
        int socket = connect_site();
        bool registers = register_file(socket).status == STATUS_OK;
        (void)!write(told[1], &registers, 1);
        for (;;)
            pause();
    }
    bool registers = false;
    ck_assert_int_eq(read(told[0], &registers, 1), 1);
    ck_assert(registers);
    ck_assert_uint_eq(regions_stats(site.regions).regions, 1);
    kill(caller, SIGKILL);
    waitpid(caller, NULL, 0);
    WAIT_FOR(all_gone());
    close(told[0]), close(told[1]);
}
END_TEST

START_TEST(stopping_ends_what_is_connected)
{
    int socket = connect_site();
    ck_assert_uint_eq(register_file(socket).status, STATUS_OK);
    // the fixture stops it
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("region");
    TCase *files = tcase_create("files");
    tcase_add_test(files, a_file_is_mapped_and_shared);
    tcase_add_test(files, files_that_could_shrink_are_refused);
    tcase_add_test(files, files_of_other_kinds_are_refused);
    tcase_add_test(files, sizes_must_be_true_and_within_limits);
    tcase_add_test(files, what_the_engine_cannot_reach_is_mapped_alone);
    tcase_add_test(files, limits_of_all_count_what_is_still_used);
    tcase_add_test(files, only_the_right_name_finds_a_region);
    tcase_add_test(files, places_are_checked_without_overflow);
    suite_add_tcase(suite, files);
    TCase *socket = tcase_create("socket");
    tcase_set_timeout(socket, 60);
    tcase_add_checked_fixture(socket, start_site, stop_site);
    tcase_add_test(socket, a_region_lives_as_long_as_its_connection);
    tcase_add_test(socket, regions_are_forgotten_by_number);
    tcase_add_test(socket, what_cannot_be_shared_is_refused_with_its_reason);
    tcase_add_test(socket, requests_may_come_byte_by_byte);
    tcase_add_test(socket, descriptors_beyond_the_first_end_the_connection);
    tcase_add_test(socket, another_protocol_ends_the_connection);
    tcase_add_test(socket, who_does_not_read_replies_is_cut_off);
    tcase_add_test(socket, connections_are_limited);
    tcase_add_test(socket, connections_may_end_at_any_moment);
    tcase_add_test(socket, a_killed_caller_leaves_nothing);
    tcase_add_test(socket, stopping_ends_what_is_connected);
    suite_add_tcase(suite, socket);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed > 0;
}
