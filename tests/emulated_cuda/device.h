// CUDA C++ on a CPU: a block's threads are coroutines, one block runs after another. What a device does at once is done
// one by one here, and what it does late (copies to shared memory) as late as it may, so that a missing barrier shows.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Place { unsigned x, y, z; };
static Place threadIdx, blockIdx;

enum { MOST_THREADS = 1024, STACK = 96 << 10, COPIES = 64, LATE = 8 };
enum Waiting { NOBODY, FOR_WARP, FOR_BLOCK };

struct Copy { void *target; const void *source; int bytes; };
struct Thread {
    ucontext_t context;
    bool done;
    Waiting waiting;
    int collectives;
    Copy copies[LATE][COPIES]; // of groups that are on their way, the oldest first; the last one is not ended yet
    int counts[LATE], groups;
};

static Thread threads[MOST_THREADS];
static char *stacks;
static ucontext_t scheduler;
static int running;
static uint32_t exchanged[2][MOST_THREADS][8];
static void (*body)(void **);
static void **body_arguments;
extern "C" int backwards; // whether threads take turns in falling order
int backwards = 0;

static void fail(const char *what)
{
    fprintf(stderr, "emulated device: %s\n", what);
    abort();
}

static void wait(Waiting waiting)
{
    threads[running].waiting = waiting;
    swapcontext(&threads[running].context, &scheduler);
}

static void arrive(int late)
{
    Thread &thread = threads[running];
    while (thread.groups > late) {
        for (int at = 0; at < thread.counts[0]; at++) {
            memcpy(thread.copies[0][at].target, thread.copies[0][at].source, (size_t)thread.copies[0][at].bytes);
        }
        memmove(thread.copies, thread.copies + 1, sizeof thread.copies - sizeof thread.copies[0]);
        memmove(thread.counts, thread.counts + 1, sizeof thread.counts - sizeof thread.counts[0]);
        thread.counts[LATE - 1] = 0;
        thread.groups--;
    }
}

static void run_thread(void)
{
    body(body_arguments);
    if (threads[running].groups || threads[running].counts[0]) {
        fail("a thread leaves with copies on their way");
    }
    threads[running].done = true;
    swapcontext(&threads[running].context, &scheduler);
}

static bool released(int first, int last, Waiting waiting)
{
    bool any = false;
    for (int at = first; at < last; at++) {
        if (!threads[at].done && threads[at].waiting != waiting) {
            return false;
        }
        any = any || !threads[at].done;
    }
    for (int at = first; any && at < last; at++) {
        threads[at].waiting = NOBODY;
    }
    return any;
}

static void run_block(int count)
{
    for (int at = 0; at < count; at++) {
        Thread &thread = threads[at];
        memset(thread.counts, 0, sizeof thread.counts);
        thread.done = false, thread.waiting = NOBODY, thread.collectives = thread.groups = 0;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = stacks + (size_t)at * STACK;
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
    }
    // Each warp goes as far as it can before another one begins: what lacks a barrier reads what is not there yet.
    for (bool left = true; left;) {
        left = false;
        for (int turn = 0; turn < count; turn += 32) {
            const int warp = backwards ? count - 32 - turn : turn;
            do {
                for (int lane = 0; lane < 32; lane++) {
                    const int at = warp + (backwards ? 31 - lane : lane);
                    if (!threads[at].done && threads[at].waiting == NOBODY) {
                        running = at, threadIdx = Place{(unsigned)at, 0, 0};
                        swapcontext(&scheduler, &threads[at].context);
                    }
                }
            } while (released(warp, warp + 32, FOR_WARP));
            for (int at = warp; at < warp + 32; at++) {
                left = left || !threads[at].done;
            }
        }
        if (left && !released(0, count, FOR_BLOCK)) {
            fail("threads wait for one another for ever");
        }
    }
}

static void run_grid(void (*kernel)(void **), void **arguments, unsigned x, unsigned y, unsigned z, unsigned count)
{
    if (count > MOST_THREADS || count % 32) {
        fail("a block of so many threads");
    }
    stacks = stacks ? stacks : (char *)malloc((size_t)MOST_THREADS * STACK);
    body = kernel, body_arguments = arguments;
    for (blockIdx.z = 0; blockIdx.z < z; blockIdx.z++) {
        for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++) {
            for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++) {
                run_block((int)count);
            }
        }
    }
}

static void __syncthreads(void) { wait(FOR_BLOCK); }

// Gives a warp's threads what each of them brings; the two rooms take turns, so that nobody overwrites what is read.
static uint32_t (*exchange(const uint32_t *words, int count))[8]
{
    const int room = threads[running].collectives++ & 1;
    memcpy(exchanged[room][running], words, (size_t)count * 4);
    wait(FOR_WARP);
    return exchanged[room] + (running & ~31);
}

static int __shfl_xor_sync(unsigned, int value, int distance)
{
    const uint32_t word = (uint32_t)value;
    return (int)exchange(&word, 1)[(running & 31) ^ distance][0];
}

static float __shfl_xor_sync(unsigned mask, float value, int distance)
{
    int bits;
    memcpy(&bits, &value, 4);
    bits = __shfl_xor_sync(mask, bits, distance);
    memcpy(&value, &bits, 4);
    return value;
}

static int8_t byte_of(uint32_t word, int at) { return (int8_t)(word >> (8 * at)); }

static int __dp4a(int a, int b, int sum)
{
    for (int at = 0; at < 4; at++) {
        sum += byte_of((uint32_t)a, at) * byte_of((uint32_t)b, at);
    }
    return sum;
}

static uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector)
{
    const uint64_t both = (uint64_t)high << 32 | low;
    uint32_t made = 0;
    for (int at = 0; at < 4; at++) {
        made |= (uint32_t)(both >> (8 * (selector >> (4 * at) & 7)) & 255) << (8 * at);
    }
    return made;
}

template <class T> static T max(T a, T b) { return a > b ? a : b; }
template <class T> static T min(T a, T b) { return a < b ? a : b; }
static int __mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }
static float __uint_as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static uint32_t __float_as_uint(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmul_rn(float a, float b) { return a * b; }

// What follows stands for instructions.cuh.
#define STAGES_OF(bytes) 3
static size_t launched_bytes; // that the launch gave to a block
template <int BYTES> static int8_t *launched_memory(void)
{
    static int8_t memory[BYTES] __attribute__((aligned(16)));
    if (launched_bytes < BYTES) {
        fail("a launch with too little shared memory");
    }
    return memory;
}

template <int BYTES> static void copy_async(void *target, const void *source)
{
    Thread &thread = threads[running];
    if ((uintptr_t)target % BYTES || (uintptr_t)source % BYTES || thread.counts[thread.groups] == COPIES) {
        fail("a copy that is not aligned, or one too many");
    }
    thread.copies[thread.groups][thread.counts[thread.groups]++] = Copy{target, source, BYTES};
}

static void copies_end(void)
{
    if (++threads[running].groups == LATE) {
        fail("too many groups of copies");
    }
}

template <int LATEST> static void copies_wait(void) { arrive(LATEST); }

static void load_matrices(uint32_t (&words)[4], const void *row)
{
    uint32_t halves[2];
    memcpy(halves, &row, 8);
    uint32_t(*rows)[8] = exchange(halves, 2);
    for (int at = 0; at < 4; at++) {
        const char *from;
        memcpy(&from, rows[at * 8 + (running & 31) / 4], 8);
        memcpy(&words[at], from + (running & 3) * 4, 4);
    }
}

static void multiply_tile(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    uint32_t(*all)[8] = exchange(mine, 6);
    const int lane = running & 31;
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 32; k++) {
            const uint32_t left = all[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2];
            const uint32_t right = all[column * 4 + k % 16 / 4][4 + k / 16];
            sums[e] += byte_of(left, k % 4) * byte_of(right, k % 4);
        }
    }
}

static float from_half(uint16_t half)
{
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent ? ldexpf((float)(1024 + fraction), exponent - 25) : ldexpf((float)fraction, -24);
    return half & 0x8000 ? -size : size;
}

static float2 from_halves(uint32_t pair)
{
    return float2{from_half((uint16_t)pair), from_half((uint16_t)(pair >> 16))};
}

static uint16_t to_half(float x)
{
    _Float16 half = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

// Exact in float32 before they are rounded.
static uint32_t minus_halves(uint32_t a, uint32_t b)
{
    const float2 left = from_halves(a), right = from_halves(b);
    return to_half(left.x - right.x) | (uint32_t)to_half(left.y - right.y) << 16;
}

static uint32_t times_halves(uint32_t a, uint32_t b)
{
    const float2 left = from_halves(a), right = from_halves(b);
    return to_half(left.x * right.x) | (uint32_t)to_half(left.y * right.y) << 16;
}

static void multiply_tile(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    uint32_t(*all)[8] = exchange(mine, 6);
    const int lane = running & 31;
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            const uint32_t left = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const uint32_t right = all[column * 4 + k % 8 / 2][4 + k / 8];
            sums[e] += from_half((uint16_t)(left >> (16 * (k % 2)))) * from_half((uint16_t)(right >> (16 * (k % 2))));
        }
    }
}
