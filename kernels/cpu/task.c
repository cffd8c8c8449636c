// The walk over one batch's use of a weight: which work an item is, which tokens it concerns, and
// in what order panels and slices of R are visited. Runs on the engine's worker threads; an item
// touches nothing shared but its own outputs.
//
//     task --> items {group, run of panels} --> tiles of tokens, gathered over all operands
//                                                |
//              up to 8 tokens   each panel: stream, twice at most, from L2 the second time
//              more             each slice of R: fold A (L2), then each panel: expand B (L1),
//                                             multiply
//              extreme          the same in FP64
//
// A token whose scales leave CPU_NARROW goes to the wide tile, so that it slows down no other. A
// panel so flagged is computed wide for every token.
#include "wide.h"

enum {
    STREAM_TOKENS_MAX = 2 * CPU_STREAM_TOKENS, // beyond, expanding slices is faster
    TILE_TOKENS = 192,                         // share one expansion of a slice of weights
    PANELS_MAX = 16,                           // share one folding of a slice of activations
    ITEMS_PER_THREAD = 4,                      // so that the last to finish is not far behind
    ALIGNMENT = 64,
    BLOCK_R_MIN = 32,
};

// One row of A in the item's group, and where its outputs go.
struct token {
    const uint8_t *codes;
    const uint8_t *scales;
    uint64_t scale_word, scale_byte; // strides, as in struct einsum_scale_strides
    uint8_t *output;                 // of the group's output 0
    enum einsum_scale_type scale_type;
    enum einsum_output_type output_type;
};

// A thread's scratch, cut up.
struct scratch {
    struct token *narrow; // [TILE_TOKENS]
    struct token *wide;   // [TILE_TOKENS]
    float *scales;        // [TILE_TOKENS][K], of the narrow tokens
    float *a;             // [TILE_TOKENS][CPU_A_STRIDE], or [STREAM_TOKENS_MAX][R]
    float *b;             // [CPU_DEPTH][16]
    float *sums;          // [PANELS_MAX][TILE_TOKENS][16]
    double *wide_a;       // [CPU_WIDE_ROWS][CPU_DEPTH]
    double *wide_b;       // [CPU_DEPTH][16]
    double *wide_sums;    // [TILE_TOKENS][16]
};

// One item in progress.
struct walk {
    const struct cpu_kernel *kernel;
    const struct cpu_weight *weight;
    struct scratch scratch;
    uint32_t group;
    uint32_t panel_begin, panel_end; // within the group; at most PANELS_MAX
    uint32_t narrow_n, wide_n;       // tokens in the tiles
};

static uint64_t max_u64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

// Returns the part at *at and moves on behind it. Counts alone if `base` is NULL.
static void *carve(uint8_t *base, uint64_t *at, uint64_t bytes)
{
    void *part = base == NULL ? NULL : base + *at;
    *at += (bytes + ALIGNMENT - 1) & ~(uint64_t)(ALIGNMENT - 1);
    return part;
}

static uint64_t scratch_carve(struct scratch *scratch, uint8_t *base, uint64_t reduced_dim)
{
    uint64_t a = max_u64(TILE_TOKENS * CPU_A_STRIDE, STREAM_TOKENS_MAX * reduced_dim);
    uint64_t at = 0;
    scratch->narrow = carve(base, &at, TILE_TOKENS * sizeof(struct token));
    scratch->wide = carve(base, &at, TILE_TOKENS * sizeof(struct token));
    scratch->scales = carve(base, &at, TILE_TOKENS * reduced_dim / BLOCK_R_MIN * sizeof(float));
    scratch->a = carve(base, &at, a * sizeof(float));
    scratch->b = carve(base, &at, CPU_DEPTH * CPU_PANEL * sizeof(float));
    scratch->sums = carve(base, &at, PANELS_MAX * TILE_TOKENS * CPU_PANEL * sizeof(float));
    scratch->wide_a = carve(base, &at, CPU_WIDE_ROWS * CPU_DEPTH * sizeof(double));
    scratch->wide_b = carve(base, &at, CPU_DEPTH * CPU_PANEL * sizeof(double));
    scratch->wide_sums = carve(base, &at, TILE_TOKENS * CPU_PANEL * sizeof(double));
    return at;
}

uint64_t cpu_scratch_bytes(uint32_t reduced_dim)
{
    struct scratch scratch;
    return scratch_carve(&scratch, NULL, reduced_dim);
}

// The groups that some token uses.
static void used_groups(const struct cpu_task *task, uint32_t *begin, uint32_t *end)
{
    *begin = UINT32_MAX;
    *end = 0;
    for (uint32_t i = 0; i < task->operands_n; i++) {
        const struct einsum_operand *operand = &task->operands[i];
        uint32_t operand_end = operand->group_begin + operand->groups;
        if (operand->tokens == 0 || operand->groups == 0)
            continue;
        *begin = operand->group_begin < *begin ? operand->group_begin : *begin;
        *end = operand_end > *end ? operand_end : *end;
    }
    if (*begin > *end)
        *begin = *end;
}

uint32_t cpu_task_items(const struct cpu_task *task, uint32_t threads)
{
    uint32_t begin, end;
    used_groups(task, &begin, &end);
    if (begin == end)
        return 0;
    uint32_t groups = end - begin;
    uint32_t panels = task->weight->format.output_dim / CPU_PANEL;
    uint64_t wanted = ((uint64_t)threads * ITEMS_PER_THREAD + groups - 1) / groups;
    uint64_t parts = max_u64(wanted, (panels + PANELS_MAX - 1) / PANELS_MAX);
    return groups * (parts < panels ? (uint32_t)parts : panels);
}

static uint32_t blocks_of(const struct walk *walk)
{
    return walk->weight->format.reduced_dim / walk->weight->format.block_r;
}

static struct cpu_panel panel_at(const struct walk *walk, uint32_t panel)
{
    const struct cpu_weight *weight = walk->weight;
    const struct einsum_weight_format *format = &weight->format;
    uint64_t row = (uint64_t)walk->group * format->output_dim + (uint64_t)panel * CPU_PANEL;
    struct cpu_panel found = {
        .elements = weight->elements +
                    row * format->reduced_dim * einsum_weight_element_bytes(format->weight_type),
        .scale_lanes = format->block_d == 1 ? CPU_PANEL : 1,
        .reduced_dim = format->reduced_dim,
        .block_r = format->block_r,
        .type = format->weight_type,
    };
    if (weight->scales != NULL)
        found.scales = weight->scales + row / format->block_d * blocks_of(walk);
    return found;
}

static bool panel_is_wide(const struct walk *walk, uint32_t panel)
{
    const struct einsum_weight_format *format = &walk->weight->format;
    uint64_t index = (uint64_t)walk->group * (format->output_dim / CPU_PANEL) + panel;
    return (walk->weight->elements_wide[index] | walk->weight->scales_wide[index]) != 0;
}

static void store_narrow(const struct walk *walk, const struct token *token, uint32_t panel,
                         const float *sums)
{
    uint64_t first = (uint64_t)panel * CPU_PANEL;
    if (token->output_type == EINSUM_OUTPUT_FP32)
        memcpy(token->output + 4 * first, sums, CPU_PANEL * sizeof(float));
    else
        walk->kernel->round_bf16(sums, CPU_PANEL, (uint16_t *)(void *)(token->output + 2 * first));
}

static void store_wide(const struct token *token, uint32_t panel, const double *sums)
{
    uint64_t first = (uint64_t)panel * CPU_PANEL;
    for (uint64_t j = 0; j < CPU_PANEL; j++) {
        if (token->output_type == EINSUM_OUTPUT_FP32)
            ((float *)(void *)token->output)[first + j] = (float)sums[j];
        else
            ((uint16_t *)(void *)token->output)[first + j] = bf16_from_double(sums[j]);
    }
}

static const uint8_t *token_scale(const struct token *token, uint32_t k)
{
    return token->scales + k / 4 * token->scale_word + k % 4 * token->scale_byte;
}

// ---- The wide path.

static void wide_fold(const struct walk *walk, const struct token *token, uint32_t r_begin,
                      uint32_t depth, double *out)
{
    uint32_t block_r = walk->weight->format.block_r;
    for (uint32_t r = r_begin; r < r_begin + depth;) {
        double scale = wide_scale(token_scale(token, r / block_r), token->scale_type);
        for (uint32_t i = 0; i < block_r && r < r_begin + depth; i++, r++)
            *out++ = (double)e4m3_to_float(token->codes[r]) * scale;
    }
}

// All of `tokens` (at most TILE_TOKENS) for one panel.
static void wide_panel(const struct walk *walk, const struct token *tokens, uint32_t n,
                       uint32_t index)
{
    const struct scratch *scratch = &walk->scratch;
    struct cpu_panel panel = panel_at(walk, index);
    memset(scratch->wide_sums, 0, (uint64_t)n * CPU_PANEL * sizeof(double));
    for (uint32_t r = 0; r < panel.reduced_dim; r += CPU_DEPTH) {
        uint32_t left = panel.reduced_dim - r;
        uint32_t depth = left < CPU_DEPTH ? left : CPU_DEPTH;
        wide_expand(&panel, r, depth, scratch->wide_b);
        for (uint32_t t = 0; t < n; t += CPU_WIDE_ROWS) {
            uint32_t rows = n - t < CPU_WIDE_ROWS ? n - t : CPU_WIDE_ROWS;
            for (uint32_t i = 0; i < rows; i++)
                wide_fold(walk, &tokens[t + i], r, depth, scratch->wide_a + i * CPU_DEPTH);
            walk->kernel->wide_multiply(scratch->wide_a, rows, scratch->wide_b, depth,
                                        scratch->wide_sums + (uint64_t)t * CPU_PANEL);
        }
    }
    for (uint32_t t = 0; t < n; t++)
        store_wide(&tokens[t], index, scratch->wide_sums + (uint64_t)t * CPU_PANEL);
}

static void flush_wide(struct walk *walk)
{
    for (uint32_t panel = walk->panel_begin; walk->wide_n > 0 && panel < walk->panel_end; panel++)
        wide_panel(walk, walk->scratch.wide, walk->wide_n, panel);
    walk->wide_n = 0;
}

// ---- The narrow path.

static void stream_panels(const struct walk *walk)
{
    const struct scratch *scratch = &walk->scratch;
    const struct einsum_weight_format *format = &walk->weight->format;
    uint64_t blocks = blocks_of(walk);
    for (uint32_t t = 0; t < walk->narrow_n; t++)
        walk->kernel->fold(scratch->narrow[t].codes, scratch->scales + t * blocks,
                           format->reduced_dim, format->block_r,
                           scratch->a + (uint64_t)t * format->reduced_dim);

    uint32_t passes = (walk->narrow_n + CPU_STREAM_TOKENS - 1) / CPU_STREAM_TOKENS;
    uint32_t pass = (walk->narrow_n + passes - 1) / passes; // as even as possible
    for (uint32_t index = walk->panel_begin; index < walk->panel_end; index++) {
        if (panel_is_wide(walk, index))
            continue;
        struct cpu_panel panel = panel_at(walk, index);
        for (uint32_t t = 0; t < walk->narrow_n; t += pass) {
            uint32_t left = walk->narrow_n - t;
            walk->kernel->stream(&panel, scratch->a + (uint64_t)t * format->reduced_dim,
                                 left < pass ? left : pass, scratch->sums + t * CPU_PANEL);
        }
        for (uint32_t t = 0; t < walk->narrow_n; t++)
            store_narrow(walk, &scratch->narrow[t], index, scratch->sums + t * CPU_PANEL);
    }
}

static void multiply_panels(const struct walk *walk)
{
    const struct scratch *scratch = &walk->scratch;
    const struct einsum_weight_format *format = &walk->weight->format;
    const uint64_t panel_sums = TILE_TOKENS * CPU_PANEL;
    uint64_t blocks = blocks_of(walk);
    uint32_t panels = walk->panel_end - walk->panel_begin;

    memset(scratch->sums, 0, panels * panel_sums * sizeof(float));
    for (uint32_t r = 0; r < format->reduced_dim; r += CPU_DEPTH) {
        uint32_t left = format->reduced_dim - r;
        uint32_t depth = left < CPU_DEPTH ? left : CPU_DEPTH;
        for (uint32_t t = 0; t < walk->narrow_n; t++)
            walk->kernel->fold(scratch->narrow[t].codes + r,
                               scratch->scales + t * blocks + r / format->block_r, depth,
                               format->block_r, scratch->a + (uint64_t)t * CPU_A_STRIDE);
        for (uint32_t i = 0; i < panels; i++) {
            if (panel_is_wide(walk, walk->panel_begin + i))
                continue;
            struct cpu_panel panel = panel_at(walk, walk->panel_begin + i);
            walk->kernel->expand(&panel, r, depth, scratch->b);
            walk->kernel->multiply(scratch->a, walk->narrow_n, scratch->b, depth,
                                   scratch->sums + i * panel_sums);
        }
    }

    for (uint32_t t = 0; t < walk->narrow_n; t++)
        for (uint32_t i = 0; i < panels; i++)
            if (!panel_is_wide(walk, walk->panel_begin + i))
                store_narrow(walk, &scratch->narrow[t], walk->panel_begin + i,
                             scratch->sums + i * panel_sums + (uint64_t)t * CPU_PANEL);
}

static void flush_narrow(struct walk *walk)
{
    if (walk->narrow_n == 0)
        return;
    if (walk->narrow_n <= STREAM_TOKENS_MAX)
        stream_panels(walk);
    else
        multiply_panels(walk);
    for (uint32_t panel = walk->panel_begin; panel < walk->panel_end; panel++)
        if (panel_is_wide(walk, panel))
            wide_panel(walk, walk->scratch.narrow, walk->narrow_n, panel);
    walk->narrow_n = 0;
}

// ---- Gathering.

static bool all_zero(const uint8_t *codes, uint32_t n)
{
    uint32_t any = 0;
    for (uint32_t i = 0; i < n; i++)
        any |= codes[i];
    return (any & 0x7F) == 0;
}

// Reads a token's scales as FP32, whatever their layout. Returns false if one is not narrow.
static bool load_scales(const struct walk *walk, const struct token *token, float *scales)
{
    uint32_t block_r = walk->weight->format.block_r;
    for (uint32_t k = 0; k < blocks_of(walk); k++) {
        const uint8_t *at = token_scale(token, k);
        float scale = token->scale_type == EINSUM_SCALE_UE8M0 ? ue8m0_to_float(*at) : fp32_load(at);
        if (!cpu_is_narrow(scale)) {
            // Rows of zeros come with any scale, 2^-127 above all: padding must not cost more.
            bool finite = (fp32_bits(scale) & 0x7FFFFFFF) < 0x7F800000;
            if (!finite || !all_zero(token->codes + (uint64_t)k * block_r, block_r))
                return false;
            scale = 0;
        }
        scales[k] = scale;
    }
    return true;
}

static void add_token(struct walk *walk, const struct token *token)
{
    const struct scratch *scratch = &walk->scratch;
    float *scales = scratch->scales + (uint64_t)walk->narrow_n * blocks_of(walk);
    if (load_scales(walk, token, scales)) {
        scratch->narrow[walk->narrow_n++] = *token;
        if (walk->narrow_n == TILE_TOKENS)
            flush_narrow(walk);
    } else {
        scratch->wide[walk->wide_n++] = *token;
        if (walk->wide_n == TILE_TOKENS)
            flush_wide(walk);
    }
}

static void add_operand(struct walk *walk, const struct einsum_operand *operand)
{
    const struct einsum_weight_format *format = &walk->weight->format;
    if (walk->group < operand->group_begin || walk->group - operand->group_begin >= operand->groups)
        return;
    uint64_t g = walk->group - operand->group_begin;
    struct einsum_scale_strides strides = einsum_scale_strides(format, operand);
    uint64_t output_row =
        (uint64_t)format->output_dim * einsum_output_element_bytes(operand->output_type);
    for (uint64_t t = 0; t < operand->tokens; t++) {
        uint64_t at = einsum_activation_offset(operand->activation_layout, operand->tokens,
                                               operand->groups, format->reduced_dim, t, g);
        struct token token = {
            .codes = (const uint8_t *)operand->activations + at,
            .scales = (const uint8_t *)operand->scales + t * strides.token + g * strides.group,
            .scale_word = strides.word,
            .scale_byte = strides.byte,
            .output = (uint8_t *)operand->output + (t * operand->groups + g) * output_row,
            .scale_type = operand->scale_type,
            .output_type = operand->output_type,
        };
        add_token(walk, &token);
    }
}

void cpu_task_run(const struct cpu_kernel *kernel, const struct cpu_task *task, uint32_t item,
                  uint32_t items, void *scratch)
{
    struct walk walk = {.kernel = kernel, .weight = task->weight};
    uint32_t begin, end;
    used_groups(task, &begin, &end);
    // NOLINTNEXTLINE(clang-analyzer-core.DivideZero): a task without groups has no items
    uint32_t parts = items / (end - begin);
    uint32_t panels = task->weight->format.output_dim / CPU_PANEL;
    uint64_t part = item % parts;
    walk.group = begin + item / parts;
    walk.panel_begin = (uint32_t)(panels * part / parts);
    walk.panel_end = (uint32_t)(panels * (part + 1) / parts);

    scratch_carve(&walk.scratch, scratch, task->weight->format.reduced_dim);
    for (uint32_t i = 0; i < task->operands_n; i++)
        add_operand(&walk, &task->operands[i]);
    flush_narrow(&walk);
    flush_wide(&walk);
}
