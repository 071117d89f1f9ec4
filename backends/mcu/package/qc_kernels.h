/* What the generated kernels call in their inner loops. The same results on every processor, bit by bit:
   SMLAD where the DSP extension is, Helium (MVE) where that is, plain C elsewhere. */
#ifndef QC_KERNELS_H
#define QC_KERNELS_H
#include <stdint.h>
#include <string.h>

#if defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 1)
#define QC_MVE 1
#include <arm_mve.h>
#elif defined(__ARM_FEATURE_DSP) && __ARM_FEATURE_DSP && defined(__GNUC__)
#define QC_DSP 1
#include <arm_acle.h>
#if defined(__OPTIMIZE__) && !defined(__clang__)
#define QC_ASM 1 /* the tiles' loops in assembly: Clang, and GCC without optimization, lack the registers for them */
#endif
#endif

/* A layer stays a function, so that a profile shows it, and its pointers stay parameters: where GCC 12 (-O2) knows that
   both lead into one array, it may take a layer for a function without effects and leave out its call. */
#if defined(__clang__)
#define QC_INLINE static inline __attribute__((always_inline, unused))
#define QC_LAYER __attribute__((noinline))
#elif defined(__GNUC__)
#define QC_INLINE static inline __attribute__((always_inline, unused))
#define QC_LAYER __attribute__((noipa))
#else
#define QC_INLINE static inline
#define QC_LAYER
#endif

QC_INLINE uint32_t qc_word(const int8_t *from)
{
    uint32_t word;
    (void)memcpy(&word, from, 4u); /* codes stand at any address */
    return word;
}

QC_INLINE void qc_copy(int8_t *to, const int8_t *from, int32_t count)
{
    int32_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const uint32_t word = qc_word(&from[i]);
        (void)memcpy(&to[i], &word, 4u);
    }
    for (; i < count; ++i) {
        to[i] = from[i];
    }
}

/* Codes of four bits stand two a byte, the first in the low half: qc_half reads one, qc_pack writes one, qc_unpack
   reads several that follow one another. */
QC_INLINE int32_t qc_half(const int8_t *from, int32_t index)
{
    const int32_t both = from[index >> 1];
    return ((index & 1) != 0) ? (both >> 4) : (((both & 15) ^ 8) - 8);
}

QC_INLINE void qc_pack(int8_t *to, int32_t index, int32_t code)
{
    const uint32_t both = (uint8_t)to[index >> 1], half = (uint32_t)code & 15u;
    const uint32_t made = ((index & 1) != 0) ? ((both & 15u) | (half << 4)) : ((both & 0xF0u) | half);
    to[index >> 1] = (int8_t)(uint8_t)made;
}

QC_INLINE void qc_unpack(int8_t *to, const int8_t *from, int32_t index, int32_t count)
{
    int32_t i = 0;
    if (((index & 1) != 0) && (count > 0)) {
        to[0] = (int8_t)qc_half(from, index);
        i = 1;
    }
    for (; i + 4 <= count; i += 4) {
        const int8_t *const pair = &from[(index + i) >> 1];
        uint32_t word = (uint32_t)(uint8_t)pair[0] | ((uint32_t)(uint8_t)pair[1] << 8);
        word = (word | (word << 8)) & 0x00FF00FFu;
        word = (word | (word << 4)) & 0x0F0F0F0Fu;
        /* Per byte (x ^ 8) - 8, with a high bit set so that no byte borrows from the next. */
        word = (((word ^ 0x08080808u) | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
        (void)memcpy(&to[i], &word, 4u);
    }
    for (; i < count; ++i) {
        to[i] = (int8_t)qc_half(from, index + i);
    }
}

QC_INLINE void qc_fill(int8_t *to, int32_t code, int32_t count)
{
    (void)memset(to, code, (uint32_t)count);
}

QC_INLINE int32_t qc_clip(int32_t x, int32_t low, int32_t high)
{
#if defined(QC_DSP)
    if (__builtin_constant_p(low) && __builtin_constant_p(high) && (low == -128) && (high == 127)) {
        return __ssat(x, 8);
    }
    if (__builtin_constant_p(low) && __builtin_constant_p(high) && (low == -8) && (high == 7)) {
        return __ssat(x, 4);
    }
#endif
    const int32_t raised = (x < low) ? low : x;
    return (raised > high) ? high : raised;
}

/* clip(((acc * multiplier + 2^(shift-1)) >> shift) + zero_point, low, high), ties up. */
QC_INLINE int32_t qc_requantize(int32_t acc, int32_t multiplier, int32_t shift, int32_t zero_point, int32_t low,
                                int32_t high)
{
    const int64_t product = (int64_t)acc * multiplier;
    const int64_t rounded = (product + ((int64_t)1 << (shift - 1))) >> shift;
    const int64_t code = rounded + zero_point;
    return (int32_t)((code < low) ? low : ((code > high) ? high : code));
}

/* The same with shift = places + 33: only the product's high word counts. twice = 2 * zero_point + 1. */
QC_INLINE int32_t qc_requantize_high(int32_t acc, int32_t multiplier, int32_t places, int32_t twice, int32_t low,
                                     int32_t high)
{
    const int32_t upper = (int32_t)(((int64_t)acc * multiplier) >> 32);
    return qc_clip(((upper >> places) + twice) >> 1, low, high);
}

/* acc[p][q] += sum over k of a[p][k] * w[q][k]; rows of a and w stand step_a and step_w codes apart. */
#if defined(QC_DSP)
QC_INLINE int32_t qc_even(uint32_t word)
{
    return (int32_t)__sxtb16(word);
}

QC_INLINE int32_t qc_odd(uint32_t word)
{
    int32_t pair;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(pair) : "r"(word));
    return pair;
}

/* The loops of these two are in assembly: a compiler that keeps the loops around them in registers spills the tile's.
   They are macros, since steps must be literals: below 4096, as an address has room for. */
#if defined(QC_ASM)
#define QC_STEP_2X2                                                                                                    \
    "ldr %[x1], [%[a], %[sa]]\n\tldr %[x0], [%[a]], #4\n\t"                                                            \
    "sxtb16 %[e0], %[x0]\n\tsxtb16 %[x0], %[x0], ror #8\n\t"                                                           \
    "sxtb16 %[e1], %[x1]\n\tsxtb16 %[x1], %[x1], ror #8\n\t"                                                           \
    "ldr %[y], [%[w], %[sw]]\n\tsxtb16 %[t], %[y]\n\tsxtb16 %[y], %[y], ror #8\n\t"                                    \
    "smlad %[c1], %[e0], %[t], %[c1]\n\tsmlad %[c3], %[e1], %[t], %[c3]\n\t"                                           \
    "smlad %[c1], %[x0], %[y], %[c1]\n\tsmlad %[c3], %[x1], %[y], %[c3]\n\t"                                           \
    "ldr %[y], [%[w]], #4\n\tsxtb16 %[t], %[y]\n\tsxtb16 %[y], %[y], ror #8\n\t"                                       \
    "smlad %[c0], %[e0], %[t], %[c0]\n\tsmlad %[c2], %[e1], %[t], %[c2]\n\t"                                           \
    "smlad %[c0], %[x0], %[y], %[c0]\n\tsmlad %[c2], %[x1], %[y], %[c2]\n\t"

#define qc_tile_2x2(a_, step_a, w_, step_w, acc_, k)                                                                   \
    do {                                                                                                               \
        const int8_t *qa = (a_), *qw = (w_);                                                                           \
        const int8_t *const qend = qa + ((k) & ~3);                                                                    \
        if ((k) >= 4) {                                                                                                \
            uint32_t x0, x1, e0, e1, y, t;                                                                             \
            __asm__("1:\n\t" QC_STEP_2X2 "cmp %[a], %[end]\n\tbne 1b"                                                  \
                    : [a] "+r"(qa), [w] "+r"(qw), [c0] "+r"((acc_)[0]), [c1] "+r"((acc_)[1]), [c2] "+r"((acc_)[2]),    \
                      [c3] "+r"((acc_)[3]), [x0] "=&r"(x0), [x1] "=&r"(x1), [e0] "=&r"(e0), [e1] "=&r"(e1),            \
                      [y] "=&r"(y), [t] "=&r"(t)                                                                       \
                    : [end] "r"(qend), [sa] "n"(step_a), [sw] "n"(step_w)                                              \
                    : "cc", "memory");                                                                                 \
        }                                                                                                              \
        for (int32_t i = 0; i < ((k) & 3); ++i) {                                                                      \
            (acc_)[0] += qa[i] * qw[i];                                                                                \
            (acc_)[1] += qa[i] * qw[i + (step_w)];                                                                     \
            (acc_)[2] += qa[i + (step_a)] * qw[i];                                                                     \
            (acc_)[3] += qa[i + (step_a)] * qw[i + (step_w)];                                                          \
        }                                                                                                              \
    } while (0)

#define QC_ROW_1X4(load, c)                                                                                            \
    load "\n\tsxtb16 %[t], %[y]\n\tsxtb16 %[y], %[y], ror #8\n\t"                                                      \
         "smlad %[" c "], %[e], %[t], %[" c "]\n\tsmlad %[" c "], %[x], %[y], %[" c "]\n\t"

#define qc_tile_1x4(a_, step_a, w_, step_w, acc_, k)                                                                   \
    do {                                                                                                               \
        const int8_t *qa = (a_), *qw = (w_);                                                                           \
        const int8_t *const qend = qa + ((k) & ~3);                                                                    \
        if ((k) >= 4) {                                                                                                \
            uint32_t x, e, y, t;                                                                                       \
            __asm__("1:\n\tldr %[x], [%[a]], #4\n\tsxtb16 %[e], %[x]\n\tsxtb16 %[x], %[x], ror #8\n\t"                 \
                    QC_ROW_1X4("ldr %[y], [%[w], %[s1]]", "c1") QC_ROW_1X4("ldr %[y], [%[w], %[s2]]", "c2")            \
                    QC_ROW_1X4("ldr %[y], [%[w], %[s3]]", "c3") QC_ROW_1X4("ldr %[y], [%[w]], #4", "c0")               \
                    "cmp %[a], %[end]\n\tbne 1b"                                                                       \
                    : [a] "+r"(qa), [w] "+r"(qw), [c0] "+r"((acc_)[0]), [c1] "+r"((acc_)[1]), [c2] "+r"((acc_)[2]),    \
                      [c3] "+r"((acc_)[3]), [x] "=&r"(x), [e] "=&r"(e), [y] "=&r"(y), [t] "=&r"(t)                     \
                    : [end] "r"(qend), [s1] "n"(step_w), [s2] "n"(2 * (step_w)), [s3] "n"(3 * (step_w))                \
                    : "cc", "memory");                                                                                 \
        }                                                                                                              \
        for (int32_t i = 0; i < ((k) & 3); ++i) {                                                                      \
            (acc_)[0] += qa[i] * qw[i];                                                                                \
            (acc_)[1] += qa[i] * qw[i + (step_w)];                                                                     \
            (acc_)[2] += qa[i] * qw[i + 2 * (step_w)];                                                                 \
            (acc_)[3] += qa[i] * qw[i + 3 * (step_w)];                                                                 \
        }                                                                                                              \
    } while (0)

#endif

QC_INLINE void qc_tile_1x2(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc, int32_t k)
{
    int32_t c0 = acc[0], c1 = acc[1];
    const int8_t *const end = a + (k & ~3);
    (void)step_a;
    while (a != end) {
        const uint32_t a0 = qc_word(a), w1 = qc_word(w + step_w), w0 = qc_word(w);
        const int32_t even = qc_even(a0), odd = qc_odd(a0);
        c0 = __smlad(odd, qc_odd(w0), __smlad(even, qc_even(w0), c0));
        c1 = __smlad(odd, qc_odd(w1), __smlad(even, qc_even(w1), c1));
        a += 4;
        w += 4;
    }
    for (int32_t i = 0; i < (k & 3); ++i) {
        c0 += a[i] * w[i];
        c1 += a[i] * w[i + step_w];
    }
    acc[0] = c0;
    acc[1] = c1;
}

#if !defined(QC_ASM)
QC_INLINE void qc_tile_1x4(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc, int32_t k)
{
    qc_tile_1x2(a, step_a, w, step_w, &acc[0], k);
    qc_tile_1x2(a, step_a, w + 2 * step_w, step_w, &acc[2], k);
}

QC_INLINE void qc_tile_2x2(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc, int32_t k)
{
    qc_tile_1x2(a, step_a, w, step_w, &acc[0], k);
    qc_tile_1x2(a + step_a, step_a, w, step_w, &acc[2], k);
}
#endif

QC_INLINE void qc_tile_1x1(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc, int32_t k)
{
    int32_t c = acc[0];
    (void)step_a;
    (void)step_w;
    for (int32_t i = 0; i < (k & ~3); i += 4) {
        const uint32_t a0 = qc_word(&a[i]), w0 = qc_word(&w[i]);
        c = __smlad(qc_odd(a0), qc_odd(w0), __smlad(qc_even(a0), qc_even(w0), c));
    }
    for (int32_t i = k & ~3; i < k; ++i) {
        c += a[i] * w[i];
    }
    acc[0] = c;
}

/* acc[c] += sum over t of a[t][c] * w[t][c] for four channels. */
QC_INLINE void qc_depthwise_4(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc,
                              int32_t taps)
{
    int32_t c0 = acc[0], c1 = acc[1], c2 = acc[2], c3 = acc[3];
#pragma GCC unroll 3
    for (int32_t t = 0; t < taps; ++t) {
        const uint32_t a0 = qc_word(a), w0 = qc_word(w);
        const int32_t ae = qc_even(a0), ao = qc_odd(a0), we = qc_even(w0), wo = qc_odd(w0);
        c0 = __smlabb(ae, we, c0);
        c2 = __smlatt(ae, we, c2);
        c1 = __smlabb(ao, wo, c1);
        c3 = __smlatt(ao, wo, c3);
        a += step_a;
        w += step_w;
    }
    acc[0] = c0;
    acc[1] = c1;
    acc[2] = c2;
    acc[3] = c3;
}
#else
/* One row of a tile: codes at a, four rows of weights at most. */
QC_INLINE int32_t qc_dot(const int8_t *a, const int8_t *w, int32_t acc, int32_t k)
{
#if defined(QC_MVE)
    for (int32_t left = k; left > 0; left -= 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)left);
        acc = vmladavaq_p_s8(acc, vldrbq_z_s8(a, lanes), vldrbq_z_s8(w, lanes), lanes);
        a += 16;
        w += 16;
    }
#else
    for (int32_t i = 0; i < k; ++i) {
        acc += (int32_t)a[i] * w[i];
    }
#endif
    return acc;
}

QC_INLINE void qc_tile_1x1(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc, int32_t k)
{
    (void)step_a;
    (void)step_w;
    acc[0] = qc_dot(a, w, acc[0], k);
}

QC_INLINE void qc_tile_1x2(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc, int32_t k)
{
    (void)step_a;
#if defined(QC_MVE)
    int32_t c0 = acc[0], c1 = acc[1];
    for (int32_t left = k; left > 0; left -= 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)left);
        const int8x16_t codes = vldrbq_z_s8(a, lanes);
        c0 = vmladavaq_p_s8(c0, codes, vldrbq_z_s8(w, lanes), lanes);
        c1 = vmladavaq_p_s8(c1, codes, vldrbq_z_s8(w + step_w, lanes), lanes);
        a += 16;
        w += 16;
    }
    acc[0] = c0;
    acc[1] = c1;
#else
    acc[0] = qc_dot(a, w, acc[0], k);
    acc[1] = qc_dot(a, w + step_w, acc[1], k);
#endif
}

QC_INLINE void qc_tile_1x4(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc, int32_t k)
{
    (void)step_a;
#if defined(QC_MVE)
    int32_t c0 = acc[0], c1 = acc[1], c2 = acc[2], c3 = acc[3];
    for (int32_t left = k; left > 0; left -= 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)left);
        const int8x16_t codes = vldrbq_z_s8(a, lanes);
        c0 = vmladavaq_p_s8(c0, codes, vldrbq_z_s8(w, lanes), lanes);
        c1 = vmladavaq_p_s8(c1, codes, vldrbq_z_s8(w + step_w, lanes), lanes);
        c2 = vmladavaq_p_s8(c2, codes, vldrbq_z_s8(w + 2 * step_w, lanes), lanes);
        c3 = vmladavaq_p_s8(c3, codes, vldrbq_z_s8(w + 3 * step_w, lanes), lanes);
        a += 16;
        w += 16;
    }
    acc[0] = c0;
    acc[1] = c1;
    acc[2] = c2;
    acc[3] = c3;
#else
    for (int32_t q = 0; q < 4; ++q) {
        acc[q] = qc_dot(a, w + q * step_w, acc[q], k);
    }
#endif
}

QC_INLINE void qc_tile_2x2(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc, int32_t k)
{
#if defined(QC_MVE)
    int32_t c00 = acc[0], c01 = acc[1], c10 = acc[2], c11 = acc[3];
    for (int32_t left = k; left > 0; left -= 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)left);
        const int8x16_t a0 = vldrbq_z_s8(a, lanes), a1 = vldrbq_z_s8(a + step_a, lanes);
        const int8x16_t w0 = vldrbq_z_s8(w, lanes), w1 = vldrbq_z_s8(w + step_w, lanes);
        c00 = vmladavaq_p_s8(c00, a0, w0, lanes);
        c01 = vmladavaq_p_s8(c01, a0, w1, lanes);
        c10 = vmladavaq_p_s8(c10, a1, w0, lanes);
        c11 = vmladavaq_p_s8(c11, a1, w1, lanes);
        a += 16;
        w += 16;
    }
    acc[0] = c00;
    acc[1] = c01;
    acc[2] = c10;
    acc[3] = c11;
#else
    acc[0] = qc_dot(a, w, acc[0], k);
    acc[1] = qc_dot(a, w + step_w, acc[1], k);
    acc[2] = qc_dot(a + step_a, w, acc[2], k);
    acc[3] = qc_dot(a + step_a, w + step_w, acc[3], k);
#endif
}

QC_INLINE void qc_depthwise_4(const int8_t *a, int32_t step_a, const int8_t *w, int32_t step_w, int32_t *acc,
                              int32_t taps)
{
#if defined(QC_MVE)
    int32x4_t sums = vldrwq_s32(acc);
    for (int32_t t = 0; t < taps; ++t) {
        sums = vaddq_s32(sums, vmulq_s32(vldrbq_s32(a), vldrbq_s32(w)));
        a += step_a;
        w += step_w;
    }
    vstrwq_s32(acc, sums);
#else
    for (int32_t t = 0; t < taps; ++t) {
        for (int32_t c = 0; c < 4; ++c) {
            acc[c] += (int32_t)a[c] * w[c];
        }
        a += step_a;
        w += step_w;
    }
#endif
}
#endif
#endif
