// Convolutions and dense layers as one product of matrices, its left one gathered tile by tile (implicit GEMM):
// out[m][n] = code of (bias[n] + sum over k of patch[m][k] * weights[n][k]), m a pixel, k = (row, column, channel).

struct Linear {
    int rows, columns, channels;                   // of the input
    int height, width, outputs;                    // of the output
    int window_columns;                            // of the window
    int stride_y, stride_x, dilation_y, dilation_x, top, left;
    int depth, stored_depth;                       // codes of a patch; of a row of weights: a multiple of 32
    int group_channels, group_outputs, blocks;     // of a group; blocks of BN outputs that it takes
    int outside, zero_point, low, high;            // with high words `zero_point` is 2 * zero point + 1; of floats the bits
};

// How sums end: as codes by whole products or by their high words, or as floats.
enum Form { SHIFTED, HIGH, REAL };

const int DEEP = 64;  // codes that one step multiplies
const int STATIC = 49152;  // bytes of shared memory that a kernel may declare

// Byte where chunk `chunk` of 16 codes of a row of a tile lies: ldmatrix reads eight rows from eight different banks.
__device__ __forceinline__ int placed(int row, int chunk)
{
    return row * DEEP + ((chunk ^ ((row >> 1) & 3)) << 4);
}

// A sum's code, or clip(sum * scale, low, high); `factor` is a multiplier, or a scale's bits.
template <Form FORM, class Shape>
__device__ __forceinline__ auto finished(const Shape &shape, int acc, int factor, int shift)
{
    if constexpr (FORM == REAL) {
        const float real = __fmul_rn((float)acc, __uint_as_float((uint32_t)factor));
        return fminf(fmaxf(real, __uint_as_float((uint32_t)shape.low)), __uint_as_float((uint32_t)shape.high));
    } else if constexpr (FORM == HIGH) {
        return (int8_t)qc_requantize_high(acc, factor, shift, shape.zero_point, shape.low, shape.high);
    } else {
        return (int8_t)qc_requantize(acc, factor, shift, shape.zero_point, shape.low, shape.high);
    }
}

template <Form FORM>
__device__ __forceinline__ auto coded(const Linear &shape, const int *__restrict__ table, int n, int sum)
{
    return finished<FORM>(shape, sum + table[3 * n], table[3 * n + 1], table[3 * n + 2]);
}

// Where a pixel's window begins.
struct Corner {
    int y, x;
    bool real;
};

__device__ __forceinline__ Corner corner(const Linear &shape, int m)
{
    const int y = m / shape.width, x = m - y * shape.width;
    return Corner{y * shape.stride_y - shape.top, x * shape.stride_x - shape.left, y < shape.height};
}

// Where code k of a patch comes from: the window's row and column, and the channel within the group.
struct Tap {
    int i, j, c;
    __device__ __forceinline__ Tap(const Linear &shape, int k)
    {
        const int tap = k / shape.group_channels;
        c = k - tap * shape.group_channels;
        i = tap / shape.window_columns;
        j = tap - i * shape.window_columns;
    }
    __device__ __forceinline__ void advance(const Linear &shape, int count)
    {
        c += count;
        while (c >= shape.group_channels) {
            c -= shape.group_channels;
            if (++j == shape.window_columns) {
                j = 0;
                i++;
            }
        }
    }
};

// The code's address, or nothing where it lies outside of the map or of the patch.
__device__ __forceinline__ const int8_t *seen(const Linear &shape, const int8_t *map, const Corner &from, const Tap &tap,
                                              int k)
{
    const int y = from.y + tap.i * shape.dilation_y, x = from.x + tap.j * shape.dilation_x;
    const bool inside = from.real && k < shape.depth && (unsigned)y < (unsigned)shape.rows &&
                        (unsigned)x < (unsigned)shape.columns;
    return inside ? map + ((wide_t)y * shape.columns + x) * shape.channels + tap.c : nullptr;
}

// Gathers tiles of BM patches, VECTOR neighbouring codes at a time.
template <int BM, int THREADS, int VECTOR>
struct Patches {
    static const int WORD = VECTOR < 4 ? 4 : VECTOR;  // bytes that a thread writes at once
    static const int ACROSS = DEEP / WORD, ROWS = BM * ACROSS / THREADS, STEP = THREADS / ACROSS;
    Corner corners[ROWS];
    Tap tap;
    int k;

    __device__ __forceinline__ Patches(const Linear &shape, int first)
        : tap(shape, threadIdx.x % ACROSS * WORD), k(threadIdx.x % ACROSS * WORD)
    {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            corners[r] = corner(shape, first + (int)threadIdx.x / ACROSS + r * STEP);
        }
    }

    __device__ __forceinline__ void gather(const Linear &shape, const int8_t *__restrict__ map, int8_t *tile)
    {
        const int column = threadIdx.x % ACROSS * WORD;
        const uint32_t filling = (shape.outside & 255) * 0x01010101u;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = (int)threadIdx.x / ACROSS + r * STEP;
            int8_t *target = tile + placed(row, column >> 4) + (column & 15);
            if (VECTOR >= 4) {
                const int8_t *source = seen(shape, map, corners[r], tap, k);
                if (source) {
                    copy_async<WORD>(target, source);
                } else {
#pragma unroll
                    for (int byte = 0; byte < WORD; byte += 4) {
                        *(uint32_t *)(target + byte) = filling;
                    }
                }
            } else {
                Tap each = tap;
                uint32_t word = 0;
#pragma unroll 1
                for (int byte = 0; byte < 4; byte++) {
                    const int8_t *source = seen(shape, map, corners[r], each, k + byte);
                    word |= (source ? (uint32_t)(uint8_t)*source : filling & 255u) << (8 * byte);
                    each.advance(shape, 1);
                }
                *(uint32_t *)target = word;
            }
        }
        tap.advance(shape, DEEP);
        k += DEEP;
    }
};

// Copies a tile of BN rows of weights.
template <int BN, int THREADS>
__device__ __forceinline__ void take_weights(const Linear &shape, const int8_t *__restrict__ weights, int first, int k,
                                             int8_t *tile)
{
#pragma unroll
    for (int at = threadIdx.x; at < BN * 4; at += THREADS) {
        const int row = at >> 2, chunk = at & 3;
        int8_t *target = tile + placed(row, chunk);
        if (first + row < shape.group_outputs && k + chunk * 16 < shape.stored_depth) {
            copy_async<16>(target, weights + (wide_t)(first + row) * shape.stored_depth + k + chunk * 16);
        } else {
            *(int4 *)target = int4{0, 0, 0, 0};
        }
    }
}

// Sums of a tile in tensor cores: DOWN x ACROSS warps. Of codes; or of halves, half as many of which are as many bytes.
template <int BM, int BN, int DOWN, int ACROSS, class Sum = int>
struct TensorCores {
    static const int THREADS = 32 * DOWN * ACROSS, TM = BM / DOWN / 16, TN = BN / ACROSS / 8;
    Sum sums[TM][TN][4];

    __device__ __forceinline__ int row(void) const { return (int)threadIdx.x / 32 / ACROSS * TM * 16; }
    __device__ __forceinline__ int column(void) const { return (int)threadIdx.x / 32 % ACROSS * TN * 8; }

    __device__ __forceinline__ void multiply(const int8_t *a, const int8_t *b, int part)
    {
        const int lane = threadIdx.x & 31;
        uint32_t left[TM][4], right[TN][2];
#pragma unroll
        for (int m = 0; m < TM; m++) {
            load_matrices(left[m], a + placed(row() + m * 16 + (lane & 15), 2 * part + (lane >> 4)));
        }
#pragma unroll
        for (int n = 0; n < TN; n += 2) {
            uint32_t words[4];
            load_matrices(words, b + placed(column() + n * 8 + (lane & 7) + ((lane >> 4) << 3), 2 * part + (lane >> 3 & 1)));
            right[n][0] = words[0], right[n][1] = words[1], right[n + 1][0] = words[2], right[n + 1][1] = words[3];
        }
#pragma unroll
        for (int m = 0; m < TM; m++) {
#pragma unroll
            for (int n = 0; n < TN; n++) {
                multiply_tile(sums[m][n], left[m], right[n]);
            }
        }
    }

    template <class Take>
    __device__ __forceinline__ void give(Take take) const
    {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int n = 0; n < TN; n++) {
#pragma unroll
            for (int m = 0; m < TM; m++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    take(row() + m * 16 + (lane >> 2) + (e >> 1) * 8, column() + n * 8 + (lane & 3) * 2 + (e & 1), sums[m][n][e]);
                }
            }
        }
    }
};

// Sums of a tile by dp4a: 16 x 16 threads, for groups too narrow for tensor cores.
template <int BM, int BN>
struct DotProducts {
    static const int THREADS = 256, TM = BM / 16, TN = BN / 16;
    int sums[TM][TN][1];

    __device__ __forceinline__ void multiply(const int8_t *a, const int8_t *b, int part)
    {
        const int y = threadIdx.x >> 4, x = threadIdx.x & 15;
#pragma unroll
        for (int word = 0; word < 8; word++) {
            const int chunk = 2 * part + (word >> 2), byte = (word & 3) * 4;
            int left[TM], right[TN];
#pragma unroll
            for (int m = 0; m < TM; m++) {
                left[m] = *(const int *)(a + placed(y + m * 16, chunk) + byte);
            }
#pragma unroll
            for (int n = 0; n < TN; n++) {
                right[n] = *(const int *)(b + placed(x + n * 16, chunk) + byte);
            }
#pragma unroll
            for (int m = 0; m < TM; m++) {
#pragma unroll
                for (int n = 0; n < TN; n++) {
                    sums[m][n][0] = __dp4a(left[m], right[n], sums[m][n][0]);
                }
            }
        }
    }

    template <class Take>
    __device__ __forceinline__ void give(Take take) const
    {
#pragma unroll
        for (int m = 0; m < TM; m++) {
#pragma unroll
            for (int n = 0; n < TN; n++) {
                take((threadIdx.x >> 4) + m * 16, (threadIdx.x & 15) + n * 16, sums[m][n][0]);
            }
        }
    }
};

// Writes a tile of codes, as many neighbours at once as the output's channels allow.
template <int BM, int BN, int THREADS, int VECTOR>
__device__ __forceinline__ void give_codes(const Linear &shape, const int8_t *tile, int pitch, int m, int n,
                                           int8_t *__restrict__ output)
{
    const int pixels = shape.height * shape.width;
    for (int at = threadIdx.x; at < BM * (BN / VECTOR); at += THREADS) {
        const int row = at / (BN / VECTOR), column = at % (BN / VECTOR) * VECTOR;
        if (m + row < pixels && n + column < shape.group_outputs) {
            const int8_t *source = tile + row * pitch + column;
            int8_t *target = output + (wide_t)(m + row) * shape.outputs + column;
            if (VECTOR == 16) {
                *(int4 *)target = *(const int4 *)source;
            } else if (VECTOR == 8) {
                *(int2 *)target = *(const int2 *)source;
            } else if (VECTOR == 4) {
                *(int *)target = *(const int *)source;
            } else {
                *target = *source;
            }
        }
    }
}

// TAKEN and GIVEN: codes that are read and written at once, 16, 8, 4 or 1.
template <class Tile, int BM, int BN, int TAKEN, int GIVEN, Form FORM, class Output>
__device__ __forceinline__ void linear(const int8_t *__restrict__ input, const int8_t *__restrict__ weights,
                                       const int *__restrict__ table, Output *__restrict__ output, const Linear &shape)
{
    const int THREADS = Tile::THREADS, BYTES = (BM + BN) * DEEP, PITCH = BN + 16, STAGES = STAGES_OF(BYTES);
    int8_t *memory;
    if constexpr (3 * BYTES <= STATIC) {
        __shared__ __align__(16) int8_t declared[3 * BYTES];
        memory = declared;
    } else {
        memory = launched_memory<STAGES * BYTES>();
    }
    const int group = blockIdx.y / shape.blocks, n = (int)(blockIdx.y % shape.blocks) * BN, m = blockIdx.x * BM;
    const int steps = (shape.stored_depth + DEEP - 1) / DEEP;
    input += (wide_t)blockIdx.z * shape.rows * shape.columns * shape.channels + group * shape.group_channels;
    weights += (wide_t)group * shape.group_outputs * shape.stored_depth;
    const int channel = group * shape.group_outputs + n;
    output += (wide_t)blockIdx.z * shape.height * shape.width * shape.outputs + channel;

    Tile tile = {};
    Patches<BM, THREADS, TAKEN> patches(shape, m);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < steps) {
            patches.gather(shape, input, memory + stage * BYTES);
            take_weights<BN, THREADS>(shape, weights, n, stage * DEEP, memory + stage * BYTES + BM * DEEP);
        }
        copies_end();
    }
    for (int step = 0; step < steps; step++) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        const int next = step + STAGES - 1;
        if (next < steps) {
            int8_t *stage = memory + next % STAGES * BYTES;
            patches.gather(shape, input, stage);
            take_weights<BN, THREADS>(shape, weights, n, next * DEEP, stage + BM * DEEP);
        }
        copies_end();
        const int8_t *stage = memory + step % STAGES * BYTES;
        tile.multiply(stage, stage + BM * DEEP, 0);
        if (step * DEEP + 32 < shape.stored_depth) {
            tile.multiply(stage, stage + BM * DEEP, 1);
        }
    }
    copies_wait<0>();
    __syncthreads();
    if constexpr (FORM == REAL) {
        tile.give([&](int row, int column, int sum) {
            if (m + row < shape.height * shape.width && n + column < shape.group_outputs) {
                output[(wide_t)(m + row) * shape.outputs + column] = coded<FORM>(shape, table, channel + column, sum);
            }
        });
    } else {
        tile.give([&](int row, int column, int sum) {
            const bool real = n + column < shape.group_outputs;
            memory[row * PITCH + column] = real ? coded<FORM>(shape, table, channel + column, sum) : (int8_t)0;
        });
        __syncthreads();
        give_codes<BM, BN, THREADS, GIVEN>(shape, memory, PITCH, m, n, output);
    }
}
