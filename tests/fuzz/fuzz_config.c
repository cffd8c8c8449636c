// Any bytes as a configuration: refused with a printable reason and nothing left to free, or
// accepted with every promise of config.h kept.
#include "kernels/einsum.h"
#include "server/config.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void check_refused(const struct config *config, const struct error *err)
{
    static const struct config empty;
    ASSERT(memcmp(config, &empty, sizeof empty) == 0);
    ASSERT(err->text[0]);
    for (const char *c = err->text; *c; c++)
        ASSERT(*c >= 0x20 && *c < 0x7f);
}

static void check_accepted(const struct config *config)
{
    ASSERT(config->listen_n >= 1 && config->listen_n <= CONFIG_LISTEN_MAX);
    for (size_t i = 0; i < config->listen_n; i++)
        ASSERT(strchr(config->listen[i], ':'));
    ASSERT(config->unix_socket_mode <= 0777);
    ASSERT(config->request_tokens_max >= 1);
    ASSERT(config->request_tokens_max <= EINSUM_TOKENS_MAX);
    ASSERT(config->buckets_n >= 1 && config->buckets_n <= CONFIG_BUCKETS_MAX);
    for (size_t i = 1; i < config->buckets_n; i++)
        ASSERT(config->buckets[i - 1] < config->buckets[i]);
    ASSERT(config->buckets[config->buckets_n - 1] == config->batch_tokens_max);
    ASSERT(config->log_level <= LOG_LEVEL_ERROR && config->log_format <= LOG_FORMAT_JSON);
    for (size_t i = 0; i < config->weights_n; i++) {
        const struct config_weights *weights = &config->weights[i];
        ASSERT(weights->path[0] && weights->name_prefix);
        ASSERT(weights->tensor_parallel_rank < weights->tensor_parallel_size);
        for (size_t j = 0; j < weights->tensors_n; j++)
            ASSERT(weights->tensors[j][0]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct config config;
    struct error err;
    if (config_parse(&config, (const char *)data, bytes, &err)) {
        check_refused(&config, &err);
        return 0;
    }
    check_accepted(&config);
    config_deinit(&config);
    return 0;
}
