// Types and the rounding of the integer program (docs/integer-kernels.md), for kernels of CUDA devices.
typedef signed char int8_t;
typedef short int16_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned int uint;
typedef long long wide_t;

__device__ __forceinline__ int qc_clip(int x, int low, int high)
{
    const int raised = (x < low) ? low : x;
    return (raised > high) ? high : raised;
}

// clip(((acc * multiplier + 2^(shift-1)) >> shift) + zero_point, low, high), ties up.
__device__ __forceinline__ int qc_requantize(int acc, int multiplier, int shift, int zero_point, int low, int high)
{
    const wide_t product = (wide_t)acc * multiplier;
    const wide_t rounded = (product + ((wide_t)1 << (shift - 1))) >> shift;
    const wide_t code = rounded + zero_point;
    return (int)((code < low) ? low : ((code > high) ? high : code));
}

// The same with shift = places + 33: only the product's high word counts. twice = 2 * zero_point + 1.
__device__ __forceinline__ int qc_requantize_high(int acc, int multiplier, int places, int twice, int low, int high)
{
    return qc_clip(((__mulhi(acc, multiplier) >> places) + twice) >> 1, low, high);
}

// saturate(round_half_even(x / scale) + zero_point): the quotient is rounded to float32, as ONNX's QuantizeLinear has it.
__device__ __forceinline__ int qc_quantize(float x, float scale, int zero_point)
{
    const float rounded = rintf(__fdiv_rn(x, scale));
    return qc_clip((int)fminf(fmaxf(rounded, -512.0f), 512.0f) + zero_point, -128, 127);
}

__device__ __forceinline__ float qc_dequantize(int code, float scale, int zero_point)
{
    return __fmul_rn((float)(code - zero_point), scale);
}
