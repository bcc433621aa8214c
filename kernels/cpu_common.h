// What the CPU kernels share: vectors of this processor, 2^x, a register-blocked product, memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <omp.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int PANEL = 2 * LANES;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

// Inlined into the walk, these loops lose registers to it: 4 % of the whole.
#define ON_ITS_OWN __attribute__((noinline))

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float VecAt4 __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

inline Vec load(const float* p) { return *reinterpret_cast<const VecAt4*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<VecAt4*>(p) = x; }
inline Vec splat(float x) { return x - Vec{}; }

// 2^f, |f| <= 0.5, relative error 1.6e-7; 1 at 0. Of this degree the least error is 8e-8 before rounding.
inline Vec exp2_of(Vec f) {
    Vec p = splat(1.32746334e-3f);
    p = p * f + 9.67196168e-3f;
    p = p * f + 5.55067837e-2f;
    p = p * f + 2.40222353e-1f;
    p = p * f + 6.93147062e-1f;
    return p * f + 1.f;
}

#if defined(__AVX512F__)
inline float highest_of(Vec x) { return _mm512_reduce_max_ps(__m512(x)); }
inline float sum_of(Vec x) { return _mm512_reduce_add_ps(__m512(x)); }

// 2^x for x up to 127, not below 2^-126.
inline Vec exp2_any(Vec x) {
    x = x < -126.f ? splat(-126.f) : x;
    const Vec whole = Vec(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT));
    return Vec(_mm512_scalef_ps(__m512(exp2_of(x - whole)), __m512(whole)));
}

// 2^x for x <= 0, exactly 0 below 2^-126.
inline Vec exp2_or_zero(Vec x) {
    const Vec whole = Vec(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT));
    const __mmask16 normal = _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    return Vec(_mm512_maskz_scalef_ps(normal, __m512(exp2_of(x - whole)), __m512(whole)));
}
#else
inline float highest_of(Vec x) {
    float found = x[0];
    for (int l = 1; l < LANES; l++) found = std::max(found, x[l]);
    return found;
}

inline float sum_of(Vec x) {
    float found = 0.f;
    for (int l = 0; l < LANES; l++) found += x[l];
    return found;
}

// 2^x for x up to 127, not below 2^-126: the whole part goes into the exponent.
inline Vec exp2_any(Vec x) {
    x = x < -126.f ? splat(-126.f) : x;
    const IntVec whole = __builtin_convertvector(x + 128.5f, IntVec) - 128;
    return exp2_of(x - __builtin_convertvector(whole, Vec)) * reinterpret_cast<Vec>((whole + 127) << 23);
}

// 2^x for x <= 0, exactly 0 below 2^-126.
inline Vec exp2_or_zero(Vec x) { return x < -126.f ? Vec{} : exp2_any(x); }
#endif

// The lower or upper halves of two vectors, their elements in turn.
template <bool UPPER>
inline Vec interleave(Vec a, Vec b) {
    constexpr int HALF = LANES / 2, FIRST = UPPER ? HALF : 0;
#if defined(__clang__)
    Vec both;
    for (int i = 0; i < HALF; i++) {
        both[2 * i] = a[FIRST + i];
        both[2 * i + 1] = b[FIRST + i];
    }
    return both;
#else
    IntVec from;
    for (int i = 0; i < HALF; i++) {
        from[2 * i] = FIRST + i;
        from[2 * i + 1] = LANES + FIRST + i;
    }
    return __builtin_shuffle(a, b, from);
#endif
}

// out[column * stride + row] = rows[row][column] of LANES rows and as many columns, 0 for a row that is null. By shuffles of
// whole vectors, rows i and i + LANES / 2 becoming rows 2i and 2i + 1 each time: one element at a time takes thrice as long.
inline void transpose(const float* const* rows, float* out, long stride) {
    Vec x[LANES], y[LANES];
    for (int r = 0; r < LANES; r++) x[r] = rows[r] ? load(rows[r]) : Vec{};
    for (int done = 1; done < LANES; done *= 2) {
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = interleave<false>(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = interleave<true>(x[i], x[i + LANES / 2]);
        }
        for (int r = 0; r < LANES; r++) x[r] = y[r];
    }
    for (int r = 0; r < LANES; r++) store(out + r * stride, x[r]);
}

// The right side of a product is in panels: PANEL columns of all its rows, then the next PANEL columns. A panel is read as one
// stream, which the processor sees coming; columns of a matrix by rows lie on few lines of the first cache, and miss there.
// This is where a column begins in a matrix of so many rows; its next row is PANEL floats on.
inline long column_at(long column, long rows) { return (column - column % PANEL) * rows + column % PANEL; }

// Rows of `dim` floats, 0 for one that is null, as the columns of a matrix in panels.
inline void transpose_tile(const float* const* rows, float* out, long count, long dim) {
    const float* square[LANES];
    for (long s = 0; s < count; s += LANES)
        for (long d = 0; d < dim; d += LANES) {
            for (int i = 0; i < LANES; i++) square[i] = rows[s + i] ? rows[s + i] + d : nullptr;
            transpose(square, out + column_at(s, dim) + d * PANEL, PANEL);
        }
}

// c[m x n] (+)= a[m x k] b[k x n]; b the first k of `rows` rows, in panels. m a multiple of ROWS, n of PANEL.
template <bool ADD>
ON_ITS_OWN void multiply(const float* a, long lda, const float* b, long rows, float* c, long ldc, long m, long n, long k) {
    for (long j = 0; j < n; j += PANEL) {
        const float* panel = b + j * rows;
        for (long i = 0; i < m; i += ROWS) {
            Vec left[ROWS], right[ROWS];
            for (int r = 0; r < ROWS; r++) {
                left[r] = ADD ? load(c + (i + r) * ldc + j) : Vec{};
                right[r] = ADD ? load(c + (i + r) * ldc + j + LANES) : Vec{};
            }
            for (long l = 0; l < k; l++) {
                const Vec b0 = load(panel + l * PANEL), b1 = load(panel + l * PANEL + LANES);
                for (int r = 0; r < ROWS; r++) {
                    const Vec x = splat(a[(i + r) * lda + l]);
                    left[r] += x * b0;
                    right[r] += x * b1;
                }
            }
            for (int r = 0; r < ROWS; r++) {
                store(c + (i + r) * ldc + j, left[r]);
                store(c + (i + r) * ldc + j + LANES, right[r]);
            }
        }
    }
}

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

// Not set to zero, which one thread would do, and in large pages where the system gives them: touching 4 KiB pages for the
// first time costs more than filling them.
Buffer allocate(size_t floats) {
    constexpr size_t PAGE = size_t(1) << 21;
    const size_t bytes = (floats * sizeof(float) + PAGE - 1) / PAGE * PAGE;
    void* p = std::aligned_alloc(PAGE, bytes);
#ifdef MADV_HUGEPAGE
    if (p) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return Buffer(static_cast<float*>(p));
}

struct Strides {
    int64_t batch, token, head;
};

}  // namespace
