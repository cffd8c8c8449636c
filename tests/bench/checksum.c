// What CRC-32C costs beside the copy that every request has anyway, by size; and whether summing inside
// the copy would spare anything.
//
//     build/release/tests/bench/checksum
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/crc32c.h"
#include "server/base.h"

enum { TOKEN_BYTES = 8 * 4096 + 8 * 32 * 4, PIECE_BYTES = 8192, WORK_BYTES = 1 << 29 };

enum way { SUM, COPY, COPY_THEN_SUM, SUM_IN_COPY, WAYS };

static uint32_t once(enum way way, uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    uint32_t crc = 0;
    if (way == COPY || way == COPY_THEN_SUM)
        memcpy(to, from, bytes);
    __asm__ volatile("" : : "r"(to) : "memory");
    if (way == SUM || way == COPY_THEN_SUM)
        crc = crc32c_extend(0, from, bytes);
    for (uint64_t at = 0; way == SUM_IN_COPY && at < bytes; at += PIECE_BYTES) {
        uint64_t n = bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES;
        memcpy(to + at, from + at, n);
        crc = crc32c_extend(crc, to + at, n);
    }
    return crc;
}

int main(void)
{
    static const uint32_t tokens[] = {1, 8, 64, 512};
    uint8_t *from = malloc(512 * TOKEN_BYTES), *to = malloc(512 * TOKEN_BYTES);
    if (!from || !to)
        return 1;
    memset(from, 7, 512 * TOKEN_BYTES);
    memset(to, 0, 512 * TOKEN_BYTES);
    printf("us for each token (%d bytes): summed, copied, copied then summed, summed in the copy\n",
           TOKEN_BYTES);
    for (size_t i = 0; i < ARRAY_LEN(tokens); i++) {
        uint64_t bytes = (uint64_t)tokens[i] * TOKEN_BYTES, rounds = WORK_BYTES / bytes;
        double us[WAYS];
        for (enum way way = 0; way < WAYS; way++) {
            once(way, to, from, bytes);
            uint64_t began = now_ns(), sink = 0;
            for (uint64_t n = 0; n < rounds; n++)
                sink += once(way, to, from, bytes);
            us[way] = (double)(now_ns() - began) / 1e3 / (double)(rounds * tokens[i]);
            __asm__ volatile("" : : "r"(sink));
        }
        printf("%4u tokens  %.2f  %.2f  %.2f  %.2f\n", tokens[i], us[SUM], us[COPY],
               us[COPY_THEN_SUM], us[SUM_IN_COPY]);
    }
    free(to);
    free(from);
    return 0;
}
