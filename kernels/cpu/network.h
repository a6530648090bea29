/* What Python and the native kernels say to each other: a program of operations, and the step it is run on.
 *
 * `library.py` mirrors these structures field by field.  Knows nothing of layers or requests.
 */
#ifndef PERSIMMON_NETWORK_H
#define PERSIMMON_NETWORK_H

#include <stdint.h>

/* Columns of a weight that lie together; see `linear.h`. */
#define PANEL 64

enum { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 };

enum { EMBED, LINEAR, ATTENTION, NORM_ROWS, DRAW, TAKE_ROWS };

/* What a projection does with its result. */
enum { STORE, STORE_RELU_SQUARED, ADD };

/* One operation; each kind uses the fields it is documented to use, the others are zero.  Activations are float32,
 * [T, width] and contiguous. */
typedef struct {
    int64_t kind;
    /* EMBED: table [rows, width] of type -> output; of INT8, times scales [rows] of scale_type.
     * LINEAR: input [T, in] -> LayerNorm where norm_weight is given -> times weight, plus bias where given -> output
     *         [T, out], as `finish` says.  `rounds`: inputs are rounded to bfloat16 and multiplied as such.
     *         `sparse`: inputs come from squared ReLU: none is negative, and most are zero.  Of a quantized weight,
     *         INT8 or INT4, packed with its scales, of scale_type, one for each output and `group` inputs; or of INT8 in
     *         rows [out, in] with scales [out].
     *         `integer`: inputs are rounded to 8 bits too.
     *         `of_rows`: for the rows that a TAKE_ROWS took, R instead of T.
     * ATTENTION: input [T, heads, 3, head_dim] -> output [T, heads * head_dim]; norm_weight, norm_bias [2, head_dim]
     *         or null; cosine, sine [*, rotary / 2], of every position; keys, values: the cache, of type; of INT8,
     *         scales of keys and values, cache_scales: bfloat16, as attention_int8.h says.
     * NORM_ROWS: rows of input [T, width] -> the step's hidden [R, width]; `of_rows`: all rows of input [R, width].
     * TAKE_ROWS: rows of input [T, width] -> output [R, width].
     * DRAW: input [T, in] logits -> the step's drawn tokens [T], as its draws say. */
    int64_t type;
    int64_t finish;
    int64_t rounds;
    int64_t sparse;
    int64_t in;
    int64_t out;
    int64_t heads;
    int64_t head_dim;
    int64_t rotary;
    int64_t block_size;
    int64_t group;
    int64_t scale_type;
    int64_t integer;
    int64_t of_rows;
    double eps;
    float *input;
    float *output;
    const float *norm_weight;
    const float *norm_bias;
    const void *weight;
    const float *bias;
    const float *cosine;
    const float *sine;
    void *keys;
    void *values;
    const void *scales;
    uint16_t *cache_scales;
} Operation;

/* How a row draws; temperature 0 takes the most probable token, the lowest id among equals. */
typedef struct {
    double temperature;
    double top_p;
    double min_p;
    int64_t top_k;
    int64_t seed;
    int64_t sample_index;
    int64_t position;
} Draw;

/* The step: T tokens of `sequences` sequences, one after the other. */
typedef struct {
    int64_t tokens;
    int64_t sequences;
    int64_t rows;              /* R */
    const int64_t *token_ids;  /* [T]; a negative one, -1 - r, stands for sampled[r] */
    const int64_t *sampled;    /* [*] or null */
    const int32_t *starts;     /* [sequences] position of each one's first token */
    const int32_t *firsts;     /* [sequences + 1] its row among the T, and T */
    const int32_t *tables;     /* the sequences' blocks, one list after the other */
    const int32_t *table_firsts; /* [sequences] where each one's list begins */
    const int64_t *row_ids;    /* [R] or null for all */
    float *hidden;             /* [R, width] */
    const Draw *draws;         /* [T] */
    int64_t *drawn;            /* [T] */
    const float *cosine, *sine;  /* [T, rotary / 2], each token's angles; or null for those of its position */
} Step;

/* Bytes of scratch memory that `persimmon_run` needs for programs whose projections have at most `inputs` inputs, summed
 * over all rows. */
int64_t persimmon_scratch_bytes(int64_t inputs, int64_t threads);

/* Runs a program in scratch memory made for it.  Returns 0, or 1 plus the index of an operation that it does not know. */
int64_t persimmon_run(const Operation *program, int64_t operations, const Step *step, void *scratch, int64_t inputs,
                      int64_t threads);

/* Lays a [out, in] weight out as LINEAR reads it; `pairs`: for inputs rounded to bfloat16. */
void persimmon_pack(const void *weight, void *packed, int64_t out, int64_t in, int64_t item_bytes, int64_t pairs,
                    int64_t threads);

/* The same for a quantized weight, as LINEAR reads it with the fields of `op`: numbers and scales as a `QuantizedMatrix`
 * has them; `persimmon_packed_bytes` of memory. */
void persimmon_pack_quantized(const Operation *op, const void *numbers, const void *scales, void *packed,
                              int64_t threads);
int64_t persimmon_packed_bytes(const Operation *op);

/* A [rows, in] matrix that becomes 8 or 4 bits.  The first of `steps` is what the weight of the largest magnitude of a
 * group is divided by, negated, for its scale; the others are tried in turn, and then `refits` times the scale of least
 * squares for the numbers at hand. */
typedef struct {
    const void *weights;  /* of type */
    void *numbers;        /* as a `QuantizedMatrix` has them, like scales */
    void *scales;         /* [rows, in / group] of scale_type */
    const double *steps;
    int64_t *failed;      /* on entry rows, after it the first row that has no finite scale, if there is one */
    int64_t rows;
    int64_t in;
    int64_t group;
    int64_t type;
    int64_t scale_type;
    int64_t bits;
    int64_t step_count;
    int64_t refits;
} WeightRounding;

void persimmon_round_weights(const WeightRounding *rounding, int64_t threads);

/* Whether LINEAR can multiply bfloat16 numbers as they are. */
int64_t persimmon_multiplies_bfloat16(void);

#endif
