// Block-sparse attention on a CPU: packed keys, register-blocked products, online softmax in fp32.
//
// A plain C interface without torch headers, compiled on first use. Every query tile walks its kept key tiles in
// strips; single tokens are gathered into tiles on the way, and the pooled tail is some more tiles with a bias per column.

#include "cpu_common.h"

namespace {

// One call. Fields in the order of _Call in cpu.py.
//
// q, k, v: fp32 [batch, tokens, heads, dim], dim contiguous, other strides given. out: contiguous, same shape.
// lse: [batch, tokens, heads] or null. slots: [tiles, block], -1 where empty. readable: [batch, tiles, block] bytes,
// batch stride given. keep: [batch, heads, tiles, tiles] bytes. k_mean, v_mean: [batch, heads, video, dim] or null;
// log2_counts: [batch, heads, tiles, video], the last only where counts_row is 0. singles: [batch, heads, video,
// most_singles], -1 for none. wanted: [tiles] bytes, query tiles that are asked for, or null for all. dim a multiple of
// PANEL (see draftdiff_panel), block 64 or 128.
struct Call {
    const float *q, *k, *v;
    float *out, *lse;
    const int64_t* slots;
    const uint8_t *readable, *keep;
    const float *k_mean, *v_mean, *log2_counts;
    const int32_t* singles;
    const uint8_t* wanted;
    Strides q_at, k_at, v_at;
    int64_t readable_batch, counts_row, most_singles, batch, tokens, heads, dim, tiles, video, block;
    float scale;
    int32_t threads;

    int64_t packed_tiles() const { return tiles + (k_mean ? (video + block - 1) / block : 0); }
    // Of the last tile of pooled keys.
    int64_t empty_slots() const { return k_mean ? (packed_tiles() - tiles) * block - video : 0; }
    int64_t tile_size() const { return block * dim; }
    // Key tiles that are scored before one pass of the softmax.
    int64_t tiles_of_strip() const { return std::max<int64_t>(1, 256 / block); }
};

// A thread's own memory. rows, value_rows: of a tile in the making. queries, acc: [block, dim]. scores: [block, strip].
// bias: [strip]. row_max, row_sum: [block]. walk: the key tiles of a query tile. key_at, value_at: those of a strip.
// gathered: keys and values of single tokens, a strip of each.
struct Scratch {
    std::vector<const float*> rows, value_rows, key_at, value_at;
    std::vector<float> queries, acc, scores, bias, row_max, row_sum, gathered;
    std::vector<int64_t> walk;

    explicit Scratch(const Call& c)
        : rows(c.block), value_rows(c.block), key_at(c.tiles_of_strip()), value_at(c.tiles_of_strip()), queries(c.tile_size()),
          acc(c.tile_size()), scores(c.block * c.tiles_of_strip() * c.block), bias(c.tiles_of_strip() * c.block),
          row_max(c.block), row_sum(c.block), gathered(c.singles ? 2 * c.tiles_of_strip() * c.tile_size() : 0) {}

    // Slot s of the tile in the making holds a token.
    void take(const Call& c, int64_t b, int64_t h, int64_t token, int64_t s) {
        rows[s] = c.k + b * c.k_at.batch + token * c.k_at.token + h * c.k_at.head;
        value_rows[s] = c.v + b * c.v_at.batch + token * c.v_at.token + h * c.v_at.head;
    }
};

// A tile of the keys and values at rows and value_rows, null for none, in panels: keys transposed [dim, block], values [block, dim].
void fill(const Call& c, const float* const* rows, const float* const* value_rows, float* keys, float* values) {
    for (int64_t s = 0; s < c.block; s++) {
        const int64_t ahead = std::min(s + 8, c.block - 1);
        for (int64_t d = 0; d < c.dim; d += 16) {
            __builtin_prefetch(rows[ahead] + d);
            __builtin_prefetch(value_rows[ahead] + d);
        }
        for (int64_t d = 0; d < c.dim; d += PANEL) {
            float* to = values + column_at(d, c.block) + s * PANEL;
            if (value_rows[s]) std::memcpy(to, value_rows[s] + d, PANEL * sizeof(float));
            else std::fill(to, to + PANEL, 0.f);
        }
    }
    transpose_tile(rows, keys, c.block, c.dim);
}

// A key tile of one head; what no query reads is zero. Pooled keys and values follow the tokens' tiles as some more tiles.
void pack(const Call& c, int64_t bh, int64_t tile, float* keys, float* values, Scratch& own) {
    const int64_t b = bh / c.heads, h = bh % c.heads;
    for (int64_t s = 0; s < c.block; s++) {
        own.rows[s] = own.value_rows[s] = nullptr;
        if (tile < c.tiles) {
            if (c.readable[b * c.readable_batch + tile * c.block + s]) own.take(c, b, h, c.slots[tile * c.block + s], s);
        } else if (const int64_t mean = (tile - c.tiles) * c.block + s; mean < c.video) {
            own.rows[s] = c.k_mean + (bh * c.video + mean) * c.dim;
            own.value_rows[s] = c.v_mean + (bh * c.video + mean) * c.dim;
        }
    }
    fill(c, own.rows.data(), own.value_rows.data(), keys, values);
}

// What is added to the scores of a key tile, in base 2: -inf for what may not be read, for pooled keys their weight.
// Whether any is not 0.
bool key_bias(const Call& c, int64_t b, const uint8_t* kept, const float* counts, int64_t tile, float* bias) {
    if (tile < c.tiles) {
        const uint8_t* may = c.readable + b * c.readable_batch + tile * c.block;
        bool any = false;
        for (int64_t s = 0; s < c.block; s++) {
            bias[s] = may[s] ? 0.f : NEGATIVE_INFINITY;
            any |= !may[s];
        }
        return any;
    }
    for (int64_t s = 0; s < c.block; s++) {
        const int64_t mean = (tile - c.tiles) * c.block + s;
        bias[s] = mean < c.video && !kept[mean] ? counts[mean] : NEGATIVE_INFINITY;
    }
    return true;
}

// Takes one row of `width` scores into its running softmax: weights in their place, what was summed before rescaled. bias:
// null where it is 0 throughout.
ON_ITS_OWN void softmax_strip(float* __restrict scores, const float* __restrict bias, int64_t width,
                          float* __restrict acc, int64_t dim, float* __restrict row_max, float* __restrict row_sum) {
    Vec top = splat(NEGATIVE_INFINITY);
    if (bias)
        for (int64_t i = 0; i < width; i += LANES) {
            const Vec x = load(scores + i) + load(bias + i);
            store(scores + i, x);
            top = top > x ? top : x;
        }
    else
        for (int64_t i = 0; i < width; i += LANES) {
            const Vec x = load(scores + i);
            top = top > x ? top : x;
        }
    const float old_max = *row_max, new_max = std::max(old_max, highest_of(top));
    // -inf where nothing was read so far, or nothing but NaN, which must come through.
    const float shift = new_max == NEGATIVE_INFINITY ? 0.f : new_max;
    Vec sum{};
    for (int64_t i = 0; i < width; i += LANES) {
        const Vec p = exp2_or_zero(load(scores + i) - shift);
        sum += p;
        store(scores + i, p);
    }
    float total = *row_sum;
    if (old_max != new_max) {
        const float rescale = std::exp2(old_max - shift);
        for (int64_t d = 0; d < dim; d += LANES) store(acc + d, load(acc + d) * rescale);
        total *= rescale;
    }
    *row_sum = total + sum_of(sum);
    *row_max = new_max;
}

// Output and log-sum-exp of one query tile of one head. keys, values: all packed tiles of that head.
void query_tile(const Call& c, int64_t bh, int64_t tile, const float* keys, const float* values, Scratch& own) {
    const int64_t b = bh / c.heads, h = bh % c.heads, dim = c.dim, block = c.block, size = c.tile_size();
    const int64_t most = c.tiles_of_strip(), strip = most * block;
    const int64_t* slots = c.slots + tile * block;
    float *queries = own.queries.data(), *acc = own.acc.data(), *scores = own.scores.data(), *bias = own.bias.data();
    float *row_max = own.row_max.data(), *row_sum = own.row_sum.data();
    int64_t filled = 0;
    while (filled < block && slots[filled] >= 0) filled++;
    const int64_t m = (filled + ROWS - 1) / ROWS * ROWS;
    for (int64_t r = 0; r < m; r++) {
        const float* from = c.q + b * c.q_at.batch + slots[r < filled ? r : 0] * c.q_at.token + h * c.q_at.head;
        for (int64_t d = 0; d < dim; d++) queries[r * dim + d] = from[d] * c.scale * LOG2E;
    }
    std::fill(acc, acc + m * dim, 0.f);
    std::fill(row_max, row_max + block, NEGATIVE_INFINITY);
    std::fill(row_sum, row_sum + block, 0.f);

    // One strip of tiles: so many keys of them, a multiple of PANEL. biased: unless all bias is 0.
    const auto read = [&](int64_t width, bool biased) {
        for (int64_t at = 0; at < width; at += block)
            multiply<false>(queries, dim, own.key_at[at / block], dim, scores + at, strip, m, std::min(block, width - at), dim);
        for (int64_t r = 0; r < m; r++)
            softmax_strip(scores + r * strip, biased ? bias : nullptr, width, acc + r * dim, dim, row_max + r, row_sum + r);
        for (int64_t at = 0; at < width; at += block)
            multiply<true>(scores + at, strip, own.value_at[at / block], block, acc, dim, m, dim, std::min(block, width - at));
    };

    const uint8_t* kept = c.keep + (bh * c.tiles + tile) * c.tiles;
    const float* counts = c.log2_counts + (bh * c.tiles + tile) * c.counts_row;
    own.walk.clear();
    for (int64_t j = 0; j < c.packed_tiles(); j++)
        if (j >= c.tiles || kept[j]) own.walk.push_back(j);
    for (int64_t start = 0; start < int64_t(own.walk.size()); start += most) {
        const int64_t n = std::min<int64_t>(most, own.walk.size() - start);
        bool biased = false;
        for (int64_t i = 0; i < n; i++) {
            const int64_t j = own.walk[start + i];
            own.key_at[i] = keys + j * size;
            own.value_at[i] = values + j * size;
            biased |= key_bias(c, b, kept, counts, j, bias + i * block);
        }
        const int64_t beyond = own.walk[start + n - 1] + 1 == c.packed_tiles() ? c.empty_slots() : 0;
        read(n * block - beyond / PANEL * PANEL, biased);
    }
    const int64_t singles = tile < c.video ? c.most_singles : 0;
    const int32_t* single = c.singles + (bh * c.video + tile) * c.most_singles;
    for (int64_t start = 0; start < singles; start += strip) {
        const int64_t n = std::min(most, (singles - start + block - 1) / block);
        for (int64_t i = 0; i < n; i++) {
            for (int64_t s = 0; s < block; s++) {
                const int64_t at = start + i * block + s;
                const bool there = at < singles && single[at] >= 0;
                own.rows[s] = own.value_rows[s] = nullptr;
                if (there) own.take(c, b, h, single[at], s);
                bias[i * block + s] = there ? 0.f : NEGATIVE_INFINITY;
            }
            float* into = own.gathered.data() + 2 * i * size;
            fill(c, own.rows.data(), own.value_rows.data(), into, into + size);
            own.key_at[i] = into;
            own.value_at[i] = into + size;
        }
        read(std::min(n * block, (singles - start + PANEL - 1) / PANEL * PANEL), true);
    }
    for (int64_t r = 0; r < filled; r++) {
        const int64_t to = (b * c.tokens + slots[r]) * c.heads + h;
        const float sum = row_sum[r];
        const float share = sum == 0.f ? 0.f : 1.f / sum;
        for (int64_t d = 0; d < dim; d++) c.out[to * dim + d] = acc[r * dim + d] * share;
        if (c.lse) c.lse[to] = sum == 0.f ? NEGATIVE_INFINITY : (row_max[r] + std::log2(sum)) * LN2;
    }
}

}  // namespace

// What a head_dim must be a multiple of.
extern "C" int draftdiff_panel() { return PANEL; }

// Returns 0, or 1 if there is no memory for the packed keys and values.
extern "C" int draftdiff_block_sparse(const Call* call) {
    const Call& c = *call;
    const int64_t all_heads = c.batch * c.heads, packed = c.packed_tiles(), size = c.tile_size();
    // Heads whose keys are packed at a time: few, so that memory is used again while it is near; enough query tiles for all
    // threads to end at about the same time.
    const int64_t group = std::min(all_heads, (16 * c.threads + c.tiles - 1) / c.tiles);
    const Buffer keys = allocate(group * packed * size), values = allocate(group * packed * size);
    if (!keys || !values) return 1;
    std::vector<int32_t> cost(group * c.tiles);
    std::vector<int64_t> queue(group * c.tiles);

#pragma omp parallel num_threads(c.threads)
    {
        Scratch own(c);
        for (int64_t first = 0; first < all_heads; first += group) {
            const int64_t heads = std::min(group, all_heads - first), rows = heads * c.tiles;
#pragma omp for schedule(static)
            for (int64_t item = 0; item < heads * packed; item++) {
                const int64_t head = item / packed, tile = item % packed, row = head * c.tiles + tile;
                pack(c, first + head, tile, keys.get() + item * size, values.get() + item * size, own);
                if (tile < c.tiles) {
                    const uint8_t* kept = c.keep + (first * c.tiles + row) * c.tiles;
                    const bool wanted = !c.wanted || c.wanted[tile];
                    cost[row] = wanted ? static_cast<int32_t>(std::count(kept, kept + c.tiles, 1)) : -1;
                    queue[row] = row;
                }
            }
            // Longest rows first: the last ones to be handed out are short.
#pragma omp single
            std::stable_sort(queue.begin(), queue.begin() + rows, [&](int64_t x, int64_t y) { return cost[x] > cost[y]; });

#pragma omp for schedule(dynamic, 1)
            for (int64_t turn = 0; turn < rows; turn++) {
                const int64_t row = queue[turn], head = row / c.tiles, at = head * packed * size;
                if (cost[row] >= 0) query_tile(c, first + head, row % c.tiles, keys.get() + at, values.get() + at, own);
            }
        }
    }
    return 0;
}
