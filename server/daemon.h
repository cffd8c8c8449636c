// The daemon as a whole: what is started in which order, and how it ends.
#pragma once

#include "config.h"

enum daemon_exit {
    DAEMON_EXIT_DRAINED = 0,     // SIGTERM or SIGINT, everything answered
    DAEMON_EXIT_FAILED = 1,      // could not start
    DAEMON_EXIT_DEVICE_LOST = 3, // a supervisor should start it again
    DAEMON_EXIT_HUNG = 4,        // likewise, and nothing in flight was answered
};

// Serves until it is told to stop. `config` is owned by the caller; every "automatic" in it is
// resolved here. `config_path` is where it came from, to be read again on SIGHUP; NULL: no file.
enum daemon_exit daemon_run(struct config *config, const char *config_path);
