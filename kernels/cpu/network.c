/* Runs a program of operations: each is one or two phases of a piece of work for the team of threads.
 *
 * Compiled once for each generation of processors that `library.py` names.
 */
#define _GNU_SOURCE
#include "network.h"

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#include "attention.h"
#include "linear.h"
#include "listed.h"
#include "norm.h"
#include "packing.h"
#include "quantized.h"
#include "sampling.h"
#include "team.h"
#include "weight_rounding.h"

/* Parts that each thread should have of an operation at least. */
#define PARTS_EACH 16

/* Whose memory one thread uses. */
typedef struct {
    Workspace floats;
    QuantizedWorkspace quantized;
} OwnMemory;

typedef struct {
    const Operation *program;
    const Step *step;
    void *inputs;         /* a projection's inputs, in tiles, normalised, rounded or in lists */
    OwnMemory *memories;  /* one a thread */
    int64_t threads;
} Run;

static void embed(const Operation *op, const Step *step, int64_t row) {
    int64_t id = step->token_ids[row];
    if (id < 0) id = step->sampled[-1 - id];
    float *to = op->output + row * op->out;
    const float scale = op->scales ? item_as(op->scales, id, (int)op->scale_type) : 1.0f;
    for (int64_t i = 0; i < op->out; i++) to[i] = item_as(op->weight, id * op->out + i, (int)op->type) * scale;
}

/* How many rows a projection has. */
static int64_t rows_of(const Operation *op, const Step *step) { return op->of_rows ? step->rows : step->tokens; }

static int is_quantized(const Operation *op) { return op->type == INT8 || op->type == INT4; }

/* Whether a product has inputs in another form than what comes in. */
static int prepares(const Operation *op, int64_t rows) {
    return op->norm_weight || op->rounds || op->integer || rows > 1;
}

/* One row of a projection's inputs, normalised where there is a norm; in `buffer`, or as it came. */
static const float *normed_row(const Operation *op, int64_t row, float *buffer) {
    const float *from = op->input + row * op->in;
    if (!op->norm_weight) return from;
    layer_norm(from, buffer, op->norm_weight, op->norm_bias, (float)op->eps, op->in);
    return buffer;
}

static void round_items(const Operation *op, const Rounded *rounded, int64_t row, char *items) {
    float buffer[op->in];
    const float *from = normed_row(op, row, buffer);
    /* Bytes of weights are stored as unsigned numbers. */
    if (op->type == INT4) round_row(from, op->in, rounded, row, items, 1, 8);
    else if (item_bytes_of(op) == 2) round_row(from, op->in, rounded, row, items, 2, 0);
    else round_row(from, op->in, rounded, row, items, 1, BYTE_DOTS ? 128 : 0);
}

/* The inputs of one tile's rows, normalised or rounded; with few rows, without those that are zero in all. */
static void prepare_tile(const Operation *op, int64_t tile, int64_t rows, void *inputs) {
    const int64_t first = tile * tile_rows(rows), left = rows - first, some = left < tile_rows(rows) ? left : tile_rows(rows);
    const char *from[TILE_ROWS];
    if (op->integer) {
        const Rounded rounded = rounded_inputs(op, rows, inputs);
        const int64_t stride = ROW_BUFFER_BYTES(rounded), words = rounded.row_bytes / 4;
        char items[some * stride];
        for (int64_t row = 0; row < some; row++) {
            from[row] = items + row * stride;
            round_items(op, &rounded, first + row, items + row * stride);
        }
        if (rounded.leaves_out && op->type == INT4) gather_nonzero(op, &rounded, rows, items, stride, 2, STEP_LINES(INT4));
        else if (rounded.leaves_out) gather_nonzero(op, &rounded, rows, items, stride, 1, STEP_LINES(INT8));
        place_tile((uint32_t *)inputs + first * words, words, from, some);
    } else if (op->rounds) {
        uint16_t items[some * op->in];
        float buffer[op->in];
        for (int64_t row = 0; row < some; row++) {
            const float *normed = normed_row(op, first + row, buffer);
            from[row] = (const char *)(items + row * op->in);
            for (int64_t i = 0; i < op->in; i++) items[row * op->in + i] = to_bfloat16(normed[i]);
        }
        place_tile((uint32_t *)inputs + first * op->in / 2, op->in / 2, from, some);
    } else {
        float buffers[op->norm_weight ? some * op->in : 1];
        for (int64_t row = 0; row < some; row++)
            from[row] = (const char *)normed_row(op, first + row, op->norm_weight ? buffers + row * op->in : buffers);
        if (lists_nonzero(op, rows))
            place_listed_tile((uint32_t *)inputs + first * LISTED_WORDS(op->in), op->in, from, some);
        else place_tile((uint32_t *)inputs + first * op->in, op->in, from, some);
    }
}

/* How many rows of a product one thread takes together: alike in all parts, whole tiles, and few enough that every thread
 * has some parts, as long as a part still shares each weight between two tiles. */
static int64_t rows_together(const Operation *op, const Run *run) {
    const int64_t rows = rows_of(op, run->step), panels = (op->out + PANEL - 1) / PANEL;
    const int64_t tiles = tile_count(rows), most = ROWS_AT_ONCE / tile_rows(rows);
    int64_t blocks = (tiles + most - 1) / most;
    while (blocks * panels < 2 * run->threads && tiles >= 2 * (blocks + 1)) blocks++;
    return (tiles + blocks - 1) / blocks * tile_rows(rows);
}

/* Some rows of one panel. */
static void linear(const Operation *op, const Run *run, int64_t part, int64_t thread) {
    const int64_t rows = rows_of(op, run->step), panels = (op->out + PANEL - 1) / PANEL;
    const int64_t together = rows_together(op, run), first = part / panels * together, panel = part % panels;
    const int64_t some = rows - first < together ? rows - first : together;
    const void *inputs = prepares(op, rows) ? run->inputs : (const void *)op->input;
    OwnMemory *own = run->memories + thread;
    /* Threads take panels in turn. */
    const int64_t next_panel = (panel + run->threads) % panels;
    if (op->integer) {
        const Rounded rounded = rounded_inputs(op, rows, run->inputs);
        const Inputs in = some_inputs(inputs, rounded.row_bytes / 4, rows, first, some);
        multiply_integers(op, &rounded, &in, first, panel, next_panel, own->floats.sums, &own->quantized);
    } else if (lists_nonzero(op, rows)) {
        const Inputs in = some_inputs(inputs, LISTED_WORDS(op->in), rows, first, some);
        multiply_listed_panel(op, &in, panel, next_panel, &own->floats);
    } else {
        const Inputs in = some_inputs(inputs, op->rounds ? op->in / 2 : op->in, rows, first, some);
        if (is_quantized(op)) multiply_floats(op, &in, panel, next_panel, &own->floats, &own->quantized);
        else multiply_panel(op, &in, panel, next_panel, &own->floats);
    }
    finish_panel(op, first, some, panel, own->floats.sums);
}

/* How many of a sequence's heads one thread takes together, so that it can fetch the next one's keys in time: as many as
 * leave each thread enough parts. */
static int64_t heads_together(const Operation *op, const Run *run) {
    int64_t heads = 1;
    while (op->heads % (2 * heads) == 0 && run->step->sequences * op->heads >= 2 * heads * PARTS_EACH * run->threads)
        heads *= 2;
    return heads;
}

/* Some heads of one sequence. */
static void attention(const Operation *op, const Run *run, int64_t part) {
    const Step *step = run->step;
    const int64_t width = op->heads * op->head_dim, together = heads_together(op, run);
    /* The last sequences are the longest: they come first, so that no thread waits for one at the end. */
    const int64_t sequence = step->sequences - 1 - part * together / op->heads, first_head = part * together % op->heads;
    const int64_t first = step->firsts[sequence];
    const int32_t *table = step->tables + step->table_firsts[sequence];
    const int64_t angles = (step->cosine ? first : step->starts[sequence]) * (op->rotary / 2);
    for (int64_t head = first_head; head < first_head + together; head++) {
        const int64_t next_tile = (table[0] * op->heads + head + 1) * op->block_size * op->head_dim;
        const Head own = {
            .op = op,
            .qkv = op->input + (first * op->heads + head) * 3 * op->head_dim,
            .stride = 3 * width,
            .out = op->output + first * width + head * op->head_dim,
            .out_stride = width,
            .head = head,
            .start = step->starts[sequence],
            .count = step->firsts[sequence + 1] - first,
            .table = table,
            .cosine = (step->cosine ? step->cosine : op->cosine) + angles,
            .sine = (step->cosine ? step->sine : op->sine) + angles,
            .next = head + 1 < first_head + together ? address(op->keys, next_tile, (int)op->type) : NULL,
        };
        attend_head(&own);
    }
}

static void norm_row(const Operation *op, const Step *step, int64_t row) {
    const int64_t from = step->row_ids && !op->of_rows ? step->row_ids[row] : row;
    layer_norm(op->input + from * op->in, step->hidden + row * op->in, op->norm_weight, op->norm_bias, (float)op->eps,
               op->in);
}

static void take_row(const Operation *op, const Step *step, int64_t row) {
    memcpy(op->output + row * op->in, op->input + step->row_ids[row] * op->in, (size_t)op->in * sizeof(float));
}

/* One row's token. */
static void draw(const Operation *op, const Run *run, int64_t row, int64_t thread) {
    /* The thread's share of what is used for inputs elsewhere: weights, and candidates that are twice as wide. */
    float *weights = (float *)run->inputs + thread * 3 * op->in;
    run->step->drawn[row] =
        draw_token(run->step->draws + row, op->input + row * op->in, op->in, weights, (Candidate *)(weights + op->in));
}

/* How many parts an operation's two phases have. */
static void count_parts(const Operation *op, const Run *run, uint32_t parts[2]) {
    const Step *step = run->step;
    int64_t rows, together;
    parts[0] = parts[1] = 0;
    switch (op->kind) {
        case LINEAR:
            rows = rows_of(op, step);
            if (rows == 0) break;
            parts[0] = prepares(op, rows) ? (uint32_t)tile_count(rows) : 0;
            together = rows_together(op, run);
            parts[1] = (uint32_t)((rows + together - 1) / together * ((op->out + PANEL - 1) / PANEL));
            break;
        case ATTENTION: parts[1] = (uint32_t)(step->sequences * op->heads / heads_together(op, run)); break;
        case NORM_ROWS: case TAKE_ROWS: parts[1] = (uint32_t)step->rows; break;
        default: parts[1] = (uint32_t)step->tokens;
    }
}

static void run_part(const void *context, int64_t phase, int64_t part, int64_t thread) {
    const Run *run = context;
    const Operation *op = run->program + phase / 2;
    switch (op->kind) {
        case EMBED: embed(op, run->step, part); break;
        case LINEAR:
            if (phase % 2) linear(op, run, part, thread);
            else prepare_tile(op, part, rows_of(op, run->step), run->inputs);
            break;
        case ATTENTION: attention(op, run, part); break;
        case NORM_ROWS: norm_row(op, run->step, part); break;
        case DRAW: draw(op, run, part, thread); break;
        case TAKE_ROWS: take_row(op, run->step, part); break;
    }
}

static int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Of inputs, in the largest of their forms. */
static int64_t input_bytes(int64_t inputs) { return align(LISTED_WORDS(inputs) * (int64_t)sizeof(float)); }

int64_t persimmon_scratch_bytes(int64_t inputs, int64_t threads) {
    return input_bytes(inputs) + (threads < MAX_THREADS ? threads : MAX_THREADS) * sizeof(OwnMemory);
}

int64_t persimmon_run(const Operation *program, int64_t operations, const Step *step, void *scratch, int64_t inputs,
                      int64_t threads) {
    for (int64_t i = 0; i < operations; i++)
        if (program[i].kind < EMBED || program[i].kind > TAKE_ROWS) return i + 1;
    uint32_t parts[MAX_PHASES];
    for (int64_t first = 0; first < operations; first += MAX_PHASES / 2) {
        const int64_t some = operations - first < MAX_PHASES / 2 ? operations - first : MAX_PHASES / 2;
        void *memories = (char *)scratch + input_bytes(inputs);
        const Run run = {program + first, step, scratch, memories, threads};
        for (int64_t i = 0; i < some; i++) count_parts(program + first + i, &run, parts + 2 * i);
        work_together((Work){run_part, &run, 2 * some, threads}, parts);
    }
    return 0;
}

void persimmon_pack(const void *weight, void *packed, int64_t out, int64_t in, int64_t item_bytes, int64_t pairs,
                    int64_t threads) {
    const Packing packing = {
        .weight = weight, .packed = packed, .out = out, .in = in, .item_bytes = item_bytes, .together = pairs ? 2 : 1};
    const uint32_t panels = (uint32_t)((out + PANEL - 1) / PANEL);
    work_together((Work){pack_part, &packing, 1, threads}, &panels);
}

void persimmon_pack_quantized(const Operation *op, const void *numbers, const void *scales, void *packed,
                              int64_t threads) {
    const Packing packing = {
        .weight = numbers,
        .scales = scales,
        .packed = packed,
        .out = op->out,
        .in = op->in,
        .type = op->type,
        .group = op->group,
        .scale_type = op->scale_type,
        .lines = !op->integer || op->sparse,
        .joined = op->integer && op->sparse,
    };
    const uint32_t panels = (uint32_t)((op->out + PANEL - 1) / PANEL);
    work_together((Work){pack_part, &packing, 1, threads}, &panels);
}

int64_t persimmon_packed_bytes(const Operation *op) {
    const Layout layout = layout_of(op->in, op->group, op->type, op->scale_type);
    return (op->out + PANEL - 1) / PANEL * layout.panel_bytes;
}

void persimmon_round_weights(const WeightRounding *rounding, int64_t threads) {
    const uint32_t rows = (uint32_t)rounding->rows;
    work_together((Work){round_weights_part, rounding, 1, threads}, &rows);
}

/* Tells a build of other sources: its structures differ from those of library.py. */
int64_t persimmon_layout(void) {
    return (int64_t)((sizeof(WeightRounding) << 30) + (sizeof(Operation) << 20) + (sizeof(Step) << 10) + sizeof(Draw));
}

int64_t persimmon_multiplies_bfloat16(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
