// One projection a call: the life that Einsum, OutputProject and ModelInfer share.
//
//     on_message   unary_begin, decode, then unary_start or unary_fail
//     on_wake      unary_on_wake
//     on_cancel    unary_on_cancel
//     on_end       unary_on_end
#pragma once

#include "projection.h"

// The call's state of `bytes`, zeroed, whose first member is the projection. Counts the request.
void *unary_begin(struct call *call, size_t bytes, enum metrics_method method);
// Answers at once, or once the job is done.
void unary_start(struct projection *projection, const struct wire_request *request,
                 grpc_byte_buffer *message);
void unary_fail(struct projection *projection, const struct error *err);

void unary_on_wake(struct call *call);
void unary_on_cancel(struct call *call);
void unary_on_end(struct call *call);
