// Block-sparse attention on a CPU: packed keys, register-blocked products, online softmax in fp32.
//
// A plain C interface without torch headers, compiled on first use. Every query tile walks its kept key tiles in
// strips; the pooled tail is some more tiles with a bias per column.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <omp.h>
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

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float VecAt4 __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

inline Vec load(const float* p) { return *reinterpret_cast<const VecAt4*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<VecAt4*>(p) = x; }
inline Vec splat(float x) { return x - Vec{}; }

// 2^x for x <= 0, relative error 2e-7: nearest integer into the exponent, the rest by its Taylor series.
inline Vec exp2_vec(Vec x) {
    x = x < -126.f ? splat(-126.f) : x;
    const IntVec whole = __builtin_convertvector(x - 0.5f, IntVec);
    const Vec f = x - __builtin_convertvector(whole, Vec);
    Vec p = splat(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.f;
    return p * reinterpret_cast<Vec>((whole + 127) << 23);
}

// c[m x n] (+)= a[m x k] b[k x n]; m a multiple of ROWS, n of PANEL.
template <bool ADD>
void multiply(const float* a, long lda, const float* b, long ldb, float* c, long ldc, long m, long n, long k) {
    for (long j = 0; j < n; j += PANEL) {
        for (long i = 0; i < m; i += ROWS) {
            Vec left[ROWS], right[ROWS];
            for (int r = 0; r < ROWS; r++) {
                left[r] = ADD ? load(c + (i + r) * ldc + j) : Vec{};
                right[r] = ADD ? load(c + (i + r) * ldc + j + LANES) : Vec{};
            }
            for (long l = 0; l < k; l++) {
                const Vec b0 = load(b + l * ldb + j), b1 = load(b + l * ldb + j + LANES);
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

// q, k, v: fp32 [batch, tokens, heads, dim], dim contiguous, other strides given. out: contiguous, same shape.
// lse: [batch, tokens, heads] or null. slots: [tiles, block], -1 where empty. readable: [batch, tiles, block] bytes,
// batch stride given. keep: [batch, heads, tiles, tiles] bytes. k_mean, v_mean: [batch, heads, video, dim] or null;
// log2_tokens: [video]. dim a multiple of PANEL (see draftdiff_panel), block of 64.
extern "C" int draftdiff_panel() { return PANEL; }

// Returns 0, or 1 if there is no memory for the packed keys and values.
extern "C" int draftdiff_block_sparse(
    const float* q, const float* k, const float* v, float* out, float* lse, const int64_t* slots,
    const uint8_t* readable, int64_t readable_batch, const uint8_t* keep, const float* k_mean, const float* v_mean,
    const float* log2_tokens, const int64_t* strides, int64_t batch, int64_t tokens, int64_t heads, int64_t dim,
    int64_t tiles, int64_t video, int64_t block, float scale, int threads) {
    const Strides sq{strides[0], strides[1], strides[2]}, sk{strides[3], strides[4], strides[5]},
        sv{strides[6], strides[7], strides[8]};
    const int64_t tail_tiles = k_mean ? (video + block - 1) / block : 0;
    const int64_t packed = tiles + tail_tiles, size = block * dim, all_heads = batch * heads;
    const int64_t strip = std::max<int64_t>(1, 256 / block) * block;
    const Buffer keys = allocate(all_heads * packed * size), values = allocate(all_heads * packed * size);
    if (!keys || !values) return 1;
    std::vector<int32_t> cost(all_heads * tiles);
    std::vector<int64_t> queue(all_heads * tiles);

#pragma omp parallel num_threads(threads)
    {
        // Keys transposed, values as they are, tile by tile; what no query reads is zero.
        std::vector<const float*> key_rows(block);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < all_heads * packed; item++) {
            const int64_t bh = item / packed, tile = item % packed, b = bh / heads, h = bh % heads;
            float *kt = keys.get() + item * size, *vt = values.get() + item * size;
            for (int64_t s = 0; s < block; s++) {
                const float* value = nullptr;
                key_rows[s] = nullptr;
                if (tile < tiles) {
                    const int64_t token = slots[tile * block + s];
                    if (token >= 0) {
                        key_rows[s] = k + b * sk.batch + token * sk.token + h * sk.head;
                        value = v + b * sv.batch + token * sv.token + h * sv.head;
                    }
                } else if (const int64_t mean = (tile - tiles) * block + s; mean < video) {
                    key_rows[s] = k_mean + (bh * video + mean) * dim;
                    value = v_mean + (bh * video + mean) * dim;
                }
                if (value) std::memcpy(vt + s * dim, value, dim * sizeof(float));
                else std::fill(vt + s * dim, vt + (s + 1) * dim, 0.f);
            }
            // A few columns at a time: all of them would fall into the same few sets of the cache.
            for (int64_t first = 0; first < dim; first += LANES)
                for (int64_t s = 0; s < block; s++)
                    for (int64_t d = first; d < first + LANES; d++)
                        kt[d * block + s] = key_rows[s] ? key_rows[s][d] : 0.f;
            if (tile < tiles) {
                const uint8_t* row = keep + (bh * tiles + tile) * tiles;
                cost[bh * tiles + tile] = static_cast<int32_t>(std::count(row, row + tiles, 1));
                queue[bh * tiles + tile] = bh * tiles + tile;
            }
        }
        // Longest rows first: the last ones to be handed out are short.
#pragma omp single
        std::stable_sort(queue.begin(), queue.end(), [&](int64_t x, int64_t y) { return cost[x] > cost[y]; });

        std::vector<float> queries(size), acc(size), scores(block * strip), biases(strip), row_max(block), row_sum(block);
        std::vector<int64_t> walk;
#pragma omp for schedule(dynamic, 1)
        for (int64_t turn = 0; turn < all_heads * tiles; turn++) {
            const int64_t row = queue[turn], bh = row / tiles, tile = row % tiles, b = bh / heads, h = bh % heads;
            const int64_t* own = slots + tile * block;
            int64_t filled = 0;
            while (filled < block && own[filled] >= 0) filled++;
            const int64_t m = (filled + ROWS - 1) / ROWS * ROWS;
            for (int64_t r = 0; r < m; r++) {
                const float* from = q + b * sq.batch + (r < filled ? own[r] : own[0]) * sq.token + h * sq.head;
                for (int64_t d = 0; d < dim; d++) queries[r * dim + d] = from[d] * scale * LOG2E;
            }
            std::fill(acc.begin(), acc.begin() + m * dim, 0.f);
            std::fill(row_max.begin(), row_max.end(), NEGATIVE_INFINITY);
            std::fill(row_sum.begin(), row_sum.end(), 0.f);

            const uint8_t* kept = keep + row * tiles;
            walk.clear();
            for (int64_t j = 0; j < tiles; j++)
                if (kept[j]) walk.push_back(j);
            for (int64_t j = tiles; j < packed; j++) walk.push_back(j);

            for (size_t start = 0; start < walk.size(); start += strip / block) {
                const int64_t n = std::min<int64_t>(strip / block, walk.size() - start), width = n * block;
                for (int64_t i = 0; i < n; i++) {
                    const int64_t j = walk[start + i];
                    multiply<false>(queries.data(), dim, keys.get() + (bh * packed + j) * size, block,
                                    scores.data() + i * block, strip, m, block, dim);
                    float* bias = biases.data() + i * block;
                    if (j < tiles) {
                        const uint8_t* may = readable + b * readable_batch + j * block;
                        for (int64_t s = 0; s < block; s++) bias[s] = may[s] ? 0.f : NEGATIVE_INFINITY;
                    } else {
                        for (int64_t s = 0; s < block; s++) {
                            const int64_t mean = (j - tiles) * block + s;
                            bias[s] = mean < video && !kept[mean] ? log2_tokens[mean] : NEGATIVE_INFINITY;
                        }
                    }
                }
                for (int64_t r = 0; r < m; r++) {
                    float* s = scores.data() + r * strip;
                    Vec top = splat(NEGATIVE_INFINITY);
                    for (int64_t c = 0; c < width; c += LANES) {
                        const Vec x = load(s + c) + load(biases.data() + c);
                        store(s + c, x);
                        top = top > x ? top : x;
                    }
                    float new_max = row_max[r];
                    for (int l = 0; l < LANES; l++) new_max = std::max(new_max, top[l]);
                    if (new_max == NEGATIVE_INFINITY) {
                        std::fill(s, s + width, 0.f);
                        continue;
                    }
                    Vec sum{};
                    for (int64_t c = 0; c < width; c += LANES) {
                        const Vec x = load(s + c) - new_max;
                        // exp2_vec stops at 2^-126: exact zero for what may not be read.
                        const Vec p = x < -126.f ? Vec{} : exp2_vec(x);
                        sum += p;
                        store(s + c, p);
                    }
                    const float rescale = std::exp2(row_max[r] - new_max);
                    if (rescale != 1.f) {
                        float* a = acc.data() + r * dim;
                        for (int64_t d = 0; d < dim; d += LANES) store(a + d, load(a + d) * rescale);
                    }
                    row_sum[r] *= rescale;
                    for (int l = 0; l < LANES; l++) row_sum[r] += sum[l];
                    row_max[r] = new_max;
                }
                for (int64_t i = 0; i < n; i++)
                    multiply<true>(scores.data() + i * block, strip, values.get() + (bh * packed + walk[start + i]) * size,
                                   dim, acc.data(), dim, m, dim, block);
            }
            for (int64_t r = 0; r < filled; r++) {
                const int64_t to = (b * tokens + own[r]) * heads + h;
                const float share = row_sum[r] > 0.f ? 1.f / row_sum[r] : 0.f;
                for (int64_t d = 0; d < dim; d++) out[to * dim + d] = acc[r * dim + d] * share;
                if (lse) lse[to] = row_sum[r] > 0.f ? (row_max[r] + std::log2(row_sum[r])) * LN2 : NEGATIVE_INFINITY;
            }
        }
    }
    return 0;
}
