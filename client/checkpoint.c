// Values are drawn by counter, not by sequence: element i of a tensor depends on the seed, the
// layer, the kind of tensor and i. So files can be cut anywhere without changing what is in them.
//
//     64 random bits --> 4 x 13 bits --> table of 8192 normal samples --> 4 values
#include "checkpoint.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define INDEX_NAME "model.safetensors.index.json"

enum {
    SAMPLE_BITS = 13,
    SAMPLES_N = 1 << SAMPLE_BITS,
    SAMPLES_PER_DRAW = 4,
    // The standard deviation of E4M3 weights: as in a quantised model, the largest of many
    // thousands then come near 448, the end of E4M3's range.
    E4M3_DEVIATION = 100,
    BUFFER_BYTES = 1 << 20,
    HEADER_ALIGNMENT_BYTES = 8,
    LAYERS_PER_SHARD = 8,
};

static_assert(SAMPLE_BITS * SAMPLES_PER_DRAW <= 64, "one draw feeds all its samples");

struct preset {
    const char *name;
    uint32_t layers, groups;
    uint32_t block; // of D and of R
};

static const struct preset presets[] = {
    {"v4-flash", 43, 8, 128},
    {"v4-pro", 61, 16, 128},
    {"v4.1-flash", 40, 8, 32},
};

static const char *const scale_suffixes[] = {"scale", "weight_scale_inv", "weight_scale"};

// ---- options

const char *checkpoint_preset(size_t index)
{
    return index < ARRAY_LEN(presets) ? presets[index].name : NULL;
}

enum status checkpoint_options_init(struct checkpoint_options *options, const char *preset,
                                    struct error *err)
{
    for (size_t i = 0; i < ARRAY_LEN(presets); i++) {
        if (strcmp(presets[i].name, preset) != 0)
            continue;
        *options = (struct checkpoint_options){
            .layers = presets[i].layers,
            .shards = (presets[i].layers + LAYERS_PER_SHARD - 1) / LAYERS_PER_SHARD,
            .name_prefix = "",
            .scale_suffix = scale_suffixes[0],
            .format = {.groups = presets[i].groups,
                       .output_dim = 1024,
                       .reduced_dim = 4096,
                       .weight_type = EINSUM_WEIGHT_E4M3,
                       .scale_type = EINSUM_SCALE_UE8M0,
                       .block_d = presets[i].block,
                       .block_r = presets[i].block},
        };
        return STATUS_OK;
    }
    return error_field(err, STATUS_INVALID_ARGUMENT, "model",
                       "'%.64s', expected v4-flash, v4-pro or v4.1-flash", preset);
}

// The format with what BF16 weights ignore set as einsum.h wants it.
static struct einsum_weight_format stored_format(const struct checkpoint_options *options)
{
    struct einsum_weight_format format = options->format;
    if (format.weight_type == EINSUM_WEIGHT_BF16) {
        format.scale_type = EINSUM_SCALE_NONE;
        format.block_d = 1;
        format.block_r = 128;
    }
    return format;
}

uint64_t checkpoint_bytes(const struct checkpoint_options *options)
{
    struct einsum_weight_format format = stored_format(options);
    return options->layers * (einsum_weight_bytes(&format) + einsum_weight_scale_bytes(&format));
}

static bool is_multiple_upto(uint32_t value, uint32_t multiple, uint32_t max)
{
    return value > 0 && value <= max && value % multiple == 0;
}

static enum status check_format(const struct einsum_weight_format *format, struct error *err)
{
    if (!is_multiple_upto(format->groups, 1, EINSUM_GROUPS_MAX))
        return error_field(err, STATUS_INVALID_ARGUMENT, "groups", "%" PRIu32 ", expected 1 to %d",
                           format->groups, EINSUM_GROUPS_MAX);
    if (!is_multiple_upto(format->output_dim, EINSUM_OUTPUT_DIM_MULTIPLE, EINSUM_DIM_MAX))
        return error_field(err, STATUS_INVALID_ARGUMENT, "output_dim",
                           "%" PRIu32 ", expected a multiple of %d up to %d", format->output_dim,
                           EINSUM_OUTPUT_DIM_MULTIPLE, EINSUM_DIM_MAX);
    if (!is_multiple_upto(format->reduced_dim, EINSUM_REDUCED_DIM_MULTIPLE, EINSUM_DIM_MAX))
        return error_field(err, STATUS_INVALID_ARGUMENT, "reduced_dim",
                           "%" PRIu32 ", expected a multiple of %d up to %d", format->reduced_dim,
                           EINSUM_REDUCED_DIM_MULTIPLE, EINSUM_DIM_MAX);
    if (format->weight_type == EINSUM_WEIGHT_BF16)
        return STATUS_OK;
    if (format->weight_type != EINSUM_WEIGHT_E4M3)
        return error_field(err, STATUS_INVALID_ARGUMENT, "weight_type", "expected E4M3 or BF16");
    if (format->scale_type != EINSUM_SCALE_FP32 && format->scale_type != EINSUM_SCALE_UE8M0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "scale_type", "expected FP32 or UE8M0");
    bool square = format->block_d == format->block_r || format->block_d == 1;
    if ((format->block_r != 128 && format->block_r != 32) || !square)
        return error_field(err, STATUS_INVALID_ARGUMENT, "block",
                           "%" PRIu32 "x%" PRIu32 ", expected 128x128, 32x32, 1x128 or 1x32",
                           format->block_d, format->block_r);
    if (format->output_dim % format->block_d != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "output_dim",
                           "%" PRIu32 " is no multiple of the block, %" PRIu32, format->output_dim,
                           format->block_d);
    return STATUS_OK;
}

static enum status check_options(const struct checkpoint_options *options, struct error *err)
{
    if (!options->directory || !options->directory[0])
        return error_field(err, STATUS_INVALID_ARGUMENT, "directory", "empty");
    if (!is_multiple_upto(options->layers, 1, CHECKPOINT_LAYERS_MAX))
        return error_field(err, STATUS_INVALID_ARGUMENT, "layers", "%" PRIu32 ", expected 1 to %d",
                           options->layers, CHECKPOINT_LAYERS_MAX);
    if (!is_multiple_upto(options->shards, 1, options->layers))
        return error_field(err, STATUS_INVALID_ARGUMENT, "shards",
                           "%" PRIu32 ", expected 1 to the number of layers, %" PRIu32,
                           options->shards, options->layers);
    if (strlen(options->name_prefix) >= CHECKPOINT_NAME_BYTES)
        return error_field(err, STATUS_INVALID_ARGUMENT, "name_prefix", "longer than %d bytes",
                           CHECKPOINT_NAME_BYTES - 1);
    // Names go into JSON as they are.
    for (const char *at = options->name_prefix; *at; at++)
        if (*at <= ' ' || *at > '~' || *at == '"' || *at == '\\')
            return error_field(err, STATUS_INVALID_ARGUMENT, "name_prefix",
                               "byte 0x%02x, expected printable ASCII without quotes",
                               (unsigned char)*at);
    bool known = false;
    for (size_t i = 0; i < ARRAY_LEN(scale_suffixes); i++)
        known = known || strcmp(scale_suffixes[i], options->scale_suffix) == 0;
    if (!known)
        return error_field(err, STATUS_INVALID_ARGUMENT, "scale_suffix",
                           "'%.64s', expected scale, weight_scale_inv or weight_scale",
                           options->scale_suffix);
    return check_format(&options->format, err);
}

// ---- values

// The finaliser of splitmix64: any two counters give unrelated values.
static inline uint64_t mix(uint64_t counter)
{
    uint64_t value = (counter + 1) * 0x9e3779b97f4a7c15u;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

enum tensor_kind { TENSOR_WEIGHT, TENSOR_SCALES };

static uint64_t tensor_key(uint64_t seed, uint32_t layer, enum tensor_kind kind)
{
    return mix(mix(seed) ^ ((uint64_t)layer << 1 | (uint64_t)kind));
}

// A sample of roughly the standard normal distribution: the sum of four uniform ones. Integers and
// exact operations alone, so that every machine gets the same.
static double normal_sample(uint32_t index)
{
    uint64_t random = mix(index);
    int64_t sum = -2 * 65535;
    for (int i = 0; i < 4; i++)
        sum += (int64_t)(random >> (16 * i) & 0xffff);
    static const double deviation = 37837.2; // 65536 * sqrt(4 / 12)
    return (double)sum / deviation;
}

static double e4m3_value(uint8_t code)
{
    uint32_t exponent = code >> 3 & 15, fraction = code & 7;
    double magnitude = exponent ? ldexp(8 + fraction, (int)exponent - 10) : ldexp(fraction, -9);
    return code & 0x80 ? -magnitude : magnitude;
}

static uint8_t e4m3_nearest(double value)
{
    double magnitude = fabs(value);
    uint8_t code = 0; // codes without the sign rise with their value; 0x7e is 448, 0x7f NaN
    while (code < 0x7e && e4m3_value((uint8_t)(code + 1)) <= magnitude)
        code++;
    if (code < 0x7e && e4m3_value((uint8_t)(code + 1)) - magnitude < magnitude - e4m3_value(code))
        code++;
    return value < 0 ? code | 0x80 : code;
}

static uint16_t bf16_nearest(double value)
{
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct samples {
    uint8_t e4m3[SAMPLES_N];
    uint16_t bf16[SAMPLES_N];
};

static void samples_init(struct samples *samples, uint32_t reduced_dim)
{
    double bf16_deviation = 1 / sqrt(reduced_dim); // a sum of that many has deviation 1
    for (uint32_t i = 0; i < SAMPLES_N; i++) {
        samples->e4m3[i] = e4m3_nearest(E4M3_DEVIATION * normal_sample(i));
        samples->bf16[i] = bf16_nearest(bf16_deviation * normal_sample(i));
    }
}

// Elements [begin, begin + count); both multiples of SAMPLES_PER_DRAW.
static void fill_e4m3(const struct samples *samples, uint64_t key, uint64_t begin, uint64_t count,
                      uint8_t *to)
{
    for (uint64_t i = 0; i < count; i += SAMPLES_PER_DRAW) {
        uint64_t random = mix(key + (begin + i) / SAMPLES_PER_DRAW);
        for (uint32_t j = 0; j < SAMPLES_PER_DRAW; j++)
            to[i + j] = samples->e4m3[random >> (j * SAMPLE_BITS) & (SAMPLES_N - 1)];
    }
}

static void fill_bf16(const struct samples *samples, uint64_t key, uint64_t begin, uint64_t count,
                      uint16_t *to)
{
    for (uint64_t i = 0; i < count; i += SAMPLES_PER_DRAW) {
        uint64_t random = mix(key + (begin + i) / SAMPLES_PER_DRAW);
        for (uint32_t j = 0; j < SAMPLES_PER_DRAW; j++)
            to[i + j] = samples->bf16[random >> (j * SAMPLE_BITS) & (SAMPLES_N - 1)];
    }
}

// Around the scale that gives outputs a deviation of 1.
static void fill_scales(const struct einsum_weight_format *format, uint64_t key, uint64_t begin,
                        uint64_t count, uint8_t *to)
{
    double middle = 1 / (E4M3_DEVIATION * sqrt(format->reduced_dim));
    int exponent;
    frexp(middle, &exponent); // middle lies in [2^(exponent-1), 2^exponent)
    for (uint64_t i = 0; i < count; i++) {
        uint64_t random = mix(key + begin + i);
        if (format->scale_type == EINSUM_SCALE_UE8M0) {
            to[i] = (uint8_t)(127 + exponent - 2 + (int)(random % 3));
        } else {
            float scale = (float)(middle * (0.5 + (double)(random >> 40) * 0x1p-24));
            memcpy(to + i * sizeof scale, &scale, sizeof scale);
        }
    }
}

// ---- files

// One checkpoint being written.
struct writer {
    const struct checkpoint_options *options;
    struct einsum_weight_format format;
    struct samples samples;
    uint64_t bytes_done, bytes_total;
    uint8_t buffer[BUFFER_BYTES];
};

// A file under its temporary name until it is whole.
struct output {
    int fd;
    char *path, *temporary_path;
};

static enum status system_error(struct error *err, const char *path, int reason)
{
    enum status status = reason == ENOSPC || reason == EDQUOT || reason == ENOMEM
                             ? STATUS_RESOURCE_EXHAUSTED
                             : STATUS_FAILED_PRECONDITION;
    return error_set(err, status, "%.384s: %s", path, strerrordesc_np(reason));
}

static void output_discard(struct output *output)
{
    if (output->fd >= 0) {
        close(output->fd);
        unlink(output->temporary_path);
    }
    free(output->temporary_path);
    free(output->path);
    *output = (struct output){.fd = -1};
}

static enum status output_begin(struct output *output, const char *directory, const char *name,
                                struct error *err)
{
    char *path, *temporary_path;
    if (asprintf(&path, "%s/%s", directory, name) < 0)
        return system_error(err, directory, ENOMEM);
    enum status status;
    if (asprintf(&temporary_path, "%s/.%s.%ld", directory, name, (long)getpid()) < 0) {
        status = system_error(err, directory, ENOMEM);
        goto free_path;
    }
    int fd = open(temporary_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        status = system_error(err, path, errno);
        goto free_temporary_path;
    }
    *output = (struct output){.fd = fd, .path = path, .temporary_path = temporary_path};
    return STATUS_OK;

free_temporary_path:
    free(temporary_path);
free_path:
    free(path);
    return status;
}

static enum status output_write(const struct output *output, const void *from, size_t bytes,
                                struct error *err)
{
    const char *at = from;
    while (bytes > 0) {
        ssize_t put = write(output->fd, at, bytes);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return system_error(err, output->path, errno);
        at += put;
        bytes -= (size_t)put;
    }
    return STATUS_OK;
}

static enum status output_finish(struct output *output, struct error *err)
{
    enum status status = STATUS_OK;
    // Some file systems tell of a full disk only here.
    int closed = close(output->fd);
    output->fd = -1;
    if (closed != 0 || rename(output->temporary_path, output->path) != 0) {
        status = system_error(err, output->path, errno);
        unlink(output->temporary_path);
    }
    output_discard(output);
    return status;
}

// Text that grows. text_finish tells whether all of it found room; `bytes` is the owner's to free.
struct text {
    FILE *stream;
    char *bytes;
    size_t length;
};

static bool text_begin(struct text *text)
{
    *text = (struct text){0};
    text->stream = open_memstream(&text->bytes, &text->length);
    return text->stream != NULL;
}

static bool text_finish(struct text *text)
{
    bool failed = ferror(text->stream) != 0;
    return fclose(text->stream) == 0 && !failed;
}

// ---- shards

static uint32_t shard_layer_begin(const struct checkpoint_options *options, uint32_t shard)
{
    return (uint32_t)((uint64_t)shard * options->layers / options->shards);
}

static void shard_name(const struct checkpoint_options *options, uint32_t shard, char name[64])
{
    snprintf(name, 64, "model-%05" PRIu32 "-of-%05" PRIu32 ".safetensors", shard + 1,
             options->shards);
}

static const char *scale_dtype(const struct einsum_weight_format *format)
{
    return format->scale_type == EINSUM_SCALE_FP32 ? "F32" : "F8_E8M0";
}

// The length and the JSON, as they stand at the start of the file.
static bool make_header(const struct writer *writer, uint32_t layer_begin, uint32_t layer_end,
                        struct text *text)
{
    const struct checkpoint_options *options = writer->options;
    const struct einsum_weight_format *format = &writer->format;
    uint64_t rows = (uint64_t)format->groups * format->output_dim, offset = 0;
    uint64_t weight_bytes = einsum_weight_bytes(format);
    uint64_t scale_bytes = einsum_weight_scale_bytes(format);
    if (!text_begin(text))
        return false;
    static const uint64_t no_length_yet = 0;
    fwrite(&no_length_yet, sizeof no_length_yet, 1, text->stream);
    fprintf(text->stream, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (uint32_t layer = layer_begin; layer < layer_end; layer++) {
        fprintf(text->stream,
                ",\"%slayers.%" PRIu32 ".attn.wo_a.weight\":{\"dtype\":\"%s\",\"shape\":[%" PRIu64
                ",%" PRIu32 "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}",
                options->name_prefix, layer,
                format->weight_type == EINSUM_WEIGHT_BF16 ? "BF16" : "F8_E4M3", rows,
                format->reduced_dim, offset, offset + weight_bytes);
        offset += weight_bytes;
        if (scale_bytes == 0)
            continue;
        fprintf(text->stream,
                ",\"%slayers.%" PRIu32 ".attn.wo_a.%s\":{\"dtype\":\"%s\",\"shape\":[%" PRIu64
                ",%" PRIu32 "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}",
                options->name_prefix, layer, options->scale_suffix, scale_dtype(format),
                rows / format->block_d, format->reduced_dim / format->block_r, offset,
                offset + scale_bytes);
        offset += scale_bytes;
    }
    fputc('}', text->stream);
    fflush(text->stream);
    while (text->length % HEADER_ALIGNMENT_BYTES != 0) {
        fputc(' ', text->stream);
        fflush(text->stream);
    }
    if (!text_finish(text))
        return false;
    uint64_t length = text->length - sizeof length;
    for (size_t i = 0; i < sizeof length; i++)
        text->bytes[i] = (char)(length >> (8 * i));
    return true;
}

static enum status write_tensor(struct writer *writer, const struct output *output, uint32_t layer,
                                enum tensor_kind kind, struct error *err)
{
    const struct einsum_weight_format *format = &writer->format;
    const struct checkpoint_options *options = writer->options;
    uint64_t key = tensor_key(options->seed, layer, kind);
    uint64_t tensor_bytes =
        kind == TENSOR_WEIGHT ? einsum_weight_bytes(format) : einsum_weight_scale_bytes(format);
    uint64_t element_bytes = kind == TENSOR_WEIGHT
                                 ? einsum_weight_element_bytes(format->weight_type)
                                 : einsum_scale_element_bytes(format->scale_type);
    for (uint64_t done = 0; done < tensor_bytes;) {
        uint64_t bytes = tensor_bytes - done < BUFFER_BYTES ? tensor_bytes - done : BUFFER_BYTES;
        uint64_t begin = done / element_bytes, count = bytes / element_bytes;
        if (kind == TENSOR_SCALES)
            fill_scales(format, key, begin, count, writer->buffer);
        else if (format->weight_type == EINSUM_WEIGHT_BF16)
            fill_bf16(&writer->samples, key, begin, count, (uint16_t *)(void *)writer->buffer);
        else
            fill_e4m3(&writer->samples, key, begin, count, writer->buffer);
        enum status status = output_write(output, writer->buffer, bytes, err);
        if (status != STATUS_OK)
            return status;
        done += bytes;
        writer->bytes_done += bytes;
        if (options->progress &&
            !options->progress(options->progress_context, writer->bytes_done, writer->bytes_total))
            return error_set(err, STATUS_CANCELLED, "writing was given up by its caller");
    }
    return STATUS_OK;
}

static enum status write_shard(struct writer *writer, uint32_t shard, struct error *err)
{
    const struct checkpoint_options *options = writer->options;
    uint32_t layer_begin = shard_layer_begin(options, shard);
    uint32_t layer_end = shard_layer_begin(options, shard + 1);
    char name[64];
    shard_name(options, shard, name);

    struct output output;
    enum status status = output_begin(&output, options->directory, name, err);
    if (status != STATUS_OK)
        return status;
    struct text header;
    if (make_header(writer, layer_begin, layer_end, &header))
        status = output_write(&output, header.bytes, header.length, err);
    else
        status = system_error(err, output.path, ENOMEM);
    free(header.bytes);
    for (uint32_t layer = layer_begin; layer < layer_end && status == STATUS_OK; layer++) {
        status = write_tensor(writer, &output, layer, TENSOR_WEIGHT, err);
        if (status == STATUS_OK)
            status = write_tensor(writer, &output, layer, TENSOR_SCALES, err);
    }
    if (status == STATUS_OK)
        return output_finish(&output, err);
    output_discard(&output);
    return status;
}

// ---- the index

static bool make_index(const struct writer *writer, struct text *text)
{
    const struct checkpoint_options *options = writer->options;
    if (!text_begin(text))
        return false;
    fprintf(text->stream, "{\n  \"metadata\": {\"total_size\": %" PRIu64 "},\n  \"weight_map\": {",
            writer->bytes_total);
    const char *separator = "\n";
    for (uint32_t shard = 0; shard < options->shards; shard++) {
        char name[64];
        shard_name(options, shard, name);
        uint32_t layer_end = shard_layer_begin(options, shard + 1);
        for (uint32_t layer = shard_layer_begin(options, shard); layer < layer_end; layer++) {
            fprintf(text->stream, "%s    \"%slayers.%" PRIu32 ".attn.wo_a.weight\": \"%s\"",
                    separator, options->name_prefix, layer, name);
            separator = ",\n";
            if (writer->format.scale_type != EINSUM_SCALE_NONE)
                fprintf(text->stream, ",\n    \"%slayers.%" PRIu32 ".attn.wo_a.%s\": \"%s\"",
                        options->name_prefix, layer, options->scale_suffix, name);
        }
    }
    fprintf(text->stream, "\n  }\n}\n");
    return text_finish(text);
}

static enum status write_index(const struct writer *writer, struct error *err)
{
    struct output output;
    enum status status = output_begin(&output, writer->options->directory, INDEX_NAME, err);
    if (status != STATUS_OK)
        return status;
    struct text index;
    if (make_index(writer, &index))
        status = output_write(&output, index.bytes, index.length, err);
    else
        status = system_error(err, output.path, ENOMEM);
    free(index.bytes);
    if (status == STATUS_OK)
        return output_finish(&output, err);
    output_discard(&output);
    return status;
}

// An index left from before would make a half-written checkpoint look whole.
static enum status remove_index(const char *directory, struct error *err)
{
    char *path;
    if (asprintf(&path, "%s/%s", directory, INDEX_NAME) < 0)
        return system_error(err, directory, ENOMEM);
    enum status status = STATUS_OK;
    if (unlink(path) != 0 && errno != ENOENT)
        status = system_error(err, path, errno);
    free(path);
    return status;
}

enum status checkpoint_write(const struct checkpoint_options *options, struct error *err)
{
    enum status status = check_options(options, err);
    if (status != STATUS_OK)
        return status;
    if (mkdir(options->directory, 0777) != 0 && errno != EEXIST)
        return system_error(err, options->directory, errno);
    status = remove_index(options->directory, err);
    if (status != STATUS_OK)
        return status;
    struct writer *writer = malloc(sizeof *writer);
    if (!writer)
        return system_error(err, options->directory, ENOMEM);
    writer->options = options;
    writer->format = stored_format(options);
    writer->bytes_done = 0;
    writer->bytes_total = checkpoint_bytes(options);
    samples_init(&writer->samples, options->format.reduced_dim);
    for (uint32_t shard = 0; shard < options->shards && status == STATUS_OK; shard++)
        status = write_shard(writer, shard, err);
    if (status == STATUS_OK)
        status = write_index(writer, err);
    free(writer);
    return status;
}
