#include "origin.h"

#include <stdlib.h>
#include <string.h>

#include "weights.h"

// A name may hold what means something else in a pattern.
static char *escape(const char *name)
{
    char *pattern = malloc(2 * strlen(name) + 1), *to = pattern;
    if (!pattern)
        return NULL;
    for (; *name; name++) {
        if (strchr("*?[\\", *name))
            *to++ = '\\';
        *to++ = *name;
    }
    *to = '\0';
    return pattern;
}

enum status origin_init(struct origin *origin, const struct weights_load *load, const char *tensor,
                        struct error *err)
{
    *origin = (struct origin){
        .path = strdup(load->path),
        .pattern = escape(tensor),
        .name_prefix = strdup(load->name_prefix ? load->name_prefix : ""),
        .checksums = strdup(load->checksums ? load->checksums : ""),
        .tensor_parallel_rank = load->tensor_parallel_rank,
        .tensor_parallel_size = load->tensor_parallel_size,
        .output_dim = load->output_dim,
    };
    if (origin->path && origin->pattern && origin->name_prefix && origin->checksums)
        return STATUS_OK;
    origin_deinit(origin);
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
}

void origin_deinit(struct origin *origin)
{
    free(origin->path);
    free(origin->pattern);
    free(origin->name_prefix);
    free(origin->checksums);
    *origin = (struct origin){0};
}

struct weights_load origin_load(const struct origin *origin)
{
    return (struct weights_load){
        .path = origin->path,
        .tensors = (const char *const *)&origin->pattern,
        .tensors_n = 1,
        .name_prefix = origin->name_prefix,
        .checksums = origin->checksums,
        .tensor_parallel_rank = origin->tensor_parallel_rank,
        .tensor_parallel_size = origin->tensor_parallel_size,
        .output_dim = origin->output_dim,
        .replace = true,
    };
}
