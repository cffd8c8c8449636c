// The batcher in the simulated world; the model sees each change of a job's state.
#include "simulated_names.h"

#include "model.h"

#define job_advance model_advance
#include "server/batch.c"     // NOLINT(bugprone-suspicious-include)
#include "server/scheduler.c" // NOLINT(bugprone-suspicious-include)
