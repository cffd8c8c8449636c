// The addresses from which a connection was cut off lately: kept out for a while, suspects for some time
// after, for whom limits are lower. And the faults of all connections of an address together: who is past
// HTTP/2's limits loses the connection by gRPC, and opens the next. An address is that of TCP; of other
// families none is kept out, suspected or counted. Main thread, but for adding to suspects_faults.
#pragma once

#include <netinet/in.h>
#include <stdatomic.h>
#include <sys/socket.h>

#include "rate.h"

enum {
    SUSPECTS_MAX = 64, // remembered; the oldest gives way
    SUSPECTS_SETS_LOG2 = 10,
    SUSPECTS_SET = 4,
};

struct suspects {
    uint64_t penalty_ns, faults_max, seed;
    uint64_t until_ns; // the last one's forgotten_ns
    struct suspects_address {
        struct in6_addr address;         // of IPv4 as mapped into IPv6's
        uint64_t penalty_ns;             // doubled each time again
        uint64_t until_ns, forgotten_ns; // kept out; a suspect
    } addresses[SUSPECTS_MAX];
    uint32_t next;
    // In sets, by hash. The one of which nothing was heard for longest gives way, if that is more than a
    // second; where there is none, the next address of a set is not counted.
    struct suspects_faults {
        struct in6_addr address;
        _Atomic uint64_t faults; // of all time, whoever had the place
        struct rate rate;
    } faults[1 << SUSPECTS_SETS_LOG2][SUSPECTS_SET];
};

// An address is kept out for `penalty_ms` the first time, and has a multiple of `faults_max` in a second for
// its connections together. `seed` is nobody's to guess: which addresses share a set depends on it.
void suspects_init(struct suspects *suspects, uint32_t penalty_ms, uint32_t faults_max,
                   uint64_t seed);

// A connection from there has been cut off.
void suspects_punish(struct suspects *suspects, const struct sockaddr_storage *peer,
                     uint64_t now_ns);

enum suspects_standing { STANDING_GOOD, STANDING_SUSPECT, STANDING_KEPT_OUT };
enum suspects_standing suspects_standing(const struct suspects *suspects,
                                         const struct sockaddr_storage *peer, uint64_t now_ns);
// Whether anybody is kept out or a suspect.
bool suspects_any(const struct suspects *suspects, uint64_t now_ns);

// What counts an address's faults, for as long as `suspects` is there; NULL: nothing does.
_Atomic uint64_t *suspects_faults(struct suspects *suspects, const struct sockaddr_storage *peer,
                                  uint64_t now_ns);
// That one connection may have in a second.
uint64_t suspects_faults_max(const struct suspects *suspects, bool suspect);
// Whether an address has had too many in this second.
bool suspects_has_too_many(struct suspects *suspects, const struct sockaddr_storage *peer,
                           bool suspect, uint64_t now_ns);
