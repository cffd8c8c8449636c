// What the files of einsumctl share: one file per group of commands (ctl_*.c), a table of them in
// einsumctl.c. Everything runs on the main thread unless a file says otherwise.
//
// A command gets its parsed arguments, prints to stdout (one JSON document with --json), reports to
// stderr, and returns its exit code.
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "../server/status.h"
#include "einsum_client.h"

enum ctl_exit {
    CTL_OK = 0,
    CTL_FAILED = 1,      // the operation was carried out and failed
    CTL_USAGE = 2,       // the command line is wrong
    CTL_UNREACHABLE = 3, // no answer: not listening, connection lost, or the deadline passed
    CTL_REFUSED = 4,     // the server answered with an error
};

// ---- the command line ---------------------------------------------------------------------------

struct ctl_option {
    const char *name;  // without the dashes; a table of options ends with NULL
    const char *value; // what its argument is called in the help; NULL: a switch
    const char *help;  // with its default
};

enum { CTL_GIVEN_MAX = 64 };

struct ctl_args {
    const struct ctl_command *command;
    int operands_n; // what is no option
    const char *operands[CTL_GIVEN_MAX];
    int given_n; // options in the order given
    struct {
        int option; // index into the command's options
        const char *value;
    } given[CTL_GIVEN_MAX];
};

struct ctl {
    const char *endpoint;
    uint32_t timeout_ms, retry_ms;                                                 // 0: not given
    const char *tls_ca, *tls_certificate, *tls_key, *tls_server_name, *token_file; // NULL: likewise
    bool json;
    struct einsum_client *client; // after ctl_connect
};

struct ctl_command {
    const char *name;
    const char *operands; // for the usage line
    const char *summary;  // one line
    const char *help;     // what it answers, and an example; lines
    const struct ctl_option *options;
    int operands_min, operands_max;
    enum ctl_exit (*run)(struct ctl *ctl, const struct ctl_args *args);
};

// The last value given, NULL if none.
const char *ctl_value(const struct ctl_args *args, int option);
bool ctl_has(const struct ctl_args *args, int option);
// All values given, in order; returns how many, at most CTL_GIVEN_MAX.
size_t ctl_values(const struct ctl_args *args, int option, const char *values[CTL_GIVEN_MAX]);

// Whole numbers, and one of a list of words (NULL-terminated; the result is its index). `*value`
// keeps what it holds if the option is not given. false: said so, the command returns CTL_USAGE.
NODISCARD bool ctl_number(const struct ctl_args *args, int option, uint64_t min, uint64_t max,
                          uint64_t *value);
NODISCARD bool ctl_real(const struct ctl_args *args, int option, double min, double max,
                        double *value);
NODISCARD bool ctl_word(const struct ctl_args *args, int option, const char *const *words,
                        int *index);
// A list as in "1,8,64"; returns how many, 0 if it said what is wrong.
size_t ctl_number_list(const char *name, const char *text, uint64_t min, uint64_t max,
                       uint32_t *values, size_t values_max);

// Prints to stderr, and returns CTL_USAGE.
enum ctl_exit ctl_usage_error(const char *format, ...) PRINTF_LIKE(1, 2);

// ---- reporting ----------------------------------------------------------------------------------

// Fills in what every command shares of a client's options; a command may change them.
void ctl_client_options(const struct ctl *ctl, struct einsum_client_options *options);
// Makes ctl->client; `options` NULL: those of ctl_client_options. false: reported.
NODISCARD bool ctl_connect(struct ctl *ctl, const struct einsum_client_options *options);

// Reports an error, with --json as {"error": {...}} on stdout, and returns its exit code.
enum ctl_exit ctl_fail(const struct ctl *ctl, const struct einsum_client_error *error);
enum ctl_exit ctl_fail_local(const struct ctl *ctl, const struct error *err); // not of the server
json_t *ctl_error_json(const struct einsum_client_error *error);

void ctl_print_json(json_t *json);   // takes it
json_t *ctl_real_json(double value); // null for what JSON cannot hold

// "32.0 MiB", "1.25 ms": for people. `text` is the buffer, and is returned.
enum { CTL_TEXT_BYTES = 32 };
const char *ctl_bytes(uint64_t bytes, char text[CTL_TEXT_BYTES]);
const char *ctl_duration(uint64_t ns, char text[CTL_TEXT_BYTES]);

// A bar on stderr if that is a terminal; otherwise nothing. Any one thread at a time.
struct ctl_progress {
    const char *label;
    bool shown;
    uint64_t drawn_ns;
};
void ctl_progress_init(struct ctl_progress *progress, const struct ctl *ctl, const char *label);
void ctl_progress_draw(struct ctl_progress *progress, uint64_t done, uint64_t total,
                       const char *note);
void ctl_progress_end(struct ctl_progress *progress); // wipes it

// From here on SIGINT and SIGTERM set a flag, once; a second one kills.
void ctl_catch_signals(void);
bool ctl_interrupted(void);

// ---- what commands have in common ---------------------------------------------------------------

// The words of the flags for layouts, types and priorities; index 0 is no word's.
extern const char *const ctl_recipes[],
    *const ctl_activation_layouts[], *const ctl_scale_layouts[], *const ctl_scale_types[],
                                                                     *const ctl_output_types[],
                                                                         *const ctl_priorities[];

json_t *ctl_weight_json(const struct einsum_client_weight *weight);

// The entry of an option that several commands have.
#define CTL_OPTION_KERNEL                                                                          \
    {                                                                                              \
        "kernel", "NAME", "one of those that info shows; default the server's choice"              \
    }

// Likewise; read by the next.
#define CTL_OPTION_TRANSPORT                                                                       \
    {                                                                                              \
        "transport", "T",                                                                          \
            "grpc (default), shm (gRPC, tensors in shared memory), ring (all of it there), or "    \
            "auto: the best that the server offers"                                                \
    }
// Likewise; it sets options.checksums.
#define CTL_OPTION_CHECKSUMS                                                                       \
    {                                                                                              \
        "checksums", NULL, "send tensors with their CRC-32C, and check that of outputs"            \
    }
NODISCARD bool ctl_transport(const struct ctl_args *args, int option,
                             struct einsum_client_options *options);

// Random tensors of one request: activations and scales, or attention and positions.
struct ctl_inputs {
    uint8_t *activations, *scales; // to be freed
    uint64_t activations_bytes, scales_bytes;
};
uint64_t ctl_random_next(uint64_t *state); // splitmix64
// E4M3 values like those of a normal distribution, never NaN; scales that bring activations to
// magnitude one, FP32 ones not powers of two. false: no memory.
NODISCARD bool ctl_random_inputs(const struct einsum_client_weight *weight, uint32_t tokens,
                                 enum einsum_client_scale_layout scale_layout,
                                 enum einsum_client_scale_type scale_type, uint64_t seed,
                                 struct ctl_inputs *inputs);
void ctl_inputs_deinit(struct ctl_inputs *inputs);
// Makes them the two tensors that the request's operation takes; it borrows them.
void ctl_inputs_lend(const struct ctl_inputs *inputs, struct einsum_client_request *request);

// Bytes of a request's scales, of all groups of a weight.
uint64_t ctl_scales_bytes(const struct einsum_client_weight *weight, uint32_t tokens,
                          enum einsum_client_scale_layout layout,
                          enum einsum_client_scale_type type);

// ---- the commands -------------------------------------------------------------------------------

extern const struct ctl_command ctl_command_token;
extern const struct ctl_command ctl_command_info, ctl_command_health, ctl_command_selftest;
extern const struct ctl_command ctl_command_weights;
extern const struct ctl_command ctl_command_run, ctl_command_check, ctl_command_bench;
extern const struct ctl_command ctl_command_make_checkpoint;
