// One row of halves times weights of four bits in blocks of 32, each with a scale: what decoding a language model waits for.
// out[n] = sum over blocks of scale[n][block] * sum over i of (code - 8) * x[block * 32 + i], summed in float32.
// codes[n][block][16]: code 2i in the low half of byte i.

struct Nibbles {
    int outputs, blocks;  // of 32 codes each
};

const int PART = 128;  // blocks of x that are in shared memory at once

// x[0..3] as the codes of a half word want it: code i stays where it is, 4i places up, and x is so much smaller.
__device__ __forceinline__ float4 lowered(float2 first, float2 second)
{
    return float4{first.x, first.y * 0.0625f, second.x * 0.00390625f, second.y * 0.000244140625f};
}

// The code at place `at` of a word, less 8, times 2^at: the bits of a float beside 2^23, without a conversion.
template <int AT>
__device__ __forceinline__ float code_less_eight(uint32_t word)
{
    return __uint_as_float((word & (15u << AT)) | 0x4B000000u) - (8388608.0f + (float)(8 << AT));
}

__device__ __forceinline__ float four(uint32_t word, float4 x, float sum)
{
    sum = fmaf(code_less_eight<0>(word), x.x, sum);
    sum = fmaf(code_less_eight<4>(word), x.y, sum);
    sum = fmaf(code_less_eight<8>(word), x.z, sum);
    return fmaf(code_less_eight<12>(word), x.w, sum);
}

// WARPS x ROWS outputs a block. Lanes take blocks of 32; each reads its x from banks that its neighbours do not.
template <int WARPS, int ROWS>
__device__ __forceinline__ void w4a16(const uint32_t *__restrict__ x, const int4 *__restrict__ codes,
                                      const uint16_t *__restrict__ scales, uint16_t *__restrict__ output,
                                      const Nibbles &shape)
{
    __shared__ __align__(16) float4 lowered_x[PART * 8];
    const int lane = threadIdx.x & 31, first = (blockIdx.x * WARPS + (int)threadIdx.x / 32) * ROWS;
    float sums[ROWS] = {};
    for (int part = 0; part < shape.blocks; part += PART) {
        const int count = min(PART, shape.blocks - part);
        int4 words[PART / 32][ROWS];
        uint16_t steps[PART / 32][ROWS];
#pragma unroll
        for (int turn = 0; turn < PART / 32; turn++) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                const int block = turn * 32 + lane;
                const bool real = block < count && first + row < shape.outputs;
                const wide_t at = (wide_t)(first + row) * shape.blocks + part + block;
                words[turn][row] = real ? codes[at] : int4{0, 0, 0, 0};
                steps[turn][row] = real ? scales[at] : (uint16_t)0;
            }
        }
        __syncthreads();
        for (int at = threadIdx.x; at < count * 8; at += WARPS * 32) {
            const uint32_t *pair = x + ((wide_t)part * 8 + at) * 2;
            lowered_x[at & ~7 | (at + at / 8) & 7] = lowered(from_halves(pair[0]), from_halves(pair[1]));
        }
        __syncthreads();
#pragma unroll
        for (int turn = 0; turn < PART / 32; turn++) {
            const int block = turn * 32 + lane;
            if (block < count) {
                float products[ROWS] = {};
#pragma unroll
                for (int word = 0; word < 4; word++) {
                    const float4 low = lowered_x[block * 8 + ((2 * word + block) & 7)];
                    const float4 high = lowered_x[block * 8 + ((2 * word + 1 + block) & 7)];
#pragma unroll
                    for (int row = 0; row < ROWS; row++) {
                        const int4 all = words[turn][row];
                        const uint32_t each = (uint32_t)(word == 0 ? all.x : word == 1 ? all.y : word == 2 ? all.z : all.w);
                        products[row] = four(each >> 16, high, four(each, low, products[row]));
                    }
                }
#pragma unroll
                for (int row = 0; row < ROWS; row++) {
                    sums[row] = fmaf(from_halves(steps[turn][row]).x, products[row], sums[row]);
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
            output[first + row] = to_half(sum);
        }
    }
}
