// The Open Inference Protocol's hot messages, ModelInferRequest and ModelInferResponse, read and
// written as wire.h does with its own: one walk over the tags, no byte of a raw tensor touched.
#pragma once

#include "wire.h"

enum {
    WIRE_INFER_VERSION_BYTES_MAX = 16,
    WIRE_INFER_ID_BYTES_MAX = 256,
    WIRE_INFER_NAME_BYTES_MAX = 64, // of a tensor
    WIRE_INFER_TYPE_BYTES_MAX = 16, // of datatypes and layouts
    WIRE_INFER_RANK_MAX = 8,
    WIRE_INFER_KERNEL_BYTES_MAX = 128, // of a response
    WIRE_INFER_INPUTS_MAX = 2,         // more, or a second output, is INVALID_ARGUMENT
};

struct wire_infer_input {
    char name[WIRE_INFER_NAME_BYTES_MAX + 1];
    char datatype[WIRE_INFER_TYPE_BYTES_MAX + 1];
    char dtype[WIRE_INFER_TYPE_BYTES_MAX + 1]; // parameters; "": not given
    char layout[WIRE_INFER_TYPE_BYTES_MAX + 1];
    int64_t shape[WIRE_INFER_RANK_MAX]; // as sent: any value
    uint32_t rank;
    struct wire_range message; // the InferInputTensor
    bool contents;             // it holds such a field
};

// Parameters that were not given are "" and 0.
struct wire_infer {
    char model_name[WIRE_WEIGHT_BYTES_MAX + 1];
    char model_version[WIRE_INFER_VERSION_BYTES_MAX + 1];
    char id[WIRE_INFER_ID_BYTES_MAX + 1];
    char activation_layout[WIRE_INFER_TYPE_BYTES_MAX + 1];
    char scale_layout[WIRE_INFER_TYPE_BYTES_MAX + 1];
    char output_dtype[WIRE_INFER_TYPE_BYTES_MAX + 1]; // of the request
    char kernel[WIRE_KERNEL_BYTES_MAX + 1];
    uint64_t group_begin, group_end, priority, timeout_us;
    struct wire_infer_sum {
        bool given;
        uint64_t value; // as sent: any
    } activations_crc32c, scales_crc32c;
    bool output_crc32c;
    uint32_t inputs_n, outputs_n, raw_n; // raw_n counts those beyond the array, too
    struct wire_infer_input inputs[WIRE_INFER_INPUTS_MAX];
    char output_name[WIRE_INFER_NAME_BYTES_MAX + 1];
    char dtype[WIRE_INFER_TYPE_BYTES_MAX + 1]; // of the requested output
    struct wire_range raw[WIRE_INFER_INPUTS_MAX];
};

// INVALID_ARGUMENT for bytes that are no ModelInferRequest; UNIMPLEMENTED for parameters that ask
// for what must not be ignored. Other parameters that are not known are.
NODISCARD enum status wire_read_infer(const grpc_slice *slices, size_t slices_n,
                                      struct wire_infer *infer, struct error *err);

// What a list of numbers holds: the field of InferTensorContents.
enum wire_infer_list { WIRE_INFER_INT32 = 2, WIRE_INFER_UINT8 = 4, WIRE_INFER_FP32 = 6 };

// Converts an input's contents to little-endian bytes. They must be of that list and fill `bytes`
// exactly. INVALID_ARGUMENT names the input.
NODISCARD enum status wire_infer_convert(const grpc_slice *slices, size_t slices_n,
                                         const struct wire_infer_input *input,
                                         enum wire_infer_list list, void *to, uint64_t bytes,
                                         struct error *err);

struct wire_infer_response {
    const char *model_name, *model_version, *id, *kernel, *output_name, *datatype;
};

enum { WIRE_INFER_HEAD_BYTES_MAX = 1536 };

// Writes all of a ModelInferResponse but the output's bytes, which must follow it at once: the head
// ends with their tag and length. Returns the head's length.
size_t wire_write_infer_head(const struct wire_infer_response *infer,
                             const struct wire_response *response,
                             uint8_t head[WIRE_INFER_HEAD_BYTES_MAX]);
