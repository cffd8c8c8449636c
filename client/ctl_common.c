// What the commands of einsumctl have in common: values of options, errors, JSON, progress bars,
// signals, random tensors.

#include "ctl.h"

#include "../kernels/einsum.h"
#include "../kernels/fp8.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

const char *const ctl_recipes[] = {"", "1,128,128", "1,1,128", "1,32,32", "1,1,32", NULL};
const char *const ctl_activation_layouts[] = {"", "tgr", "gtr", NULL};
const char *const ctl_scale_layouts[] = {"", "tgk", "gkt", NULL};
const char *const ctl_scale_types[] = {"", "fp32", "ue8m0", NULL};
const char *const ctl_output_types[] = {"", "bf16", "fp32", NULL};
const char *const ctl_priorities[] = {"", "low", "normal", "high", NULL};

// ---- values of options --------------------------------------------------------------------------

const char *ctl_value(const struct ctl_args *args, int option)
{
    for (int i = args->given_n; i-- > 0;) {
        if (args->given[i].option == option)
            return args->given[i].value;
    }
    return NULL;
}

bool ctl_has(const struct ctl_args *args, int option)
{
    return ctl_value(args, option) != NULL;
}

size_t ctl_values(const struct ctl_args *args, int option, const char *values[CTL_GIVEN_MAX])
{
    size_t n = 0;
    for (int i = 0; i < args->given_n; i++) {
        if (args->given[i].option == option)
            values[n++] = args->given[i].value;
    }
    return n;
}

enum ctl_exit ctl_usage_error(const char *format, ...)
{
    fprintf(stderr, "einsumctl: ");
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, " (--help tells more)\n");
    return CTL_USAGE;
}

static bool parse_number(const char *text, const char **end, uint64_t *value)
{
    if (*text < '0' || *text > '9') // strtoull takes signs and spaces
        return false;
    char *stop;
    errno = 0;
    *value = strtoull(text, &stop, 10);
    *end = stop;
    return errno == 0;
}

size_t ctl_number_list(const char *name, const char *text, uint64_t min, uint64_t max,
                       uint32_t *values, size_t values_max)
{
    size_t n = 0;
    for (const char *at = text;; at++) {
        uint64_t value;
        if (n == values_max || !parse_number(at, &at, &value) || value < min || value > max ||
            (*at && *at != ',')) {
            ctl_usage_error("--%s: \"%s\" is not %s from %llu to %llu", name, text,
                            values_max == 1 ? "a whole number" : "a list of whole numbers",
                            (unsigned long long)min, (unsigned long long)max);
            return 0;
        }
        values[n++] = (uint32_t)value;
        if (!*at)
            return n;
    }
}

bool ctl_number(const struct ctl_args *args, int option, uint64_t min, uint64_t max,
                uint64_t *value)
{
    const char *text = ctl_value(args, option);
    if (!text)
        return true;
    const char *end;
    if (parse_number(text, &end, value) && !*end && *value >= min && *value <= max)
        return true;
    ctl_usage_error("--%s: \"%s\" is not a whole number from %llu to %llu",
                    args->command->options[option].name, text, (unsigned long long)min,
                    (unsigned long long)max);
    return false;
}

bool ctl_real(const struct ctl_args *args, int option, double min, double max, double *value)
{
    const char *text = ctl_value(args, option);
    if (!text)
        return true;
    char *end;
    *value = strtod(text, &end);
    if (end != text && !*end && *value >= min && *value <= max)
        return true;
    ctl_usage_error("--%s: \"%s\" is not a number from %g to %g",
                    args->command->options[option].name, text, min, max);
    return false;
}

bool ctl_word(const struct ctl_args *args, int option, const char *const *words, int *index)
{
    const char *text = ctl_value(args, option);
    if (!text)
        return true;
    char all[256] = "";
    size_t used = 0;
    for (int i = 0; words[i]; i++) {
        if (!words[i][0])
            continue;
        if (strcmp(words[i], text) == 0) {
            *index = i;
            return true;
        }
        used += (size_t)snprintf(all + used, sizeof all - used, "%s%s", used ? ", " : "", words[i]);
    }
    ctl_usage_error("--%s: \"%s\" is none of %s", args->command->options[option].name, text, all);
    return false;
}

bool ctl_transport(const struct ctl_args *args, int option, struct einsum_client_options *options)
{
    static const char *const words[] = {"", "grpc", "shm", "ring", "auto", NULL};
    static const enum einsum_client_transport transports[] = {
        EINSUM_CLIENT_TRANSPORT_TCP, EINSUM_CLIENT_TRANSPORT_TCP, EINSUM_CLIENT_TRANSPORT_SHARED,
        EINSUM_CLIENT_TRANSPORT_RING, EINSUM_CLIENT_TRANSPORT_AUTO};
    int word = 1;
    if (!ctl_word(args, option, words, &word))
        return false;
    options->transport = transports[word];
    if (options->transport == EINSUM_CLIENT_TRANSPORT_TCP)
        return true;
    options->shared_memory = "auto";
    options->shared_memory_bytes = 1 << 30; // cut to what the server allows
    return true;
}

// ---- errors and JSON ----------------------------------------------------------------------------

void ctl_client_options(const struct ctl *ctl, struct einsum_client_options *options)
{
    einsum_client_options_init(options);
    options->user_agent = "einsumctl/" EINSUMD_VERSION;
    options->tls_ca = ctl->tls_ca;
    options->tls_certificate = ctl->tls_certificate;
    options->tls_key = ctl->tls_key;
    options->tls_server_name = ctl->tls_server_name;
    options->token_file = ctl->token_file;
    options->retry_ms = ctl->retry_ms;
    if (!ctl->timeout_ms)
        return;
    options->deadline_ms = ctl->timeout_ms;
    options->load_deadline_ms = ctl->timeout_ms;
}

bool ctl_connect(struct ctl *ctl, const struct einsum_client_options *options)
{
    struct einsum_client_options usual;
    ctl_client_options(ctl, &usual);
    struct einsum_client_error error;
    if (einsum_client_create(ctl->endpoint, options ? options : &usual, &ctl->client, &error) ==
        EINSUM_CLIENT_OK)
        return true;
    ctl_usage_error("%s", error.text);
    return false;
}

json_t *ctl_error_json(const struct einsum_client_error *error)
{
    json_t *json = json_pack("{s:s, s:i, s:s, s:b}", "status",
                             einsum_client_status_name(error->status), "code", (int)error->status,
                             "message", error->text, "from_server", error->from_server);
    if (error->field[0])
        json_object_set_new(json, "field", json_string(error->field));
    if (error->retry_after_ms)
        json_object_set_new(json, "retry_after_ms", json_integer(error->retry_after_ms));
    return json;
}

static enum ctl_exit exit_code_of(const struct einsum_client_error *error)
{
    if (error->from_server)
        return CTL_REFUSED;
    bool no_answer = error->status == EINSUM_CLIENT_UNAVAILABLE ||
                     error->status == EINSUM_CLIENT_DEADLINE_EXCEEDED;
    return no_answer ? CTL_UNREACHABLE : CTL_FAILED;
}

enum ctl_exit ctl_fail(const struct ctl *ctl, const struct einsum_client_error *error)
{
    fprintf(stderr, "einsumctl: %s: %s\n", einsum_client_status_name(error->status), error->text);
    if (ctl->json)
        ctl_print_json(json_pack("{s:o}", "error", ctl_error_json(error)));
    return exit_code_of(error);
}

enum ctl_exit ctl_fail_local(const struct ctl *ctl, const struct error *err)
{
    fprintf(stderr, "einsumctl: %s\n", err->text);
    if (ctl->json)
        ctl_print_json(json_pack("{s:{s:s, s:i, s:s, s:b}}", "error", "status",
                                 status_name(err->status), "code", (int)err->status, "message",
                                 err->text, "from_server", 0));
    return err->status == STATUS_INVALID_ARGUMENT ? CTL_USAGE : CTL_FAILED;
}

void ctl_print_json(json_t *json)
{
    json_dumpf(json, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(json);
}

json_t *ctl_real_json(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *rope_json(const struct einsum_client_rope *rope)
{
    if (rope->cache[0])
        return json_pack("{s:s, s:s, s:I}", "cache", rope->cache, "cache_tensor",
                         rope->cache_tensor, "positions_max", (json_int_t)rope->positions_max);
    json_t *json =
        json_pack("{s:o, s:o, s:I}", "theta", ctl_real_json(rope->theta), "factor",
                  ctl_real_json(rope->factor), "positions_max", (json_int_t)rope->positions_max);
    if (rope->factor > 1)
        json_object_update_new(json, json_pack("{s:I, s:o, s:o}", "original_positions_max",
                                               (json_int_t)rope->original_positions_max,
                                               "beta_fast", ctl_real_json(rope->beta_fast),
                                               "beta_slow", ctl_real_json(rope->beta_slow)));
    return json;
}

json_t *ctl_weight_json(const struct einsum_client_weight *weight)
{
    json_t *recipes = json_array();
    for (uint32_t i = 0; i < weight->recipes_n; i++) {
        unsigned recipe = (unsigned)weight->recipes[i];
        if (recipe >= 1 && recipe <= 4)
            json_array_append_new(recipes, json_string(ctl_recipes[recipe]));
    }
    bool known = weight->scale_type == EINSUM_CLIENT_SCALE_FP32 ||
                 weight->scale_type == EINSUM_CLIENT_SCALE_UE8M0;
    return json_pack(
        "{s:s, s:I, s:I, s:I, s:s, s:s?, s:I, s:I, s:o, s:I, s:s, s:I, s:I, s:I, s:o}", "name",
        weight->name, "groups", (json_int_t)weight->groups, "output_dim",
        (json_int_t)weight->output_dim, "reduced_dim", (json_int_t)weight->reduced_dim,
        "weight_type", weight->weight_type == EINSUM_CLIENT_WEIGHT_BF16 ? "bf16" : "e4m3",
        "scale_type", known ? ctl_scale_types[weight->scale_type] : NULL, "block_d",
        (json_int_t)weight->block_d, "block_r", (json_int_t)weight->block_r, "recipes", recipes,
        "resident_bytes", (json_int_t)weight->resident_bytes, "source", weight->source,
        "tensor_parallel_rank", (json_int_t)weight->tensor_parallel_rank, "tensor_parallel_size",
        (json_int_t)weight->tensor_parallel_size, "generation", (json_int_t)weight->generation,
        "rope", weight->has_rope ? rope_json(&weight->rope) : json_null());
}

// ---- for people ---------------------------------------------------------------------------------

const char *ctl_bytes(uint64_t bytes, char text[CTL_TEXT_BYTES])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    size_t unit = 0;
    for (; value >= 1024 && unit + 1 < ARRAY_LEN(units); unit++)
        value /= 1024;
    snprintf(text, CTL_TEXT_BYTES, unit ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return text;
}

const char *ctl_duration(uint64_t ns, char text[CTL_TEXT_BYTES])
{
    double value = (double)ns;
    if (ns < 1000000)
        snprintf(text, CTL_TEXT_BYTES, "%.1f us", value / 1e3);
    else if (ns < 1000000000)
        snprintf(text, CTL_TEXT_BYTES, "%.2f ms", value / 1e6);
    else if (ns < 120000000000ull)
        snprintf(text, CTL_TEXT_BYTES, "%.1f s", value / 1e9);
    else
        snprintf(text, CTL_TEXT_BYTES, "%llu h %llu min",
                 (unsigned long long)(ns / 3600000000000ull),
                 (unsigned long long)(ns / 60000000000ull % 60));
    return text;
}

void ctl_progress_init(struct ctl_progress *progress, const struct ctl *ctl, const char *label)
{
    *progress = (struct ctl_progress){.label = label, .shown = !ctl->json && isatty(2)};
}

void ctl_progress_draw(struct ctl_progress *progress, uint64_t done, uint64_t total,
                       const char *note)
{
    enum { BAR = 30, PAUSE_NS = 100 * 1000 * 1000 };
    uint64_t now = now_ns();
    if (!progress->shown || (now - progress->drawn_ns < PAUSE_NS && done < total))
        return;
    progress->drawn_ns = now;
    double share = total ? (double)done / (double)total : 0;
    int filled = (int)(share * BAR);
    char bar[BAR + 1];
    for (int i = 0; i < BAR; i++)
        bar[i] = i < filled ? '#' : '.';
    bar[BAR] = '\0';
    fprintf(stderr, "\r\x1b[K%s [%s] %3.0f %%  %s", progress->label, bar, share * 100, note);
}

void ctl_progress_end(struct ctl_progress *progress)
{
    if (progress->shown)
        fprintf(stderr, "\r\x1b[K");
}

// ---- signals ------------------------------------------------------------------------------------

static volatile sig_atomic_t interrupted;

static void on_signal(int number)
{
    (void)number;
    interrupted = 1;
}

void ctl_catch_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool ctl_interrupted(void)
{
    return interrupted != 0;
}

// ---- random tensors -----------------------------------------------------------------------------

uint64_t ctl_random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// 256 codes that, picked evenly, are spread like a normal distribution with 448 at 3.5 sigma.
static void fill_codes(uint8_t codes[256])
{
    uint64_t state = 1;
    for (int i = 0; i < 256; i++) {
        // The sum of twelve even numbers is near enough to normal.
        double sum = -6;
        for (int k = 0; k < 12; k++)
            sum += (double)(ctl_random_next(&state) >> 11) * 0x1p-53;
        codes[i] = e4m3_from_double(sum * 128);
    }
}

uint64_t ctl_scales_bytes(const struct einsum_client_weight *weight, uint32_t tokens,
                          enum einsum_client_scale_layout layout,
                          enum einsum_client_scale_type type)
{
    if (weight->block_r == 0)
        return 0;
    return einsum_scale_bytes((enum einsum_scale_layout)(int)layout,
                              (enum einsum_scale_type)(int)type, tokens, weight->groups,
                              weight->reduced_dim / weight->block_r);
}

bool ctl_random_inputs(const struct einsum_client_weight *weight, uint32_t tokens,
                       enum einsum_client_scale_layout scale_layout,
                       enum einsum_client_scale_type scale_type, uint64_t seed,
                       struct ctl_inputs *inputs)
{
    uint8_t codes[256];
    fill_codes(codes);
    inputs->activations_bytes =
        einsum_activation_bytes(tokens, weight->groups, weight->reduced_dim);
    inputs->scales_bytes = ctl_scales_bytes(weight, tokens, scale_layout, scale_type);
    inputs->activations = malloc(inputs->activations_bytes + 8);
    inputs->scales = malloc(inputs->scales_bytes + 8);
    if (!inputs->activations || !inputs->scales) {
        ctl_inputs_deinit(inputs);
        return false;
    }
    uint64_t state = seed;
    for (uint64_t i = 0; i < inputs->activations_bytes; i += 8) {
        uint64_t random = ctl_random_next(&state);
        for (unsigned k = 0; k < 8; k++)
            inputs->activations[i + k] = codes[random >> (8 * k) & 0xff];
    }
    for (uint64_t i = 0; i < inputs->scales_bytes; i++) // 2^-9 to 2^-6
        inputs->scales[i] = (uint8_t)(118 + (ctl_random_next(&state) & 3));
    for (uint64_t i = 0; scale_type == EINSUM_CLIENT_SCALE_FP32 && i < inputs->scales_bytes;
         i += 4) {
        float scale = (float)(0x1p-8 + (double)(ctl_random_next(&state) >> 11) * 0x1p-60);
        memcpy(inputs->scales + i, &scale, sizeof scale);
    }
    return true;
}

void ctl_inputs_lend(const struct ctl_inputs *inputs, struct einsum_client_request *request)
{
    if (request->operation == EINSUM_CLIENT_OUTPUT_PROJECT) {
        request->attention = inputs->activations;
        request->attention_bytes = inputs->activations_bytes;
        request->positions = (const int64_t *)(const void *)inputs->scales;
        request->positions_bytes = inputs->scales_bytes;
        return;
    }
    request->activations = inputs->activations;
    request->activations_bytes = inputs->activations_bytes;
    request->scales = inputs->scales;
    request->scales_bytes = inputs->scales_bytes;
}

void ctl_inputs_deinit(struct ctl_inputs *inputs)
{
    free(inputs->activations);
    free(inputs->scales);
    *inputs = (struct ctl_inputs){0};
}
