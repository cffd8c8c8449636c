// Fuzzes the whole daemon from the bytes of an HTTP/2 connection: gRPC's transport, and all services
// behind it. An input is one byte that says how it is sent, and the bytes, frames mostly:
//
//     bit 0   the preface and SETTINGS go before them
//     bit 1   in small pieces
//     bit 2   then nothing is read, and the socket closed
//     bit 3   then it is half-closed
//
// Besides not crashing: what comes back is frames, sockets are closed when connections have ended, and
// a call of somebody else is answered beside all inputs.
//
// The mutator keeps frames whole: it changes what is in them, deals them anew, and adds calls of the
// methods that there are.
#include "tests/fuzz/daemon_site.h"
#include "tests/fuzz/http2_frames.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t size_max);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t size_max, unsigned seed);

enum {
    WITH_HELLO = 1,
    IN_PIECES = 2,
    UNREAD = 4,
    HALF_CLOSED = 8,
    SILENT_MS = 3, // long enough for most replies
    CHECK_EVERY = 128,
    PAYLOAD_MAX = 4096,
    TEMPLATE_BYTES = 512,
};

static const uint8_t hello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0";
enum { HELLO_BYTES = sizeof hello }; // the last byte of SETTINGS' stream is the string's end

static const char *const paths[] = {
    "/einsum.v1.Einsum/Einsum",
    "/einsum.v1.Einsum/EinsumStream",
    "/einsum.v1.Einsum/OutputProject",
    "/einsum.v1.Einsum/LoadWeights",
    "/einsum.v1.Einsum/UnloadWeights",
    "/einsum.v1.Einsum/ListWeights",
    "/einsum.v1.Einsum/ServerInfo",
    "/einsum.v1.Einsum/SelfTest",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/inference.GRPCInferenceService/ModelReady",
    "/inference.GRPCInferenceService/ServerMetadata",
    "/inference.GRPCInferenceService/ModelMetadata",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/inference.GRPCInferenceService/ModelConfig",
    "/inference.GRPCInferenceService/ModelStatistics",
    "/inference.GRPCInferenceService/RepositoryIndex",
    "/inference.GRPCInferenceService/RepositoryModelLoad",
    "/inference.GRPCInferenceService/RepositoryModelUnload",
    "/nobody.Knows/This",
};

// ---- an input

static void check_frames(const uint8_t *reply, size_t n)
{
    static const char not_http2[] = "HTTP/1.1 400 ";
    if (n > sizeof not_http2 && memcmp(reply, not_http2, sizeof not_http2 - 1) == 0)
        return;
    for (size_t at = 0; n - at >= FRAME_HEADER_BYTES;) {
        size_t frame = FRAME_HEADER_BYTES + frames_big_endian(reply + at, 3);
        ASSERT(reply[at + 3] < FRAME_KINDS);
        if (frame > n - at)
            return; // more than was kept
        at += frame;
    }
}

static void talk(const uint8_t *bytes, size_t n, uint8_t how)
{
    static uint8_t reply[65536];
    size_t received = 0, piece = how & IN_PIECES ? 1 + how / 16 : 65536;
    int fd = site_connect("grpc.sock");
    bool whole = !(how & WITH_HELLO) || site_send(fd, hello, HELLO_BYTES, piece);
    whole = whole && site_send(fd, bytes, n, piece);
    if (whole && (how & HALF_CLOSED))
        shutdown(fd, SHUT_WR);
    if (!(how & UNREAD))
        site_receive(fd, SILENT_MS, reply, sizeof reply, &received);
    close(fd);
    check_frames(reply, received);
}

// Somebody else asks for the daemon's health.
static void check_others(void)
{
    static const uint8_t serving[] = {0, 0, 0, 0, 2, 8, 1};
    uint8_t bytes[TEMPLATE_BYTES + 64], reply[4096];
    size_t n = frames_call(bytes, "/grpc.health.v1.Health/Check", 1, 0), received = 0;
    n += frames_message(bytes + n, NULL, 0, 1, FLAG_END_STREAM);
    int fd = site_connect("grpc.sock");
    ASSERT(site_send(fd, hello, HELLO_BYTES, 65536) && site_send(fd, bytes, n, 65536));
    bool answered = false;
    for (int ms = 0; !answered && ms < SITE_PATIENCE_MS; ms += 10) {
        size_t more;
        bool ended = site_receive(fd, 10, reply + received, sizeof reply - received, &more);
        received += more;
        answered = memmem(reply, received, serving, sizeof serving) != NULL;
        ASSERT(answered || !ended);
    }
    ASSERT(answered);
    close(fd);
    site_check_sockets();
}

// For capture.py: the daemon alone, for clients to talk to.
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    if (!getenv("FUZZ_SERVE_ONLY"))
        return 0;
    site_start();
    puts(site.directory);
    fflush(stdout);
    getchar();
    exit(0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (site.inputs == 0)
        site_start();
    if (site.inputs++ % CHECK_EVERY == 0)
        check_others();
    if (size >= 2)
        talk(data + 1, size - 1, data[0]);
    return 0;
}

// ---- the mutator

static uint32_t dice;

static uint32_t below(uint32_t n)
{
    dice = dice * 1664525 + 1013904223;
    return (uint32_t)((uint64_t)(dice >> 8) * n >> 24);
}

// A new frame, of a kind that matters.
static size_t make_frame(uint8_t to[TEMPLATE_BYTES])
{
    static const uint8_t nothing[64];
    uint32_t stream = 1 + 2 * below(4);
    size_t payload = below(16), n;
    switch (below(5)) {
    case 0:
    case 1:
        return frames_call(to, paths[below(ARRAY_LEN(paths))], stream, below(4) == 0);
    case 2:
        return frames_message(to, nothing, below(sizeof nothing), stream, below(2));
    case 3: // SETTINGS, PING, WINDOW_UPDATE and others, of about the right size
        n = frames_header(to, payload = below(2) ? 4 : 8, below(FRAME_KINDS), below(2),
                          below(2) ? stream : 0);
        break;
    default:
        n = frames_header(to, payload, below(FRAME_KINDS + 2), below(256), below(8));
    }
    for (size_t i = 0; i < payload; i++)
        to[n + i] = (uint8_t)below(256);
    return n + payload;
}

static size_t insert_frame(uint8_t *bytes, size_t n, size_t n_max, size_t at)
{
    uint8_t frame[TEMPLATE_BYTES];
    size_t frame_bytes = make_frame(frame);
    if (frames_splice(bytes, &n, n_max, at, 0, frame_bytes))
        memcpy(bytes + at, frame, frame_bytes);
    return n;
}

static size_t copy_frame(uint8_t *bytes, size_t n, size_t n_max, struct frame_at from, size_t at)
{
    uint8_t frame[PAYLOAD_MAX];
    if (from.bytes > sizeof frame)
        return n;
    memcpy(frame, bytes + from.offset, from.bytes);
    if (frames_splice(bytes, &n, n_max, at, 0, from.bytes))
        memcpy(bytes + at, frame, from.bytes);
    return n;
}

// Changes what is in a frame and sets its length, and mostly that of gRPC's message, to what it is now.
static size_t change_payload(uint8_t *bytes, size_t n, size_t n_max, struct frame_at it)
{
    uint8_t payload[PAYLOAD_MAX];
    size_t before = it.bytes - FRAME_HEADER_BYTES;
    if (it.bytes < FRAME_HEADER_BYTES || before > PAYLOAD_MAX)
        return n;
    uint8_t *frame = bytes + it.offset;
    bool is_message = frame[3] == FRAME_DATA && before >= GRPC_PREFIX_BYTES && below(8) > 0;
    size_t skipped = is_message ? GRPC_PREFIX_BYTES : 0;
    memcpy(payload, frame + FRAME_HEADER_BYTES, before);
    size_t after =
        skipped + LLVMFuzzerMutate(payload + skipped, before - skipped, PAYLOAD_MAX - skipped);
    if (!frames_splice(bytes, &n, n_max, it.offset + FRAME_HEADER_BYTES, before, after))
        return n;
    if (is_message)
        frames_write_big_endian(payload + 1, 4, after - skipped);
    memcpy(frame + FRAME_HEADER_BYTES, payload, after);
    frames_write_big_endian(frame, 3, after);
    return n;
}

static void change_header(uint8_t *bytes, struct frame_at it)
{
    if (it.bytes < FRAME_HEADER_BYTES)
        return;
    uint8_t *frame = bytes + it.offset;
    switch (below(3)) {
    case 0:
        frame[3] = (uint8_t)below(FRAME_KINDS + 2);
        break;
    case 1:
        frame[4] ^= (uint8_t)(1u << below(8));
        break;
    default:
        frames_write_big_endian(frame + 5, 4, below(4) ? below(12) : dice);
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t size_max, unsigned seed)
{
    dice = seed;
    if (size < 1 + FRAME_HEADER_BYTES || below(8) == 0)
        return LLVMFuzzerMutate(data, size, size_max);
    if (below(16) == 0)
        data[0] = (uint8_t)below(256);
    // A preface of the input's own counts as frames, if odd ones; most inputs leave it to bit 0.
    struct frame_at frames[FRAMES_MAX];
    uint8_t *bytes = data + 1;
    size_t n = size - 1, n_max = size_max - 1;
    size_t frames_n = frames_find(bytes, n, frames);
    struct frame_at it = frames[below((uint32_t)frames_n)];
    size_t at = frames[below((uint32_t)frames_n)].offset;
    switch (below(10)) {
    case 0:
        n = insert_frame(bytes, n, n_max, below(2) ? n : at);
        break;
    case 1:
        n = copy_frame(bytes, n, n_max, it, at);
        break;
    case 2:
        if (frames_n > 1)
            frames_splice(bytes, &n, n_max, it.offset, it.bytes, 0);
        break;
    case 3:
    case 4:
        change_header(bytes, it);
        break;
    default:
        n = change_payload(bytes, n, n_max, it);
    }
    return 1 + n;
}
