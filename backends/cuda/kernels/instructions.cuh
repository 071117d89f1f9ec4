// What PTX has and CUDA C++ without its headers does not. The emulation of tests replaces this file.

__device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// Blocks of 256 threads that a multiprocessor is to have room for, in registers: before sm_80 copies take too many of them.
#if __CUDA_ARCH__ >= 800
#define RESIDENT 2
#else
#define RESIDENT 1
#endif

// Memory of a block that the launch gives it, since it is more than 48 KB.
template <int BYTES>
__device__ __forceinline__ int8_t *launched_memory(void)
{
    extern __shared__ __align__(16) int8_t launched[];
    return launched;
}

// Tiles in shared memory, all but one on their way; before sm_80, which has 64 KB, two of the largest ones.
#if __CUDA_ARCH__ >= 800
#define STAGES_OF(bytes) 3
#else
#define STAGES_OF(bytes) ((bytes) * 3 > 65536 ? 2 : 3)
#endif

// Copies 4, 8 or 16 bytes to shared memory behind the thread's back; before sm_80 at once.
template <int BYTES>
__device__ __forceinline__ void copy_async(void *target, const void *source)
{
#if __CUDA_ARCH__ >= 800
    if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)), "l"(source));
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(target)), "l"(source), "n"(BYTES));
    }
#else
    if (BYTES == 16) {
        *(int4 *)target = *(const int4 *)source;
    } else if (BYTES == 8) {
        *(int2 *)target = *(const int2 *)source;
    } else {
        *(int *)target = *(const int *)source;
    }
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copies_end(void)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}

// Waits until at most the last `LATEST` groups are still on their way.
template <int LATEST>
__device__ __forceinline__ void copies_wait(void)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
#endif
}

// Four matrices of 8 rows of 16 bytes: lane l gives the address of row l, and takes bytes 4 (l % 4) on of row l / 4 of
// each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sums[16][8] += a[16][32] * b[8][32], signed codes, by the tensor cores; fragments as PTX has m16n8k32.
__device__ __forceinline__ void multiply_tile(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int part = 0; part < 4; part++) { // eight rows and sixteen codes each
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(sums[2 * (part % 2)]), "+r"(sums[2 * (part % 2) + 1])
            : "r"(a[part]), "r"(b[part / 2]));
    }
#endif
}

// sums[16][8] += a[16][16] * b[8][16], halves of 16 bits, summed in float32; fragments as PTX has m16n8k16.
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int part = 0; part < 2; part++) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[2 * part]), "r"(a[2 * part + 1]), "r"(b[part]));
    }
#endif
}

// Differences and products of pairs of halves.
__device__ __forceinline__ uint32_t minus_halves(uint32_t a, uint32_t b)
{
    uint32_t pair;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

__device__ __forceinline__ uint32_t times_halves(uint32_t a, uint32_t b)
{
    uint32_t pair;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

// Two halves of 16 bits as floats.
__device__ __forceinline__ float2 from_halves(uint32_t pair)
{
    float2 both;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(both.x), "=f"(both.y)
        : "r"(pair));
    return both;
}

__device__ __forceinline__ uint16_t to_half(float x)
{
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
