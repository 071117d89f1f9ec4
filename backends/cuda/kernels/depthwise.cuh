// Depthwise convolutions: a thread has four channels of a pixel. Four taps of a channel become one word for dp4a.
// weights[c / 4][tap / 4][c % 4][tap % 4], taps beyond the window zero. `shape` is as of linear.cuh.

// The four channels from `c` on of a pixel, or padding.
template <int VECTOR>
__device__ __forceinline__ uint32_t four_channels(const Linear &shape, const int8_t *__restrict__ map, int y, int x, int c,
                                                  uint32_t filling)
{
    if ((unsigned)y >= (unsigned)shape.rows || (unsigned)x >= (unsigned)shape.columns) {
        return filling;
    }
    const int8_t *from = map + ((wide_t)y * shape.columns + x) * shape.channels + c;
    if (VECTOR == 4) {
        return *(const uint32_t *)from;
    }
    uint32_t word = 0;
#pragma unroll
    for (int byte = 0; byte < 4; byte++) {
        word |= c + byte < shape.channels ? (uint32_t)(uint8_t)from[byte] << (8 * byte) : 0u;
    }
    return word;
}

// From words of four channels to words of four taps.
__device__ __forceinline__ void transpose(uint32_t (&words)[4])
{
    const uint32_t low = __byte_perm(words[0], words[1], 0x5140), high = __byte_perm(words[0], words[1], 0x7362);
    const uint32_t other = __byte_perm(words[2], words[3], 0x5140), upper = __byte_perm(words[2], words[3], 0x7362);
    words[0] = __byte_perm(low, other, 0x5410), words[1] = __byte_perm(low, other, 0x7632);
    words[2] = __byte_perm(high, upper, 0x5410), words[3] = __byte_perm(high, upper, 0x7632);
}

template <int HEIGHT, int WIDTH, int THREADS, int VECTOR, Form FORM>
__device__ __forceinline__ void depthwise(const int8_t *__restrict__ input, const int8_t *__restrict__ weights,
                                          const int *__restrict__ table, int8_t *__restrict__ output, const Linear &shape)
{
    const int TAPS = HEIGHT * WIDTH, WORDS = (TAPS + 3) / 4;
    const int quads = (shape.channels + 3) / 4, at = blockIdx.x * THREADS + threadIdx.x;
    const int quad = at % quads, m = at / quads, c = quad * 4;
    const int y = m / shape.width, x = m - y * shape.width;
    if (y >= shape.height) {
        return;
    }
    input += (wide_t)blockIdx.z * shape.rows * shape.columns * shape.channels;
    output += ((wide_t)blockIdx.z * shape.height * shape.width + m) * shape.outputs + c;
    const int4 *rows = (const int4 *)weights + (wide_t)quad * WORDS;
    const int above = y * shape.stride_y - shape.top, beside = x * shape.stride_x - shape.left;
    const uint32_t filling = (shape.outside & 255) * 0x01010101u;
    int sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
        uint32_t codes[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int tap = word * 4 + t;
            codes[t] = tap < TAPS ? four_channels<VECTOR>(shape, input, above + tap / WIDTH * shape.dilation_y,
                                                          beside + tap % WIDTH * shape.dilation_x, c, filling)
                                  : 0u;
        }
        transpose(codes);
        const int4 w = rows[word];
        sums[0] = __dp4a((int)codes[0], w.x, sums[0]);
        sums[1] = __dp4a((int)codes[1], w.y, sums[1]);
        sums[2] = __dp4a((int)codes[2], w.z, sums[2]);
        sums[3] = __dp4a((int)codes[3], w.w, sums[3]);
    }
    uint32_t made = 0;
#pragma unroll
    for (int byte = 0; byte < 4; byte++) {
        if (VECTOR == 4 || c + byte < shape.channels) {
            const int code = coded<FORM>(shape, table, c + byte, sums[byte]);
            made |= (uint32_t)(code & 255) << (8 * byte);
            if (VECTOR != 4) {
                output[byte] = (int8_t)code;
            }
        }
    }
    if (VECTOR == 4) {
        *(uint32_t *)output = made;
    }
}
