/* y = (Σ_i A_i ⊗ B_i) x + bias for a few tokens, with the large factor read from memory exactly once.

   Letters as in matrices/kronecker.py: A_i (m1, n1) with row p and column a, B_i (m2, n2) with row q and column b,
   i of k terms, t tokens; left[p, i, a], right[q, i, b], x[t, a, b], y[t, p, q]. Both orders of contraction are one
   product of `left`, read as a matrix, with a few vectors:

     B first   Z[t, q, (i a)] = Σ_b B_i[q, b] x[t, a, b]    then  y[t, p, q] = Σ_ia left[p, (i a)] Z[t, q, (i a)]
     A first   U[(p i), t, b] = Σ_a left[(p i), a] x[t, a, b]  then  y[t, p, q] = Σ_ib B_i[q, b] U[(p i), t, b]

   `left` is the large factor. Where the large one of A ⊗ B is B, the two change their roles: A gives the letters of B
   here and B those of A, and x and y, which are the same numbers in memory, are then x[t, b, a] and y[t, q, p], the
   large index last. `chunked` says so: everything that is read or written is in one piece, and all sums are the same.

   `half` says that numbers are bfloat16 in memory; otherwise they are float32. In between all is float32.

   One source serves every instruction set: LANES floats are one vector of the compiler's vector extension, and the
   flags of the build say what it becomes. The sum of one output never depends on how rows and vectors are grouped or
   on the number of threads. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef LANES
#define LANES 4
#endif
#define STEP (2 * LANES)       /* weights of one row that are taken at a time */
#ifndef STREAMS
#define STREAMS 4              /* places of the matrix that are read in turns */
#endif
#define RUN (CHUNK / STREAMS)  /* rows p that each stream gives to a chunk */
#define VECTORS (LANES == 16 ? 4 : 2) /* vectors per pass: STREAMS * VECTORS sums have to stay in registers */
#define TILE (4 * LANES)       /* columns a that are mixed together */
#define CHUNK 16               /* rows p whose outputs are finished together */
#ifndef PREFETCH_BYTES
#define PREFETCH_BYTES 512     /* how far ahead of the arithmetic memory is asked for */
#endif
#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quads __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

/* Both belong to the OpenMP runtime that torch has loaded. The library is linked with none, so that there is never a
   second pool of threads; where there is no such runtime the symbols are null and one thread does the work. */
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));

static inline float widened(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static inline uint16_t rounded(float number) /* to nearest, ties to even; NaN stays NaN */
{
    uint32_t bits;
    memcpy(&bits, &number, 4);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : nearest);
}

static inline float element(const void *numbers, size_t at, int half)
{
    return half ? widened(((const uint16_t *)numbers)[at]) : ((const float *)numbers)[at];
}

/* One product; which of the two orders it is, the letters above say.

   vectors: what `left` is multiplied with, (count, padded), padded with zeros to whole steps; for bfloat16 weights the
   even and the odd elements of each step stand apart, as the two halves of a word give them. */
typedef struct {
    const void *left, *right, *x, *bias;
    void *y;
    size_t tokens, m1, k, n1, m2, n2;
    int half, x_half, y_half; /* of the weights and the bias; of x; of y */
    int chunked;              /* x[t, b, a] and y[t, q, p] */
    int b_first;
    size_t length, padded, count; /* of the vectors; how many there are */
    size_t tiled;                 /* n1, in whole tiles */
    float *columns;               /* x in float32, (t, n2, tiled) */
    float *vectors, *small;       /* small: `right` in float32 */
    /* For each thread (terms, count, CHUNK), terms being k if A is first, else 1; and outputs (CHUNK, m2). */
    float *sums;
    size_t sums_size;
} Product;

/* n1 neighbours of x from x[at] on, as float32. */
static void take_run(const Product *job, size_t at, float *run)
{
    const uint16_t *halves = (const uint16_t *)job->x + at;
    if (!job->x_half)
        memcpy(run, (const float *)job->x + at, job->n1 * sizeof(float));
    else
        for (size_t a = 0; a < job->n1; a++)
            run[a] = widened(halves[a]);
}

/* Token t of x as float32 with b before a, columns[b][a], each b padded with zeros to whole tiles. */
static void take_columns(const Product *job, size_t token)
{
    float *columns = job->columns + token * job->n2 * job->tiled;
    size_t x_at = token * job->n1 * job->n2;
    memset(columns, 0, job->n2 * job->tiled * sizeof(float));
    for (size_t b = 0; b < job->n2; b++)
        if (job->chunked || job->n2 == 1)
            take_run(job, x_at + b * job->n1, columns + b * job->tiled);
        else
            for (size_t a = 0; a < job->n1; a++)
                columns[b * job->tiled + a] = element(job->x, x_at + a * job->n2 + b, job->x_half);
}

/* Σ_b factors[b] columns[b][a], n1 numbers. */
static void mix_columns(const Product *job, const float *columns, const float *factors, float *mixed)
{
    for (size_t a = 0; a < job->n1; a += TILE) {
        floats acc[TILE / LANES];
        for (size_t j = 0; j < TILE / LANES; j++)
            acc[j] = (floats){0};
        for (size_t b = 0; b < job->n2; b++)
            for (size_t j = 0; j < TILE / LANES; j++)
                acc[j] += factors[b] * *(const floats *)(columns + b * job->tiled + a + j * LANES);
        memcpy(mixed + a, acc, (job->n1 - a < TILE ? job->n1 - a : TILE) * sizeof(float));
    }
}

/* The vector of token t and row q of B (B first) or column b of B (A first), in the order of its steps. */
static void prepare_vector(const Product *job, size_t index)
{
    float *vector = job->vectors + index * job->padded;
    size_t per_token = job->b_first ? job->m2 : job->n2, which = index % per_token;
    const float *columns = job->columns + index / per_token * job->n2 * job->tiled;
    memset(vector, 0, job->padded * sizeof(float));
    if (!job->b_first || !job->small)
        memcpy(vector, columns + which * job->tiled, job->n1 * sizeof(float));
    else
        for (size_t i = 0; i < job->k; i++)
            mix_columns(job, columns, job->small + (which * job->k + i) * job->n2, vector + i * job->n1);
    if (job->half) {
        float natural[STEP];
        for (float *step = vector; step < vector + job->padded; step += STEP) {
            memcpy(natural, step, sizeof natural);
            for (size_t j = 0; j < LANES; j++) {
                step[j] = natural[2 * j];
                step[LANES + j] = natural[2 * j + 1];
            }
        }
    }
}

ALWAYS_INLINE void load_step(const char *weights, int half, floats *first, floats *second)
{
    if (half) {
        words pairs = *(const words *)weights;
        *first = (floats)(pairs << 16);
        *second = (floats)(pairs & 0xffff0000u);
    } else {
        *first = ((const floats *)weights)[0];
        *second = ((const floats *)weights)[1];
    }
}

/* sums[r][v] = Σ_j row r [j] · vector v [j], the rows `apart` bytes from each other and the vectors `padded` numbers.
   How many there are of both is constant wherever this is called, so that all sums stay in registers. */
ALWAYS_INLINE void dot_block(const char *weights, size_t apart, size_t length, size_t padded, const float *z, int half,
                             size_t rows, size_t vectors, float sums[STREAMS][VECTORS])
{
    size_t width = half ? 2 : 4, step_bytes = STEP * width;
    floats acc[STREAMS][VECTORS];
#pragma GCC unroll 4
    for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; v++)
            acc[r][v] = (floats){0};
    size_t whole = length / STEP;
    for (size_t s = 0; s < whole; s++) {
#pragma GCC unroll 4
        for (size_t r = 0; r < rows; r++) {
            const char *at = weights + r * apart + s * step_bytes;
            floats first, second;
#pragma GCC unroll 2
            for (size_t line = 0; line < (step_bytes + 63) / 64; line++)
                __builtin_prefetch(at + PREFETCH_BYTES + 64 * line, 0, 3);
            load_step(at, half, &first, &second);
#pragma GCC unroll 4
            for (size_t v = 0; v < vectors; v++) {
                const floats *z_step = (const floats *)(z + v * padded + s * STEP);
                acc[r][v] += first * z_step[0];
                acc[r][v] += second * z_step[1];
            }
        }
    }
    if (length % STEP) {
#pragma GCC unroll 4
        for (size_t r = 0; r < rows; r++) {
            char rest[STEP * 4] = {0};
            floats first, second;
            memcpy(rest, weights + r * apart + whole * step_bytes, length * width - whole * step_bytes);
            load_step(rest, half, &first, &second);
#pragma GCC unroll 4
            for (size_t v = 0; v < vectors; v++) {
                const floats *z_step = (const floats *)(z + v * padded + whole * STEP);
                acc[r][v] += first * z_step[0];
                acc[r][v] += second * z_step[1];
            }
        }
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; v++) {
            quads parts[LANES / 4];
            memcpy(parts, &acc[r][v], sizeof parts);
            for (size_t half = LANES / 8; half; half /= 2)
                for (size_t j = 0; j < half; j++)
                    parts[j] += parts[j + half];
            sums[r][v] = (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
        }
}

#define BLOCK(R, V) dot_block(weights, apart, length, padded, z, half, R, V, sums)

ALWAYS_INLINE void dots_of_dtype(const char *weights, size_t apart, size_t length, size_t padded, const float *z,
                                 int half, size_t rows, size_t vectors, float sums[STREAMS][VECTORS])
{
    if (rows == STREAMS)
        switch (vectors) {
        case 1: BLOCK(STREAMS, 1); break;
        case 2: BLOCK(STREAMS, 2); break;
#if LANES == 16
        case 3: BLOCK(STREAMS, 3); break;
        case 4: BLOCK(STREAMS, 4); break;
#endif
        }
    else
        for (size_t v = 0; v < vectors; v++) { /* the last rows of a matrix, one by one */
            float one[STREAMS][VECTORS];
            dot_block(weights, apart, length, padded, z + v * padded, half, 1, 1, one);
            sums[0][v] = one[0][0];
        }
}

static void dots(const char *weights, size_t apart, size_t length, size_t padded, const float *z, int half, size_t rows,
                 size_t vectors, float sums[STREAMS][VECTORS])
{
    if (half)
        dots_of_dtype(weights, apart, length, padded, z, 1, rows, vectors, sums);
    else
        dots_of_dtype(weights, apart, length, padded, z, 0, rows, vectors, sums);
}

/* Σ_ib B_i[q, b] U[(p i), t, b] of the CHUNK values of p. */
static void mix_sums(const Product *job, const float *sums, size_t t, size_t q, float y[CHUNK])
{
    floats even[CHUNK / LANES], odd[CHUNK / LANES]; /* two sums, each of which waits for itself */
    for (size_t j = 0; j < CHUNK / LANES; j++)
        even[j] = odd[j] = (floats){0};
    for (size_t i = 0; i < job->k; i++) {
        const float *factors = job->small + (q * job->k + i) * job->n2;
        const float *u = sums + (i * job->count + t * job->n2) * CHUNK;
        size_t b = 0;
        for (; b + 1 < job->n2; b += 2)
            for (size_t j = 0; j < CHUNK / LANES; j++) {
                even[j] += factors[b] * *(const floats *)(u + b * CHUNK + j * LANES);
                odd[j] += factors[b + 1] * *(const floats *)(u + (b + 1) * CHUNK + j * LANES);
            }
        if (b < job->n2)
            for (size_t j = 0; j < CHUNK / LANES; j++)
                even[j] += factors[b] * *(const floats *)(u + b * CHUNK + j * LANES);
    }
    for (size_t j = 0; j < CHUNK / LANES; j++)
        even[j] += odd[j];
    memcpy(y, even, CHUNK * sizeof(float));
}

/* Adds the bias and writes `number` outputs of token t from output `out` on. */
static void write_outputs(const Product *job, size_t t, size_t out, const float *restrict numbers, size_t number)
{
    size_t at = t * job->m1 * job->m2 + out;
    float *restrict y = (float *)job->y + at;
    uint16_t *restrict y_half = (uint16_t *)job->y + at;
    if (!job->y_half && !job->bias)
        memcpy(y, numbers, number * sizeof(float));
    else if (!job->y_half)
        for (size_t j = 0; j < number; j++)
            y[j] = numbers[j] + ((const float *)job->bias)[out + j];
    else if (!job->bias)
        for (size_t j = 0; j < number; j++)
            y_half[j] = rounded(numbers[j]);
    else
        for (size_t j = 0; j < number; j++)
            y_half[j] = rounded(numbers[j] + widened(((const uint16_t *)job->bias)[out + j]));
}

/* y[t, p, q] for p = first + stream * apart + j, j < run: mixed by B where A came first, put in place, with bias. */
static void finish_chunk(const Product *job, float *sums, size_t first, size_t streams, size_t apart, size_t run)
{
    float *outputs = sums + job->sums_size - CHUNK * job->m2; /* (p, q) */
    for (size_t t = 0; t < job->tokens; t++) {
        for (size_t q = 0; q < job->m2; q++) {
            float mixed[CHUNK];
            const float *y = sums + (t * job->m2 + q) * CHUNK;
            if (!job->b_first) {
                mix_sums(job, sums, t, q, mixed);
                y = mixed;
            }
            if (job->chunked)
                for (size_t stream = 0; stream < streams; stream++)
                    write_outputs(job, t, q * job->m1 + first + stream * apart, y + stream * RUN, run);
            else
                for (size_t p = 0; p < CHUNK; p++)
                    outputs[p * job->m2 + q] = y[p];
        }
        for (size_t stream = 0; stream < streams && !job->chunked; stream++)
            write_outputs(job, t, (first + stream * apart) * job->m2, outputs + stream * RUN * job->m2, run * job->m2);
    }
}

/* Rows p = first + stream * apart + j with j < run, up to the finished outputs. */
static void multiply_chunk(const Product *job, float *sums, size_t first, size_t streams, size_t apart, size_t run)
{
    size_t terms = job->b_first ? 1 : job->k, row_bytes = job->length * (job->half ? 2 : 4);
    for (size_t j = 0; j < run; j++)
        for (size_t i = 0; i < terms; i++) {
            const char *weights = (const char *)job->left + ((first + j) * terms + i) * row_bytes;
            for (size_t v0 = 0; v0 < job->count; v0 += VECTORS) { /* after the first pass the rows are in the cache */
                size_t vectors = job->count - v0 < VECTORS ? job->count - v0 : VECTORS;
                float block[STREAMS][VECTORS];
                dots(weights, apart * terms * row_bytes, job->length, job->padded, job->vectors + v0 * job->padded,
                     job->half, streams, vectors, block);
                for (size_t stream = 0; stream < streams; stream++)
                    for (size_t v = 0; v < vectors; v++)
                        sums[(i * job->count + v0 + v) * CHUNK + stream * RUN + j] = block[stream][v];
            }
        }
    finish_chunk(job, sums, first, streams, apart, run);
}

/* The rows p that fall to one thread, as STREAMS parts that are read side by side. Parts far from each other the
   processor prefetches as streams; rows that follow each other in one page it does not, and reads at half the rate. */
static void multiply_part(const Product *job, size_t thread, size_t threads)
{
    size_t begin = job->m1 * thread / threads, end = job->m1 * (thread + 1) / threads;
    size_t apart = (end - begin) / STREAMS;
    float *sums = job->sums + thread * job->sums_size;
    for (size_t j = 0; j < apart; j += RUN)
        multiply_chunk(job, sums, begin + j, STREAMS, apart, apart - j < RUN ? apart - j : RUN);
    for (size_t p = begin + STREAMS * apart; p < end; p++)
        multiply_chunk(job, sums, p, 1, 0, 1);
}

static void prepare_part(const Product *job, size_t thread, size_t threads)
{
    for (size_t v = job->count * thread / threads; v < job->count * (thread + 1) / threads; v++)
        prepare_vector(job, v);
}

typedef struct {
    const Product *job;
    void (*part)(const Product *, size_t, size_t);
} Task;

static void run_part(void *data)
{
    const Task *task = data;
    task->part(task->job, (size_t)omp_get_thread_num(), (size_t)omp_get_num_threads());
}

/* All threads or one: a team of another size would make the runtime end threads and start new ones. */
static void run(const Product *job, void (*part)(const Product *, size_t, size_t), size_t threads)
{
    Task task = {job, part};
    if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads)
        GOMP_parallel(run_part, &task, (unsigned)threads, 0);
    else
        part(job, 0, 1);
}

/* Below these amounts of work waking the other threads takes longer than what they save. */
#define BYTES_WORTH_THREADS 131072
#define MULTIPLICATIONS_WORTH_THREADS 65536

static int multiply(Product *job, size_t threads)
{
    size_t tokens = job->tokens, m1 = job->m1, k = job->k, n1 = job->n1, m2 = job->m2, n2 = job->n2;
    /* Fewer multiply-adds, as in kronecker.py. A plain matrix has no B, and nothing to mix afterwards. */
    job->b_first = !job->right || n1 * n2 * m2 + m1 * n1 * m2 <= m1 * n1 * n2 + m1 * n2 * m2;
    job->length = job->b_first ? k * n1 : n1;
    job->padded = (job->length + STEP - 1) / STEP * STEP;
    job->count = tokens * (job->b_first ? m2 : n2);
    job->sums_size = ((job->b_first ? 1 : k) * job->count + m2) * CHUNK;
    job->sums_size = (job->sums_size + 31) / 32 * 32; /* no cache line, nor pair of them, belongs to two threads */
    size_t small_size = job->right ? (m2 * k * n2 + 31) / 32 * 32 : 0;
    job->tiled = (n1 + TILE - 1) / TILE * TILE;
    size_t floats_needed = job->count * job->padded + tokens * n2 * job->tiled + threads * job->sums_size + small_size;
    void *scratch;
    if (posix_memalign(&scratch, 128, floats_needed * sizeof(float)))
        return -1;
    job->sums = scratch;
    job->small = job->right ? job->sums + threads * job->sums_size : NULL;
    job->vectors = job->sums + threads * job->sums_size + small_size;
    job->columns = job->vectors + job->count * job->padded;
    for (size_t j = 0; job->right && j < m2 * k * n2; j++)
        job->small[j] = element(job->right, j, job->half);
    for (size_t t = 0; t < tokens; t++)
        take_columns(job, t);
    size_t mixing = job->b_first && job->right ? tokens * m2 * k * n1 * n2 : 0;
    size_t bytes = m1 * k * n1 * (job->half ? 2 : 4);
    run(job, prepare_part, mixing < MULTIPLICATIONS_WORTH_THREADS ? 1 : threads);
    run(job, multiply_part, bytes < BYTES_WORTH_THREADS ? 1 : threads);
    free(scratch);
    return 0;
}

/* y[t] = (Σ_i A_i ⊗ B_i) x[t] + bias, or, if `chunked`, (Σ_i B_i ⊗ A_i) x[t] + bias; A is `left`, the larger one.
   All are contiguous, bias may be null. Returns 0, or -1 if there is no memory. */
int kronecker(int half, int chunked, const void *left, const void *right, const void *x, const void *bias, void *y,
              size_t tokens, size_t m1, size_t k, size_t n1, size_t m2, size_t n2, size_t threads)
{
    Product job = {.left = left, .right = right, .x = x, .bias = bias, .y = y, .tokens = tokens, .m1 = m1, .k = k,
                   .n1 = n1, .m2 = m2, .n2 = n2, .half = half, .x_half = half, .y_half = half, .chunked = chunked};
    return multiply(&job, threads);
}

/* y[t] = W x[t] + bias with W (m, n). */
int linear(int half, const void *weight, const void *x, const void *bias, void *y, size_t tokens, size_t m, size_t n,
           size_t threads)
{
    return kronecker(half, 0, weight, NULL, x, bias, y, tokens, m, 1, n, 1, 1, threads);
}

/* y[t] = U (V x[t]) + bias with U (m, rank) and V (rank, n); what is between stays in float32. */
int low_rank(int half, const void *left, const void *right, const void *x, const void *bias, void *y, size_t tokens,
             size_t m, size_t rank, size_t n, size_t threads)
{
    float *between = malloc(tokens * rank * sizeof(float));
    Product inner = {.left = right, .x = x, .y = between, .tokens = tokens, .m1 = rank, .k = 1, .n1 = n, .m2 = 1,
                     .n2 = 1,
                     .half = half, .x_half = half, .y_half = 0};
    Product outer = {.left = left, .x = between, .bias = bias, .y = y, .tokens = tokens, .m1 = m, .k = 1, .n1 = rank,
                     .m2 = 1, .n2 = 1, .half = half, .x_half = 0, .y_half = half};
    int failed = !between || multiply(&inner, threads) || multiply(&outer, threads);
    free(between);
    return -failed;
}

/* 1 if the work can be shared among the threads of a runtime that is loaded. */
int has_threads(void)
{
    return GOMP_parallel && omp_get_thread_num && omp_get_num_threads;
}
