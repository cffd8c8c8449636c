// HTTP/2 frames as a fuzzer's mutator handles them: it changes frames and leaves their lengths right,
// so that what comes behind a change is still read as what it was.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    FRAME_HEADER_BYTES = 9,
    FRAMES_MAX = 64,
    FRAME_DATA = 0,
    FRAME_HEADERS = 1,
    FRAME_KINDS = 10,
    FLAG_END_STREAM = 1,
    FLAG_END_HEADERS = 4,
    GRPC_PREFIX_BYTES = 5,
};

struct frame_at {
    size_t offset, bytes; // with its header
};

static inline uint32_t frames_big_endian(const uint8_t *at, size_t bytes)
{
    uint32_t value = 0;
    for (size_t i = 0; i < bytes; i++)
        value = value << 8 | at[i];
    return value;
}

static inline void frames_write_big_endian(uint8_t *at, size_t bytes, size_t value)
{
    for (size_t i = bytes; i-- > 0; value >>= 8)
        at[i] = (uint8_t)value;
}

// What is no whole frame at the end counts as one.
static inline size_t frames_find(const uint8_t *bytes, size_t n, struct frame_at frames[FRAMES_MAX])
{
    size_t found = 0;
    for (size_t at = 0; at < n && found < FRAMES_MAX;) {
        size_t left = n - at, frame = left;
        if (left >= FRAME_HEADER_BYTES)
            frame = FRAME_HEADER_BYTES + frames_big_endian(bytes + at, 3);
        if (frame > left || found == FRAMES_MAX - 1)
            frame = left;
        frames[found++] = (struct frame_at){at, frame};
        at += frame;
    }
    return found;
}

// Makes room for `bytes` at `at` in place of `replaced`. False: it would be too much.
static inline bool frames_splice(uint8_t *all, size_t *n, size_t n_max, size_t at, size_t replaced,
                                 size_t bytes)
{
    if (*n - replaced + bytes > n_max)
        return false;
    memmove(all + at + bytes, all + at + replaced, *n - at - replaced);
    *n = *n - replaced + bytes;
    return true;
}

static inline size_t frames_header(uint8_t *to, size_t payload, unsigned kind, unsigned flags,
                                   uint32_t stream)
{
    frames_write_big_endian(to, 3, payload);
    to[3] = (uint8_t)kind;
    to[4] = (uint8_t)flags;
    frames_write_big_endian(to + 5, 4, stream);
    return FRAME_HEADER_BYTES;
}

static inline size_t frames_literal(uint8_t *to, const char *name, const char *value)
{
    size_t name_bytes = strlen(name), value_bytes = strlen(value);
    to[0] = 0x10; // never indexed, not by Huffman's code
    to[1] = (uint8_t)name_bytes;
    memcpy(to + 2, name, name_bytes);
    to[2 + name_bytes] = (uint8_t)value_bytes;
    memcpy(to + 3 + name_bytes, value, value_bytes);
    return 3 + name_bytes + value_bytes;
}

// A call of gRPC; `to` has room for 512 bytes.
static inline size_t frames_call(uint8_t *to, const char *path, uint32_t stream, unsigned flags)
{
    size_t n = FRAME_HEADER_BYTES;
    n += frames_literal(to + n, ":method", "POST");
    n += frames_literal(to + n, ":scheme", "http");
    n += frames_literal(to + n, ":path", path);
    n += frames_literal(to + n, ":authority", "localhost");
    n += frames_literal(to + n, "te", "trailers");
    n += frames_literal(to + n, "content-type", "application/grpc");
    frames_header(to, n - FRAME_HEADER_BYTES, FRAME_HEADERS, flags | FLAG_END_HEADERS, stream);
    return n;
}

static inline size_t frames_message(uint8_t *to, const uint8_t *bytes, size_t n, uint32_t stream,
                                    unsigned flags)
{
    size_t at = frames_header(to, GRPC_PREFIX_BYTES + n, FRAME_DATA, flags, stream);
    to[at] = 0;
    frames_write_big_endian(to + at + 1, 4, n);
    if (n > 0)
        memcpy(to + at + GRPC_PREFIX_BYTES, bytes, n);
    return at + GRPC_PREFIX_BYTES + n;
}
