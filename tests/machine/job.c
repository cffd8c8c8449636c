#include "simulated_names.h"

#include "server/job.c" // NOLINT(bugprone-suspicious-include)
