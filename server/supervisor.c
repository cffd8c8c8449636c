// See supervisor.h. A message that cannot be sent is nobody's to repair: the supervisor's own
// timeouts decide, so the results are not looked at.
#include "supervisor.h"

#include <inttypes.h>
#include <systemd/sd-daemon.h>

#include "base.h"

enum { LOADING_EXTENDS_S = 60 }; // progress comes every few seconds

void supervisor_loading(uint32_t weights_done, uint32_t weights_total)
{
    sd_notifyf(0,
               "STATUS=loading: %" PRIu32 " of %" PRIu32 " weights\nEXTEND_TIMEOUT_USEC=%d000000",
               weights_done, weights_total, LOADING_EXTENDS_S);
}

void supervisor_ready(const char *addresses)
{
    sd_notifyf(0, "READY=1\nSTATUS=serving on %s", addresses);
}

// systemd from version 253 on compares the time with that of its own request (Type=notify-reload).
void supervisor_reloading(void)
{
    sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%" PRIu64 "\nSTATUS=reading the configuration again",
               now_ns() / 1000);
}

void supervisor_reloaded(const char *addresses, const char *refused)
{
    if (refused)
        sd_notifyf(0, "READY=1\nSTATUS=serving on %s, by the old configuration: %s", addresses,
                   refused);
    else
        supervisor_ready(addresses);
}

void supervisor_stopping(uint64_t ms_max)
{
    sd_notifyf(0, "STOPPING=1\nSTATUS=draining\nEXTEND_TIMEOUT_USEC=%" PRIu64, ms_max * 1000);
}

uint64_t supervisor_alive_ms(void)
{
    uint64_t us = 0;
    if (sd_watchdog_enabled(0, &us) <= 0)
        return 0;
    return us / 2000 > 0 ? us / 2000 : 1;
}

void supervisor_alive(void)
{
    sd_notify(0, "WATCHDOG=1");
}
