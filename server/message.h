// protobuf-c messages to and from gRPC's byte buffers, and errors to gRPC's trailers. For
// everything but the two hot messages, which wire.h handles.
#pragma once

#include <grpc/byte_buffer.h>
#include <grpc/slice.h>
#include <protobuf-c/protobuf-c.h>

#include "status.h"

enum {
    MESSAGE_BYTES_MAX = 1 << 20,  // of a control message on the wire
    MESSAGE_ARENA_BYTES = 4 << 20 // that unpacking one may take: tiny submessages swell 76-fold
};

grpc_byte_buffer *message_pack(const ProtobufCMessage *message);

// `buffer` NULL is an empty message. INVALID_ARGUMENT: undecodable, or over the limits. Strings are
// checked to be UTF-8 without NUL. Free with message_free.
NODISCARD enum status message_unpack(const ProtobufCMessageDescriptor *descriptor,
                                     grpc_byte_buffer *buffer, ProtobufCMessage **message,
                                     struct error *err);
void message_free(ProtobufCMessage *message);

// The serialized google.rpc.Status for the trailer grpc-status-details-bin: code, text, and
// BadRequest if err->field is set, RetryInfo if err->retry_after_ms is. An empty slice if there is
// nothing to add to code and text.
grpc_slice message_error_details(const struct error *err);
