// A dense layer of few positions: a warp for each output, dp4a, and nothing in shared memory. `shape` is as of linear.cuh.

template <int VECTOR>
__device__ __forceinline__ int4 sixteen(const int8_t *__restrict__ from, int left)
{
    if (VECTOR == 16) {
        return *(const int4 *)from;
    }
    int words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int word = 0; word < 4; word++) {
        if (VECTOR == 4) {
            words[word] = word * 4 < left ? ((const int *)from)[word] : 0;
        } else {
#pragma unroll
            for (int byte = 0; byte < 4; byte++) {
                const int at = word * 4 + byte;
                words[word] |= at < left ? (int)((uint32_t)(uint8_t)from[at] << (8 * byte)) : 0;
            }
        }
    }
    return int4{words[0], words[1], words[2], words[3]};
}

template <int WARPS, int TAKEN, Form FORM, class Output>
__device__ __forceinline__ void gemv(const int8_t *__restrict__ input, const int8_t *__restrict__ weights,
                                     const int *__restrict__ table, Output *__restrict__ output, const Linear &shape)
{
    const int lane = threadIdx.x & 31, n = blockIdx.x * WARPS + (int)threadIdx.x / 32;
    if (n >= shape.outputs) {
        return;
    }
    const wide_t m = (wide_t)blockIdx.z * shape.height * shape.width + blockIdx.y;
    input += m * shape.depth;
    weights += (wide_t)n * shape.stored_depth;
    int sum = 0;
    for (int k = lane * 16; k < shape.depth; k += 32 * 16) {
        const int4 a = sixteen<TAKEN>(input + k, shape.depth - k), b = *(const int4 *)(weights + k);
        sum = __dp4a(a.x, b.x, sum);
        sum = __dp4a(a.y, b.y, sum);
        sum = __dp4a(a.z, b.z, sum);
        sum = __dp4a(a.w, b.w, sum);
    }
#pragma unroll
    for (int distance = 16; distance; distance >>= 1) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (lane == 0) {
        output[m * shape.outputs + n] = coded<FORM>(shape, table, n, sum);
    }
}
