/* Lays weights out as products read them: in panels of PANEL outputs, each read from front to back. */
#ifndef PERSIMMON_PACKING_H
#define PERSIMMON_PACKING_H

#include "integers.h"
#include "network.h"

/* How a quantized weight lies.  A panel is a row of groups, each of PANEL scales and then the numbers of `group_inputs`
 * inputs; outputs and inputs that a matrix does not have are zero.
 *
 * Numbers are in one of two orders:
 * - together, for integer products: of 8 bits [inputs / TOGETHER, PANEL, TOGETHER], unsigned (plus 128) where the
 *   processor multiplies bytes; of 4 bits [inputs / 8, PANEL, 4], a byte holding input k plus 8 in its low half and
 *   k + 4 in its high half;
 * - in lines, where inputs are left out one by one, or products are of floats: of 8 bits [inputs, PANEL], signed; of 4
 *   bits [inputs / 2, PANEL], a byte holding input k plus 8 in its low half and k + 1 in its high half.  Where `join_four`
 *   puts them together, a line's outputs lie as it needs them. */
typedef struct {
    int64_t groups;        /* of a panel */
    int64_t group;         /* inputs of each */
    int64_t group_inputs;  /* the same, padded to a multiple of 8 */
    int64_t scales_bytes;  /* of a group */
    int64_t group_bytes;
    int64_t panel_bytes;
} Layout;

INLINE Layout layout_of(int64_t in, int64_t group, int64_t type, int64_t scale_type) {
    const int64_t inputs = (group + 7) / 8 * 8, groups = in / group;
    const int64_t scales = PANEL * (scale_type == FLOAT32 ? 4 : 2);
    const int64_t bytes = scales + inputs * PANEL / (type == INT4 ? 2 : 1);
    return (Layout){groups, group, inputs, scales, bytes, groups * bytes};
}

/* Bytes from a panel's begin to the numbers of an input, the first of a line or of eight. */
INLINE int64_t numbers_at(const Layout *own, int64_t type, int64_t input) {
    const int64_t group = own->groups == 1 ? 0 : input / own->group;
    const int64_t numbers = (input - group * own->group) * PANEL / (type == INT4 ? 2 : 1);
    return group * own->group_bytes + own->scales_bytes + numbers;
}

typedef struct {
    const void *weight;
    const void *scales;
    void *packed;
    int64_t out, in, item_bytes, together, type, group, scale_type, lines, joined;
} Packing;

/* A panel of floats: `together` inputs of an output side by side. */
static void pack_panel(const Packing *own, int64_t panel) {
    const int64_t first = panel * PANEL, width = own->out - first < PANEL ? own->out - first : PANEL;
    for (int64_t column = 0; column < width; column++)
        for (int64_t k = 0; k < own->in; k++) {
            const int64_t from = (first + column) * own->in + k;
            const int64_t to = first * own->in + (k / own->together * width + column) * own->together + k % own->together;
            if (own->item_bytes == 4) ((uint32_t *)own->packed)[to] = ((const uint32_t *)own->weight)[from];
            else ((uint16_t *)own->packed)[to] = ((const uint16_t *)own->weight)[from];
        }
}

/* Eight inputs of one output, `column` of a panel. */
INLINE void pack_eight(const uint8_t *from, uint8_t *to, int64_t k, int64_t column, const int type, const int lines) {
    if (type == INT4) {
        uint32_t numbers;
        memcpy(&numbers, from, 4);
        uint8_t bytes[4];
        if (!lines) numbers = _pdep_u32(numbers, 0x0f0f0f0f) | _pdep_u32(numbers >> 16, 0xf0f0f0f0);
        memcpy(bytes, &numbers, 4);
        if (lines)
            for (int i = 0; i < 4; i++) to[(k / 2 + i) * PANEL + column] = bytes[i];
        else memcpy(to + (k / 8 * PANEL + column) * 4, bytes, 4);
    } else if (lines) {
        for (int i = 0; i < 8; i++) to[(k + i) * PANEL + column] = from[i];
    } else {
        for (int i = 0; i < 8; i += TOGETHER) {
            uint8_t bytes[TOGETHER];
            for (int j = 0; j < TOGETHER; j++) bytes[j] = from[i + j] ^ (BYTE_DOTS ? 0x80 : 0);
            memcpy(to + ((k + i) / TOGETHER * PANEL + column) * TOGETHER, bytes, TOGETHER);
        }
    }
}

INLINE void pack_group(const Packing *own, int64_t panel, int64_t group, uint8_t *to, const int type, const int lines) {
    const Layout layout = layout_of(own->in, own->group, own->type, own->scale_type);
    const int64_t halves = type == INT4 ? 2 : 1;
    /* Zero is 8 in 4 bits.  Eight inputs at a time of all outputs: they lie together in what is written. */
    uint8_t zeros[8];
    memset(zeros, type == INT4 ? 0x88 : 0, sizeof zeros);
    for (int64_t k = 0; k < layout.group_inputs; k += 8)
        for (int64_t column = 0; column < PANEL; column++) {
            const int64_t row = panel * PANEL + column;
            const uint8_t *from = (const uint8_t *)own->weight + (row * own->in + group * own->group + k) / halves;
            uint8_t eight[8];
            if (row >= own->out) from = zeros;
            else if (k + 8 > layout.group) {
                memcpy(eight, zeros, sizeof eight);
                memcpy(eight, from, (size_t)((layout.group - k) / halves));
                from = eight;
            }
            pack_eight(from, to, k, own->joined ? place_in_line(column) : column, type, lines);
        }
}

static void pack_quantized_panel(const Packing *own, int64_t panel) {
    const Layout layout = layout_of(own->in, own->group, own->type, own->scale_type);
    const size_t size = (size_t)layout.scales_bytes / PANEL;
    for (int64_t group = 0; group < layout.groups; group++) {
        uint8_t *to = (uint8_t *)own->packed + panel * layout.panel_bytes + group * layout.group_bytes;
        memset(to, 0, (size_t)layout.scales_bytes);
        for (int64_t column = 0; column < PANEL && panel * PANEL + column < own->out; column++)
            memcpy(to + (size_t)column * size,
                   (const char *)own->scales + (size_t)((panel * PANEL + column) * layout.groups + group) * size, size);
        to += layout.scales_bytes;
        if (own->type == INT4 && own->lines) pack_group(own, panel, group, to, INT4, 1);
        else if (own->type == INT4) pack_group(own, panel, group, to, INT4, 0);
        else if (own->lines) pack_group(own, panel, group, to, INT8, 1);
        else pack_group(own, panel, group, to, INT8, 0);
    }
}

static void pack_part(const void *context, int64_t phase, int64_t panel, int64_t thread) {
    (void)phase, (void)thread;
    const Packing *own = context;
    if (own->type == INT8 || own->type == INT4) pack_quantized_panel(own, panel);
    else pack_panel(own, panel);
}

#endif
