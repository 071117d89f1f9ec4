// Floats times weights of four or eight bits, of which every few inputs have a scale (W4A16). For sums that are kept in
// float32: out[n] = bias[n] + factor[n] * sum over k of x[k] * scale[n][k / block] * (code[n][k] - half of the codes).
// codes[n][chunk]: 32 codes each, of four bits code 2i in the low half of byte i.

struct Blocks {
    int rows, depth, outputs;  // of x, its inputs, and of the result
    int chunks;                // of 32 codes, in a row of weights; what is behind `depth` is zeros
    int shift, scales;         // 2^shift chunks have a scale in common; scales of a row
    int low, high;             // bits of the floats that results are clipped to
};

__device__ __forceinline__ float ended(const Blocks &shape, float sum, float2 numbers)
{
    const float y = fmaf(sum, numbers.x, numbers.y);
    return fminf(fmaxf(y, __uint_as_float((uint32_t)shape.low)), __uint_as_float((uint32_t)shape.high));
}

// The code at place `at` of a word, less half of the codes, times 2^at: the bits of a float beside 2^23, unconverted.
template <int BITS, int AT>
__device__ __forceinline__ float code_above(uint32_t word)
{
    const uint32_t mask = (1u << BITS) - 1;
    return __uint_as_float((word & (mask << AT)) | 0x4B000000u) - (8388608.0f + (float)(1 << (BITS - 1 + AT)));
}

// x[0..3] as `four` wants it: a code stays where it is in its half word, and x is as much smaller as it stands higher.
template <int BITS>
__device__ __forceinline__ float4 lowered(float4 x)
{
    return BITS == 4 ? float4{x.x, x.y * 0.0625f, x.z * 0.00390625f, x.w * 0.000244140625f}
                     : float4{x.x, x.y * 0.00390625f, x.z, x.w * 0.00390625f};
}

// Four codes times x: of four bits those of the low half of a word.
template <int BITS>
__device__ __forceinline__ float four(uint32_t word, float4 x, float sum)
{
    const uint32_t upper = BITS == 4 ? word >> 8 : word >> 16;
    sum = fmaf(code_above<BITS, 0>(word), x.x, sum);
    sum = fmaf(code_above<BITS, BITS>(word), x.y, sum);
    if (BITS == 4) {
        sum = fmaf(code_above<BITS, 8>(word), x.z, sum);
        return fmaf(code_above<BITS, 12>(word), x.w, sum);
    }
    sum = fmaf(code_above<BITS, 0>(upper), x.z, sum);
    return fmaf(code_above<BITS, 8>(upper), x.w, sum);
}

__device__ __forceinline__ float float_of(float x) { return x; }
__device__ __forceinline__ float float_of(uint16_t x) { return from_halves(x).x; }
__device__ __forceinline__ void put_sum(float *output, float x) { *output = x; }
__device__ __forceinline__ void put_sum(uint16_t *output, float x) { *output = to_half(x); }

template <class X>
__device__ __forceinline__ float4 four_of(const X *__restrict__ x, int at, int depth)
{
    return float4{at < depth ? float_of(x[at]) : 0.0f, at + 1 < depth ? float_of(x[at + 1]) : 0.0f,
                  at + 2 < depth ? float_of(x[at + 2]) : 0.0f, at + 3 < depth ? float_of(x[at + 3]) : 0.0f};
}

// Few rows, which are the grid's second axis: what decoding a language model waits for. WARPS x ROWS outputs a block;
// lanes take chunks, and each reads its x from banks that its neighbours do not. SCALES: of a chunk, 1 or 2.
template <int BITS, int SCALES, int WARPS, int ROWS, class X, class Output>
__device__ __forceinline__ void few_rows(const X *__restrict__ x, const int4 *__restrict__ codes,
                                         const uint16_t *__restrict__ scales, const float2 *__restrict__ table,
                                         Output *__restrict__ output, const Blocks &shape)
{
    const int TURNS = BITS == 4 ? 4 : 2, PART = 32 * TURNS, LOADS = BITS / 4;  // chunks of x in shared memory at once
    __shared__ __align__(16) float4 lowered_x[PART * 8];
    const int lane = threadIdx.x & 31, first = (blockIdx.x * WARPS + (int)threadIdx.x / 32) * ROWS;
    const wide_t position = (wide_t)blockIdx.z * shape.rows + blockIdx.y;
    x += position * shape.depth;
    float sums[ROWS] = {};
    for (int part = 0; part < shape.chunks; part += PART) {
        const int count = min(PART, shape.chunks - part);
        int4 words[TURNS][ROWS][LOADS];
        uint16_t steps[TURNS][ROWS][SCALES];
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                const int chunk = turn * 32 + lane;
                const bool real = chunk < count && first + row < shape.outputs;
                const wide_t at = (wide_t)(first + row) * shape.chunks + part + chunk;
#pragma unroll
                for (int load = 0; load < LOADS; load++) {
                    words[turn][row][load] = real ? codes[at * LOADS + load] : int4{0, 0, 0, 0};
                }
#pragma unroll
                for (int s = 0; s < SCALES; s++) {
                    const int step = SCALES == 2 ? 2 * (part + chunk) + s : (part + chunk) >> shape.shift;
                    steps[turn][row][s] = real ? scales[(wide_t)(first + row) * shape.scales + step] : (uint16_t)0;
                }
            }
        }
        __syncthreads();
        for (int at = threadIdx.x; at < count * 8; at += WARPS * 32) {
            lowered_x[at & ~7 | (at + at / 8) & 7] = lowered<BITS>(four_of(x, (part * 8 + at) * 4, shape.depth));
        }
        __syncthreads();
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int chunk = turn * 32 + lane;
            if (chunk < count) {
                float products[ROWS][SCALES] = {};
#pragma unroll
                for (int f = 0; f < 8; f++) {
                    const float4 each = lowered_x[chunk * 8 + ((f + chunk) & 7)];
                    const int word = BITS == 4 ? f / 2 : f, place = BITS == 4 && f % 2 ? 16 : 0;
#pragma unroll
                    for (int row = 0; row < ROWS; row++) {
                        const int4 all = words[turn][row][word / 4];
                        const int of = word % 4, code = of == 0 ? all.x : of == 1 ? all.y : of == 2 ? all.z : all.w;
                        float &sum = products[row][SCALES == 2 ? f / 4 : 0];
                        sum = four<BITS>((uint32_t)code >> place, each, sum);
                    }
                }
#pragma unroll
                for (int row = 0; row < ROWS; row++) {
#pragma unroll
                    for (int s = 0; s < SCALES; s++) {
                        sums[row] = fmaf(from_halves(steps[turn][row][s]).x, products[row][s], sums[row]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        float sum = sums[row];
#pragma unroll
        for (int distance = 16; distance; distance >>= 1) {
            sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        }
        if (lane == 0 && first + row < shape.outputs) {
            put_sum(output + position * shape.outputs + first + row, ended(shape, sum, table[first + row]));
        }
    }
}

// Rows as halves, each as much larger by a power of two as it takes for its peak to be between 2^14 and 2^15, and what
// to multiply by afterwards. Behind `depth` there are zeros up to whole chunks. Of four bits eights of inputs stand in the
// order in which codes come out of a word.
template <int BITS, int THREADS>
__device__ __forceinline__ void halve(const float *__restrict__ x, uint16_t *__restrict__ halves,
                                      float *__restrict__ steps, const Blocks &shape)
{
    const wide_t row = (wide_t)blockIdx.z * shape.rows + blockIdx.x;
    x += row * shape.depth;
    halves += row * shape.chunks * 32;
    float peak = 0.0f;
    for (int k = threadIdx.x; k < shape.depth; k += THREADS) {
        peak = fmaxf(peak, fabsf(x[k]));
    }
    const int exponent = max(15, min(254, (int)(__float_as_uint(folded<THREADS>(peak, Most())) >> 23)));
    const float larger = __uint_as_float((uint32_t)(268 - exponent) << 23);
    for (int k = threadIdx.x; k < shape.chunks * 32; k += THREADS) {
        const int place = BITS == 4 ? (k & ~7) | (k & 3) * 2 | (k >> 2 & 1) : k;
        halves[place] = k < shape.depth ? to_half(x[k] * larger) : (uint16_t)0;
    }
    if (threadIdx.x == 0) {
        steps[row] = __uint_as_float((uint32_t)(exponent - 14) << 23);
    }
}

// Eight weights as halves, of which the second and every other half stand as `halve` has x.
template <int BITS>
__device__ __forceinline__ int4 eight_halves(const uint32_t (&words)[BITS / 4], uint32_t scale)
{
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if constexpr (BITS == 4) {
            pairs[j] = minus_halves(words[0] >> (4 * j) & 0x000F000Fu | 0x64006400u, 0x64086408u);
        } else {
            pairs[j] = minus_halves(__byte_perm(words[j / 2], 0x64646464u, j % 2 ? 0x4342 : 0x4140), 0x64806480u);
        }
        pairs[j] = times_halves(pairs[j], scale * 0x00010001u);
    }
    return int4{(int)pairs[0], (int)pairs[1], (int)pairs[2], (int)pairs[3]};
}

// Many rows, as `halve` leaves them: tensor cores multiply halves by weights that become halves in shared memory, with
// their scales, while the tile in front is multiplied.
template <int BM, int BN, int DOWN, int ACROSS, int BITS, int SCALES>
__device__ __forceinline__ void many_rows(const uint16_t *__restrict__ x, const float *__restrict__ steps,
                                          const uint32_t *__restrict__ codes, const uint16_t *__restrict__ scales,
                                          const float2 *__restrict__ table, float *__restrict__ output,
                                          const Blocks &shape)
{
    const int THREADS = 32 * DOWN * ACROSS, STAGES = 3, BYTES = (BM + BN) * DEEP, EACH = BN * 4 / THREADS, WORDS = BITS / 4;
    __shared__ __align__(16) int8_t memory[STAGES * BYTES];
    const int n = blockIdx.y * BN, m = blockIdx.x * BM;
    x += (wide_t)blockIdx.z * shape.rows * shape.chunks * 32;
    steps += (wide_t)blockIdx.z * shape.rows;
    output += (wide_t)blockIdx.z * shape.rows * shape.outputs;
    uint32_t words[EACH][WORDS];
    uint16_t some[EACH];

    const auto copy_rows = [&](int chunk) {
        int8_t *tile = memory + chunk % STAGES * BYTES;
#pragma unroll
        for (int at = threadIdx.x; at < BM * 4; at += THREADS) {
            const int row = at >> 2, part = at & 3;
            // What is behind the last row is read from it and goes nowhere.
            const uint16_t *source = x + (wide_t)min(m + row, shape.rows - 1) * shape.chunks * 32 + chunk * 32 + part * 8;
            copy_async<16>(tile + placed(row, part), source);
        }
    };
    const auto load_codes = [&](int chunk) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = threadIdx.x + i * THREADS, part = at & 3;
            const wide_t row = min(n + (at >> 2), shape.outputs - 1);
            const uint32_t *source = codes + ((row * shape.chunks + chunk) * 4 + part) * WORDS;
#pragma unroll
            for (int word = 0; word < WORDS; word++) {
                words[i][word] = source[word];
            }
            some[i] = scales[row * shape.scales + (SCALES == 2 ? 2 * chunk + part / 2 : chunk >> shape.shift)];
        }
    };
    const auto store_weights = [&](int chunk) {
        int8_t *tile = memory + chunk % STAGES * BYTES + BM * DEEP;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = threadIdx.x + i * THREADS;
            *(int4 *)(tile + placed(at >> 2, at & 3)) = eight_halves<BITS>(words[i], some[i]);
        }
    };

    TensorCores<BM, BN, DOWN, ACROSS, float> tile = {};
    load_codes(0);
    store_weights(0);
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 1; chunk++) {
        if (chunk < shape.chunks) {
            copy_rows(chunk);
        }
        copies_end();
    }
    for (int chunk = 0; chunk < shape.chunks; chunk++) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        if (chunk + STAGES - 1 < shape.chunks) {
            copy_rows(chunk + STAGES - 1);
        }
        copies_end();
        if (chunk + 1 < shape.chunks) {
            load_codes(chunk + 1);
        }
        const int8_t *stage = memory + chunk % STAGES * BYTES;
        tile.multiply(stage, stage + BM * DEEP, 0);
        tile.multiply(stage, stage + BM * DEEP, 1);
        if (chunk + 1 < shape.chunks) {
            store_weights(chunk + 1);
        }
    }
    copies_wait<0>();
    tile.give([&](int row, int column, float sum) {
        if (m + row < shape.rows && n + column < shape.outputs) {
            const wide_t at = (wide_t)(m + row) * shape.outputs + n + column;
            output[at] = ended(shape, sum * steps[m + row], table[n + column]);
        }
    });
}
