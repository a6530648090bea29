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
/* How many bytes ahead weights are fetched with fewer rows than FETCH_ROWS; with more, the next slice is. */
#define FETCH_ROWS 5
#define BYTES_AHEAD 4096
#define LINES_AHEAD (BYTES_AHEAD / PANEL)
/* Whose memory one thread uses, next to the sums. */
typedef struct {
    uint8_t numbers[SLICE_INPUTS * PANEL]; /* a slice as dot products read it */
    float scales[SLICE_GROUPS * PANEL];
    float sums[ROWS_AT_ONCE * PANEL];      /* of one group, in products of floats */
} QuantizedWorkspace;

/* Some groups of a panel's numbers, and the inputs that they multiply. */
typedef struct {
    const uint8_t *numbers; /* of the first group, as dot products read them */
    int64_t numbers_stride; /* from group to group */
    const float *scales;    /* [PANEL], of the first group, or null where a panel has one scale for all groups */
    int64_t scales_stride;  /* from group to group */
    int64_t groups;
    int64_t first;          /* number of the first group among all */
    int64_t group_words;    /* words of a group's inputs */
    const uint32_t *counts; /* steps of each group, or null for the same everywhere */
    int64_t steps;
    int64_t ahead;          /* where numbers come from memory, how many bytes ahead they are fetched with few rows; else 0 */
} Slice;

/* Adds the products of some steps to a tile's sums.  `ahead`: see `Slice`; `how`: see integers.h; `halves`: weights of
 * 4 bits as they are stored, those of two steps in each byte. */
INLINE void add_steps(Integers sums[][MAX_VECTORS], const uint8_t *numbers, const uint32_t *inputs, int64_t steps,
                      int64_t ahead, const int rows, const int how, const int halves) {
    const int vectors = TILE_VECTORS(rows), together = halves ? 2 : 1;
    const int weight_bytes = how == DOT_PAIRS ? 2 : 4; /* for each output, of steps together */
#pragma GCC unroll 2
    for (int64_t i = 0; i < steps; i += together, numbers += PANEL * weight_bytes, inputs += together * rows) {
        Integers weights[MAX_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const uint8_t *at = numbers + v * LANES * weight_bytes;
            weights[v] = how == DOT_PAIRS ? load_pairs((const int8_t *)at) : load_integers(at);
            if (rows < FETCH_ROWS && v * LANES * weight_bytes % LINE_BYTES == 0) __builtin_prefetch(at + ahead);
        }
#pragma GCC unroll 2
        for (int half = 0; half < together; half++)
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                const Integers input = repeat_word(inputs + half * rows + row);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) {
                    const Integers own = !halves ? weights[v] : half ? high_halves(weights[v]) : low_halves(weights[v]);
                    sums[row][v] = dot(sums[row][v], own, input, how);
                }
            }
    }
}

/* sums[row, :] += what a slice's groups add, for one tile's rows, of which the first is number `first_row`.  `words`: the
 * tile's; `how`, `halves`: see `add_steps`. */
INLINE void dot_tile(const Rounded *in, int64_t first_row, const uint32_t *words, const Slice *slice, float *sums,
                     Fetch *fetch, const int rows, const int how, const int halves) {
    if (halves && rows >= FETCH_ROWS) return; /* never so; the compiler makes nothing of it */
    const int vectors = TILE_VECTORS(rows), weight_bytes = how == DOT_PAIRS ? 2 : 4;
    const float *input_scales = in->scales + first_row * in->groups + slice->first;
    const int32_t *corrections = in->corrections + first_row * in->groups + slice->first;
    for (int column = 0; column < PANEL; column += vectors * LANES)
        for (int64_t group = 0; group < slice->groups; group++) {
            const int64_t steps = slice->counts ? slice->counts[group] : slice->steps;
            const uint8_t *numbers = slice->numbers + group * slice->numbers_stride + column * weight_bytes;
            const uint32_t *inputs = words + group * slice->group_words * rows;
            if (rows >= FETCH_ROWS) fetch_more(fetch);
            Integers total[TILE_ROWS][MAX_VECTORS];
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) total[row][v] = repeat(corrections[row * in->groups + group]);
#if !BYTE_DOTS
            if (how == DOT_NARROW) {
                for (int64_t step = 0; step < steps; step += NARROW_DOTS) {
                    Integers part[TILE_ROWS][MAX_VECTORS];
#pragma GCC unroll 6
                    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; v++) part[row][v] = repeat(0);
                    add_steps(part, numbers + step * PANEL * 4 / (halves ? 2 : 1), inputs + step * rows,
                              steps - step < NARROW_DOTS ? steps - step : NARROW_DOTS, slice->ahead, rows, how, halves);
#pragma GCC unroll 6
                    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; v++) total[row][v] = add_narrow(total[row][v], part[row][v]);
                }
            } else
#endif
                add_steps(total, numbers, inputs, steps, slice->ahead, rows, how, halves);
            const float *own_scales = slice->scales ? slice->scales + group * slice->scales_stride + column : NULL;
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                const Vector input_scale = broadcast(input_scales[row * in->groups + group]);
                float *to = sums + row * PANEL + column;
                if (own_scales)
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; v++) {
                        const Vector some = multiply(to_floats(total[row][v]), input_scale);
                        store(to + v * LANES, multiply_add(some, load(own_scales + v * LANES), load(to + v * LANES)));
                    }
                else
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; v++)
                        store(to + v * LANES,
                              multiply_add(to_floats(total[row][v]), input_scale, load(to + v * LANES)));
            }
        }
}

/* A slice times all rows, of which the first is number `first_row` of the step. */
INLINE void dot_slice(const Rounded *rounded, const Inputs *in, int64_t first_row, const Slice *slice, float *sums,
                      Fetch fetch, const int how, const int halves) {
    for (int64_t row = 0; row < in->rows; row += in->tile) {
        const uint32_t *words = tile_words(in, row, slice->first * slice->group_words);
        float *own_sums = sums + row * PANEL;
#define DOTS(n) dot_tile(rounded, first_row + row, words, slice, own_sums, &fetch, n, how, halves)
        FOR_ROWS(rows_of_tile(in, row), DOTS)
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
        } else {
            const Integers unsign = repeat(BYTE_DOTS ? (int32_t)0x80808080 : 0);
            for (int i = 0; i < PANEL; i += LANES * 4)
                join_four(load_integers(from[0] + i) ^ unsign, load_integers(from[1] + i) ^ unsign,
                          load_integers(from[2] + i) ^ unsign, load_integers(from[3] + i) ^ unsign, to + 4 * i);
        }
    }
}

/* Numbers of 8 bits of a panel whose outputs lie in rows, as a slice of `inputs` inputs from `first` on. */
static void join_rows(const Operation *op, int64_t panel, int64_t first, int64_t inputs, uint8_t *to,
                      const int together) {
    const int64_t left = op->in - first, known = left < inputs ? left : inputs;
    for (int64_t column = 0; column < PANEL; column++) {
        const int64_t row = panel * PANEL + column;
        const int8_t *from = (const int8_t *)op->weight + row * op->in + first;
        for (int64_t k = 0; k < inputs; k++) {
            const int8_t number = row < op->out && k < known ? from[k] : 0;
            const uint8_t unsign = together > 1 && BYTE_DOTS ? 0x80 : 0;
            to[(k / together * PANEL + column) * together + k % together] = (uint8_t)number ^ unsign;
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

/* A panel's sums for up to ROWS_AT_ONCE rows of rounded inputs, of which the first is number `first_row` of the step. */
static void multiply_integers(const Operation *op, const Rounded *rounded, const Inputs *in, int64_t first_row,
                              int64_t panel, int64_t next_panel, float *sums, QuantizedWorkspace *own) {
    const Layout layout = layout_of(op->in, op->group, op->type, op->scale_type);
    const int type = (int)op->type, in_rows = op->scales != NULL, few = rounded->leaves_out;
    /* What one tile of few rows reads, it splits itself. */
    const int halves = type == INT4 && !op->sparse && in->rows < FETCH_ROWS;
    const char *weights = (const char *)op->weight + panel * layout.panel_bytes;
    const char *next = (const char *)op->weight + next_panel * layout.panel_bytes;
    const int64_t step_bytes = PANEL * step_inputs(op);
    /* A slice is several groups, each of inputs and of the weight, or some groups of inputs of one group of the weight. */
    const int64_t at_once = SLICE_INPUTS / rounded->group, alike = op->group == rounded->group;
    const int64_t number_bytes = PANEL / (type == INT4 ? 2 : 1); /* of an input */
    Lines list = {(const uint8_t *)weights, rounded->lines, (const uint8_t *)next, 0, few ? *rounded->line_count : 0};
    memset(sums, 0, (size_t)(in->rows * PANEL) * sizeof(float));
    for (int64_t group = 0, some; group < rounded->groups; group += some) {
        const int64_t input = group * rounded->group;
        /* The last group of all may be shorter, and is a slice by itself. */
        const int64_t end = layout.groups == 1 || alike ? rounded->inputs : (input / op->group + 1) * op->group;
        const int64_t whole = (end - input) / rounded->group;
        some = whole < 1 ? 1 : whole < at_once ? whole : at_once;
        const int64_t left = rounded->inputs - input, inputs = left < rounded->group ? left : rounded->group;
        const char *numbers = weights + numbers_at(&layout, type, input);
        Slice slice = {
            .numbers = (const uint8_t *)numbers,
            .numbers_stride = alike ? layout.group_bytes : rounded->group * number_bytes,
            .groups = some,
            .first = group,
            .group_words = rounded->group / step_inputs(op),
            .counts = few ? rounded->counts + group : NULL,
            .steps = inputs / step_inputs(op),
            .ahead = BYTES_AHEAD,
        };
        if (layout.groups > 1) {
            const char *scales = weights + input / op->group * layout.group_bytes;
            for (int64_t i = 0; i < (alike ? some : 1); i++)
                load_scales(op, panel, scales + i * layout.group_bytes, own->scales + i * PANEL);
            slice.scales = own->scales;
            slice.scales_stride = alike ? PANEL : 0;
        }
        if (op->sparse || in_rows || (type == INT4 && !halves)) {
            const int64_t stride = slice.numbers_stride;
            slice.numbers = own->numbers;
            slice.ahead = 0;
            slice.numbers_stride = slice.steps * step_bytes;
            for (int64_t i = 0; i < some; i++) {
                const uint8_t *from = (const uint8_t *)numbers + i * stride;
                uint8_t *to = own->numbers + i * slice.numbers_stride;
                Lines all = {.panel = from}, *lines = few ? &list : &all;
                const int64_t steps = few ? slice.counts[i] : slice.steps;
                if (in_rows) join_rows(op, panel, input + i * rounded->group, inputs, to, TOGETHER);
                else if (op->sparse && type == INT4) join_lines(lines, steps, to, INT4);
                else if (op->sparse) join_lines(lines, steps, to, INT8);
                else split_together(from, inputs, to);
            }
        }
        const char *after = weights + numbers_at(&layout, type, input + some * rounded->group);
        const Fetch fetch =
            fetch_of(group + some < rounded->groups ? after : next, some * inputs * number_bytes, in, some);
        if (type == INT4 && halves) dot_slice(rounded, in, first_row, &slice, sums, fetch, DOT_NARROW, 1);
        else if (BYTE_DOTS) dot_slice(rounded, in, first_row, &slice, sums, fetch, DOT_BYTES, 0);
        else if (type == INT4) dot_slice(rounded, in, first_row, &slice, sums, fetch, DOT_NARROW, 0);
        else if (op->sparse) dot_slice(rounded, in, first_row, &slice, sums, fetch, DOT_POSITIVE, 0);
        else dot_slice(rounded, in, first_row, &slice, sums, fetch, DOT_PAIRS, 0);
    }
    if (layout.groups == 1) scale_panel(op, in->rows, panel, weights, sums, own->scales);
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

/* A panel's sums for up to ROWS_AT_ONCE rows of floats. */
static void multiply_floats(const Operation *op, const Inputs *in, int64_t panel, int64_t next_panel, Workspace *floats,
                            QuantizedWorkspace *own) {
    const Layout layout = layout_of(op->in, op->group, op->type, op->scale_type);
    const int type = (int)op->type;
    const char *weights = (const char *)op->weight + panel * layout.panel_bytes;
    const char *next = (const char *)op->weight + next_panel * layout.panel_bytes;
    const int few = op->sparse && in->rows <= SPARSE_ROWS, widened = in->rows > in->tile;
    const int64_t rows = in->rows;
    float *sums = layout.groups == 1 ? floats->sums : own->sums;
    memset(floats->sums, 0, (size_t)(rows * PANEL) * sizeof(float));
    for (int64_t group = 0; group < layout.groups; group++) {
        if (layout.groups > 1) memset(sums, 0, (size_t)(rows * PANEL) * sizeof(float));
        for (int64_t start = 0; start < op->group; start += DEPTH) {
            const int64_t depth = op->group - start < DEPTH ? op->group - start : DEPTH;
            const int64_t first = group * op->group + start;
            const char *numbers = weights + numbers_at(&layout, type, first);
            const int8_t *slice = (const int8_t *)numbers;
            const uint32_t *words = tile_words(in, 0, first);
            const int64_t count = few ? find_nonzero(words, rows, depth, 0x7fffffffu, floats->nonzero) : -1;
            int8_t *widened_once = (int8_t *)own->numbers;
            if (op->scales || type == INT4) slice = widened_once;
            if (op->scales) join_rows(op, panel, first, depth, own->numbers, 1);
            else if (type == INT4)
                split_lines((const uint8_t *)numbers, depth, count, floats->nonzero, widened_once);
            if (widened) widen_slice(slice, depth, PANEL, INT8, floats->slice);
            const char *after = first + depth < op->in ? weights + numbers_at(&layout, type, first + depth) : next;
            const Fetch fetch = fetch_during(in, depth, count, after, depth * PANEL / (type == INT4 ? 2 : 1));
            const int32_t *nonzero = floats->nonzero;
            if (widened) multiply_slice(in, first, floats->slice, depth, count, nonzero, sums, fetch, FLOAT32);
            else multiply_slice(in, first, slice, depth, count, nonzero, sums, fetch, INT8);
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
