// Requests that are cut; the model sees what they ask of the batcher.
#include "simulated_names.h"

#include "model.h"

#define batcher_reserve_or_wait model_reserve_or_wait
#define batcher_commit model_commit
#define batcher_abandon model_abandon
#define batcher_release model_release
#include "server/cut.c" // NOLINT(bugprone-suspicious-include)
