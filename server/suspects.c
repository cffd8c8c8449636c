#include "suspects.h"

#include <string.h>

enum {
    // How far a penalty may grow, and for how many times its length its address is a suspect.
    PENALTY_TIMES_MAX = 32,
    SUSPECT_TIMES = 8,
    // Of faults_max an address has so much for its connections together, and a suspect so little.
    ADDRESS_FAULTS_TIMES = 4,
    SUSPECTS_FAULTS_PART = 8,
};

void suspects_init(struct suspects *suspects, uint32_t penalty_ms, uint32_t faults_max,
                   uint64_t seed)
{
    memset(suspects, 0, sizeof *suspects);
    suspects->penalty_ns = penalty_ms * 1000000ull;
    suspects->faults_max = faults_max;
    suspects->seed = seed;
}

// False: of another family than TCP's.
static bool address_of(const struct sockaddr_storage *peer, struct in6_addr *address)
{
    if (peer->ss_family == AF_INET6) {
        *address = ((const struct sockaddr_in6 *)peer)->sin6_addr;
        return true;
    }
    if (peer->ss_family != AF_INET)
        return false;
    *address = (struct in6_addr){.s6_addr = {[10] = 0xff, [11] = 0xff}};
    memcpy(&address->s6_addr[12], &((const struct sockaddr_in *)peer)->sin_addr, 4);
    return true;
}

// ---- kept out, suspects

// Its number; SUSPECTS_MAX: neither kept out nor a suspect.
static size_t find(const struct suspects *suspects, const struct in6_addr *address, uint64_t now_ns)
{
    size_t i = 0;
    while (i < SUSPECTS_MAX &&
           (suspects->addresses[i].forgotten_ns <= now_ns ||
            memcmp(&suspects->addresses[i].address, address, sizeof *address) != 0))
        i++;
    return i;
}

void suspects_punish(struct suspects *suspects, const struct sockaddr_storage *peer,
                     uint64_t now_ns)
{
    struct in6_addr from;
    if (!address_of(peer, &from))
        return;
    uint64_t least = suspects->penalty_ns;
    size_t found = find(suspects, &from, now_ns);
    bool again = found < SUSPECTS_MAX;
    struct suspects_address *address =
        &suspects->addresses[again ? found : suspects->next++ % SUSPECTS_MAX];
    if (!again)
        *address = (struct suspects_address){.address = from, .penalty_ns = least};
    else if (address->until_ns <= now_ns && address->penalty_ns < PENALTY_TIMES_MAX * least)
        address->penalty_ns *= 2;
    address->until_ns = now_ns + address->penalty_ns;
    address->forgotten_ns = address->until_ns + SUSPECT_TIMES * address->penalty_ns;
    if (suspects->until_ns < address->forgotten_ns)
        suspects->until_ns = address->forgotten_ns;
}

bool suspects_any(const struct suspects *suspects, uint64_t now_ns)
{
    return suspects->until_ns > now_ns;
}

enum suspects_standing suspects_standing(const struct suspects *suspects,
                                         const struct sockaddr_storage *peer, uint64_t now_ns)
{
    struct in6_addr from;
    if (!suspects_any(suspects, now_ns) || !address_of(peer, &from))
        return STANDING_GOOD;
    size_t found = find(suspects, &from, now_ns);
    if (found == SUSPECTS_MAX)
        return STANDING_GOOD;
    return suspects->addresses[found].until_ns > now_ns ? STANDING_KEPT_OUT : STANDING_SUSPECT;
}

// ---- faults

static struct suspects_faults *set_of(struct suspects *suspects, const struct in6_addr *address)
{
    uint64_t halves[2];
    memcpy(halves, address, sizeof halves);
    // The high bits of a product are of all that was multiplied; a second one lets the seed decide who meets.
    const uint64_t odd = 0x9E3779B97F4A7C15u;
    uint64_t hash = suspects->seed;
    for (size_t i = 0; i < ARRAY_LEN(halves); i++) {
        hash = (hash ^ halves[i]) * odd;
        hash ^= hash >> 32;
    }
    return suspects->faults[hash * odd >> (64 - SUSPECTS_SETS_LOG2)];
}

// Nothing has come since the last look at it, and that was before this second.
static bool is_idle(const struct suspects_faults *of, uint64_t now_ns)
{
    return atomic_load_explicit(&of->faults, memory_order_relaxed) == of->rate.last &&
           now_ns - of->rate.since_ns > 1000000000u;
}

static struct suspects_faults *faults_of(struct suspects *suspects,
                                         const struct sockaddr_storage *peer, uint64_t now_ns)
{
    struct in6_addr address;
    if (!address_of(peer, &address))
        return NULL;
    struct suspects_faults *set = set_of(suspects, &address), *stalest = NULL;
    for (size_t i = 0; i < SUSPECTS_SET; i++) {
        if (memcmp(&set[i].address, &address, sizeof address) == 0)
            return &set[i];
        if (is_idle(&set[i], now_ns) && (!stalest || set[i].rate.since_ns < stalest->rate.since_ns))
            stalest = &set[i];
    }
    if (!stalest)
        return NULL;
    stalest->address = address;
    stalest->rate.before = stalest->rate.last;
    stalest->rate.since_ns = now_ns;
    return stalest;
}

_Atomic uint64_t *suspects_faults(struct suspects *suspects, const struct sockaddr_storage *peer,
                                  uint64_t now_ns)
{
    struct suspects_faults *of = faults_of(suspects, peer, now_ns);
    return of ? &of->faults : NULL;
}

uint64_t suspects_faults_max(const struct suspects *suspects, bool suspect)
{
    return suspects->faults_max / (suspect ? SUSPECTS_FAULTS_PART : 1);
}

bool suspects_has_too_many(struct suspects *suspects, const struct sockaddr_storage *peer,
                           bool suspect, uint64_t now_ns)
{
    struct suspects_faults *of = faults_of(suspects, peer, now_ns);
    if (!of)
        return false;
    uint64_t faults = atomic_load_explicit(&of->faults, memory_order_relaxed);
    return rate_within_a_second(&of->rate, faults, now_ns) >
           ADDRESS_FAULTS_TIMES * suspects_faults_max(suspects, suspect);
}
