// Fuzzes what callers on the same host may write: entries and counts of a ring, and requests on the
// control socket. An input is one byte that says which, and
//
//     entries    8 submissions, cut short or followed by words that go over the ring's header
//     requests   bytes for the socket; the byte's upper bits say with which of them a descriptor goes
//
// Besides not crashing: an honest caller's ring is answered rightly beside every input, each
// submission that was taken is completed once, and nothing is left behind.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "client/einsum_shared.h"
#include "tests/shared_site.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { ENTRIES = 8, REGION_BYTES = 1 << 20, HEADER_WORDS = 8 };

struct caller {
    uint8_t *memory;
    struct region *region;
    struct ring *ring;
    int doorbell;
    struct einsum_ring_header *header;
    struct einsum_ring_submission *submissions;
    struct einsum_ring_completion *completions;
    uint32_t submitted;
};

static int memory_file(void)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ASSERT(fd >= 0 && ftruncate(fd, REGION_BYTES) == 0);
    ASSERT(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
    return fd;
}

static void enter(struct caller *caller)
{
    struct error err;
    uint32_t number;
    int fd = memory_file();
    ASSERT(regions_add(site.context.regions, fd, REGION_BYTES, &caller->region, &err) == STATUS_OK);
    caller->memory = mmap(NULL, REGION_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ASSERT(caller->memory != MAP_FAILED);
    close(fd);
    ASSERT(ring_open(site.context.rings, caller->region, 0, ENTRIES, &caller->ring,
                     &caller->doorbell, &err) == STATUS_OK);
    ring_set_region(caller->ring, 0, caller->region);
    ASSERT(ring_add_weight(caller->ring, name, &number, &err) == STATUS_OK);
    caller->header = (void *)caller->memory;
    caller->submissions = (void *)(caller->header + 1);
    caller->completions = (void *)(caller->submissions + ENTRIES);
    caller->submitted = 0;
}

static void leave(struct caller *caller)
{
    ring_close(caller->ring);
    regions_remove(site.context.regions, caller->region);
    munmap(caller->memory, REGION_BYTES);
    while (regions_stats(site.context.regions).regions > 1) { // the honest one's
        regions_collect(site.context.regions);
        sched_yield();
    }
}

static void ring_doorbell(const struct caller *caller)
{
    uint64_t one = 1;
    ASSERT(write(caller->doorbell, &one, sizeof one) == sizeof one);
}

static struct einsum_ring_submission good(uint64_t id)
{
    return (struct einsum_ring_submission){
        .id = id,
        .recipe = EINSUM_RECIPE_1_128_128,
        .activation_layout = EINSUM_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_SCALES_TGK,
        .scale_type = EINSUM_SCALE_UE8M0,
        .output_type = EINSUM_OUTPUT_BF16,
        .tokens = 1,
        .activations_offset = 64 << 10,
        .activations_bytes = GROUPS * REDUCED_DIM,
        .scales_offset = 128 << 10,
        .scales_bytes = GROUPS * REDUCED_DIM / 128,
        .output_offset = 192 << 10,
        .output_bytes = GROUPS * OUTPUT_DIM * 2,
    };
}

static struct caller honest;

static void check_honest(void)
{
    uint32_t before = honest.submitted;
    struct einsum_ring_submission submission = good(before);
    honest.memory[submission.activations_offset] = (uint8_t)before;
    honest.submissions[before % ENTRIES] = submission;
    einsum_ring_tell(&honest.header->submit_tail, ++honest.submitted);
    if (einsum_ring_look(&honest.header->daemon_sleeps))
        ring_doorbell(&honest);
    while (einsum_ring_look(&honest.header->complete_tail) == before)
        sched_yield();
    const struct einsum_ring_completion *completion = &honest.completions[before % ENTRIES];
    ASSERT(completion->status == STATUS_OK && completion->id == before);
    ASSERT(honest.memory[submission.output_offset] == (uint8_t)before);
    einsum_ring_set(&honest.header->complete_head, honest.submitted);
}

// Bytes of a submission go over a good one, so that few of them are enough to be wrong in one way.
static void fuzz_entries(const uint8_t *bytes, size_t n)
{
    struct caller caller;
    enter(&caller);
    uint32_t sent = 0;
    for (; sent < ENTRIES && n > 0; sent++) {
        struct einsum_ring_submission submission = good(sent);
        uint8_t *raw = (uint8_t *)&submission;
        size_t changes = bytes[0] % 16;
        bytes++, n--;
        for (size_t i = 0; i < changes && n >= 2; i++, bytes += 2, n -= 2)
            raw[8 + bytes[0] % (sizeof submission - 8)] ^= bytes[1];
        caller.submissions[sent] = submission;
    }
    einsum_ring_tell(&caller.header->submit_tail, sent);
    ring_doorbell(&caller);
    while (einsum_ring_look(&caller.header->complete_tail) != sent)
        sched_yield();
    uint32_t seen = 0;
    for (uint32_t i = 0; i < sent; i++) {
        ASSERT(caller.completions[i].id < sent && caller.completions[i].status <= 16);
        seen |= 1u << caller.completions[i].id;
    }
    ASSERT(seen == (1u << sent) - 1);
    struct einsum_ring_word *words = &caller.header->submit_tail;
    for (; n >= 3; bytes += 3, n -= 3) {
        einsum_ring_tell(&words[bytes[0] % HEADER_WORDS], bytes[1] | (uint32_t)bytes[2] << 24);
        if (bytes[0] & 0x80)
            ring_doorbell(&caller);
    }
    ring_doorbell(&caller);
    check_honest();
    leave(&caller);
}

static int connect_socket(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, site.address + strlen("unix:"));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ASSERT(fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) == 0);
    return fd;
}

static void drain(int socket)
{
    struct pollfd readable = {.fd = socket, .events = POLLIN};
    char reply[sizeof(struct einsum_shared_reply)];
    while (poll(&readable, 1, 1) > 0)
        if (recv(socket, reply, sizeof reply, MSG_DONTWAIT) <= 0)
            return;
}

// Requests that are right but for the bytes that the input changes, one after another, then raw
// bytes.
static void fuzz_requests(const uint8_t *bytes, size_t n, uint8_t how)
{
    int socket = connect_socket(), fd = memory_file();
    for (int i = 0; i < 4 && n >= 2; i++) {
        struct einsum_shared_request request = {
            .magic = EINSUM_SHARED_MAGIC,
            .op = bytes[0] % 8,
            .entries = ENTRIES,
            .bytes = REGION_BYTES,
        };
        strcpy(request.text, name);
        uint8_t *raw = (uint8_t *)&request;
        size_t changes = bytes[1] % 8;
        bytes += 2, n -= 2;
        for (size_t c = 0; c < changes && n >= 2; c++, bytes += 2, n -= 2)
            raw[bytes[0] % 64] ^= bytes[1];
        einsum_shared_send(socket, raw, sizeof request, how >> i & 2 ? fd : -1, MSG_DONTWAIT);
    }
    if (n > 0)
        einsum_shared_send(socket, bytes, n, how & 0x80 ? fd : -1, MSG_DONTWAIT);
    drain(socket);
    close(socket);
    close(fd);
    check_honest();
    while (regions_stats(site.context.regions).regions > 1 ||
           sharing_stats(site.context.sharing).connections > 0)
        sched_yield();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool started;
    if (!started) {
        started = true;
        start();
        site_listen();
        log_configure(LOG_LEVEL_ERROR, LOG_FORMAT_PLAIN);
        enter(&honest);
    }
    if (size == 0)
        return 0;
    if (data[0] % 2 == 0)
        fuzz_entries(data + 1, size - 1);
    else
        fuzz_requests(data + 1, size - 1, data[0]);
    return 0;
}
