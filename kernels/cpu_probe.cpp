// The probe on a CPU (draftdiff/core/probe.py says what it finds): mean queries against every key of the video, in fp32.
//
// One pass finds how wrong each tile's mean would be, another where it is worst outside the tiles that are kept by then.
// Scores are not kept between them: to make them again costs less than to write and read them.

#include "cpu_common.h"

namespace {

constexpr int64_t GROUP = 4 * ROWS;  // query tiles that are scored together

// One call. Fields in the order of _Probe in cpu.py.
//
// q_mean: [batch, heads, rows, dim]. k, v: fp32 [batch, tokens, heads, dim], dim contiguous, other strides given.
// v_mean: [batch, heads, tiles, dim]. center: scores of q_mean with the mean keys, in base 2, [batch, heads, rows, tiles].
// slots: [tiles, block], -1 where empty. Out: error, like center, natural logarithms; or, with keep, like center in bytes,
// singles [batch, heads, rows, most], -1 where none is left.
struct Probe {
    const float *q_mean, *k, *v, *v_mean, *center;
    const int64_t* slots;
    float* error;
    const uint8_t* keep;
    int32_t* singles;
    Strides k_at, v_at;
    int64_t batch, heads, dim, rows, tiles, block, most;
    float scale;
    int32_t threads;

    int64_t keys() const { return tiles * block; }
};

// What is known of one head's keys. packed: by tile, transposed [dim, block] in panels, 0 where empty. length, along: of the value at
// a slot its square and its product with the mean value of its tile. rest: the square of that mean. All 0 where empty.
struct Head {
    Buffer packed;
    std::vector<float> length, along, rest;

    explicit Head(const Probe& p)
        : packed(allocate(p.keys() * p.dim)), length(p.keys()), along(p.keys()), rest(p.keys()) {}

    void pack(const Probe& p, int64_t bh, int64_t tile) {
        const int64_t b = bh / p.heads, h = bh % p.heads;
        const float* mean = p.v_mean + (bh * p.tiles + tile) * p.dim;
        float* keys = packed.get() + tile * p.block * p.dim;
        float square = 0.f;
        for (int64_t d = 0; d < p.dim; d++) square += mean[d] * mean[d];
        std::vector<const float*> rows(p.block);
        for (int64_t s = 0; s < p.block; s++) {
            const int64_t at = tile * p.block + s, token = p.slots[at], ahead = p.slots[std::min(at + 8, p.keys() - 1)];
            const float* k = p.k + b * p.k_at.batch + token * p.k_at.token + h * p.k_at.head;
            const float* v = p.v + b * p.v_at.batch + token * p.v_at.token + h * p.v_at.head;
            for (int64_t d = 0; d < p.dim; d += 16) {
                __builtin_prefetch(k + (ahead - token) * p.k_at.token + d);
                __builtin_prefetch(v + (ahead - token) * p.v_at.token + d);
            }
            float own = 0.f, both = 0.f;
            for (int64_t d = 0; token >= 0 && d < p.dim; d++) {
                own += v[d] * v[d];
                both += v[d] * mean[d];
            }
            length[at] = own;
            along[at] = both;
            rest[at] = token >= 0 ? square : 0.f;
            rows[s] = token >= 0 ? k : nullptr;
        }
        transpose_tile(rows.data(), keys, p.block, p.dim);
    }
};

// A thread's own memory. queries: [GROUP, dim], scaled, in base 2. scores: [GROUP, block], or whole rows of single keys.
struct ProbeScratch {
    std::vector<float> queries, scores;

    ProbeScratch(const Probe& p, int64_t scored) : queries(GROUP * p.dim), scores(scored) {}

    // Some query tiles of a head; rows beyond the last one repeat it.
    void take(const Probe& p, int64_t bh, int64_t first, int64_t rows) {
        for (int64_t r = 0; r < rows; r++) {
            const float* from = p.q_mean + (bh * p.rows + std::min(first + r, p.rows - 1)) * p.dim;
            for (int64_t d = 0; d < p.dim; d++) queries[r * p.dim + d] = from[d] * p.scale * LOG2E;
        }
    }
};

// Squared error of a key under its tile's mean, over the square of that mean's weight and less the mean value's own square.
inline Vec squared_error(Vec score, float center, const float* length, const float* along) {
    constexpr float HIGHEST = 40.f * LOG2E;  // its square is still a float
    Vec x = score - center;
    x = x > HIGHEST ? splat(HIGHEST) : x;
    const Vec weight = exp2_any(x);
    return weight * (weight * load(length) - 2.f * load(along));
}

void errors(const Probe& p, int64_t bh, int64_t first, const Head& head, ProbeScratch& own) {
    own.take(p, bh, first, GROUP);
    const int64_t rows = std::min(GROUP, p.rows - first);
    float* scores = own.scores.data();
    for (int64_t tile = 0; tile < p.tiles; tile++) {
        const int64_t at = tile * p.block;
        multiply<false>(own.queries.data(), p.dim, head.packed.get() + at * p.dim, p.dim, scores, p.block,
                        (rows + ROWS - 1) / ROWS * ROWS, p.block, p.dim);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t to = (bh * p.rows + first + r) * p.tiles + tile;
            Vec sum{};
            for (int64_t s = 0; s < p.block; s += LANES)
                sum += squared_error(load(scores + r * p.block + s), p.center[to], &head.length[at + s], &head.along[at + s]) +
                       load(&head.rest[at + s]);
            const float total = sum_of(sum);
            p.error[to] = p.center[to] * LN2 + 0.5f * std::log(total < 0.f ? 0.f : total);
        }
    }
}

// Floats as integers of the same order.
inline IntVec ordered(Vec x) {
    const IntVec bits = reinterpret_cast<IntVec>(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

int64_t count_from(const float* x, int64_t n, int32_t least) {
    IntVec found{};
    for (int64_t i = 0; i < n; i += LANES) found -= ordered(load(x + i)) >= least;
    int64_t sum = 0;
    for (int l = 0; l < LANES; l++) sum += found[l];
    return sum;
}

// Places of the `most` highest of n scores, ascending, the first ones among equals; -1 for the rest where fewer are finite.
ON_ITS_OWN void highest(const float* x, int64_t n, int64_t most, int32_t* places) {
    int32_t low = ordered(splat(-std::numeric_limits<float>::max()))[0], high = ordered(splat(0.f))[0];
    Vec top = splat(NEGATIVE_INFINITY), bottom = splat(std::numeric_limits<float>::max());
    for (int64_t i = 0; i < n; i += LANES) {
        const Vec one = load(x + i);
        top = one > top ? one : top;
        bottom = one < bottom && one > NEGATIVE_INFINITY ? one : bottom;
    }
    for (int l = 0; l < LANES; l++) {
        top[0] = std::max(top[0], top[l]);
        bottom[0] = std::min(bottom[0], bottom[l]);
    }
    int64_t filled = 0, equal = most;
    if (top[0] > NEGATIVE_INFINITY) {
        high = ordered(top)[0];
        low = std::max(low, ordered(bottom)[0]);
        // The highest bound that `most` scores reach, or the lowest score if they are fewer.
        while (low < high) {
            const int32_t middle = static_cast<int32_t>((int64_t(low) + high + 1) >> 1);
            const int64_t found = count_from(x, n, middle);
            if (found >= most) low = middle;
            else high = middle - 1;
            if (found == most) break;
        }
        equal = most - std::min(most, low == std::numeric_limits<int32_t>::max() ? 0 : count_from(x, n, low + 1));
        for (int64_t i = 0; i < n && filled < most; i += LANES) {
            const IntVec value = ordered(load(x + i));
            const IntVec reach = value >= low;
            bool any = false;
            for (int l = 0; l < LANES; l++) any |= reach[l] != 0;
            for (int l = 0; any && l < LANES && filled < most; l++)
                if (value[l] > low || (value[l] == low && equal-- > 0)) places[filled++] = static_cast<int32_t>(i + l);
        }
    }
    std::fill(places + filled, places + most, -1);
}

void best_tokens(const Probe& p, int64_t bh, int64_t first, const Head& head, ProbeScratch& own) {
    own.take(p, bh, first, ROWS);
    const int64_t rows = std::min<int64_t>(ROWS, p.rows - first), n = p.keys();
    const uint8_t* keep = p.keep + (bh * p.rows + first) * p.tiles;
    const float* centers = p.center + (bh * p.rows + first) * p.tiles;
    float *scores = own.scores.data(), best[ROWS];
    for (int64_t r = 0; r < rows; r++) {
        best[r] = NEGATIVE_INFINITY;
        for (int64_t tile = 0; tile < p.tiles; tile++)
            if (!keep[r * p.tiles + tile]) best[r] = std::max(best[r], centers[r * p.tiles + tile]);
    }
    for (int64_t tile = 0; tile < p.tiles; tile++) {
        const int64_t start = tile * p.block;
        multiply<false>(own.queries.data(), p.dim, head.packed.get() + start * p.dim, p.dim, scores + start, n, ROWS,
                        p.block, p.dim);
        for (int64_t r = 0; r < rows; r++) {
            const float center = centers[r * p.tiles + tile];
            // Of what has so little weight that it would vanish the order does not matter.
            const float weight = keep[r * p.tiles + tile] ? 0.f : std::exp2(std::max(2.f * (center - best[r]), -100.f));
            for (int64_t at = start; at < start + p.block; at += LANES) {
                float* to = scores + r * n + at;
                const Vec square = squared_error(load(to), center, &head.length[at], &head.along[at]) + load(&head.rest[at]);
                const Vec error = square * weight;
                store(to, error > 0.f ? error : splat(NEGATIVE_INFINITY));
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        int32_t* places = p.singles + (bh * p.rows + first + r) * p.most;
        highest(scores + r * n, n, p.most, places);
        for (int64_t i = 0; i < p.most && places[i] >= 0; i++) places[i] = static_cast<int32_t>(p.slots[places[i]]);
    }
}

}  // namespace

// Errors if p.error is given, single keys if p.singles is. Returns 0, or 1 if there is no memory for a head's keys.
extern "C" int draftdiff_probe(const Probe* probe) {
    const Probe& p = *probe;
    Head head(p);
    if (!head.packed) return 1;
    const int64_t group = p.error ? GROUP : ROWS;
#pragma omp parallel num_threads(p.threads)
    {
        ProbeScratch own(p, p.error ? GROUP * p.block : ROWS * p.keys());
        for (int64_t bh = 0; bh < p.batch * p.heads; bh++) {
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < p.tiles; tile++) head.pack(p, bh, tile);
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < p.rows; first += group) {
                if (p.error) errors(p, bh, first, head, own);
                else best_tokens(p, bh, first, head, own);
            }
        }
    }
    return 0;
}
