// Memory on the device, from a caller's handle to an answer written there, without CUDA: the engine of
// shared_site.h opens memory files in its place. The caller's own addresses cannot be touched, so that
// neither client nor daemon reads what only the device may. Spoken by hand over the control socket, too.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "client/einsum_client.h"
#include "client/einsum_shared.h"
#include "shared_site.h"

enum {
    ACTIVATION_BYTES = TOKENS_MAX * GROUPS * REDUCED_DIM,
    SCALE_BYTES = TOKENS_MAX * GROUPS * (REDUCED_DIM / 128) * 4,
    OUTPUT_BYTES = TOKENS_MAX * GROUPS * OUTPUT_DIM * 2,
    SCALES_OFFSET = ACTIVATION_BYTES,
    OUTPUT_OFFSET = SCALES_OFFSET + SCALE_BYTES,
};

// ---- a caller's memory on the device

struct exported {
    int fd;
    uint8_t *address;  // the caller's, not to be touched
    uint8_t *contents; // for the test's eyes
    uint8_t handle[EINSUM_SHARED_HANDLE_BYTES];
};

static struct exported export_memory(void)
{
    struct exported exported = {.fd = memfd_create("device", MFD_CLOEXEC)};
    ck_assert_int_eq(ftruncate(exported.fd, EXPORTED_BYTES), 0);
    exported.address = mmap(NULL, EXPORTED_BYTES, PROT_NONE, MAP_SHARED, exported.fd, 0);
    exported.contents =
        mmap(NULL, EXPORTED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, exported.fd, 0);
    ck_assert(exported.address != MAP_FAILED && exported.contents != MAP_FAILED);
    memcpy(exported.handle, &exported.fd, sizeof exported.fd);
    return exported;
}

static void unexport(struct exported *exported)
{
    munmap(exported->address, EXPORTED_BYTES);
    munmap(exported->contents, EXPORTED_BYTES);
    close(exported->fd);
}

// ---- by the client

static struct einsum_client *connect_client(enum einsum_client_transport transport)
{
    struct einsum_client_options options;
    struct einsum_client_error error;
    struct einsum_client *client;
    einsum_client_options_init(&options);
    options.shared_memory = site.address;
    options.shared_memory_bytes = 8 << 20;
    options.transport = transport;
    options.attempts_max = 2;
    options.retry_pause_ms = 5;
    options.deadline_ms = 2000;
    ck_assert_msg(einsum_client_create("unix:/nowhere/e.sock", &options, &client, &error) ==
                      EINSUM_CLIENT_OK,
                  "%s", error.text);
    return client;
}

static enum einsum_client_status import(struct einsum_client *client,
                                        const struct exported *exported, uint64_t bytes,
                                        struct einsum_client_error *error)
{
    return einsum_client_memory_import_cuda(client, exported->address, bytes, exported->handle,
                                            error);
}

static struct einsum_client_request request_of(const struct exported *exported)
{
    return (struct einsum_client_request){
        .weight = name,
        .recipe = EINSUM_CLIENT_RECIPE_1_128_128,
        .activation_layout = EINSUM_CLIENT_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_CLIENT_SCALES_TGK,
        .scale_type = EINSUM_CLIENT_SCALE_FP32,
        .output_type = EINSUM_CLIENT_OUTPUT_BF16,
        .tokens = TOKENS_MAX,
        .activations = exported->address,
        .activations_bytes = ACTIVATION_BYTES,
        .scales = exported->address + SCALES_OFFSET,
        .scales_bytes = SCALE_BYTES,
        .output = exported->address + OUTPUT_OFFSET,
        .output_bytes = OUTPUT_BYTES,
    };
}

// The engine answers with the first byte of the activations, over and over.
static enum einsum_client_status ask_for(struct einsum_client *client,
                                         const struct exported *exported, uint8_t value,
                                         struct einsum_client_error *error)
{
    struct einsum_client_request request = request_of(exported);
    struct einsum_client_response response;
    exported->contents[0] = value;
    memset(exported->contents + OUTPUT_OFFSET, ~value, OUTPUT_BYTES + 1);
    enum einsum_client_status status = einsum_client_einsum(client, &request, &response, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    for (uint32_t i = 0; i < OUTPUT_BYTES; i++)
        ck_assert_uint_eq(exported->contents[OUTPUT_OFFSET + i], value);
    ck_assert_uint_eq(exported->contents[OUTPUT_OFFSET + OUTPUT_BYTES], (uint8_t)~value);
    return status;
}

static void expect_right(struct einsum_client *client, const struct exported *exported,
                         uint8_t value)
{
    struct einsum_client_error error = {.text = ""};
    ck_assert_msg(ask_for(client, exported, value, &error) == EINSUM_CLIENT_OK, "%s: %s",
                  error.field, error.text);
}

static void expect_refused(struct einsum_client *client,
                           const struct einsum_client_request *request,
                           enum einsum_client_status status, const char *text)
{
    struct einsum_client_response response;
    struct einsum_client_error error = {.text = ""};
    ck_assert_int_eq(einsum_client_einsum(client, request, &response, &error), status);
    ck_assert_msg(strstr(error.text, text), "\"%s\" lacks \"%s\"", error.text, text);
}

static void set_up(void)
{
    start();
    atomic_store(&imported, 0);
    // A client asks for more entries than others' tests need.
    rings_destroy(site.context.rings);
    const struct rings_options rings = {
        .context = &site.context, .entries_max = 1024, .spin_us = 50, .on_broken = on_broken};
    ck_assert_int_eq(rings_create(&rings, &site.context.rings, NULL), STATUS_OK);
    site_listen();
}

static void tear_down(void)
{
    stop();
    ck_assert_int_eq(imported, 0);
}

START_TEST(a_request_on_the_device_is_copied_by_nobody)
{
    struct einsum_client *client = connect_client(EINSUM_CLIENT_TRANSPORT_RING);
    struct exported first = export_memory(), second = export_memory();
    ck_assert_int_eq(import(client, &first, EXPORTED_BYTES, NULL), EINSUM_CLIENT_OK);
    ck_assert_int_eq(import(client, &second, EXPORTED_BYTES, NULL), EINSUM_CLIENT_OK);
    for (uint8_t value = 1; value < 100; value++)
        expect_right(client, value % 2 ? &first : &second, value);
    ck_assert_uint_eq(site.context.copies.in_bytes, 0);
    ck_assert_uint_eq(site.context.copies.out_bytes, 0);
    // Gone with FORGET: when that returns, its owner may free it.
    einsum_client_memory_forget_cuda(client, first.address);
    ck_assert_int_eq(imported, 1);
    expect_right(client, &second, 7);
    ck_assert_int_eq(import(client, &first, EXPORTED_BYTES, NULL), EINSUM_CLIENT_OK);
    expect_right(client, &first, 8);
    einsum_client_destroy(client);
    WAIT_FOR(imported == 0);
    unexport(&first), unexport(&second);
}
END_TEST

START_TEST(a_client_that_connects_anew_registers_anew)
{
    struct einsum_client *client = connect_client(EINSUM_CLIENT_TRANSPORT_RING);
    struct exported exported = export_memory();
    ck_assert_int_eq(import(client, &exported, EXPORTED_BYTES, NULL), EINSUM_CLIENT_OK);
    expect_right(client, &exported, 1);
    for (uint8_t round = 2; round < 6; round++) {
        struct einsum_client_error error;
        site_stop_listening();
        ck_assert_int_eq(imported, 0);
        ck_assert_int_eq(ask_for(client, &exported, round, &error), EINSUM_CLIENT_UNAVAILABLE);
        site_listen();
        WAIT_FOR(ask_for(client, &exported, round, NULL) == EINSUM_CLIENT_OK);
        ck_assert_int_eq(imported, 1);
    }
    einsum_client_destroy(client);
    WAIT_FOR(imported == 0);
    unexport(&exported);
}
END_TEST

START_TEST(what_is_not_all_there_is_refused_unread)
{
    struct einsum_client *client = connect_client(EINSUM_CLIENT_TRANSPORT_RING);
    struct exported exported = export_memory(), other = export_memory();
    ck_assert_int_eq(import(client, &exported, EXPORTED_BYTES / 2, NULL), EINSUM_CLIENT_OK);
    ck_assert_int_eq(import(client, &other, EXPORTED_BYTES, NULL), EINSUM_CLIENT_OK);
    static uint8_t here[OUTPUT_BYTES];
    static const char text[] = "all of the request must lie there";
    const struct einsum_client_request good = request_of(&exported);
    struct einsum_client_request request = good;
    request.output = here;
    expect_refused(client, &request, EINSUM_CLIENT_INVALID_ARGUMENT, text);
    request = good;
    request.scales = here;
    expect_refused(client, &request, EINSUM_CLIENT_INVALID_ARGUMENT, text);
    request = good;
    request.activations = other.address;
    expect_refused(client, &request, EINSUM_CLIENT_INVALID_ARGUMENT, text);
    request = good;
    request.scales = exported.address + SCALES_OFFSET + 4; // at no multiple of 64
    expect_refused(client, &request, EINSUM_CLIENT_INVALID_ARGUMENT, text);
    request = good;
    request.output = exported.address + EXPORTED_BYTES / 2 - 64;
    expect_refused(client, &request, EINSUM_CLIENT_INVALID_ARGUMENT, text);
    request = good;
    request.output = NULL; // as chunks
    expect_refused(client, &request, EINSUM_CLIENT_INVALID_ARGUMENT,
                   "a blocking call needs a buffer");
    expect_right(client, &exported, 9);
    einsum_client_destroy(client);
    WAIT_FOR(imported == 0);
    unexport(&exported), unexport(&other);
}
END_TEST

START_TEST(imports_are_refused_with_their_reason)
{
    struct einsum_client *client = connect_client(EINSUM_CLIENT_TRANSPORT_RING);
    struct exported exported = export_memory();
    struct einsum_client_error error;
    ck_assert_int_eq(import(client, &exported, 0, &error), EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert_int_eq(import(client, &exported, EXPORTED_BYTES + 1, &error),
                     EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert(error.from_server);
    ck_assert_int_eq(import(client, &exported, 65 << 20, &error), EINSUM_CLIENT_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(error.text, "shared_region_bytes_max"));
    struct exported garbage = exported;
    memset(garbage.handle, 0xFF, sizeof garbage.handle);
    ck_assert_int_eq(import(client, &garbage, 4096, &error), EINSUM_CLIENT_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(error.text, "cannot be opened"));
    // The client's own memory is one of the four that a connection may have.
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(import(client, &exported, EXPORTED_BYTES, NULL), EINSUM_CLIENT_OK);
    ck_assert_int_eq(import(client, &exported, EXPORTED_BYTES, &error),
                     EINSUM_CLIENT_RESOURCE_EXHAUSTED);
    ops.memory_import = NULL;
    einsum_client_memory_forget_cuda(client, exported.address);
    ck_assert_int_eq(import(client, &exported, 4096, &error), EINSUM_CLIENT_UNIMPLEMENTED);
    ck_assert_ptr_nonnull(strstr(error.text, "the engine \"null\" takes no CUDA memory"));
    einsum_client_destroy(client);
    WAIT_FOR(imported == 0);
    unexport(&exported);

    struct einsum_client_options options;
    einsum_client_options_init(&options);
    ck_assert_int_eq(einsum_client_create("unix:/nowhere/e.sock", &options, &client, &error),
                     EINSUM_CLIENT_OK);
    ck_assert_int_eq(einsum_client_memory_import_cuda(client, &exported, 4096, &exported, &error),
                     EINSUM_CLIENT_FAILED_PRECONDITION);
    einsum_client_destroy(client);
}
END_TEST

// ---- by hand

static int connect_by_hand(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, site.address + strlen("unix:"));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static struct einsum_shared_reply tell(int socket, struct einsum_shared_request request, int fd)
{
    struct einsum_shared_reply reply;
    request.magic = EINSUM_SHARED_MAGIC;
    ck_assert(einsum_shared_send(socket, &request, sizeof request, fd, 0));
    ck_assert_int_eq(recv(socket, &reply, sizeof reply, MSG_WAITALL), sizeof reply);
    return reply;
}

static struct einsum_shared_request import_of(const struct exported *exported)
{
    struct einsum_shared_request request = {.op = EINSUM_SHARED_CUDA, .bytes = EXPORTED_BYTES};
    memcpy(request.text, exported->handle, sizeof exported->handle);
    return request;
}

// CUDA gives a process one address for it; so does this.
static void *same_for_all;
static enum status import_once(struct engine *engine, const uint8_t *handle, uint64_t bytes,
                               void **memory, struct error *err)
{
    (void)engine, (void)handle, (void)bytes, (void)err;
    atomic_fetch_add(&imported, 1);
    *memory = same_for_all;
    return STATUS_OK;
}

static void forget_once(struct engine *engine, void *memory)
{
    (void)engine;
    ck_assert_ptr_eq(memory, same_for_all);
    atomic_fetch_sub(&imported, 1);
}

START_TEST(what_is_known_is_refused_to_its_connection_alone)
{
    struct exported exported = export_memory();
    same_for_all = exported.contents;
    ops.memory_import = import_once;
    ops.memory_forget = forget_once;
    int one = connect_by_hand(), other = connect_by_hand();
    ck_assert_uint_eq(tell(one, import_of(&exported), -1).status, STATUS_OK);
    struct einsum_shared_reply again = tell(one, import_of(&exported), -1);
    ck_assert_uint_eq(again.status, STATUS_ALREADY_EXISTS);
    ck_assert_str_eq(again.field, "handle");
    ck_assert_ptr_nonnull(strstr(again.text, "as region 0"));
    ck_assert_uint_eq(tell(other, import_of(&exported), -1).status, STATUS_OK);
    WAIT_FOR(imported == 2);
    close(one);
    WAIT_FOR(imported == 1);
    close(other);
    WAIT_FOR(imported == 0);
    unexport(&exported);
}
END_TEST

static bool is_found(const struct einsum_shared_reply *reply)
{
    struct region *region = region_find(site.context.regions, reply->name);
    if (region)
        region_unref(region);
    return region != NULL;
}

START_TEST(it_stays_until_the_last_job_is_answered)
{
    struct exported exported = export_memory();
    int socket = connect_by_hand();
    struct einsum_shared_reply reply = tell(socket, import_of(&exported), -1);
    struct region *used = region_find(site.context.regions, reply.name); // by a job
    ck_assert(used->on_device && used->direct && !used->staged);
    close(socket);
    WAIT_FOR(!is_found(&reply));
    ck_assert_int_eq(imported, 1);
    region_unref(used);
    WAIT_FOR(imported == 0);
    unexport(&exported);
}
END_TEST

START_TEST(neither_ring_nor_descriptor_belongs_to_it)
{
    struct exported exported = export_memory();
    int socket = connect_by_hand(), pipes[2];
    ck_assert_int_eq(pipe(pipes), 0);
    struct einsum_shared_reply reply = tell(socket, import_of(&exported), pipes[1]);
    ck_assert_uint_eq(reply.status, STATUS_OK);
    close(pipes[1]);
    char byte;
    ck_assert_int_eq(read(pipes[0], &byte, 1), 0); // the daemon has closed its own
    reply = tell(socket,
                 (struct einsum_shared_request){
                     .op = EINSUM_SHARED_RING, .region = reply.number, .entries = 8},
                 -1);
    ck_assert_uint_eq(reply.status, STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(reply.field, "region");
    ck_assert_ptr_nonnull(strstr(reply.text, "a ring cannot lie in CUDA memory"));
    reply = tell(socket, (struct einsum_shared_request){.op = EINSUM_SHARED_CUDA}, -1);
    ck_assert_uint_eq(reply.status, STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(reply.field, "bytes");
    close(socket), close(pipes[0]);
    WAIT_FOR(imported == 0);
    unexport(&exported);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client_cuda");
    TCase *tcase = tcase_create("memory on the device");
    tcase_set_timeout(tcase, 120);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_test(tcase, a_request_on_the_device_is_copied_by_nobody);
    tcase_add_test(tcase, a_client_that_connects_anew_registers_anew);
    tcase_add_test(tcase, what_is_not_all_there_is_refused_unread);
    tcase_add_test(tcase, imports_are_refused_with_their_reason);
    tcase_add_test(tcase, what_is_known_is_refused_to_its_connection_alone);
    tcase_add_test(tcase, it_stays_until_the_last_job_is_answered);
    tcase_add_test(tcase, neither_ring_nor_descriptor_belongs_to_it);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed > 0;
}
