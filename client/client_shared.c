// Memory shared with the daemon: a file of our own, mapped by both; the control connection over which
// it is registered; and blocks of it, for callers' tensors and for what they have elsewhere.
//
// Connecting runs on the thread that creates the client, later on the ring's thread; blocks are
// taken and given back by any.

#include "client_shared.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    ENTRIES = 1024,
    PAGE_BYTES = 4096,
    REPLY_TIMEOUT_S = 10,
    LOOK_NS = 10 * 1000 * 1000,
};

// The daemon's longest deadline by default: a request that it may still be working on when its
// caller has given up is over by then.
static const uint64_t quarantine_ns = 60ull * 1000000000u;

static uint64_t align_up(uint64_t value, uint64_t power_of_two)
{
    return (value + power_of_two - 1) & ~(power_of_two - 1);
}

// ---- blocks -------------------------------------------------------------------------------------

static bool heap_init(struct einsum_client_shared *shared)
{
    struct einsum_client_block *all = calloc(1, sizeof *all);
    if (!all)
        return false;
    all->offset = shared->ring_bytes;
    all->bytes = shared->bytes - shared->ring_bytes;
    shared->blocks = all;
    return true;
}

static void heap_deinit(struct einsum_client_shared *shared)
{
    while (shared->blocks) {
        struct einsum_client_block *next = shared->blocks->next;
        free(shared->blocks);
        shared->blocks = next;
    }
}

static bool is_free(const struct einsum_client_block *block, uint64_t now)
{
    return block && !block->used && block->free_ns <= now;
}

// With those behind it that are free as well. What the daemon may still touch stays by itself.
static void join(struct einsum_client_block *block, uint64_t now)
{
    while (is_free(block, now) && is_free(block->next, now)) {
        struct einsum_client_block *next = block->next;
        block->bytes += next->bytes;
        block->next = next->next;
        free(next);
    }
}

// Leaves of a block what is asked for, and makes another of the rest. Without memory for that, it
// stays whole.
static void split(struct einsum_client_block *block, uint64_t bytes)
{
    struct einsum_client_block *rest = block->bytes > bytes ? calloc(1, sizeof *rest) : NULL;
    if (!rest)
        return;
    *rest = (struct einsum_client_block){
        .next = block->next, .offset = block->offset + bytes, .bytes = block->bytes - bytes};
    block->next = rest;
    block->bytes = bytes;
}

// First fit; NULL: none.
static uint8_t *block_take(struct einsum_client_shared *shared, uint64_t bytes)
{
    if (bytes > shared->bytes)
        return NULL;
    bytes = align_up(bytes ? bytes : 1, EINSUM_SHARED_ALIGNMENT);
    uint64_t now = einsum_client_now_ns();
    uint8_t *memory = NULL;
    pthread_mutex_lock(&shared->heap_lock);
    struct einsum_client_block *block = shared->blocks;
    for (; block; block = block->next) {
        join(block, now);
        if (is_free(block, now) && block->bytes >= bytes)
            break;
    }
    if (block) {
        split(block, bytes);
        block->used = true;
        memory = shared->memory + block->offset;
    }
    pthread_mutex_unlock(&shared->heap_lock);
    return memory;
}

// Joined with its neighbours when the next is looked for.
static void block_give_back(struct einsum_client_shared *shared, const uint8_t *memory,
                            uint64_t free_ns)
{
    uint64_t offset = (uint64_t)(memory - shared->memory);
    pthread_mutex_lock(&shared->heap_lock);
    struct einsum_client_block *block = shared->blocks;
    while (block && block->offset != offset)
        block = block->next;
    if (block && block->used) {
        block->used = false;
        block->free_ns = free_ns;
    }
    pthread_mutex_unlock(&shared->heap_lock);
}

void *einsum_client_memory_alloc(struct einsum_client *client, uint64_t bytes)
{
    return client->shared ? block_take(client->shared, bytes) : NULL;
}

void einsum_client_memory_free(struct einsum_client *client, void *memory)
{
    if (client->shared && memory)
        block_give_back(client->shared, memory, 0);
}

// ---- places -------------------------------------------------------------------------------------

bool einsum_client_offset_of(uintptr_t begin, uint64_t begin_bytes, const void *memory,
                             uint64_t bytes, uint64_t *offset)
{
    uintptr_t at = (uintptr_t)memory;
    if (at < begin || at - begin > begin_bytes || bytes > begin_bytes - (at - begin))
        return false;
    *offset = at - begin;
    return *offset % EINSUM_SHARED_ALIGNMENT == 0;
}

struct part {
    const void *from; // NULL: room for the output
    uint64_t bytes, *offset;
    bool staged;
};

static bool stage(struct einsum_client_shared *shared, struct part *parts, size_t parts_n,
                  struct einsum_client_place *place)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < parts_n; i++) {
        if (parts[i].bytes > shared->bytes)
            return false; // no sum that could overflow
        bytes += parts[i].staged ? align_up(parts[i].bytes, EINSUM_SHARED_ALIGNMENT) : 0;
    }
    if (bytes == 0)
        return true;
    place->staged = block_take(shared, bytes);
    if (!place->staged)
        return false;
    uint8_t *at = place->staged;
    for (size_t i = 0; i < parts_n; i++) {
        struct part *part = &parts[i];
        if (!part->staged)
            continue;
        *part->offset = (uint64_t)(at - shared->memory);
        if (part->from)
            memcpy(at, part->from, part->bytes);
        else
            place->staged_output = at;
        at += align_up(part->bytes, EINSUM_SHARED_ALIGNMENT);
    }
    return true;
}

bool einsum_client_place(struct einsum_client *client, const struct einsum_client_request *request,
                         struct einsum_client_place *place)
{
    struct einsum_client_shared *shared = client->shared;
    *place = (struct einsum_client_place){0};
    if ((!request->output && !request->digest_only) || !einsum_client_shared_alive(shared))
        return false;
    if (shared->cuda_n > 0) {
        if (einsum_client_cuda_place(shared, request, place))
            return true;
        if (einsum_client_cuda_check(client, request, place, NULL) != EINSUM_CLIENT_OK)
            return false;
    }
    const struct einsum_client_tensors tensors = einsum_client_tensors_of(request);
    uint64_t room = request->digest_only ? 0 : request->output_bytes;
    struct part parts[] = {
        {tensors.first.data, tensors.first.bytes, &place->activations_offset, false},
        {tensors.second.data, tensors.second.bytes, &place->scales_offset, false},
        {NULL, room, &place->output_offset, false},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const void *memory = i < 2 ? parts[i].from : request->output;
        parts[i].staged =
            parts[i].bytes > 0 && !einsum_client_offset_of((uintptr_t)shared->memory, shared->bytes,
                                                           memory, parts[i].bytes, parts[i].offset);
    }
    if (!stage(shared, parts, sizeof parts / sizeof *parts, place))
        return false;
    place->activations_bytes = tensors.first.bytes;
    place->scales_bytes = tensors.second.bytes;
    place->output_bytes = room;
    pthread_mutex_lock(&shared->link_lock);
    memcpy(place->region, shared->name, sizeof place->region);
    pthread_mutex_unlock(&shared->link_lock);
    place->given = true;
    return true;
}

void einsum_client_unplace(struct einsum_client *client, struct einsum_client_place *place,
                           bool quiet)
{
    if (place->staged)
        block_give_back(client->shared, place->staged,
                        quiet ? 0 : einsum_client_now_ns() + quarantine_ns);
    place->staged = place->staged_output = NULL;
}

// ---- the control connection ---------------------------------------------------------------------

static enum einsum_client_status lost(struct einsum_client_error *error, const char *path,
                                      const char *what)
{
    return einsum_client_error_set(error, EINSUM_CLIENT_UNAVAILABLE, "shared memory: %s: %s: %s",
                                   path, what, strerror(errno));
}

// `*fd` gets a descriptor that came along, or -1.
static bool receive_reply(int socket, struct einsum_shared_reply *reply, int *fd)
{
    size_t got = 0;
    *fd = -1;
    while (got < sizeof *reply) {
        _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof *fd)] = {0};
        struct iovec piece = {(char *)reply + got, sizeof *reply - got};
        struct msghdr message = {.msg_iov = &piece,
                                 .msg_iovlen = 1,
                                 .msg_control = control,
                                 .msg_controllen = sizeof control};
        ssize_t n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        if (header && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof *fd))
            memcpy(fd, CMSG_DATA(header), sizeof *fd);
        got += (size_t)n;
    }
    if (got == sizeof *reply && reply->magic == EINSUM_SHARED_MAGIC)
        return true;
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    return false;
}

enum einsum_client_status einsum_client_shared_ask(struct einsum_client_shared *shared, int socket,
                                                   const struct einsum_shared_request *request,
                                                   int fd, struct einsum_shared_reply *reply,
                                                   int *reply_fd, struct einsum_client_error *error)
{
    *reply_fd = -1;
    memset(reply, 0, sizeof *reply);
    if (!einsum_shared_send(socket, request, sizeof *request, fd, 0) ||
        !receive_reply(socket, reply, reply_fd))
        return lost(error, shared->path, "no answer");
    if (reply->status == 0)
        return EINSUM_CLIENT_OK;
    reply->text[sizeof reply->text - 1] = '\0';
    char text[sizeof reply->text];
    einsum_client_clean_text(text, sizeof text, reply->text, strlen(reply->text));
    enum einsum_client_status status = reply->status <= EINSUM_CLIENT_UNAUTHENTICATED
                                           ? (enum einsum_client_status)reply->status
                                           : EINSUM_CLIENT_UNKNOWN;
    einsum_client_error_set(error, status, "shared memory: %s", text);
    if (error)
        error->from_server = true;
    return status;
}

static enum einsum_client_status open_socket(const struct einsum_client_shared *shared, int *out,
                                             struct einsum_client_error *error)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", shared->path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval timeout = {.tv_sec = REPLY_TIMEOUT_S};
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) != 0 ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout) != 0 ||
        connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        enum einsum_client_status status = lost(error, shared->path, "cannot connect");
        if (fd >= 0)
            close(fd);
        return status;
    }
    *out = fd;
    return EINSUM_CLIENT_OK;
}

// Registers the memory and makes the ring. `*doorbell` -1: there is no ring.
static enum einsum_client_status register_all(struct einsum_client_shared *shared, int socket,
                                              struct einsum_shared_reply *region, int *doorbell,
                                              struct einsum_client_error *error)
{
    struct einsum_shared_reply reply;
    struct einsum_shared_request request = {
        .magic = EINSUM_SHARED_MAGIC, .op = EINSUM_SHARED_REGION, .bytes = shared->bytes};
    enum einsum_client_status status =
        einsum_client_shared_ask(shared, socket, &request, shared->file, region, doorbell, error);
    if (*doorbell >= 0) // none was due
        close(*doorbell);
    *doorbell = -1;
    if (status != EINSUM_CLIENT_OK || !shared->ring_wanted)
        return status;
    request = (struct einsum_shared_request){.magic = EINSUM_SHARED_MAGIC,
                                             .op = EINSUM_SHARED_RING,
                                             .region = region->number,
                                             .entries = shared->entries};
    status = einsum_client_shared_ask(shared, socket, &request, -1, &reply, doorbell, error);
    if (status == EINSUM_CLIENT_OK && *doorbell < 0)
        status = einsum_client_error_set(error, EINSUM_CLIENT_INTERNAL,
                                         "shared memory: the ring came without its doorbell");
    bool forced = shared->client->options.transport == EINSUM_CLIENT_TRANSPORT_RING;
    return forced ? status : EINSUM_CLIENT_OK;
}

enum einsum_client_status einsum_client_shared_connect(struct einsum_client_shared *shared,
                                                       struct einsum_client_error *error)
{
    int socket = -1, doorbell = -1;
    struct einsum_shared_reply region;
    struct einsum_client_cuda cuda[EINSUM_CLIENT_CUDA_MAX];
    pthread_mutex_lock(&shared->link_lock);
    enum einsum_client_status status = open_socket(shared, &socket, error);
    if (status == EINSUM_CLIENT_OK) {
        status = register_all(shared, socket, &region, &doorbell, error);
        if (status != EINSUM_CLIENT_OK)
            close(socket);
    }
    if (status == EINSUM_CLIENT_OK) {
        einsum_client_cuda_connect(shared, socket, cuda);
        pthread_mutex_lock(&shared->lock);
        memcpy(shared->cuda, cuda, sizeof shared->cuda);
        __atomic_store_n(&shared->socket, socket, __ATOMIC_RELAXED);
        shared->epoch++;
        memcpy(shared->name, region.name, sizeof shared->name);
        shared->region = region.number;
        shared->doorbell = doorbell;
        __atomic_store_n(&shared->has_ring, doorbell >= 0, __ATOMIC_RELAXED);
        if (shared->has_ring)
            einsum_client_ring_reset(shared);
        pthread_mutex_unlock(&shared->lock);
    }
    pthread_mutex_unlock(&shared->link_lock);
    return status;
}

void einsum_client_shared_disconnect(struct einsum_client_shared *shared)
{
    pthread_mutex_lock(&shared->link_lock);
    pthread_mutex_lock(&shared->lock);
    if (shared->socket >= 0)
        close(shared->socket);
    if (shared->doorbell >= 0)
        close(shared->doorbell);
    shared->doorbell = -1;
    __atomic_store_n(&shared->socket, -1, __ATOMIC_RELAXED);
    __atomic_store_n(&shared->has_ring, false, __ATOMIC_RELAXED);
    einsum_client_ring_fail(shared);
    pthread_cond_broadcast(&shared->changed);
    pthread_mutex_unlock(&shared->lock);
    pthread_mutex_unlock(&shared->link_lock);
}

static bool hung_up(struct einsum_client_shared *shared)
{
    pthread_mutex_lock(&shared->link_lock);
    struct pollfd poll_fd = {.fd = shared->socket, .events = POLLRDHUP};
    // Nothing is sent unasked: whatever can be read is the end.
    bool over = shared->socket < 0 ||
                (poll(&poll_fd, 1, 0) > 0 && (poll_fd.revents & (POLLRDHUP | POLLHUP | POLLERR)));
    pthread_mutex_unlock(&shared->link_lock);
    return over;
}

bool einsum_client_shared_alive(struct einsum_client_shared *shared)
{
    uint64_t now = einsum_client_now_ns();
    uint64_t looked = __atomic_load_n(&shared->looked_ns, __ATOMIC_RELAXED);
    bool connected = __atomic_load_n(&shared->socket, __ATOMIC_RELAXED) >= 0;
    if (!connected || now - looked < LOOK_NS)
        return connected;
    __atomic_store_n(&shared->looked_ns, now, __ATOMIC_RELAXED);
    if (!hung_up(shared))
        return true;
    einsum_client_shared_disconnect(shared);
    return false;
}

// ---- numbers ------------------------------------------------------------------------------------

// The entry for a name, made if there is none; NULL: no memory, or no name that has one.
static struct einsum_client_number *find_number(struct einsum_client_shared *shared, uint32_t op,
                                                const char *name)
{
    uint32_t hash = op;
    for (const char *at = name; *at; at++)
        hash = hash * 16777619u ^ (uint8_t)*at;
    for (size_t i = 0; i < shared->numbers_n; i++)
        if (shared->numbers[i].hash == hash && shared->numbers[i].op == op &&
            strcmp(shared->numbers[i].name, name) == 0)
            return &shared->numbers[i];
    if (strlen(name) >= EINSUM_SHARED_TEXT_BYTES)
        return NULL;
    if (shared->numbers_n == shared->numbers_room) {
        size_t room = shared->numbers_room ? 2 * shared->numbers_room : 64;
        void *grown = realloc(shared->numbers, room * sizeof *shared->numbers);
        if (!grown)
            return NULL;
        shared->numbers = grown;
        shared->numbers_room = room;
    }
    struct einsum_client_number *entry = &shared->numbers[shared->numbers_n++];
    *entry = (struct einsum_client_number){.op = op, .hash = hash};
    strcpy(entry->name, name);
    return entry;
}

bool einsum_client_shared_number(struct einsum_client_shared *shared, uint32_t op, const char *name,
                                 uint32_t *number, uint64_t *epoch)
{
    pthread_mutex_lock(&shared->link_lock);
    struct einsum_client_number *entry = shared->has_ring ? find_number(shared, op, name) : NULL;
    bool known = entry && entry->epoch == shared->epoch;
    if (entry && !known) {
        struct einsum_shared_request request = {.magic = EINSUM_SHARED_MAGIC, .op = op};
        struct einsum_shared_reply reply;
        int fd;
        strcpy(request.text, name);
        known = einsum_client_shared_ask(shared, shared->socket, &request, -1, &reply, &fd, NULL) ==
                EINSUM_CLIENT_OK;
        if (fd >= 0)
            close(fd);
        if (known) {
            entry->number = reply.number;
            entry->epoch = shared->epoch;
        }
    }
    if (known) {
        *number = entry->number;
        *epoch = entry->epoch;
    }
    pthread_mutex_unlock(&shared->link_lock);
    return known;
}

// ---- create and destroy -------------------------------------------------------------------------

// The socket's path, and what the server allows if it is asked.
static enum einsum_client_status find_socket(struct einsum_client_shared *shared,
                                             struct einsum_client_error *error)
{
    const struct einsum_client_options *options = &shared->client->options;
    const char *given = options->shared_memory;
    if (strcmp(given, "auto") != 0) {
        if (strncmp(given, "unix:/", 6) != 0 || strlen(given + 5) >= sizeof shared->path)
            return einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT,
                                           "shared_memory: \"%.200s\" is neither \"auto\" nor "
                                           "unix:/PATH",
                                           given);
        strcpy(shared->path, given + 5);
        return EINSUM_CLIENT_OK;
    }
    struct einsum_client_info *info = calloc(1, sizeof *info);
    if (!info)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    enum einsum_client_status status = einsum_client_server_info(shared->client, info, error);
    size_t bytes = status == EINSUM_CLIENT_OK ? strlen(info->shared_memory.socket) : 0;
    if (status == EINSUM_CLIENT_OK && (bytes == 0 || bytes >= sizeof shared->path))
        status = einsum_client_error_set(error, EINSUM_CLIENT_FAILED_PRECONDITION,
                                         "the server shares no memory");
    if (status == EINSUM_CLIENT_OK) {
        strcpy(shared->path, info->shared_memory.socket);
        if (shared->bytes > info->shared_memory.region_bytes_max)
            shared->bytes = info->shared_memory.region_bytes_max & ~(uint64_t)(PAGE_BYTES - 1);
        while (shared->entries > info->shared_memory.ring_entries_max)
            shared->entries /= 2;
        shared->ring_wanted = shared->ring_wanted && shared->entries > 0;
    }
    free(info);
    return status;
}

static enum einsum_client_status make_memory(struct einsum_client_shared *shared,
                                             struct einsum_client_error *error)
{
    static const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    shared->ring_bytes =
        shared->ring_wanted ? align_up(einsum_ring_bytes(shared->entries), PAGE_BYTES) : 0;
    shared->file = memfd_create("einsum-client", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (shared->file < 0 || shared->bytes <= shared->ring_bytes ||
        ftruncate(shared->file, (off_t)shared->bytes) != 0 ||
        fcntl(shared->file, F_ADD_SEALS, seals) != 0)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED,
                                       "no memory file of %llu bytes: %s",
                                       (unsigned long long)shared->bytes, strerror(errno));
    void *memory = mmap(NULL, shared->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, shared->file, 0);
    if (memory == MAP_FAILED)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED,
                                       "no room to map %llu bytes",
                                       (unsigned long long)shared->bytes);
    shared->memory = memory;
    madvise(memory, shared->bytes, MADV_HUGEPAGE); // advice
    bool heap = heap_init(shared);
    if (shared->ring_wanted) {
        uint8_t *at = memory;
        shared->header = (void *)at;
        shared->submissions = (void *)(at + sizeof *shared->header);
        shared->completions = (void *)(shared->submissions + shared->entries);
        shared->slots = calloc(shared->entries, sizeof(struct einsum_client_ring_call *));
        shared->free_slots = calloc(shared->entries, sizeof *shared->free_slots);
    }
    if (!heap || (shared->ring_wanted && (!shared->slots || !shared->free_slots)))
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    return EINSUM_CLIENT_OK;
}

static enum einsum_client_status start(struct einsum_client_shared *shared,
                                       struct einsum_client_error *error)
{
    enum einsum_client_status status = find_socket(shared, error);
    if (status == EINSUM_CLIENT_OK)
        status = make_memory(shared, error);
    if (status == EINSUM_CLIENT_OK)
        status = einsum_client_shared_connect(shared, error);
    if (status == EINSUM_CLIENT_OK &&
        pthread_create(&shared->thread, NULL, einsum_client_ring_thread, shared) != 0)
        status = einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no thread");
    else if (status == EINSUM_CLIENT_OK)
        shared->thread_started = true;
    return status;
}

enum einsum_client_status einsum_client_shared_create(struct einsum_client *client,
                                                      struct einsum_client_error *error)
{
    const struct einsum_client_options *options = &client->options;
    if (options->transport == EINSUM_CLIENT_TRANSPORT_TCP ||
        options->transport == EINSUM_CLIENT_TRANSPORT_UNIX)
        return EINSUM_CLIENT_OK;
    struct einsum_client_shared *shared = calloc(1, sizeof *shared);
    if (!shared)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    shared->client = client;
    shared->bytes = align_up(options->shared_memory_bytes, PAGE_BYTES);
    shared->entries = ENTRIES;
    shared->ring_wanted = options->transport != EINSUM_CLIENT_TRANSPORT_SHARED;
    shared->file = shared->socket = shared->doorbell = -1;
    einsum_spin_init(&shared->spin, options->spin_us);
    shared->random = client->random ^ 0x9e3779b97f4a7c15u;
    shared->pending_end = &shared->pending;
    shared->ready_end = &shared->ready;
    pthread_mutex_init(&shared->heap_lock, NULL);
    pthread_mutex_init(&shared->link_lock, NULL);
    pthread_mutex_init(&shared->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&shared->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    enum einsum_client_status status = start(shared, error);
    client->shared = shared;
    if (status == EINSUM_CLIENT_OK)
        return status;
    einsum_client_shared_destroy(client);
    bool wrong = status == EINSUM_CLIENT_INVALID_ARGUMENT && !(error && error->from_server);
    return options->transport == EINSUM_CLIENT_TRANSPORT_AUTO && !wrong ? EINSUM_CLIENT_OK : status;
}

void einsum_client_shared_destroy(struct einsum_client *client)
{
    struct einsum_client_shared *shared = client->shared;
    if (!shared)
        return;
    if (shared->thread_started) {
        pthread_mutex_lock(&shared->lock);
        shared->stopping = true;
        pthread_cond_broadcast(&shared->changed);
        pthread_mutex_unlock(&shared->lock);
        pthread_join(shared->thread, NULL);
    }
    if (shared->socket >= 0)
        close(shared->socket);
    if (shared->doorbell >= 0)
        close(shared->doorbell);
    if (shared->memory)
        munmap(shared->memory, shared->bytes);
    if (shared->file >= 0)
        close(shared->file);
    heap_deinit(shared);
    pthread_cond_destroy(&shared->changed);
    pthread_mutex_destroy(&shared->lock);
    pthread_mutex_destroy(&shared->link_lock);
    pthread_mutex_destroy(&shared->heap_lock);
    free(shared->free_slots);
    free(shared->slots);
    free(shared->numbers);
    free(shared);
    client->shared = NULL;
}

enum einsum_client_transport einsum_client_transport(const struct einsum_client *client)
{
    const struct einsum_client_shared *shared = client->shared;
    if (shared && __atomic_load_n(&shared->socket, __ATOMIC_RELAXED) >= 0)
        return __atomic_load_n(&shared->has_ring, __ATOMIC_RELAXED)
                   ? EINSUM_CLIENT_TRANSPORT_RING
                   : EINSUM_CLIENT_TRANSPORT_SHARED;
    return strncmp(client->endpoint, "unix:", 5) == 0 ? EINSUM_CLIENT_TRANSPORT_UNIX
                                                      : EINSUM_CLIENT_TRANSPORT_TCP;
}
