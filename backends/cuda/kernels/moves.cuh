// One of several maps that become one along an axis: `outer` times `inner` neighbouring codes, among `pitch` of the result.

struct Move {
    int outer, inner, pitch, offset;
};

template <int THREADS>
__device__ __forceinline__ void join(const int8_t *__restrict__ input, int8_t *__restrict__ output, const Move &shape)
{
    const wide_t at = (wide_t)blockIdx.x * THREADS + threadIdx.x, sample = blockIdx.z;
    if (at < (wide_t)shape.outer * shape.inner) {
        const wide_t row = at / shape.inner, column = at - row * shape.inner;
        output[(sample * shape.outer + row) * shape.pitch + shape.offset + column] =
            input[sample * shape.outer * shape.inner + at];
    }
}
