// What the supervisor that started the daemon is told, by systemd's protocol (Type=notify). Where
// there is none, nothing is sent. Any thread.
#pragma once

#include <stdint.h>

// While weights are read: how far that is, and that it goes on, so that a start may take as long as
// it needs, but not hang.
void supervisor_loading(uint32_t weights_done, uint32_t weights_total);
// From here on callers are answered.
void supervisor_ready(const char *addresses);
// The configuration is being read again; and how that ended: `refused` NULL, or why it was not
// applied.
void supervisor_reloading(void);
void supervisor_reloaded(const char *addresses, const char *refused);
// The end has begun, and takes no longer than this.
void supervisor_stopping(uint64_t ms_max);

// How often to call supervisor_alive: twice as often as the supervisor must hear it; 0: not at all.
uint64_t supervisor_alive_ms(void);
void supervisor_alive(void);
