// CRC-32C (Castagnoli's polynomial, reflected, as iSCSI, ext4 and google-crc32c compute it), by ISA-L,
// which takes the fastest code that the processor has. Both sides include this.
#pragma once

#include <isa-l/crc.h>
#include <stddef.h>
#include <stdint.h>

// Of what `crc` covers and the bytes behind it; 0 is that of nothing.
static inline uint32_t crc32c_extend(uint32_t crc, const void *bytes, uint64_t n)
{
    enum { STEP = 1 << 30 }; // ISA-L counts in int
    const unsigned char *at = bytes;
    crc = ~crc;
    while (n > 0) {
        int step = n < STEP ? (int)n : STEP;
        crc = crc32_iscsi((unsigned char *)(uintptr_t)at, step, crc);
        at += step;
        n -= (uint64_t)step;
    }
    return ~crc;
}
