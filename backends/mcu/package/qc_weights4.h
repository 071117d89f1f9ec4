/* Tiles whose weights are packed in four bits. The row of k codes that begins `at` bytes behind w has `half` bytes,
   4 * ceil(k / 8): byte j holds code j in its low four bits and code half + j in its high ones, zero past the end. */
#ifndef QC_WEIGHTS4_H
#define QC_WEIGHTS4_H
#include "qc_kernels.h"

QC_INLINE int32_t qc_low(int8_t pair)
{
    return ((pair & 15) ^ 8) - 8;
}

QC_INLINE int32_t qc_high(int8_t pair)
{
    return pair >> 4;
}

/* Codes from the byte `from` on, one by one. */
QC_INLINE int32_t qc_dot4(const int8_t *a, const int8_t *w, int32_t half, int32_t from, int32_t acc, int32_t k)
{
    int32_t j = from;
    for (; j < k - half; ++j) {
        acc += a[j] * qc_low(w[j]) + a[half + j] * qc_high(w[j]);
    }
    for (; j < ((k < half) ? k : half); ++j) {
        acc += a[j] * qc_low(w[j]);
    }
    return acc;
}

#if defined(QC_DSP)
/* Bytes whose two codes both stand for activations, in words. */
#define QC_PAIRED(k, half) (((k) > (half)) ? (((k) - (half)) & ~3) : 0)
/* A code that stays in the highest four bits of sixteen is 4096 times itself, which takes one AND in place of a sign
   extension. The sums are that much larger: of no more than 504 codes at a time they fit 32 bits whatever the codes. */
#define QC_CODES4 252
#define QC_MASK4 0xF000F000u

#if defined(QC_ASM)
#define QC_UNPACK2(first, second)                                                                                      \
    "ldr %[x1], " second "\n\tldr %[x0], " first "\n\t"                                                                \
    "sxtb16 %[e0], %[x0]\n\tsxtb16 %[x0], %[x0], ror #8\n\t"                                                           \
    "sxtb16 %[e1], %[x1]\n\tsxtb16 %[x1], %[x1], ror #8\n\t"
#define QC_ROW2(row, even, odd, c, d)                                                                                  \
    "ldr %[y], " row "\n\tand %[t], %[m], %[y], lsl #" even "\n\t"                                                     \
    "smlad %[" c "], %[e0], %[t], %[" c "]\n\tsmlad %[" d "], %[e1], %[t], %[" d "]\n\t"                               \
    "and %[y], %[m], %[y], lsl #" odd "\n\t"                                                                           \
    "smlad %[" c "], %[x0], %[y], %[" c "]\n\tsmlad %[" d "], %[x1], %[y], %[" d "]\n\t"
#define QC_STEP4_2X2                                                                                                   \
    QC_UNPACK2("[%[a], %[h]]", "[%[a], %[sh]]")                                                                        \
    QC_ROW2("[%[w], %[h]]", "8", "0", "c1", "c3") QC_ROW2("[%[w]]", "8", "0", "c0", "c2")                              \
    QC_UNPACK2("[%[a]], #4", "[%[a], %[sa]]")                                                                          \
    QC_ROW2("[%[w], %[h]]", "12", "4", "c1", "c3") QC_ROW2("[%[w]], #4", "12", "4", "c0", "c2")

#define qc_tile4_2x2(a_, step_a, w_, at, half, acc_, k)                                                                \
    do {                                                                                                               \
        const int8_t *qa = (a_), *qw = &(w_)[at];                                                                      \
        for (int32_t left = QC_PAIRED(k, half); left > 0; left -= QC_CODES4) {                                         \
            const int8_t *const qend = qa + ((left < QC_CODES4) ? left : QC_CODES4);                                   \
            int32_t c0 = 0, c1 = 0, c2 = 0, c3 = 0;                                                                    \
            uint32_t x0, x1, e0, e1, y, t;                                                                             \
            __asm__("1:\n\t" QC_STEP4_2X2 "ldr %[y], %[end]\n\tcmp %[a], %[y]\n\tbne 1b"                               \
                    : [a] "+r"(qa), [w] "+r"(qw), [c0] "+r"(c0), [c1] "+r"(c1), [c2] "+r"(c2), [c3] "+r"(c3),          \
                      [x0] "=&r"(x0), [x1] "=&r"(x1), [e0] "=&r"(e0), [e1] "=&r"(e1), [y] "=&r"(y), [t] "=&r"(t)       \
                    : [end] "m"(qend), [m] "r"(QC_MASK4), [sa] "n"(step_a), [h] "n"(half), [sh] "n"((step_a) + (half)) \
                    : "cc", "memory");                                                                                 \
            (acc_)[0] += c0 >> 12;                                                                                     \
            (acc_)[1] += c1 >> 12;                                                                                     \
            (acc_)[2] += c2 >> 12;                                                                                     \
            (acc_)[3] += c3 >> 12;                                                                                     \
        }                                                                                                              \
        if (QC_PAIRED(k, half) != (half)) {                                                                            \
            const int8_t *const ra = (a_), *const rw = &(w_)[at];                                                      \
            const int32_t from = QC_PAIRED(k, half);                                                                   \
            (acc_)[0] = qc_dot4(ra, rw, half, from, (acc_)[0], k);                                                     \
            (acc_)[1] = qc_dot4(ra, rw + (half), half, from, (acc_)[1], k);                                            \
            (acc_)[2] = qc_dot4(ra + (step_a), rw, half, from, (acc_)[2], k);                                          \
            (acc_)[3] = qc_dot4(ra + (step_a), rw + (half), half, from, (acc_)[3], k);                                 \
        }                                                                                                              \
    } while (0)

#define QC_ROW1(row, c)                                                                                                \
    "ldr %[y], " row "\n\tand %[t], %[m], %[y], lsl #12\n\tsmlad %[" c "], %[e0], %[t], %[" c "]\n\t"                  \
    "and %[t], %[m], %[y], lsl #4\n\tsmlad %[" c "], %[x0], %[t], %[" c "]\n\t"                                        \
    "and %[t], %[m], %[y], lsl #8\n\tsmlad %[" c "], %[e1], %[t], %[" c "]\n\t"                                        \
    "and %[y], %[m], %[y]\n\tsmlad %[" c "], %[x1], %[y], %[" c "]\n\t"

#define qc_tile4_1x4(a_, step_a, w_, at, half, acc_, k)                                                                \
    do {                                                                                                               \
        const int8_t *qa = (a_), *qw = &(w_)[at];                                                                      \
        for (int32_t left = QC_PAIRED(k, half); left > 0; left -= QC_CODES4) {                                         \
            const int8_t *const qend = qa + ((left < QC_CODES4) ? left : QC_CODES4);                                   \
            int32_t c0 = 0, c1 = 0, c2 = 0, c3 = 0;                                                                    \
            uint32_t x0, x1, e0, e1, y, t;                                                                             \
            __asm__("1:\n\t" QC_UNPACK2("[%[a]], #4", "[%[a], %[h]]")                                                  \
                    QC_ROW1("[%[w], %[h]]", "c1") QC_ROW1("[%[w], %[h2]]", "c2") QC_ROW1("[%[w], %[h3]]", "c3")        \
                    QC_ROW1("[%[w]], #4", "c0") "ldr %[y], %[end]\n\tcmp %[a], %[y]\n\tbne 1b"                         \
                    : [a] "+r"(qa), [w] "+r"(qw), [c0] "+r"(c0), [c1] "+r"(c1), [c2] "+r"(c2), [c3] "+r"(c3),          \
                      [x0] "=&r"(x0), [x1] "=&r"(x1), [e0] "=&r"(e0), [e1] "=&r"(e1), [y] "=&r"(y), [t] "=&r"(t)       \
                    : [end] "m"(qend), [m] "r"(QC_MASK4), [h] "n"(half), [h2] "n"(2 * (half)), [h3] "n"(3 * (half))    \
                    : "cc", "memory");                                                                                 \
            (acc_)[0] += c0 >> 12;                                                                                     \
            (acc_)[1] += c1 >> 12;                                                                                     \
            (acc_)[2] += c2 >> 12;                                                                                     \
            (acc_)[3] += c3 >> 12;                                                                                     \
        }                                                                                                              \
        if (QC_PAIRED(k, half) != (half)) {                                                                            \
            for (int32_t q = 0; q < 4; ++q) {                                                                          \
                (acc_)[q] = qc_dot4((a_), &(w_)[(at) + q * (half)], half, QC_PAIRED(k, half), (acc_)[q], k);           \
            }                                                                                                          \
        }                                                                                                              \
    } while (0)

#endif

/* Words of two rows, unpacked: codes k, k + 2 and k + 1, k + 3 of the low half, then of the high one. */
QC_INLINE void qc_tile4_1x2(const int8_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t half, int32_t *acc,
                            int32_t k)
{
    const int32_t paired = QC_PAIRED(k, half);
    w += at;
    (void)step_a;
    for (int32_t first = 0; first < paired; first += QC_CODES4) {
        const int32_t last = (paired - first < QC_CODES4) ? paired : (first + QC_CODES4);
        int32_t c0 = 0, c1 = 0;
        for (int32_t j = first; j < last; j += 4) {
            const uint32_t low = qc_word(&a[j]), high = qc_word(&a[half + j]);
            const uint32_t w0 = qc_word(&w[j]), w1 = qc_word(&w[half + j]);
            const int32_t le = qc_even(low), lo = qc_odd(low), he = qc_even(high), ho = qc_odd(high);
            c0 = __smlad(le, (int32_t)((w0 << 12) & QC_MASK4), __smlad(lo, (int32_t)((w0 << 4) & QC_MASK4), c0));
            c0 = __smlad(he, (int32_t)((w0 << 8) & QC_MASK4), __smlad(ho, (int32_t)(w0 & QC_MASK4), c0));
            c1 = __smlad(le, (int32_t)((w1 << 12) & QC_MASK4), __smlad(lo, (int32_t)((w1 << 4) & QC_MASK4), c1));
            c1 = __smlad(he, (int32_t)((w1 << 8) & QC_MASK4), __smlad(ho, (int32_t)(w1 & QC_MASK4), c1));
        }
        acc[0] += c0 >> 12;
        acc[1] += c1 >> 12;
    }
    acc[0] = qc_dot4(a, w, half, paired, acc[0], k);
    acc[1] = qc_dot4(a, w + half, half, paired, acc[1], k);
}

#if !defined(QC_ASM)
QC_INLINE void qc_tile4_1x4(const int8_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t half, int32_t *acc,
                            int32_t k)
{
    qc_tile4_1x2(a, step_a, w, at, half, &acc[0], k);
    qc_tile4_1x2(a, step_a, w, at + 2 * half, half, &acc[2], k);
}

QC_INLINE void qc_tile4_2x2(const int8_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t half, int32_t *acc,
                            int32_t k)
{
    qc_tile4_1x2(a, step_a, w, at, half, &acc[0], k);
    qc_tile4_1x2(a + step_a, step_a, w, at, half, &acc[2], k);
}
#endif

/* acc[c] += sum over t of a[t][c] * w[t][c] for four channels; byte c of a pair of taps has both of channel c. */
QC_INLINE void qc_depthwise4_4(const int8_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t row, int32_t *acc,
                               int32_t taps)
{
    int32_t c0 = 0, c1 = 0, c2 = 0, c3 = 0;
    (void)row;
    w += at;
#pragma GCC unroll 2
    for (int32_t t = 0; t < taps / 2; ++t) {
        const uint32_t first = qc_word(a), second = qc_word(a + step_a), both = qc_word(w);
        const int32_t fe = qc_even(first), fo = qc_odd(first), se = qc_even(second), so = qc_odd(second);
        const int32_t we = (int32_t)((both << 12) & QC_MASK4), wo = (int32_t)((both << 4) & QC_MASK4);
        const int32_t ve = (int32_t)((both << 8) & QC_MASK4), vo = (int32_t)(both & QC_MASK4);
        c0 = __smlabb(se, ve, __smlabb(fe, we, c0));
        c1 = __smlabb(so, vo, __smlabb(fo, wo, c1));
        c2 = __smlatt(se, ve, __smlatt(fe, we, c2));
        c3 = __smlatt(so, vo, __smlatt(fo, wo, c3));
        a += 2 * step_a;
        w += 4;
    }
    if (taps % 2 != 0) {
        const uint32_t first = qc_word(a), both = qc_word(w);
        const int32_t we = (int32_t)((both << 12) & QC_MASK4), wo = (int32_t)((both << 4) & QC_MASK4);
        c0 = __smlabb(qc_even(first), we, c0);
        c1 = __smlabb(qc_odd(first), wo, c1);
        c2 = __smlatt(qc_even(first), we, c2);
        c3 = __smlatt(qc_odd(first), wo, c3);
    }
    acc[0] += c0 >> 12;
    acc[1] += c1 >> 12;
    acc[2] += c2 >> 12;
    acc[3] += c3 >> 12;
}
#else
#if defined(QC_MVE)
/* Both halves of up to 16 bytes of a row, 16 times themselves: sums are 16 times too large until the end. */
QC_INLINE int32_t qc_both4(int8x16_t low, int8x16_t high, int8x16_t pairs, int32_t acc)
{
    acc = vmladavaq_s8(acc, low, vshlq_n_s8(pairs, 4));
    return vmladavaq_s8(acc, high, vandq_s8(pairs, vdupq_n_s8(-16)));
}

/* Lanes of activations: none past the end. */
QC_INLINE mve_pred16_t qc_lanes(int32_t left)
{
    return vctp8q((left > 0) ? (uint32_t)left : 0u);
}
#endif

QC_INLINE void qc_rows4(const int8_t *a, const int8_t *w, int32_t half, int32_t *acc, int32_t rows, int32_t k)
{
#if defined(QC_MVE)
    int32_t c[4] = {0, 0, 0, 0};
    for (int32_t j = 0; j < half; j += 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)(half - j));
        const int8x16_t low = vldrbq_z_s8(&a[j], qc_lanes(((k < half) ? k : half) - j));
        const int8x16_t high = vldrbq_z_s8(&a[half + j], qc_lanes(k - half - j));
#pragma GCC unroll 4
        for (int32_t q = 0; q < rows; ++q) {
            c[q] = qc_both4(low, high, vldrbq_z_s8(&w[q * half + j], lanes), c[q]);
        }
    }
#pragma GCC unroll 4
    for (int32_t q = 0; q < rows; ++q) {
        acc[q] += c[q] >> 4;
    }
#else
    for (int32_t q = 0; q < rows; ++q) {
        acc[q] = qc_dot4(a, &w[q * half], half, 0, acc[q], k);
    }
#endif
}

QC_INLINE void qc_tile4_1x2(const int8_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t half, int32_t *acc,
                            int32_t k)
{
    (void)step_a;
    qc_rows4(a, &w[at], half, acc, 2, k);
}

QC_INLINE void qc_tile4_1x4(const int8_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t half, int32_t *acc,
                            int32_t k)
{
    (void)step_a;
    qc_rows4(a, &w[at], half, acc, 4, k);
}

QC_INLINE void qc_tile4_2x2(const int8_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t half, int32_t *acc,
                            int32_t k)
{
#if defined(QC_MVE)
    int32_t c00 = 0, c01 = 0, c10 = 0, c11 = 0;
    w += at;
    for (int32_t j = 0; j < half; j += 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)(half - j));
        const mve_pred16_t in_low = qc_lanes(((k < half) ? k : half) - j), in_high = qc_lanes(k - half - j);
        const int8x16_t w0 = vldrbq_z_s8(&w[j], lanes), w1 = vldrbq_z_s8(&w[half + j], lanes);
        const int8x16_t low0 = vldrbq_z_s8(&a[j], in_low), high0 = vldrbq_z_s8(&a[half + j], in_high);
        const int8x16_t low1 = vldrbq_z_s8(&a[step_a + j], in_low);
        const int8x16_t high1 = vldrbq_z_s8(&a[step_a + half + j], in_high);
        c00 = qc_both4(low0, high0, w0, c00);
        c01 = qc_both4(low0, high0, w1, c01);
        c10 = qc_both4(low1, high1, w0, c10);
        c11 = qc_both4(low1, high1, w1, c11);
    }
    acc[0] += c00 >> 4;
    acc[1] += c01 >> 4;
    acc[2] += c10 >> 4;
    acc[3] += c11 >> 4;
#else
    qc_rows4(a, &w[at], half, &acc[0], 2, k);
    qc_rows4(a + step_a, &w[at], half, &acc[2], 2, k);
#endif
}

QC_INLINE void qc_depthwise4_4(const int8_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t row, int32_t *acc,
                               int32_t taps)
{
    (void)row;
    w += at;
#if defined(QC_MVE)
    int32x4_t sums = vldrwq_s32(acc);
    for (int32_t t = 0; t < taps; t += 2) {
        const int32x4_t both = vldrbq_s32(w);
        sums = vaddq_s32(sums, vmulq_s32(vldrbq_s32(a), vshrq_n_s32(vshlq_n_s32(both, 28), 28)));
        if (t + 1 < taps) {
            sums = vaddq_s32(sums, vmulq_s32(vldrbq_s32(a + step_a), vshrq_n_s32(both, 4)));
        }
        a += 2 * step_a;
        w += 4;
    }
    vstrwq_s32(acc, sums);
#else
    for (int32_t t = 0; t < taps; ++t) {
        for (int32_t c = 0; c < 4; ++c) {
            acc[c] += a[t * step_a + c] * ((t % 2 != 0) ? qc_high(w[t / 2 * 4 + c]) : qc_low(w[t / 2 * 4 + c]));
        }
    }
#endif
}
#endif
#endif
