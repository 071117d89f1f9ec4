/* Tiles whose activations have 16 bits and weights 8. The row of weights that begins `at` bytes behind w ends at a
   multiple of four, with zeros. Steps of activations are in codes, not in bytes. */
#ifndef QC_CODES16_H
#define QC_CODES16_H
#include "qc_kernels.h"

/* SXTB16 takes bytes 0 and 2 of a word, SMLAD neighbours: the inner two of four weights change places. */
#if defined(QC_DSP)
#define QC_FOUR(a, b, c, d) a, c, b, d
#else
#define QC_FOUR(a, b, c, d) a, b, c, d
#endif

QC_INLINE void qc_copy16(int16_t *to, const int16_t *from, int32_t count)
{
    qc_copy((int8_t *)to, (const int8_t *)from, 2 * count);
}

QC_INLINE void qc_fill16(int16_t *to, int32_t code, int32_t count)
{
    for (int32_t i = 0; i < count; ++i) {
        to[i] = (int16_t)code;
    }
}

/* Weights of a row from `from` on, a multiple of four, one by one. */
QC_INLINE int32_t qc_dot16(const int16_t *a, const int8_t *w, int32_t from, int32_t acc, int32_t k)
{
    for (int32_t i = from; i < k; ++i) {
#if defined(QC_DSP)
        const int32_t place = (i & ~3) | ((i & 1) << 1) | ((i & 2) >> 1);
#else
        const int32_t place = i;
#endif
        acc += (int32_t)a[i] * w[place];
    }
    return acc;
}

#if defined(QC_DSP)
QC_INLINE uint32_t qc_pair(const int16_t *from)
{
    uint32_t pair;
    (void)memcpy(&pair, from, 4u);
    return pair;
}

#define QC_WIDE_ROW2(row, c, d)                                                                                        \
    "ldr %[y], " row "\n\tsxtb16 %[t], %[y]\n\tsxtb16 %[y], %[y], ror #8\n\t"                                          \
    "smlad %[" c "], %[x0], %[t], %[" c "]\n\tsmlad %[" d "], %[z0], %[t], %[" d "]\n\t"                               \
    "smlad %[" c "], %[x1], %[y], %[" c "]\n\tsmlad %[" d "], %[z1], %[y], %[" d "]\n\t"

#define qc_wide_2x2(a_, step_a, w_, at, row, acc_, k)                                                                  \
    do {                                                                                                               \
        const int16_t *qa = (a_);                                                                                      \
        const int8_t *qw = &(w_)[at];                                                                                  \
        const int16_t *const qend = qa + ((k) & ~3);                                                                   \
        if ((k) >= 4) {                                                                                                \
            uint32_t x0, x1, z0, z1, y, t;                                                                             \
            __asm__("1:\n\tldr %[z0], [%[a], %[sa]]\n\tldr %[z1], [%[a], %[sa4]]\n\t"                                  \
                    "ldr %[x1], [%[a], #4]\n\tldr %[x0], [%[a]], #8\n\t"                                               \
                    QC_WIDE_ROW2("[%[w], %[sw]]", "c1", "c3") QC_WIDE_ROW2("[%[w]], #4", "c0", "c2")                   \
                    "cmp %[a], %[end]\n\tbne 1b"                                                                       \
                    : [a] "+r"(qa), [w] "+r"(qw), [c0] "+r"((acc_)[0]), [c1] "+r"((acc_)[1]), [c2] "+r"((acc_)[2]),    \
                      [c3] "+r"((acc_)[3]), [x0] "=&r"(x0), [x1] "=&r"(x1), [z0] "=&r"(z0), [z1] "=&r"(z1),            \
                      [y] "=&r"(y), [t] "=&r"(t)                                                                       \
                    : [end] "r"(qend), [sa] "n"(2 * (step_a)), [sa4] "n"(2 * (step_a) + 4), [sw] "n"(row)              \
                    : "cc", "memory");                                                                                 \
        }                                                                                                              \
        if (((k) & 3) != 0) {                                                                                          \
            const int16_t *const ra = (a_);                                                                            \
            const int8_t *const rw = &(w_)[at];                                                                        \
            (acc_)[0] = qc_dot16(ra, rw, (k) & ~3, (acc_)[0], k);                                                      \
            (acc_)[1] = qc_dot16(ra, rw + (row), (k) & ~3, (acc_)[1], k);                                              \
            (acc_)[2] = qc_dot16(ra + (step_a), rw, (k) & ~3, (acc_)[2], k);                                           \
            (acc_)[3] = qc_dot16(ra + (step_a), rw + (row), (k) & ~3, (acc_)[3], k);                                   \
        }                                                                                                              \
    } while (0)

#define QC_WIDE_ROW1(row, c)                                                                                           \
    "ldr %[y], " row "\n\tsxtb16 %[t], %[y]\n\tsxtb16 %[y], %[y], ror #8\n\t"                                          \
    "smlad %[" c "], %[x0], %[t], %[" c "]\n\tsmlad %[" c "], %[x1], %[y], %[" c "]\n\t"

#define qc_wide_1x4(a_, step_a, w_, at, row, acc_, k)                                                                  \
    do {                                                                                                               \
        const int16_t *qa = (a_);                                                                                      \
        const int8_t *qw = &(w_)[at];                                                                                  \
        const int16_t *const qend = qa + ((k) & ~3);                                                                   \
        if ((k) >= 4) {                                                                                                \
            uint32_t x0, x1, y, t;                                                                                     \
            __asm__("1:\n\tldr %[x1], [%[a], #4]\n\tldr %[x0], [%[a]], #8\n\t"                                         \
                    QC_WIDE_ROW1("[%[w], %[s1]]", "c1") QC_WIDE_ROW1("[%[w], %[s2]]", "c2")                            \
                    QC_WIDE_ROW1("[%[w], %[s3]]", "c3") QC_WIDE_ROW1("[%[w]], #4", "c0")                               \
                    "cmp %[a], %[end]\n\tbne 1b"                                                                       \
                    : [a] "+r"(qa), [w] "+r"(qw), [c0] "+r"((acc_)[0]), [c1] "+r"((acc_)[1]), [c2] "+r"((acc_)[2]),    \
                      [c3] "+r"((acc_)[3]), [x0] "=&r"(x0), [x1] "=&r"(x1), [y] "=&r"(y), [t] "=&r"(t)                 \
                    : [end] "r"(qend), [s1] "n"(row), [s2] "n"(2 * (row)), [s3] "n"(3 * (row))                         \
                    : "cc", "memory");                                                                                 \
        }                                                                                                              \
        if (((k) & 3) != 0) {                                                                                          \
            for (int32_t q = 0; q < 4; ++q) {                                                                          \
                (acc_)[q] = qc_dot16((a_), &(w_)[(at) + q * (row)], (k) & ~3, (acc_)[q], k);                           \
            }                                                                                                          \
        }                                                                                                              \
    } while (0)

QC_INLINE void qc_wide_1x2(const int16_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t row, int32_t *acc,
                           int32_t k)
{
    int32_t c0 = acc[0], c1 = acc[1];
    w += at;
    (void)step_a;
    for (int32_t i = 0; i < (k & ~3); i += 4) {
        const int32_t first = (int32_t)qc_pair(&a[i]), second = (int32_t)qc_pair(&a[i + 2]);
        const uint32_t w0 = qc_word(&w[i]), w1 = qc_word(&w[row + i]);
        c0 = __smlad(second, qc_odd(w0), __smlad(first, qc_even(w0), c0));
        c1 = __smlad(second, qc_odd(w1), __smlad(first, qc_even(w1), c1));
    }
    acc[0] = qc_dot16(a, w, k & ~3, c0, k);
    acc[1] = qc_dot16(a, w + row, k & ~3, c1, k);
}

/* acc[c] += sum over t of a[t][c] * w[t][c] for four channels. */
QC_INLINE void qc_wide_depthwise_4(const int16_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t row,
                                   int32_t *acc, int32_t taps)
{
    int32_t c0 = acc[0], c1 = acc[1], c2 = acc[2], c3 = acc[3];
    (void)row;
    w += at;
#pragma GCC unroll 3
    for (int32_t t = 0; t < taps; ++t) {
        const int32_t first = (int32_t)qc_pair(a), second = (int32_t)qc_pair(&a[2]);
        const uint32_t w0 = qc_word(w);
        const int32_t we = qc_even(w0), wo = qc_odd(w0);
        c0 = __smlabb(first, we, c0);
        c1 = __smlatt(first, we, c1);
        c2 = __smlabb(second, wo, c2);
        c3 = __smlatt(second, wo, c3);
        a += step_a;
        w += 4;
    }
    acc[0] = c0;
    acc[1] = c1;
    acc[2] = c2;
    acc[3] = c3;
}
#else
/* Up to four rows of weights. */
QC_INLINE void qc_rows16(const int16_t *a, const int8_t *w, int32_t row, int32_t *acc, int32_t rows, int32_t k)
{
#if defined(QC_MVE)
    for (int32_t i = 0; i < k; i += 8) {
        const mve_pred16_t lanes = vctp16q((uint32_t)(k - i));
        const int16x8_t codes = vldrhq_z_s16(&a[i], lanes);
#pragma GCC unroll 4
        for (int32_t q = 0; q < rows; ++q) {
            acc[q] = vmladavaq_p_s16(acc[q], codes, vldrbq_z_s16(&w[q * row + i], lanes), lanes);
        }
    }
#else
    for (int32_t q = 0; q < rows; ++q) {
        acc[q] = qc_dot16(a, &w[q * row], 0, acc[q], k);
    }
#endif
}

QC_INLINE void qc_wide_1x2(const int16_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t row, int32_t *acc,
                           int32_t k)
{
    (void)step_a;
    qc_rows16(a, &w[at], row, acc, 2, k);
}

QC_INLINE void qc_wide_1x4(const int16_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t row, int32_t *acc,
                           int32_t k)
{
    (void)step_a;
    qc_rows16(a, &w[at], row, acc, 4, k);
}

QC_INLINE void qc_wide_2x2(const int16_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t row, int32_t *acc,
                           int32_t k)
{
#if defined(QC_MVE)
    int32_t c00 = acc[0], c01 = acc[1], c10 = acc[2], c11 = acc[3];
    w += at;
    for (int32_t i = 0; i < k; i += 8) {
        const mve_pred16_t lanes = vctp16q((uint32_t)(k - i));
        const int16x8_t a0 = vldrhq_z_s16(&a[i], lanes), a1 = vldrhq_z_s16(&a[step_a + i], lanes);
        const int16x8_t w0 = vldrbq_z_s16(&w[i], lanes), w1 = vldrbq_z_s16(&w[row + i], lanes);
        c00 = vmladavaq_p_s16(c00, a0, w0, lanes);
        c01 = vmladavaq_p_s16(c01, a0, w1, lanes);
        c10 = vmladavaq_p_s16(c10, a1, w0, lanes);
        c11 = vmladavaq_p_s16(c11, a1, w1, lanes);
    }
    acc[0] = c00;
    acc[1] = c01;
    acc[2] = c10;
    acc[3] = c11;
#else
    qc_rows16(a, &w[at], row, &acc[0], 2, k);
    qc_rows16(a + step_a, &w[at], row, &acc[2], 2, k);
#endif
}

QC_INLINE void qc_wide_depthwise_4(const int16_t *a, int32_t step_a, const int8_t *w, int32_t at, int32_t row,
                                   int32_t *acc, int32_t taps)
{
    (void)row;
    w += at;
#if defined(QC_MVE)
    int32x4_t sums = vldrwq_s32(acc);
    for (int32_t t = 0; t < taps; ++t) {
        sums = vaddq_s32(sums, vmulq_s32(vldrhq_s32(a), vldrbq_s32(w)));
        a += step_a;
        w += 4;
    }
    vstrwq_s32(acc, sums);
#else
    for (int32_t t = 0; t < taps; ++t) {
        for (int32_t c = 0; c < 4; ++c) {
            acc[c] += (int32_t)a[t * step_a + c] * w[t * 4 + c];
        }
    }
#endif
}
#endif
#endif
