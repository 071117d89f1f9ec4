// What computes in float32. Nothing here is contracted (NVRTC is told so): a product and a sum are rounded once together
// where fmaf stands and apart elsewhere, on every device alike.

// Numbers that a kernel is launched with: integers, or the bits of floats.
template <int COUNT>
struct Numbers {
    int bits[COUNT];
    __device__ __forceinline__ float real(int at) const { return __uint_as_float((uint32_t)bits[at]); }
};

const float LEAST = -3.4028234663852886e38f;
// A float beside which whole numbers of up to 22 bits, and nothing less, can be told.
const float WHOLE = 12582912.0f;

// e to the x (Cephes' expf), for what is between -87 and 88, and as if it were at the end beyond them.
__device__ __forceinline__ float qc_exp(float x)
{
    x = fmaxf(fminf(x, 88.0f), -87.0f);
    const float beside = fmaf(x, 1.4426950408889634f, WHOLE), n = beside - WHOLE;
    const float r = fmaf(n, LN2_LOW, fmaf(n, LN2_HIGH, x));
    const float p = fmaf(exp_series(r), r * r, r + 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(beside) << 23));
}

__device__ __forceinline__ float qc_erf(float x)
{
    x = fmaxf(fminf(x, ERF_END), -ERF_END);
    return x * erf_series(fmaf(x * x, 2.0f / (ERF_END * ERF_END), -1.0f));
}

__device__ __forceinline__ float qc_tanh(float x) { return 1.0f - 2.0f / (qc_exp(x + x) + 1.0f); }

// Stores a float, or its code.
__device__ __forceinline__ void put(float *output, float x, float, int) { *output = x; }
__device__ __forceinline__ void put(int8_t *output, float x, float scale, int zero_point)
{
    *output = (int8_t)qc_quantize(x, scale, zero_point);
}

struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Most {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// What THREADS neighbouring threads have as one number, the same in all of them: of a warp, or of a block.
template <int THREADS, class Combine>
__device__ __forceinline__ float folded(float x, Combine combine)
{
#pragma unroll
    for (int distance = 16; distance; distance >>= 1) {
        x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
    }
    if constexpr (THREADS > 32) {
        __shared__ float parts[THREADS / 32];
        __syncthreads();
        if ((threadIdx.x & 31) == 0) {
            parts[threadIdx.x / 32] = x;
        }
        __syncthreads();
        x = parts[0];
#pragma unroll
        for (int warp = 1; warp < THREADS / 32; warp++) {
            x = combine(x, parts[warp]);
        }
    }
    return x;
}

// A row of values that is gone over several times by THREADS threads: kept in registers, or computed again where it is
// long. `value(column)` computes one.
template <int WIDTH, int THREADS, class Value>
struct Row {
    static constexpr int EACH = (WIDTH + THREADS - 1) / THREADS, SOME = EACH > 16 ? 4 : EACH;
    static constexpr bool KEPT = EACH <= 16;
    const Value &value;
    const int first;
    float kept[KEPT ? EACH : 1];

    __device__ __forceinline__ Row(const Value &value) : value(value), first(threadIdx.x % THREADS)
    {
        if constexpr (KEPT) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                kept[i] = first + i * THREADS < WIDTH ? value(first + i * THREADS) : 0.0f;
            }
        }
    }

    // Calls `body(column, value)` for each column of this thread.
    template <class Body>
    __device__ __forceinline__ void each(Body body)
    {
#pragma unroll (SOME)
        for (int i = 0; i < EACH; i++) {
            const int column = first + i * THREADS;
            if (column < WIDTH) {
                if constexpr (KEPT) {
                    body(column, kept[i]);
                } else {
                    float again = value(column);
                    body(column, again);
                }
            }
        }
    }

    template <class Term, class Combine>
    __device__ __forceinline__ float fold(float start, Term term, Combine combine)
    {
        float found = start;
        each([&](int, float &x) { found = combine(found, term(x)); });
        return folded<THREADS>(found, combine);
    }
};

// (x - mean) / sqrt(variance + epsilon) * weight + bias along a row.
template <int WIDTH, int THREADS, bool CENTRED, class Value, class Output>
__device__ __forceinline__ void normalize(const Value &value, const float *__restrict__ weight,
                                          const float *__restrict__ bias, float epsilon, Output *output, float scale,
                                          int zero_point)
{
    Row<WIDTH, THREADS, Value> row(value);
    const float share = 1.0f / WIDTH;
    float mean = 0.0f;
    if constexpr (CENTRED) {
        mean = row.fold(0.0f, [](float x) { return x; }, Sum()) * share;
    }
    const float variance = row.fold(0.0f, [&](float x) { return (x - mean) * (x - mean); }, Sum()) * share;
    const float factor = 1.0f / sqrtf(variance + epsilon);
    row.each([&](int column, float x) {
        put(output + column, fmaf((x - mean) * factor, weight[column], bias[column]), scale, zero_point);
    });
}

// exp(x - max) / sum of exp(x - max) along a row.
template <int WIDTH, int THREADS, class Value, class Output>
__device__ __forceinline__ void softmax(const Value &value, Output *output, float scale, int zero_point)
{
    Row<WIDTH, THREADS, Value> row(value);
    const float peak = row.fold(LEAST, [](float x) { return x; }, Most());
    const auto power = [&](float &x) { return row.KEPT ? x = qc_exp(x - peak) : qc_exp(x - peak); };
    const float factor = 1.0f / row.fold(0.0f, power, Sum());
    row.each([&](int column, float x) {
        put(output + column, (row.KEPT ? x : qc_exp(x - peak)) * factor, scale, zero_point);
    });
}
