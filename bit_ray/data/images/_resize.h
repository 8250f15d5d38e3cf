/* Antialiased bilinear resize of 8-bit pixels, with the same bits as torch's resize of uint8 (antialias=True).
 *
 * Two passes, columns before rows, rounding to 8 bits in between. Weights are the triangle filter's in double
 * precision, scaled to int16 with as many bits as the largest of them has room for; sums are integers, so their order
 * is free. A pass is a dot product of neighbouring pixels: pairs of 16-bit values times pairs of weights into 32 bits,
 * eight of which are one AVX2 instruction. Where the CPU has no AVX2, plain C gives the same bits.
 */

#ifndef BIT_RAY_RESIZE_H
#define BIT_RAY_RESIZE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && defined(__x86_64__)
#define BIT_RAY_AVX2 1
#include <immintrin.h>
#else
#define BIT_RAY_AVX2 0
#endif

#define TAP_GROUP 4    /* taps of a pixel are padded to whole groups, with weight zero */
#define ROWS_AT_ONCE 4 /* rows that share the loading of a pixel's weights */
#define MAX_PRECISION 22

/* How a window of one resized axis is made from the source. */
struct axis {
    int count;        /* pixels of the window */
    int first, last;  /* the source pixels that it needs: [first, last) */
    int taps;         /* weights per pixel, a multiple of TAP_GROUP */
    int shift;        /* bits behind the point of the weights */
    int *start;       /* [count] first source pixel of each */
    int16_t *weights; /* [count, taps] */
};

static void axis_free(struct axis *axis)
{
    free(axis->start);
    free(axis->weights);
    axis->start = NULL;
    axis->weights = NULL;
}

/* The taps of pixel i: their number, the first of them, and their weights (which sum to one). */
static int triangle(int i, int in, double scale, int limit, int *start, double *weights)
{
    const double support = scale > 1.0 ? scale : 1.0;
    const double inverse = scale >= 1.0 ? 1.0 / scale : 1.0;
    const double center = scale * (i + 0.5);
    int64_t from = (int64_t)(center - support + 0.5), to = (int64_t)(center + support + 0.5);
    double total = 0.0;
    int num, j;

    from = from < 0 ? 0 : from;
    to = to > in ? in : to;
    num = (int)(to - from);
    num = num < 0 ? 0 : num > limit ? limit : num;
    for (j = 0; j < num; j++) {
        const double x = fabs((double)(j + from) - center + 0.5) * inverse;
        weights[j] = x < 1.0 ? 1.0 - x : 0.0;
        total += weights[j];
    }
    if (total != 0.0)
        for (j = 0; j < num; j++)
            weights[j] /= total;
    *start = (int)from;
    return num;
}

/* Plan pixels [from, from + count) of an axis resized from in to out, in reverse order if mirrored. 0: no memory. */
static int axis_init(struct axis *axis, int in, int out, int from, int count, int mirrored)
{
    const double scale = (double)in / out;
    const int limit = (int)ceil(scale > 1.0 ? scale : 1.0) * 2 + 1;
    const int taps = (limit + TAP_GROUP - 1) / TAP_GROUP * TAP_GROUP;
    double *weights = malloc((size_t)limit * sizeof *weights * ((size_t)count + 1));
    int *nums = malloc((size_t)count * sizeof *nums);
    double largest = 0.0, one;
    int i, j, most = 1;

    axis->count = count;
    axis->first = in;
    axis->last = 0;
    axis->start = malloc((size_t)count * sizeof *axis->start);
    axis->weights = calloc((size_t)count * taps, sizeof *axis->weights);
    if (!weights || !nums || !axis->start || !axis->weights) {
        free(weights);
        free(nums);
        axis_free(axis);
        return 0;
    }
    /* The precision goes by all pixels of the axis, in the window or not. */
    for (i = 0; i < out; i++) {
        const int inside = i >= from && i < from + count;
        const int k = !inside ? count : mirrored ? from + count - 1 - i : i - from;
        double *w = weights + (size_t)k * limit;
        int start, num = triangle(i, in, scale, limit, &start, w);

        for (j = 0; j < num; j++)
            largest = w[j] > largest ? w[j] : largest;
        if (!inside)
            continue;
        axis->start[k] = start;
        nums[k] = num;
        most = num > most ? num : most;
        axis->first = start < axis->first ? start : axis->first;
        axis->last = start + num > axis->last ? start + num : axis->last;
    }
    for (axis->shift = 0; axis->shift < MAX_PRECISION; axis->shift++)
        if ((int)(0.5 + largest * (1 << (axis->shift + 1))) >= 1 << 15)
            break;
    axis->taps = (most + TAP_GROUP - 1) / TAP_GROUP * TAP_GROUP;
    one = (double)(1 << axis->shift);
    for (i = 0; i < count; i++)
        for (j = 0; j < nums[i]; j++)
            axis->weights[(size_t)i * axis->taps + j] = (int16_t)(0.5 + weights[(size_t)i * limit + j] * one);
    free(weights);
    free(nums);
    return 1;
}

static uint8_t clamp8(int32_t value)
{
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* Bytes from one row of `count` RGB pixels to the next: one more than they take is written, whole vectors are read. */
static size_t resized_stride(int count)
{
    return (3 * (size_t)count + 1 + 31) / 32 * 32;
}

/* Four rows of RGBX, the first of their pixels being source pixel `origin`, to rows of `count` RGB pixels. Up to `taps`
 * pixels behind the last one are read, whatever they are. */
static void resize_columns_plain(const struct axis *axis, int origin, uint8_t *const rows[], uint8_t *const out[])
{
    int r, i, j;

    for (r = 0; r < ROWS_AT_ONCE; r++)
        for (i = 0; i < axis->count; i++) {
            const uint8_t *p = rows[r] + 4 * (size_t)(axis->start[i] - origin);
            const int16_t *w = axis->weights + (size_t)i * axis->taps;
            int32_t red = 1 << axis->shift >> 1, green = red, blue = red;

            for (j = 0; j < axis->taps; j++, p += 4) {
                red += w[j] * p[0];
                green += w[j] * p[1];
                blue += w[j] * p[2];
            }
            out[r][3 * i] = clamp8(red >> axis->shift);
            out[r][3 * i + 1] = clamp8(green >> axis->shift);
            out[r][3 * i + 2] = clamp8(blue >> axis->shift);
        }
}

/* Row i of the window from rows of `bytes` bytes that lie `stride` apart, the first being source row `origin`. */
static void resize_row_plain(const struct axis *axis, int i, int origin, const uint8_t *rows, size_t stride,
                             size_t bytes, uint8_t *out)
{
    const int16_t *w = axis->weights + (size_t)i * axis->taps;
    const int first = axis->start[i] - origin;
    const int num = axis->last - axis->start[i] < axis->taps ? axis->last - axis->start[i] : axis->taps;
    size_t x;
    int j;

    for (x = 0; x < bytes; x++) {
        int32_t sum = 1 << axis->shift >> 1;

        for (j = 0; j < num; j++)
            sum += w[j] * rows[(size_t)(first + j) * stride + x];
        out[x] = clamp8(sum >> axis->shift);
    }
}

#if BIT_RAY_AVX2

__attribute__((target("avx2"))) static void resize_columns_avx2(const struct axis *axis, int origin,
                                                                uint8_t *const rows[], uint8_t *const out[])
{
    /* Of four pixels, the lower lane takes the first two, the upper lane the others: R0 R1 G0 G1 B0 B1 X0 X1. */
    const __m256i spread = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1, /**/
                                            8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
    const __m256i pairs = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, /**/
                                           4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
    const __m128i half = _mm_set1_epi32(1 << axis->shift >> 1);
    const __m128i shift = _mm_cvtsi32_si128(axis->shift);
    const uint8_t *row0 = rows[0], *row1 = rows[1], *row2 = rows[2], *row3 = rows[3];
    uint8_t *out0 = out[0], *out1 = out[1], *out2 = out[2], *out3 = out[3];
    const int16_t *weights = axis->weights;
    int i, j;

#define LOAD(row) \
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)((row) + at))), spread)
#define SUM(sum)                                                                                                     \
    _mm_sra_epi32(_mm_add_epi32(_mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1)), half), \
                  shift)
    for (i = 0; i < axis->count; i++) {
        __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
        size_t at = 4 * (size_t)(axis->start[i] - origin);
        __m128i packed;
        int32_t pixel;

        for (j = 0; j < axis->taps; j += TAP_GROUP, at += 4 * TAP_GROUP, weights += TAP_GROUP) {
            int64_t four;
            __m256i w;

            memcpy(&four, weights, sizeof four);
            w = _mm256_shuffle_epi8(_mm256_set1_epi64x(four), pairs);
            sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(LOAD(row0), w));
            sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(LOAD(row1), w));
            sum2 = _mm256_add_epi32(sum2, _mm256_madd_epi16(LOAD(row2), w));
            sum3 = _mm256_add_epi32(sum3, _mm256_madd_epi16(LOAD(row3), w));
        }
        packed = _mm_packus_epi16(_mm_packs_epi32(SUM(sum0), SUM(sum1)), _mm_packs_epi32(SUM(sum2), SUM(sum3)));
        /* Four bytes for three: the next pixel covers the fourth. */
        pixel = _mm_cvtsi128_si32(packed);
        memcpy(out0 + 3 * (size_t)i, &pixel, 4);
        pixel = _mm_extract_epi32(packed, 1);
        memcpy(out1 + 3 * (size_t)i, &pixel, 4);
        pixel = _mm_extract_epi32(packed, 2);
        memcpy(out2 + 3 * (size_t)i, &pixel, 4);
        pixel = _mm_extract_epi32(packed, 3);
        memcpy(out3 + 3 * (size_t)i, &pixel, 4);
    }
#undef LOAD
#undef SUM
}

__attribute__((target("avx2"))) static void resize_row_avx2(const struct axis *axis, int i, int origin,
                                                            const uint8_t *rows, size_t stride, size_t bytes,
                                                            uint8_t *out)
{
    const int16_t *weights = axis->weights + (size_t)i * axis->taps;
    const int num = axis->last - axis->start[i] < axis->taps ? axis->last - axis->start[i] : axis->taps;
    const uint8_t *first = rows + (size_t)(axis->start[i] - origin) * stride;
    const __m128i shift = _mm_cvtsi32_si128(axis->shift);
    const __m256i zero = _mm256_setzero_si256();
    size_t x;
    int j;

    for (x = 0; x < bytes; x += 32) {
        __m256i sum0 = _mm256_set1_epi32(1 << axis->shift >> 1), sum1 = sum0, sum2 = sum0, sum3 = sum0, result;

        for (j = 0; j < num; j += 2) {
            const uint8_t *p = first + (size_t)j * stride + x;
            /* The row behind the last one has weight zero. */
            const uint8_t *q = j + 1 < num ? p + stride : p;
            const int32_t two = (uint16_t)weights[j] | (int32_t)weights[j + 1] * 65536;
            const __m256i w = _mm256_set1_epi32(two);
            const __m256i a = _mm256_loadu_si256((const __m256i *)p), b = _mm256_loadu_si256((const __m256i *)q);
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);

            sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), w));
            sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), w));
            sum2 = _mm256_add_epi32(sum2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), w));
            sum3 = _mm256_add_epi32(sum3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), w));
        }
        result = _mm256_packus_epi16(
            _mm256_packs_epi32(_mm256_sra_epi32(sum0, shift), _mm256_sra_epi32(sum1, shift)),
            _mm256_packs_epi32(_mm256_sra_epi32(sum2, shift), _mm256_sra_epi32(sum3, shift)));
        if (bytes - x >= 32) {
            _mm256_storeu_si256((__m256i *)(out + x), result);
        } else {
            uint8_t rest[32];

            _mm256_storeu_si256((__m256i *)rest, result);
            memcpy(out + x, rest, bytes - x);
        }
    }
}

#endif /* BIT_RAY_AVX2 */

static int has_avx2(void)
{
#if BIT_RAY_AVX2
    return __builtin_cpu_supports("avx2");
#else
    return 0;
#endif
}

static void resize_columns(int simd, const struct axis *axis, int origin, uint8_t *const rows[], uint8_t *const out[])
{
#if BIT_RAY_AVX2
    if (simd) {
        resize_columns_avx2(axis, origin, rows, out);
        return;
    }
#endif
    (void)simd;
    resize_columns_plain(axis, origin, rows, out);
}

static void resize_row(int simd, const struct axis *axis, int i, int origin, const uint8_t *rows, size_t stride,
                       size_t bytes, uint8_t *out)
{
#if BIT_RAY_AVX2
    if (simd) {
        resize_row_avx2(axis, i, origin, rows, stride, bytes, out);
        return;
    }
#endif
    (void)simd;
    resize_row_plain(axis, i, origin, rows, stride, bytes, out);
}

#endif
