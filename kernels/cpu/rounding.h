/* Inputs of a product rounded to 8 bits, in groups of one scale: the largest number of a group becomes 127.
 *
 * A row is rounded by itself, so that its bits do not depend on others.
 */
#ifndef PERSIMMON_ROUNDING_H
#define PERSIMMON_ROUNDING_H

#include "integers.h"
#include "linear.h"
#include "packing.h"

/* Inputs of a group, where the weight's groups allow it. */
#define ROUNDED_GROUP 64
/* Groups whose largest number is below this are rounded to zero: its inverse would be infinite. */
#define SMALLEST 1e-30f

/* Rounded inputs, in the memory that they share. */
typedef struct {
    int64_t groups;
    int64_t group;        /* inputs of each but the last, which may be shorter */
    int64_t inputs;       /* all, padded to a multiple of 8 */
    int64_t row_bytes;    /* of the items, padded to whole words */
    void *items;          /* their words, see tiles.h */
    float *scales;        /* [rows, groups] */
    int32_t *corrections; /* [rows, groups], what sums begin with because weights are stored as unsigned numbers */
    /* Whether inputs that are zero in all rows are left out; then what remains lies at the beginning of each group. */
    int leaves_out;
    uint32_t *counts;     /* [groups], its steps in a product, see STEP_LINES */
    uint32_t *lines;      /* of a panel that these steps multiply, counted from its begin; a line is PANEL bytes */
    uint32_t *line_count; /* of all groups together */
} Rounded;

/* The largest multiple of 8 that divides a weight's group and is at most ROUNDED_GROUP. */
INLINE int64_t rounded_group(int64_t in, int64_t group) {
    if (group == in) return ROUNDED_GROUP;
    for (int64_t size = ROUNDED_GROUP; size > 8; size -= 8)
        if (group % size == 0) return size;
    return 8;
}

/* Whether a step of `rows` rows leaves out inputs that are zero in all of them. */
INLINE int leaves_zeros_out(const Operation *op, int64_t rows) {
    return op->integer && op->sparse && rows <= SPARSE_ROWS;
}

INLINE Rounded rounded_inputs(const Operation *op, int64_t rows, void *memory) {
    Rounded own = {.group = rounded_group(op->in, op->group), .inputs = (op->in + 7) / 8 * 8, .items = memory};
    own.leaves_out = leaves_zeros_out(op, rows);
    own.groups = (own.inputs + own.group - 1) / own.group;
    own.row_bytes = own.inputs * item_bytes_of(op);
    own.scales = (float *)((char *)memory + rows * own.row_bytes);
    own.corrections = (int32_t *)(own.scales + rows * own.groups);
    own.line_count = (uint32_t *)(own.corrections + rows * own.groups);
    own.counts = own.line_count + 1;
    own.lines = own.counts + own.groups;
    return own;
}

/* A rounded row's items one after the other, with room for half a vector that the last group may go beyond. */
#define ROW_BUFFER_BYTES(rounded) ((rounded).row_bytes + LANES * 2)

/* Rounds one row to `items`, one after the other, of `bytes` each; `offset` is what weights are stored with. */
INLINE void round_row(const float *from, int64_t in, const Rounded *own, int64_t row, char *items, const int bytes,
                      int offset) {
    for (int64_t group = 0; group < own->groups; group++) {
        const int64_t first = group * own->group, left = in - first;
        const int64_t count = left < own->group ? left : own->group;
        float padded[ROUNDED_GROUP + LANES];
        const float *some = from + first;
        if (count % LANES) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, some, (size_t)count * sizeof(float));
            some = padded;
        }
        Integers most = repeat(0);
        for (int64_t i = 0; i < count; i += LANES) most = largest_integers(most, without_sign(load(some + i)));
        /* Numbers without a sign are in the order of their bits, and what is not finite is the largest. */
        const int32_t bits = largest_integer(most);
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        const int finite = bits < 0x7f800000, zero = largest < SMALLEST || !finite;
        const Vector inverse = broadcast(zero ? 0.0f : 127.0f / largest);
        Integers total = repeat(0);
        for (int64_t i = 0; i < count; i += LANES) {
            const Integers rounded = zero ? repeat(0) : to_integers(multiply(load(some + i), inverse));
            total += rounded;
            if (bytes == 2) store_words(items + (first + i) * 2, rounded);
            else store_bytes(items + first + i, rounded);
        }
        const int64_t place = row * own->groups + group;
        own->scales[place] = !finite ? NAN : zero ? 0.0f : largest / 127.0f;
        own->corrections[place] = -offset * sum_of_integers(total);
    }
    /* Padding multiplies numbers that are zero, and 0 is the one input that leaves out as well. */
    memset(items + in * bytes, 0, (size_t)((own->inputs - in) * bytes));
}

/* Moves the inputs that are not zero in all rows to the beginning of their group.  items: of all rows, one row after the
 * other, `stride` bytes apart; `unit`: bytes of the inputs that one line of weights multiplies; `step_lines`: lines of a
 * step. */
INLINE void gather_nonzero(const Operation *op, const Rounded *own, int64_t rows, char *items, int64_t stride,
                           const int unit, const int step_lines) {
    const Layout layout = layout_of(op->in, op->group, op->type, op->scale_type);
    const int64_t line_inputs = op->type == INT4 ? 2 : 1;
    uint32_t *lines = own->lines;
    for (int64_t group = 0; group < own->groups; group++) {
        const int64_t first = group * own->group, left = own->inputs - first;
        const int64_t some = (left < own->group ? left : own->group) / line_inputs;
        const uint32_t first_line = (uint32_t)(numbers_at(&layout, op->type, first) / PANEL);
        char *own_items = items + first / line_inputs * unit;
        int64_t count = 0;
        for (int64_t i = 0; i < some; i++) {
            uint16_t any = 0;
            for (int64_t row = 0; row < rows; row++) {
                uint16_t item = 0;
                memcpy(&item, own_items + row * stride + i * unit, unit);
                memcpy(own_items + row * stride + count * unit, &item, unit);
                any |= item;
            }
            lines[count] = first_line + (uint32_t)i;
            count += any != 0;
        }
        /* The last step's other lines are multiplied by zero. */
        const int64_t steps = (count + step_lines - 1) / step_lines;
        for (; count < steps * step_lines; count++) {
            for (int64_t row = 0; row < rows; row++) memset(own_items + row * stride + count * unit, 0, unit);
            lines[count] = first_line;
        }
        own->counts[group] = (uint32_t)steps;
        lines += count;
    }
    *own->line_count = (uint32_t)(lines - own->lines);
}

#endif
