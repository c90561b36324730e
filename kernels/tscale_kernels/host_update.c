/* The host update in C: what host_update.py says in torch, bit for bit. Built by host_native.py with -ffp-contract=off, without -ffast-math:
   every operation below is one rounding. Threads share out blocks of 4096 elements, so no sum belongs to two of them; they take eight at a time
   as they come, since other work runs on the same cores. */
#include <stdint.h>
#include <string.h>

enum { BLOCK = 4096 };
static const float ROUND = 12582912.0f; /* 1.5 * 2**23: adding and subtracting it rounds to the nearest even */

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Sum of squares, n a multiple of 32: fp32 squares, four neighbours in fp32, the quarters in fp64. */
static inline double squares(const float* restrict x, int64_t n) {
    double total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int64_t i = 0; i < n; i += 32)
        for (int lane = 0; lane < 8; ++lane) {
            const float* v = x + i + 4 * lane;
            const float quarter = (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]);
            total[lane] += (double)quarter;
        }
    return ((total[0] + total[1]) + (total[2] + total[3])) + ((total[4] + total[5]) + (total[6] + total[7]));
}

/* weights and momentum [n] in place; weight_squares [ceil(n / 4096)]; one multiplier per `columns` elements, a multiple of 128. */
void tscale_update(float* weights, float* momentum, const uint16_t* gradient, const float* multipliers, double* weight_squares, int64_t n,
                   int64_t columns, float gap, float decay, float momentum_rate, float gradient_rate, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * BLOCK, stop = least(n, first + BLOCK);
        for (int64_t at = first; at < stop;) {
            const int64_t row = at / columns, part = least(stop, (row + 1) * columns) - at;
            const float multiplier = multipliers[row];
            float* restrict w = weights + at;
            float* restrict m = momentum + at;
            const uint16_t* restrict g = gradient + at;
            for (int64_t i = 0; i < part; ++i) {
                const float h = from_bf16(g[i]) * multiplier;
                const float old = m[i];
                const float now = old + gap * (h - old);
                m[i] = now;
                w[i] = w[i] * decay + (momentum_rate * now + gradient_rate * h);
            }
            at += part;
        }
        weight_squares[block] = squares(weights + first, stop - first);
    }
}

/* weight_squares of weights that somebody else changed. */
void tscale_weight_squares(const float* weights, double* weight_squares, int64_t n, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block)
        weight_squares[block] = squares(weights + block * BLOCK, least(n, (block + 1) * BLOCK) - block * BLOCK);
}

/* codes[i] = weights[i] * inverse, rounded to the nearest even within -128..127. */
void tscale_encode_int8(const float* weights, int8_t* codes, int64_t n, float inverse, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * BLOCK, part = least(n, first + BLOCK) - first;
        const float* restrict w = weights + first;
        int8_t* restrict out = codes + first;
        for (int64_t i = 0; i < part; ++i) {
            float scaled = w[i] * inverse;
            scaled = scaled < -128.0f ? -128.0f : scaled;
            scaled = scaled > 127.0f ? 127.0f : scaled;
            out[i] = (int8_t)(int32_t)((scaled + ROUND) - ROUND);
        }
    }
}

/* total += part in bf16, each sum rounded to the nearest even once. */
void tscale_add_gradient(uint16_t* total, const uint16_t* part, int64_t n, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * BLOCK, length = least(n, first + BLOCK) - first;
        uint16_t* restrict t = total + first;
        const uint16_t* restrict p = part + first;
        for (int64_t i = 0; i < length; ++i) t[i] = to_bf16(from_bf16(t[i]) + from_bf16(p[i]));
    }
}

/* row_squares[r] = sum of squares of a row of bf16 in fp64 (the squares are exact in fp32), columns a multiple of 128. */
void tscale_row_squares(const uint16_t* gradient, double* row_squares, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const uint16_t* g = gradient + row * columns;
        double total[16] = {0};
        for (int64_t i = 0; i < columns; i += 16)
            for (int lane = 0; lane < 16; ++lane) {
                const float value = from_bf16(g[i + lane]);
                total[lane] += (double)(value * value);
            }
        double sum = 0;
        for (int lane = 0; lane < 16; ++lane) sum += total[lane];
        row_squares[row] = sum;
    }
}
