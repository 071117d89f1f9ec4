// Products of two activations, one for each place of the axes in front: c[m][n] of sum over k of a[m][k] * b[k][n].

struct Product {
    int rows, depth, columns;
    int a_row, b_deep, b_column, c_row;    // elements from one to the next; codes of a row of a, and of c, are neighbours
    int a_size, b_size, c_size;            // elements of a sample
    int middle, inner;                     // how many the last two axes in front have
    int a_outer, a_middle, a_inner, b_outer, b_middle, b_inner, c_outer, c_middle, c_inner;
    int zero_in;                           // zero point of a's codes; b's is 0
    int multiplier, shift;
    int zero_point, low, high;             // as of Linear
};

// Where a matrix begins.
__device__ __forceinline__ wide_t matrix_at(const Product &shape, int size, int outer, int middle, int inner)
{
    const int each = blockIdx.y / shape.inner;
    return (wide_t)blockIdx.z * size + (wide_t)(each / shape.middle) * outer + (wide_t)(each % shape.middle) * middle +
           (wide_t)(blockIdx.y % shape.inner) * inner;
}

// Takes a tile of ROWS rows of DEEP codes from neighbours, VECTOR at once; zeros where there are none.
template <int ROWS, int THREADS, int VECTOR>
__device__ __forceinline__ void take_rows(const int8_t *__restrict__ from, int step, int rows, int k, int depth,
                                          int8_t *tile)
{
#pragma unroll 2
    for (int at = threadIdx.x; at < ROWS * (DEEP / VECTOR); at += THREADS) {
        const int row = at / (DEEP / VECTOR), column = at % (DEEP / VECTOR) * VECTOR;
        int8_t *target = tile + placed(row, column >> 4) + (column & 15);
        const bool there = row < rows && k + column < depth;
        const int8_t *source = from + (row * step + k + column);
        if constexpr (VECTOR > 1) {
            if (there) {
                copy_async<VECTOR>(target, source);
            } else if (VECTOR == 16) {
                *(int4 *)target = int4{0, 0, 0, 0};
            } else {
                *(int *)target = 0;
            }
        } else {
            *target = there ? *source : (int8_t)0;
        }
    }
}

// Takes a tile whose rows are columns in memory: blocks of four by four codes are turned in registers.
template <int ROWS, int THREADS, int VECTOR>
__device__ __forceinline__ void take_turned(const int8_t *__restrict__ from, int step, int rows, int k, int depth,
                                          int8_t *tile)
{
#pragma unroll 1
    for (int at = threadIdx.x; at < ROWS / 4 * (DEEP / 4); at += THREADS) {
        const int row = at % (ROWS / 4) * 4, column = at / (ROWS / 4) * 4;
        uint32_t words[4];
#pragma unroll
        for (int below = 0; below < 4; below++) {
            const int8_t *source = from + ((k + column + below) * step + row);
            words[below] = 0;
            if (VECTOR == 4) {
                words[below] = row < rows && k + column + below < depth ? *(const uint32_t *)source : 0u;
            } else {
#pragma unroll
                for (int byte = 0; byte < 4; byte++) {
                    const bool there = row + byte < rows && k + column + below < depth;
                    words[below] |= there ? (uint32_t)(uint8_t)source[byte] << (8 * byte) : 0u;
                }
            }
        }
        transpose(words);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            *(uint32_t *)(tile + placed(row + r, column >> 4) + (column & 15)) = words[r];
        }
    }
}

// A, B: codes of a that are read at once, and of b: 16, 4 or 1. TURNED: b's columns are neighbours, not what is added up.
template <int BM, int BN, int DOWN, int ACROSS, int A, int B, bool TURNED, Form FORM, class Output>
__device__ __forceinline__ void product(const int8_t *__restrict__ a, const int8_t *__restrict__ b,
                                        Output *__restrict__ output, const Product &shape)
{
    const int THREADS = 32 * DOWN * ACROSS;
    __shared__ __align__(16) int8_t left[BM * DEEP], right[BN * DEEP];
    __shared__ int starts[BN];
    const int across = (shape.columns + BN - 1) / BN, m = (int)(blockIdx.x / across) * BM, n = (int)(blockIdx.x % across) * BN;
    a += matrix_at(shape, shape.a_size, shape.a_outer, shape.a_middle, shape.a_inner) + (wide_t)m * shape.a_row;
    b += matrix_at(shape, shape.b_size, shape.b_outer, shape.b_middle, shape.b_inner) + (wide_t)n * shape.b_column;
    output += matrix_at(shape, shape.c_size, shape.c_outer, shape.c_middle, shape.c_inner) + (wide_t)m * shape.c_row + n;
    const int rows = shape.rows - m, columns = shape.columns - n;
    TensorCores<BM, BN, DOWN, ACROSS> tile = {};
    int ones = 0;
    for (int k = 0; k < shape.depth; k += DEEP) {
        __syncthreads();
        take_rows<BM, THREADS, A>(a, shape.a_row, rows, k, shape.depth, left);
        if (TURNED) {
            take_turned<BN, THREADS, B>(b, shape.b_deep, columns, k, shape.depth, right);
        } else {
            take_rows<BN, THREADS, B>(b, shape.b_column, columns, k, shape.depth, right);
        }
        copies_end();
        copies_wait<0>();
        __syncthreads();
        tile.multiply(left, right, 0);
        if (k + 32 < shape.depth) {
            tile.multiply(left, right, 1);
        }
        if ((int)threadIdx.x < BN) {
#pragma unroll
            for (int chunk = 0; chunk < 4; chunk++) {
                const int4 codes = *(const int4 *)(right + placed(threadIdx.x, chunk));
                ones = __dp4a(codes.x, 0x01010101, ones);
                ones = __dp4a(codes.y, 0x01010101, ones);
                ones = __dp4a(codes.z, 0x01010101, ones);
                ones = __dp4a(codes.w, 0x01010101, ones);
            }
        }
    }
    if ((int)threadIdx.x < BN) {
        starts[threadIdx.x] = -shape.zero_in * ones;
    }
    __syncthreads();
    tile.give([&](int row, int column, int sum) {
        if (row < rows && column < columns) {
            output[row * shape.c_row + column] =
                finished<FORM>(shape, sum + starts[column], shape.multiplier, shape.shift);
        }
    });
}

// The same of floats, summed up from the first k on, each product and sum rounded once: clip(scale * sum, low, high).
template <int SIDE>
__device__ __forceinline__ void float_product(const float *__restrict__ a, const float *__restrict__ b,
                                              float *__restrict__ output, const Product &shape)
{
    const int EACH = SIDE / 16, STEP = 16;
    __shared__ float left[STEP][SIDE + 1], right[STEP][SIDE + 1];
    const int across = (shape.columns + SIDE - 1) / SIDE;
    const int m = (int)(blockIdx.x / across) * SIDE, n = (int)(blockIdx.x % across) * SIDE;
    a += matrix_at(shape, shape.a_size, shape.a_outer, shape.a_middle, shape.a_inner);
    b += matrix_at(shape, shape.b_size, shape.b_outer, shape.b_middle, shape.b_inner);
    output += matrix_at(shape, shape.c_size, shape.c_outer, shape.c_middle, shape.c_inner);
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    float sums[EACH][EACH] = {};
    for (int k = 0; k < shape.depth; k += STEP) {
        __syncthreads();
        for (int at = threadIdx.x; at < SIDE * STEP; at += 256) {
            const int row = m + at / STEP, deep = k + at % STEP;
            left[at % STEP][at / STEP] = row < shape.rows && deep < shape.depth ? a[(wide_t)row * shape.a_row + deep] : 0.0f;
            const int column = shape.b_column == 1 ? at % SIDE : at / STEP, below = shape.b_column == 1 ? at / SIDE : at % STEP;
            const bool there = n + column < shape.columns && k + below < shape.depth;
            const wide_t place = (wide_t)(k + below) * shape.b_deep + (wide_t)(n + column) * shape.b_column;
            right[below][column] = there ? b[place] : 0.0f;
        }
        __syncthreads();
        const int count = min(STEP, shape.depth - k);
        for (int deep = 0; deep < count; deep++) {
#pragma unroll
            for (int r = 0; r < EACH; r++) {
#pragma unroll
                for (int c = 0; c < EACH; c++) {
                    sums[r][c] = fmaf(left[deep][y + r * 16], right[deep][x + c * 16], sums[r][c]);
                }
            }
        }
    }
    const float scale = __uint_as_float((uint32_t)shape.multiplier);
    const float low = __uint_as_float((uint32_t)shape.low), high = __uint_as_float((uint32_t)shape.high);
#pragma unroll
    for (int r = 0; r < EACH; r++) {
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            const int row = m + y + r * 16, column = n + x + c * 16;
            if (row < shape.rows && column < shape.columns) {
                output[(wide_t)row * shape.c_row + column] = fminf(fmaxf(sums[r][c] * scale, low), high);
            }
        }
    }
}
