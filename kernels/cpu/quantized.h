/* Rows times a weight of 8-bit or 4-bit numbers, see packing.h for how it lies.
 *
 * Integer products multiply inputs that are rounded to 8 bits (rounding.h).  Sums of a group are exact, and are added up
 * in float32 in the order of groups, times the scales of the inputs and of the weight.  So a row has the same bits
 * whatever is beside it, and whatever instructions made the sums.
 *
 * Products of floats widen the numbers and add up in the order of inputs, as linear.h does; a group's sum, or the whole
 * where an output has one scale, is then multiplied by its scale.
 */
#ifndef PERSIMMON_QUANTIZED_H
#define PERSIMMON_QUANTIZED_H

#include "linear.h"
#include "packing.h"
#include "rounding.h"

/* Inputs of a slice, and groups of them at most. */
#define SLICE_INPUTS 128
#define SLICE_GROUPS (SLICE_INPUTS / 8)
/* How many bytes ahead weights are fetched with few rows. */
#define BYTES_AHEAD 4096
#define LINES_AHEAD (BYTES_AHEAD / PANEL)
/* Rows that share the weights in registers, and vectors of outputs of a tile. */
#define DOT_ROWS 6
#if LANES == 16
#define DOT_VECTORS(rows) 4
#else
#define DOT_VECTORS(rows) ((rows) == 1 ? 8 : (rows) <= 3 ? 4 : 2)
#endif

/* Whose memory one thread uses, next to the sums. */
typedef struct {
    uint8_t numbers[SLICE_INPUTS * PANEL * 2]; /* a slice as dot products read it */
    float scales[SLICE_GROUPS * PANEL];
    float sums[ROWS_AT_ONCE * PANEL];           /* of one group, in products of floats */
} QuantizedWorkspace;

/* Some groups of a panel's numbers, and the inputs that they multiply. */
typedef struct {
    const uint8_t *numbers; /* of the first group, as dot products read them */
    int64_t numbers_stride; /* from group to group */
    const float *scales;    /* [PANEL], of the first group, or null where a panel has one scale for all groups */
    int64_t scales_stride;  /* from group to group */
    int64_t groups;
    int64_t first;          /* number of the first group among all */
    const uint32_t *counts; /* steps of each group, or null for the same everywhere */
    int64_t steps;
} Slice;

/* As `fetch_more`, up to four lines. */
INLINE void fetch_lines(Fetch *fetch) {
    if (fetch->stride > 128) {
        __builtin_prefetch(fetch->at + 128);
        __builtin_prefetch(fetch->at + 192);
    }
    fetch_more(fetch);
}

/* sums[row, :] += what a slice's groups add, for `rows` rows.  `narrow`: sums of 16 bits, see integers.h. */
INLINE void dot_tile(const Rounded *in, int64_t first_row, const Slice *slice, float *sums, Fetch *fetch, const int rows,
                     const int narrow) {
    const int vectors = DOT_VECTORS(rows);
    const char *items = in->items + first_row * in->row_bytes;
    const float *input_scales = in->scales + first_row * in->groups;
    const int32_t *corrections = in->corrections + first_row * in->groups;
    for (int column = 0; column < PANEL; column += vectors * LANES)
        for (int64_t i = 0; i < slice->groups; i++) {
            const int64_t group = slice->first + i, steps = slice->counts ? slice->counts[i] : slice->steps;
            const uint8_t *numbers = slice->numbers + i * slice->numbers_stride + column * 4;
            const char *own = items + group * in->group * (narrow ? 1 : INPUT_BYTES);
            Integers total[DOT_ROWS][MAX_VECTORS];
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) total[row][v] = repeat(corrections[row * in->groups + group]);
#if !BYTE_DOTS
            if (narrow)
                for (int64_t step = 0; step < steps; step += NARROW_DOTS) {
                    const int64_t end = steps - step < NARROW_DOTS ? steps - step : NARROW_DOTS;
                    Words part[DOT_ROWS][MAX_VECTORS];
#pragma GCC unroll 6
                    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; v++) part[row][v] = (Words){0};
                    for (int64_t j = 0; j < end; j++) {
                        if (rows > 4) fetch_lines(fetch);
                        Integers weights[MAX_VECTORS];
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; v++)
                            weights[v] = load_integers(numbers + (step + j) * PANEL * 4 + v * LANES * 4);
#pragma GCC unroll 6
                        for (int row = 0; row < rows; row++) {
                            const Integers input = repeat_inputs(own + row * in->row_bytes + (step + j) * 4);
#pragma GCC unroll 8
                            for (int v = 0; v < vectors; v++) part[row][v] = dot_narrow(part[row][v], weights[v], input);
                        }
                    }
#pragma GCC unroll 6
                    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; v++) total[row][v] = add_narrow(total[row][v], part[row][v]);
                }
            else
#endif
                for (int64_t step = 0; step < steps; step++) {
                    if (rows > 4) fetch_lines(fetch);
                    Integers weights[MAX_VECTORS];
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; v++) {
                        const uint8_t *at = numbers + step * PANEL * 4 + v * LANES * 4;
                        weights[v] = load_integers(at);
                        if (BYTE_DOTS && rows <= 4) __builtin_prefetch(at + BYTES_AHEAD);
                    }
#pragma GCC unroll 6
                    for (int row = 0; row < rows; row++) {
                        const Integers input = repeat_inputs(own + row * in->row_bytes + step * 4);
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; v++) total[row][v] = dot(total[row][v], weights[v], input);
                    }
                }
            float *to = sums + column;
            if (slice->scales) {
                Vector scales[MAX_VECTORS];
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) scales[v] = load(slice->scales + i * slice->scales_stride + column + v * LANES);
#pragma GCC unroll 6
                for (int row = 0; row < rows; row++) {
                    const Vector input_scale = broadcast(input_scales[row * in->groups + group]);
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; v++) {
                        const Vector some = multiply(to_floats(total[row][v]), input_scale);
                        float *own_sums = to + row * PANEL + v * LANES;
                        store(own_sums, multiply_add(some, scales[v], load(own_sums)));
                    }
                }
            } else {
#pragma GCC unroll 6
                for (int row = 0; row < rows; row++) {
                    const Vector input_scale = broadcast(input_scales[row * in->groups + group]);
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; v++) {
                        float *own_sums = to + row * PANEL + v * LANES;
                        store(own_sums, multiply_add(to_floats(total[row][v]), input_scale, load(own_sums)));
                    }
                }
            }
        }
}

INLINE void dot_slice(const Rounded *in, int64_t first_row, int64_t rows, const Slice *slice, float *sums, Fetch fetch,
                      const int narrow) {
    const int64_t most = tile_rows(rows);
    for (int64_t row = 0; row < rows; row += most) {
        const int64_t some = rows - row < most ? rows - row : most;
        float *own_sums = sums + row * PANEL;
#define DOTS(n) dot_tile(in, first_row + row, slice, own_sums, &fetch, n, narrow)
        FOR_ROWS(some, DOTS)
    }
}

/* Numbers of 4 bits that lie together, each in a byte. */
static void split_together(const uint8_t *restrict from, int64_t inputs, uint8_t *restrict to) {
    for (int64_t k = 0; k < inputs; k += 8, from += PANEL * 4, to += PANEL * 8) {
        __builtin_prefetch(from + BYTES_AHEAD);
        __builtin_prefetch(from + BYTES_AHEAD + 64);
        __builtin_prefetch(from + BYTES_AHEAD + 128);
        __builtin_prefetch(from + BYTES_AHEAD + 192);
        for (int i = 0; i < PANEL * 4; i++) {
            to[i] = from[i] & 15;
            to[PANEL * 4 + i] = from[i] >> 4;
        }
    }
}

#if !BYTE_DOTS
/* Pairs of numbers of 8 bits, in 16 bits. */
static void widen_together(const int8_t *restrict from, int64_t inputs, int16_t *restrict to) {
    for (int64_t k = 0; k < inputs; k += 2, from += PANEL * 2, to += PANEL * 2) {
        __builtin_prefetch(from + BYTES_AHEAD);
        __builtin_prefetch(from + BYTES_AHEAD + 64);
        for (int i = 0; i < PANEL * 2; i++) to[i] = from[i];
    }
}
#endif

/* Lines that lie one after the other, or those of a list. */
typedef struct {
    const uint8_t *panel;
    const uint32_t *list;       /* lines from the panel's begin; null for all from `panel` on */
    const uint8_t *next_panel;  /* where the list is used after its end */
    int64_t done, count;        /* lines of the list that are done, of how many */
} Lines;

INLINE const uint8_t *line_at(const Lines *own, int64_t i) {
    if (!own->list) return own->panel + i * PANEL;
    if (i < own->count) return own->panel + (int64_t)own->list[i] * PANEL;
    return own->next_panel + (int64_t)own->list[i - own->count] * PANEL;
}

/* Puts lines of numbers together for the next `steps` steps. */
static void join_lines(Lines *own, int64_t steps, uint8_t *restrict to, const int type) {
    const int64_t lines = STEP_LINES(type);
    for (int64_t step = 0; step < steps; step++, to += PANEL * 4, own->done += lines) {
        const uint8_t *from[4];
        for (int64_t i = 0; i < lines; i++) {
            from[i] = line_at(own, own->done + i);
            const int64_t ahead = own->done + i + LINES_AHEAD;
            if (!own->list || ahead < 2 * own->count) __builtin_prefetch(line_at(own, ahead));
        }
        if (type == INT4) {
            for (int i = 0; i < PANEL; i += LANES * 4) {
                const Integers a = load_integers(from[0] + i), b = load_integers(from[1] + i);
                join_four(low_halves(a), high_halves(a), low_halves(b), high_halves(b), to + 4 * i);
            }
        } else if (BYTE_DOTS) {
            const Integers unsign = repeat((int32_t)0x80808080);
            for (int i = 0; i < PANEL; i += LANES * 4)
                join_four(load_integers(from[0] + i) ^ unsign, load_integers(from[1] + i) ^ unsign,
                          load_integers(from[2] + i) ^ unsign, load_integers(from[3] + i) ^ unsign, to + 4 * i);
        } else {
            const int8_t *restrict a = (const int8_t *)from[0], *restrict b = (const int8_t *)from[1];
            int16_t *restrict pairs = (int16_t *)to;
            for (int i = 0; i < PANEL; i++) {
                pairs[2 * i] = a[i];
                pairs[2 * i + 1] = b[i];
            }
        }
    }
}

#undef DOTS

/* Numbers of 8 bits of a panel whose outputs lie in rows, as a slice of `inputs` inputs from `first` on. */
static void join_rows(const Operation *op, int64_t panel, int64_t first, int64_t inputs, uint8_t *to,
                      const int together) {
    const int64_t left = op->in - first, known = left < inputs ? left : inputs;
    for (int64_t column = 0; column < PANEL; column++) {
        const int64_t row = panel * PANEL + column;
        const int8_t *from = (const int8_t *)op->weight + row * op->in + first;
        for (int64_t k = 0; k < inputs; k++) {
            const int8_t number = row < op->out && k < known ? from[k] : 0;
            const int64_t at = (k / together * PANEL + column) * together + k % together;
            if (together == 1) to[at] = (uint8_t)number;
            else if (BYTE_DOTS) to[at] = (uint8_t)number ^ 0x80;
            else ((int16_t *)to)[at] = number;
        }
    }
}

INLINE void widen_scales(const void *from, float *to, const int type) {
    for (int64_t i = 0; i < PANEL; i += LANES) store(to + i, load_as(from, i, type));
}

/* The scales of a panel's group, or of outputs whose scales lie elsewhere. */
static void load_scales(const Operation *op, int64_t panel, const void *packed, float *to) {
    if (op->scales) {
        const int64_t first = panel * PANEL;
        for (int64_t i = 0; i < PANEL; i++)
            to[i] = first + i < op->out ? item_as(op->scales, first + i, (int)op->scale_type) : 0.0f;
    } else if (op->scale_type == FLOAT16) {
        widen_scales(packed, to, FLOAT16);
    } else if (op->scale_type == BFLOAT16) {
        widen_scales(packed, to, BFLOAT16);
    } else {
        widen_scales(packed, to, FLOAT32);
    }
}

/* Multiplies a panel's sums where it has one scale for all inputs of an output. */
static void scale_panel(const Operation *op, int64_t rows, int64_t panel, const char *weights, float *sums,
                        float *scales) {
    load_scales(op, panel, weights, scales);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < PANEL; i++) sums[row * PANEL + i] *= scales[i];
}

/* A panel's sums for up to ROWS_AT_ONCE rows of rounded inputs. */
static void multiply_integers(const Operation *op, const Rounded *in, int64_t first_row, int64_t rows, int64_t panel,
                              int64_t next_panel, float *sums, QuantizedWorkspace *own) {
    const Layout layout = layout_of(op->in, op->group, op->type, op->scale_type);
    const int type = (int)op->type, in_rows = op->scales != NULL;
    const char *weights = (const char *)op->weight + panel * layout.panel_bytes;
    const char *next = (const char *)op->weight + next_panel * layout.panel_bytes;
    const int few = in->leaves_out;
    const int64_t tiles = (rows + DOT_ROWS - 1) / DOT_ROWS;
    /* A slice is several groups, each of inputs and of the weight, or some groups of inputs of one group of the weight. */
    const int64_t at_once = SLICE_INPUTS / in->group, alike = op->group == in->group;
    const int64_t number_bytes = PANEL / (type == INT4 ? 2 : 1); /* of an input */
    Lines list = {(const uint8_t *)weights, in->lines, (const uint8_t *)next, 0, few ? *in->line_count : 0};
    memset(sums, 0, (size_t)(rows * PANEL) * sizeof(float));
    for (int64_t group = 0, some; group < in->groups; group += some) {
        const int64_t input = group * in->group;
        /* The last group of all may be shorter, and is a slice by itself. */
        const int64_t end = layout.groups == 1 || alike ? in->inputs : (input / op->group + 1) * op->group;
        const int64_t whole = (end - input) / in->group;
        some = whole < 1 ? 1 : whole < at_once ? whole : at_once;
        const int64_t inputs = in->inputs - input < in->group ? in->inputs - input : in->group;
        const char *numbers = weights + numbers_at(&layout, type, input);
        Slice slice = {
            .numbers = (const uint8_t *)numbers,
            .numbers_stride = alike ? layout.group_bytes : in->group * number_bytes,
            .groups = some,
            .first = group,
            .counts = few ? in->counts + group : NULL,
            .steps = inputs / STEP_INPUTS(type),
        };
        if (layout.groups > 1) {
            const char *scales = weights + input / op->group * layout.group_bytes;
            for (int64_t i = 0; i < (alike ? some : 1); i++)
                load_scales(op, panel, scales + i * layout.group_bytes, own->scales + i * PANEL);
            slice.scales = own->scales;
            slice.scales_stride = alike ? PANEL : 0;
        }
        if (op->sparse || in_rows || type == INT4 || !BYTE_DOTS) {
            const int64_t stride = slice.numbers_stride;
            slice.numbers = own->numbers;
            slice.numbers_stride = slice.steps * PANEL * 4;
            for (int64_t i = 0; i < some; i++) {
                const uint8_t *from = (const uint8_t *)numbers + i * stride;
                uint8_t *to = own->numbers + i * slice.numbers_stride;
                Lines all = {.panel = from}, *lines = few ? &list : &all;
                const int64_t steps = few ? slice.counts[i] : slice.steps;
                if (in_rows) join_rows(op, panel, input + i * in->group, inputs, to, TOGETHER);
                else if (op->sparse && type == INT4) join_lines(lines, steps, to, INT4);
                else if (op->sparse) join_lines(lines, steps, to, INT8);
                else if (type == INT4) split_together(from, inputs, to);
#if !BYTE_DOTS
                else widen_together((const int8_t *)from, inputs, (int16_t *)to);
#endif
            }
        }
        const int64_t bytes = some * inputs * number_bytes;
        const Fetch fetch = {
            .at = group + some < in->groups ? weights + numbers_at(&layout, type, input + some * in->group) : next,
            .stride = bytes / (tiles * some * slice.steps * (PANEL / (DOT_VECTORS(DOT_ROWS) * LANES))),
        };
        if (!BYTE_DOTS && type == INT4) dot_slice(in, first_row, rows, &slice, sums, fetch, 1);
        else dot_slice(in, first_row, rows, &slice, sums, fetch, 0);
    }
    if (layout.groups == 1) scale_panel(op, rows, panel, weights, sums, own->scales);
}

/* Lines of numbers of 4 bits, each number in a byte with its sign; those that `wanted` lists, or all. */
static void split_lines(const uint8_t *restrict from, int64_t inputs, int64_t wanted_count, const int32_t *wanted,
                        int8_t *restrict to) {
    for (int64_t i = 0; i < (wanted_count < 0 ? inputs : wanted_count); i++) {
        const int64_t k = (wanted_count < 0 ? i : wanted[i]) / 2;
        if (wanted_count < 0 && i % 2) continue;
        __builtin_prefetch(from + k * PANEL + BYTES_AHEAD);
        for (int j = 0; j < PANEL; j++) {
            to[2 * k * PANEL + j] = (int8_t)((from[k * PANEL + j] & 15) - 8);
            to[(2 * k + 1) * PANEL + j] = (int8_t)((from[k * PANEL + j] >> 4) - 8);
        }
    }
}

/* A panel's sums for up to ROWS_AT_ONCE rows of floats, [*, in]. */
static void multiply_floats(const Operation *op, const float *inputs, int64_t rows, int64_t panel, int64_t next_panel,
                            Workspace *floats, QuantizedWorkspace *own) {
    const Layout layout = layout_of(op->in, op->group, op->type, op->scale_type);
    const int type = (int)op->type;
    const char *weights = (const char *)op->weight + panel * layout.panel_bytes;
    const char *next = (const char *)op->weight + next_panel * layout.panel_bytes;
    const int few = op->sparse && rows <= SPARSE_ROWS, widened = rows > TILE_ROWS;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    float *sums = layout.groups == 1 ? floats->sums : own->sums;
    memset(floats->sums, 0, (size_t)(rows * PANEL) * sizeof(float));
    for (int64_t group = 0; group < layout.groups; group++) {
        if (layout.groups > 1) memset(sums, 0, (size_t)(rows * PANEL) * sizeof(float));
        for (int64_t start = 0; start < op->group; start += DEPTH) {
            const int64_t depth = op->group - start < DEPTH ? op->group - start : DEPTH;
            const int64_t first = group * op->group + start;
            const float *some = inputs + first;
            const char *numbers = weights + numbers_at(&layout, type, first);
            const int8_t *slice = (const int8_t *)numbers;
            const int64_t count = few ? find_nonzero(some, op->in, rows, depth, 0, floats->nonzero) : -1;
            int8_t *widened_once = (int8_t *)own->numbers;
            if (op->scales || type == INT4) slice = widened_once;
            if (op->scales) join_rows(op, panel, first, depth, own->numbers, 1);
            else if (type == INT4)
                split_lines((const uint8_t *)numbers, depth, count, floats->nonzero, widened_once);
            if (widened) widen_slice(slice, depth, PANEL, INT8, floats->slice);
            const Fetch fetch = {
                .at = first + depth < op->in ? weights + numbers_at(&layout, type, first + depth) : next,
                .stride = depth * PANEL / (type == INT4 ? 2 : 1) /
                          (tiles * depth * (PANEL / (TILE_VECTORS(TILE_ROWS) * LANES))),
            };
            const int32_t *nonzero = floats->nonzero;
            if (widened) multiply_slice(some, op->in, rows, floats->slice, depth, count, nonzero, sums, fetch, FLOAT32);
            else multiply_slice(some, op->in, rows, slice, depth, count, nonzero, sums, fetch, INT8);
        }
        if (layout.groups == 1) continue;
        load_scales(op, panel, weights + group * layout.group_bytes, own->scales);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t column = 0; column < PANEL; column += LANES) {
                float *to = floats->sums + row * PANEL + column;
                store(to, multiply_add(load(sums + row * PANEL + column), load(own->scales + column), load(to)));
            }
    }
    if (layout.groups == 1) scale_panel(op, rows, panel, weights, floats->sums, own->scales);
}

#endif
