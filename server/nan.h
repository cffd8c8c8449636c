// Looks at outputs for NaN, one request in nan_sample: a kernel that goes wrong often shows it so. NaN that
// came with the request is its caller's; any other is the weight's, or ours.
#pragma once

#include "placement.h"

struct service_context;

// Of a job, or a part of one, that went well and still has its tensors.
void nan_look(struct service_context *context, const struct job *job,
              const struct placement *placement);
