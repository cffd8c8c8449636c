// The ceiling that einsumd is held to: gRPC C core alone, tuned as the daemon is, answering the same
// messages so that the same client drives it. It copies a request's bytes once, into a buffer, and
// sends as many zeros back as einsumd would numbers. No batcher, no hand-over, no checks:
//
//     bare_server [--threads N] [--weights N] --listen ADDRESS ...
//
// ADDRESS is HOST:PORT or unix:/PATH, as for the daemon. Prints "ready ADDRESS ..." on stdout once
// it listens, and ends by SIGTERM.
//
// Threads: main accepts and hands sockets to gRPC; each server thread owns one completion queue and
// all calls that arrive on it. A tag's pops are serial for its call, so calls need no lock.
#include <arpa/inet.h>
#include <einsum/v1/einsum.pb-c.h>
#include <fcntl.h>
#include <getopt.h>
#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <malloc.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "kernels/einsum.h"
#include "server/digest.h"
#include "server/wire.h"

enum {
    LISTEN_MAX = 4,
    THREADS_MAX = 64,
    SLOTS = 64, // armed on each queue for each method, as in the daemon
    STREAM_IN_FLIGHT_MAX = 64,
    TOKENS_MAX = 4096, // of one request
    SOCKET_BUFFER_BYTES = 1 << 20,
    GROUPS = 8, // V4-Flash's shape
    OUTPUT_DIM = 1024,
    REDUCED_DIM = 4096,
    MESSAGE_BYTES_MAX = 1 << 29,
    WEIGHTS_MAX = 64,
    NAME_BYTES = 32,
};

enum method { METHOD_EINSUM, METHOD_STREAM, METHOD_OTHER, METHODS };
static const char *const paths[] = {"/einsum.v1.Einsum/Einsum", "/einsum.v1.Einsum/EinsumStream"};

enum event {
    EVENT_ARRIVED,
    EVENT_STARTED, // a stream's headers have left
    EVENT_CLOSED,
    EVENT_RECEIVED,
    EVENT_SENT,
    EVENT_FINISHED,
    EVENTS
};

struct call;
struct tag {
    struct call *call;
    enum event event;
};

struct outgoing {
    struct outgoing *next;
    grpc_byte_buffer *message;
};

struct call {
    struct thread *thread;
    enum method method;
    grpc_call *grpc;
    grpc_metadata_array metadata;
    grpc_call_details details; // METHOD_OTHER
    gpr_timespec deadline;
    grpc_byte_buffer *received, *sending;
    struct outgoing *first, **last; // of a stream: replies that wait for the one being sent
    struct tag tags[EVENTS];
    uint32_t pending, in_flight;
    int cancelled;
    bool reading, half_closed, finished;
};

struct thread {
    pthread_t pthread;
    grpc_completion_queue *queue;
    uint8_t *buffer; // where what comes in is copied to, from the start for each message
    uint64_t buffer_bytes;
};

static struct thread threads[THREADS_MAX];
static grpc_server *server;
static void *registered[METHOD_OTHER];
static uint8_t *zeros;
static uint64_t zeros_bytes;
static uint32_t weights_n = 1;

_Noreturn static void fail(const char *what)
{
    perror(what);
    exit(1);
}

// ---- messages

static grpc_byte_buffer *pack(const ProtobufCMessage *message)
{
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

static grpc_byte_buffer *server_info(void)
{
    Einsum__V1__Limits limits = EINSUM__V1__LIMITS__INIT;
    limits.request_tokens_max = TOKENS_MAX;
    Einsum__V1__Memory memory = EINSUM__V1__MEMORY__INIT;
    Einsum__V1__Counters counters = EINSUM__V1__COUNTERS__INIT;
    Einsum__V1__ServerInfoResponse response = EINSUM__V1__SERVER_INFO_RESPONSE__INIT;
    response.engine = (char *)(uintptr_t) "null"; // it answers zeros, too
    response.device = (char *)(uintptr_t) "none";
    response.kernel = (char *)(uintptr_t) "bare gRPC";
    response.limits = &limits;
    response.memory = &memory;
    response.counters = &counters;
    return pack(&response.base);
}

static grpc_byte_buffer *list_weights(void)
{
    static char names[WEIGHTS_MAX][NAME_BYTES];
    static Einsum__V1__Recipe recipes[] = {EINSUM__V1__RECIPE__RECIPE_1_128_128};
    Einsum__V1__Weight weights[WEIGHTS_MAX], *pointers[WEIGHTS_MAX];
    for (uint32_t i = 0; i < weights_n; i++) {
        snprintf(names[i], sizeof names[i], "layers.%u.attn.wo_a", i);
        einsum__v1__weight__init(&weights[i]);
        weights[i].name = names[i];
        weights[i].groups = GROUPS;
        weights[i].output_dim = OUTPUT_DIM;
        weights[i].reduced_dim = REDUCED_DIM;
        weights[i].block_d = weights[i].block_r = 128;
        weights[i].weight_type = EINSUM__V1__WEIGHT_TYPE__WEIGHT_TYPE_E4M3;
        weights[i].scale_type = EINSUM__V1__SCALE_TYPE__SCALE_TYPE_UE8M0;
        weights[i].recipes = recipes;
        weights[i].n_recipes = 1;
        pointers[i] = &weights[i];
    }
    Einsum__V1__ListWeightsResponse response = EINSUM__V1__LIST_WEIGHTS_RESPONSE__INIT;
    response.weights = pointers;
    response.n_weights = weights_n;
    return pack(&response.base);
}

static grpc_byte_buffer *digest(const struct wire_request *request, uint64_t elements)
{
    struct digest computed;
    computed = (struct digest){0};
    digest_add((enum einsum_output_type)request->output_type, zeros, elements, &computed);
    Einsum__V1__Digest message = EINSUM__V1__DIGEST__INIT;
    message.crc32 = computed.crc32;
    message.elements = computed.elements;
    Einsum__V1__BatchInfo batch = EINSUM__V1__BATCH_INFO__INIT;
    Einsum__V1__EinsumResponse response = EINSUM__V1__EINSUM_RESPONSE__INIT;
    response.request_id = request->request_id;
    response.tokens = request->tokens;
    response.groups = GROUPS;
    response.output_dim = OUTPUT_DIM;
    response.output_type = (Einsum__V1__OutputType)request->output_type;
    response.digest = &message;
    response.batch = &batch;
    return pack(&response.base);
}

static void copy_in(struct thread *thread, const grpc_slice *slices, size_t slices_n)
{
    uint64_t bytes = wire_bytes(slices, slices_n);
    if (bytes > thread->buffer_bytes) {
        free(thread->buffer);
        thread->buffer_bytes = bytes;
        thread->buffer = aligned_alloc(4096, align_up(bytes, 4096));
        if (!thread->buffer)
            fail("buffer");
    }
    wire_copy(slices, slices_n, (struct wire_range){0, bytes}, thread->buffer);
}

// NULL: undecodable.
static grpc_byte_buffer *answer(struct thread *thread, const grpc_byte_buffer *message,
                                bool streamed)
{
    const grpc_slice *slices = message->data.raw.slice_buffer.slices;
    size_t slices_n = message->data.raw.slice_buffer.count;
    struct wire_request request;
    enum status status = streamed
                             ? wire_read_stream_request(slices, slices_n, &request, NULL)
                             : wire_read_request(slices, slices_n, WIRE_EINSUM, &request, NULL);
    uint64_t elements = (uint64_t)request.tokens * GROUPS * OUTPUT_DIM;
    uint64_t bytes = elements * (request.output_type == EINSUM_OUTPUT_FP32 ? 4 : 2);
    if (status != STATUS_OK || bytes > zeros_bytes)
        return NULL;
    copy_in(thread, slices, slices_n);
    if (request.digest_only)
        return digest(&request, elements);
    struct wire_response response = {
        .request_id = request.request_id,
        .tokens = request.tokens,
        .groups = GROUPS,
        .output_dim = OUTPUT_DIM,
        .output_type = request.output_type,
        .output_bytes = bytes,
        .batch_tokens = request.tokens,
        .batch_bucket = request.tokens,
        .batch_requests = 1,
    };
    uint8_t head[WIRE_RESPONSE_HEAD_BYTES_MAX];
    size_t head_bytes = wire_write_response_head(&response, streamed, head);
    grpc_slice out[2] = {grpc_slice_from_copied_buffer((const char *)head, head_bytes),
                         grpc_slice_from_static_buffer(zeros, bytes)};
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(out, 2);
    grpc_slice_unref(out[0]);
    return buffer;
}

// ---- calls

static void start(struct call *call, const grpc_op *ops, size_t ops_n, enum event event)
{
    call->pending++;
    if (grpc_call_start_batch(call->grpc, ops, ops_n, &call->tags[event], NULL) != GRPC_CALL_OK)
        abort();
}

static void arm(struct thread *thread, enum method method)
{
    struct call *call = calloc(1, sizeof *call);
    if (!call)
        fail("call");
    call->thread = thread;
    call->method = method;
    call->last = &call->first;
    for (enum event event = 0; event < EVENTS; event++)
        call->tags[event] = (struct tag){call, event};
    grpc_metadata_array_init(&call->metadata);
    grpc_call_details_init(&call->details);
    struct tag *tag = &call->tags[EVENT_ARRIVED];
    call->pending = 1;
    if (method == METHOD_OTHER)
        grpc_server_request_call(server, &call->grpc, &call->details, &call->metadata,
                                 thread->queue, thread->queue, tag);
    else
        grpc_server_request_registered_call(
            server, registered[method], &call->grpc, &call->deadline, &call->metadata,
            method == METHOD_EINSUM ? &call->received : NULL, thread->queue, thread->queue, tag);
}

static void finish(struct call *call, grpc_byte_buffer *message, grpc_status_code code)
{
    call->finished = true;
    call->sending = message;
    grpc_op ops[4];
    size_t ops_n = 0;
    if (call->method != METHOD_STREAM)
        ops[ops_n++] = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
    if (message) {
        ops[ops_n] = (grpc_op){.op = GRPC_OP_SEND_MESSAGE};
        ops[ops_n++].data.send_message.send_message = message;
    }
    ops[ops_n] = (grpc_op){.op = GRPC_OP_SEND_STATUS_FROM_SERVER};
    ops[ops_n++].data.send_status_from_server.status = code;
    start(call, ops, ops_n, EVENT_FINISHED);
}

static void read_next(struct call *call)
{
    if (call->reading || call->half_closed || call->in_flight >= STREAM_IN_FLIGHT_MAX)
        return;
    call->reading = true;
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &call->received;
    start(call, &op, 1, EVENT_RECEIVED);
}

static void send_next(struct call *call)
{
    struct outgoing *outgoing = call->first;
    if (call->sending || !outgoing)
        return;
    call->first = outgoing->next;
    if (!call->first)
        call->last = &call->first;
    call->sending = outgoing->message;
    free(outgoing);
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE};
    op.data.send_message.send_message = call->sending;
    start(call, &op, 1, EVENT_SENT);
}

static void stream_go_on(struct call *call)
{
    send_next(call);
    read_next(call);
    if (call->half_closed && call->in_flight == 0 && !call->finished)
        finish(call, NULL, GRPC_STATUS_OK);
}

static void on_stream_received(struct call *call)
{
    grpc_byte_buffer *message = call->received;
    call->received = NULL;
    call->reading = false;
    if (!message) {
        call->half_closed = true;
        stream_go_on(call);
        return;
    }
    grpc_byte_buffer *reply = answer(call->thread, message, true);
    grpc_byte_buffer_destroy(message);
    struct outgoing *outgoing = reply ? malloc(sizeof *outgoing) : NULL;
    if (!outgoing) {
        call->half_closed = true;
        stream_go_on(call);
        return;
    }
    *outgoing = (struct outgoing){.message = reply};
    *call->last = outgoing;
    call->last = &outgoing->next;
    call->in_flight++;
    stream_go_on(call);
}

static void on_other_arrived(struct call *call)
{
    grpc_byte_buffer *message = NULL;
    if (grpc_slice_str_cmp(call->details.method, "/einsum.v1.Einsum/ServerInfo") == 0)
        message = server_info();
    else if (grpc_slice_str_cmp(call->details.method, "/einsum.v1.Einsum/ListWeights") == 0)
        message = list_weights();
    grpc_slice_unref(call->details.method);
    grpc_slice_unref(call->details.host);
    finish(call, message, message ? GRPC_STATUS_OK : GRPC_STATUS_UNIMPLEMENTED);
}

static void on_arrived(struct call *call)
{
    grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    close.data.recv_close_on_server.cancelled = &call->cancelled;
    if (call->method == METHOD_EINSUM) {
        grpc_byte_buffer *message =
            call->received ? answer(call->thread, call->received, false) : NULL;
        start(call, &close, 1, EVENT_CLOSED);
        finish(call, message, message ? GRPC_STATUS_OK : GRPC_STATUS_INVALID_ARGUMENT);
        if (call->received)
            grpc_byte_buffer_destroy(call->received);
        call->received = NULL;
        return;
    }
    start(call, &close, 1, EVENT_CLOSED);
    if (call->method == METHOD_OTHER) {
        on_other_arrived(call);
        return;
    }
    grpc_op op = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    start(call, &op, 1, EVENT_STARTED);
    read_next(call);
}

static void destroy(struct call *call)
{
    struct outgoing *outgoing;
    while ((outgoing = call->first) != NULL) {
        call->first = outgoing->next;
        grpc_byte_buffer_destroy(outgoing->message);
        free(outgoing);
    }
    if (call->grpc)
        grpc_call_unref(call->grpc);
    grpc_metadata_array_destroy(&call->metadata);
    free(call);
}

static void drop_sent(struct call *call)
{
    if (call->sending)
        grpc_byte_buffer_destroy(call->sending);
    call->sending = NULL;
}

static void on_event(const struct tag *tag)
{
    struct call *call = tag->call;
    call->pending--;
    switch (tag->event) {
    case EVENT_ARRIVED:
        arm(call->thread, call->method);
        on_arrived(call);
        break;
    case EVENT_RECEIVED:
        on_stream_received(call);
        break;
    case EVENT_SENT:
        drop_sent(call);
        call->in_flight--;
        stream_go_on(call);
        break;
    case EVENT_FINISHED:
        drop_sent(call);
        break;
    case EVENT_STARTED:
        break;
    case EVENT_CLOSED:
        call->half_closed = true; // a cancelled stream reads no more
        break;
    case EVENTS:
        abort();
    }
    if (call->pending == 0)
        destroy(call);
}

static void *serve(void *argument)
{
    struct thread *thread = argument;
    for (;;) {
        grpc_event event =
            grpc_completion_queue_next(thread->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
        if (event.type == GRPC_OP_COMPLETE) // what fails is followed by its call's end
            on_event(event.tag);
    }
}

// ---- sockets

// Prints the address with the port that it got.
static int listen_unix(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    unlink(path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1024))
        fail(path);
    printf(" unix:%s", path);
    return fd;
}

static int listen_tcp(const char *text)
{
    const char *colon = strrchr(text, ':');
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port =
                                      htons((uint16_t)strtoul(colon ? colon + 1 : text, NULL, 10))};
    socklen_t bytes = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
        bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1024) ||
        getsockname(fd, (struct sockaddr *)&address, &bytes))
        fail(text);
    printf(" 127.0.0.1:%d", ntohs(address.sin_port));
    return fd;
}

static void take_connection(int listener, bool is_unix, grpc_server_credentials *credentials)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return;
    int bytes = SOCKET_BUFFER_BYTES, on = 1;
    if (is_unix)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    else
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    grpc_server_add_channel_from_fd(server, fd, credentials);
}

static void accept_until_told(const char *const *listens, size_t listens_n, int signals)
{
    struct pollfd polled[LISTEN_MAX + 1] = {{.fd = signals, .events = POLLIN}};
    printf("ready");
    for (size_t i = 0; i < listens_n; i++) {
        bool is_unix = strncmp(listens[i], "unix:", 5) == 0;
        int fd = is_unix ? listen_unix(listens[i] + 5) : listen_tcp(listens[i]);
        polled[i + 1] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    printf("\n");
    fflush(stdout);
    grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
    while (!(polled[0].revents & POLLIN)) {
        poll(polled, listens_n + 1, -1);
        for (size_t i = 0; i < listens_n; i++)
            if (polled[i + 1].revents & POLLIN)
                take_connection(polled[i + 1].fd, strncmp(listens[i], "unix:", 5) == 0,
                                credentials);
    }
    grpc_server_credentials_release(credentials);
    for (size_t i = 0; i < listens_n; i++) {
        close(polled[i + 1].fd);
        if (strncmp(listens[i], "unix:", 5) == 0)
            unlink(listens[i] + 5);
    }
}

// ---- start and stop

static void create_server(void)
{
    // The daemon's own, see rpc.c.
    grpc_arg args[] = {
        {.type = GRPC_ARG_INTEGER,
         .key = (char *)(uintptr_t)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
         .value.integer = MESSAGE_BYTES_MAX},
        {.type = GRPC_ARG_INTEGER,
         .key = (char *)(uintptr_t)GRPC_ARG_MAX_SEND_MESSAGE_LENGTH,
         .value.integer = -1},
        {.type = GRPC_ARG_INTEGER,
         .key = (char *)(uintptr_t)GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET,
         .value.integer = 1},
    };
    grpc_channel_args channel_args = {.num_args = ARRAY_LEN(args), .args = args};
    server = grpc_server_create(&channel_args, NULL);
    registered[METHOD_EINSUM] = grpc_server_register_method(
        server, paths[METHOD_EINSUM], NULL, GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER, 0);
    registered[METHOD_STREAM] =
        grpc_server_register_method(server, paths[METHOD_STREAM], NULL, GRPC_SRM_PAYLOAD_NONE, 0);
}

static void start_threads(uint32_t threads_n)
{
    for (uint32_t i = 0; i < threads_n; i++) {
        threads[i].queue = grpc_completion_queue_create_for_next(NULL);
        grpc_server_register_completion_queue(server, threads[i].queue, NULL);
    }
    grpc_server_start(server);
    for (uint32_t i = 0; i < threads_n; i++) {
        for (enum method method = 0; method < METHODS; method++)
            for (int slot = 0; slot < SLOTS; slot++)
                arm(&threads[i], method);
        if (pthread_create(&threads[i].pthread, NULL, serve, &threads[i]) != 0)
            fail("thread");
    }
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"listen", required_argument, NULL, 'l'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"weights", required_argument, NULL, 'w'},
                                            {0}};
    const char *listens[LISTEN_MAX];
    size_t listens_n = 0;
    cpu_set_t cores;
    sched_getaffinity(0, sizeof cores, &cores);
    uint32_t threads_n = ((uint32_t)CPU_COUNT(&cores) + 3) / 4; // as the daemon's rpc_threads
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'l' && listens_n < LISTEN_MAX)
            listens[listens_n++] = optarg;
        else if (option == 't')
            threads_n = (uint32_t)strtoul(optarg, NULL, 10);
        else if (option == 'w')
            weights_n = (uint32_t)strtoul(optarg, NULL, 10);
        else
            exit(2);
    }
    if (listens_n == 0 || threads_n < 1 || threads_n > THREADS_MAX || weights_n < 1 ||
        weights_n > WEIGHTS_MAX) {
        fprintf(stderr, "usage: bare_server [--threads N] [--weights N] --listen ADDRESS ...\n");
        return 2;
    }
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 64 << 20);
    zeros_bytes = (uint64_t)TOKENS_MAX * GROUPS * OUTPUT_DIM * 4;
    zeros = aligned_alloc(4096, zeros_bytes);
    if (!zeros)
        fail("zeros");
    memset(zeros, 0, zeros_bytes); // touched, as a batch's memory is

    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    pthread_sigmask(SIG_BLOCK, &ends, NULL);
    signal(SIGPIPE, SIG_IGN);
    grpc_init();
    create_server();
    start_threads(threads_n);
    accept_until_told(listens, listens_n, signalfd(-1, &ends, SFD_CLOEXEC));
    _exit(0); // nothing is kept, so nothing needs an orderly end
}
