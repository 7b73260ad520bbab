// What a decoder costs on a CPU, in one file: matrix products over packed weights, paged attention,
// and a whole Llama-like layer made of them. GCC's and Clang's vector extensions only, so the same
// source serves AVX-512, AVX2 and NEON.
//
// Every number is computed in float32 in an order that depends on its own row alone: a row's result
// is the same to the bit whatever else is in the batch, however long the prefill chunk was, and
// however compactly the weights are stored.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr int COLUMNS = 16;  // output columns of a panel
constexpr int PANELS = 4;    // panels that a thread takes at a time
// A vector is what a register holds: GCC keeps wider ones in memory.
#if defined __AVX512F__
constexpr int LANES = 16;
constexpr int SUMS = 28, ROWS = 16;  // panels of sums and rows of a tile: what all registers hold
constexpr int WIDE_ROWS = 14;        // where weights are wide, two panels at a time load them faster
#elif defined __AVX__
constexpr int LANES = 8;
constexpr int SUMS = 6, ROWS = 6, WIDE_ROWS = 6;
#else
constexpr int LANES = 4;
constexpr int SUMS = 6, ROWS = 6, WIDE_ROWS = 6;
#endif
constexpr int PARTS = COLUMNS / LANES;  // vectors of a panel's row
constexpr int GROUP = 32;    // weights that share a scale
constexpr int KEYS = 32;     // keys per round of the running softmax
constexpr int QUERIES = 16;  // tokens that share a round

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4)));

template <typename T>
inline T load(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

inline void store(float* p, vec value) { std::memcpy(p, &value, sizeof value); }

inline vec splat(float x) { return x - vec{}; }

// e^x to within 2 units in the last place (Cephes' polynomial); 0 below -87.
inline vec exponential(vec x) {
    x = x < -87.3f ? splat(-87.3f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    vec magic = splat(12582912.0f);  // adding it rounds to an integer
    vec n = (x * 1.44269504f + magic) - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)exponent;
}

}  // namespace

extern "C" {

enum Format : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };

// [rows, cols] weights as panels of 16 output columns, k running slowest: 16 words of 32 bits with one
// float, two bfloat16, four int8 or eight nibbles each, the lowest k in the lowest bits. scale and
// offset: [cols / 32, 16] per panel.
struct Matrix {
    int32_t format, rows, cols;
    const void* data;
    const float* scale;
    const float* offset;
    const float* bias;  // [rows] or null
};

struct Layer {
    Matrix qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm;
    const float *query_norm, *key_norm;  // [head_dim] or null
    float *keys, *values;                // this layer's pool: [slots, kv heads, head_dim]
    int32_t window;                      // 0: none
};

struct Shape {
    int32_t hidden, heads, kv_heads, head_dim, rotary_dim, intermediate;
    float epsilon, scaling;
};

// The tokens of one step. page_table: [rows, pages]. row, position, slot: of each token.
struct Batch {
    int32_t tokens, page_size, pages;
    const int32_t *row, *position, *page_table;
    const int64_t* slot;
};
}

namespace {

template <int FORMAT>
constexpr int BITS = FORMAT == FLOAT32 ? 32 : FORMAT == BFLOAT16 ? 16 : FORMAT == INT8 ? 8 : 4;

// The weight in the lowest bits of a word, which is then shifted on to the next. scale × code has few
// enough bits to be exact, so these are the very float32 weights that were packed.
template <int FORMAT>
inline vec next_weight(uvec& word, const float* scale, const float* offset) {
    uvec bits = word;
    if constexpr (FORMAT != FLOAT32) word >>= BITS<FORMAT>;
    if constexpr (FORMAT == FLOAT32) return (vec)bits;
    if constexpr (FORMAT == BFLOAT16) return (vec)(bits << 16);
    if constexpr (FORMAT == INT8) return __builtin_convertvector((ivec)(bits << 24) >> 24, vec) * load<vec>(scale);
#ifdef __AVX512F__  // one lookup instead of a mask and a conversion; it takes the lowest four bits of its index
    const vec numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(numbers, (ivec)bits) * load<vec>(scale) + load<vec>(offset);
#else
    return __builtin_convertvector((ivec)(bits & 15), vec) * load<vec>(scale) + load<vec>(offset);
#endif
}

// y[M rows][P panels] = (add ? y : 0) + x · wᵀ + bias.
template <int FORMAT, int M, int P>
void tile(const Matrix& w, int panel, const float* x, float* y, bool add) {
    constexpr int PER_WORD = 32 / BITS<FORMAT>, VECTORS = P * PARTS;
    int64_t words = (int64_t)w.cols / PER_WORD * COLUMNS, groups = w.cols / GROUP * COLUMNS;
    const uint32_t* data = (const uint32_t*)w.data + panel * words;
    const float *scale = w.scale + panel * groups, *offset = w.offset + panel * groups;
    vec acc[M][VECTORS] = {};
    const float* input = x;
    for (int k = 0; k < w.cols; k += PER_WORD, data += COLUMNS) {
        int64_t group = k / GROUP * COLUMNS;
        uvec word[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) word[v] = load<uvec>(data + v / PARTS * words + v % PARTS * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < PER_WORD; i++, input++)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) {
                int64_t at = v / PARTS * groups + group + v % PARTS * LANES;
                vec weight = next_weight<FORMAT>(word[v], scale + at, offset + at);
#pragma GCC unroll 32
                for (int m = 0; m < M; m++) acc[m][v] += input[(int64_t)m * w.cols] * weight;
                asm("" : "+r"(input));  // else the compiler keeps inputs in registers and spills sums
            }
    }
    for (int v = 0; v < VECTORS; v++) {
        int column = panel * COLUMNS + v * LANES, width = std::min(LANES, w.rows - column);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < width; n++) {
                float* to = y + (int64_t)m * w.rows + column + n;
                float value = acc[m][v][n] + (w.bias ? w.bias[column + n] : 0.0f);
                *to = add ? *to + value : value;
            }
    }
}

// PANELS panels for `rows` ≤ M rows.
template <int FORMAT, int M = ROWS>
void tiles(const Matrix& w, int panel, const float* x, int rows, float* y, bool add) {
    if (rows < M) {
        if constexpr (M > 1) tiles<FORMAT, M - 1>(w, panel, x, rows, y, add);
        return;
    }
    constexpr int P = M * 4 <= SUMS ? 4 : M * 2 <= SUMS ? 2 : 1;
    for (int p = 0; p < PANELS; p += P) tile<FORMAT, M, P>(w, panel + p, x, y, add);
}

// y[rows, w.rows] = (add ? y : 0) + x[rows, w.cols] · wᵀ + bias. Called by all threads of a team; ends in a barrier.
void linear(const Matrix& w, const float* x, int rows, float* y, bool add) {
    auto some = w.format == FLOAT32    ? tiles<FLOAT32>
                : w.format == BFLOAT16 ? tiles<BFLOAT16>
                : w.format == INT8     ? tiles<INT8>
                                       : tiles<INT4>;
    int panels = (w.rows + COLUMNS - 1) / COLUMNS, most = w.format == FLOAT32 || w.format == BFLOAT16 ? WIDE_ROWS : ROWS;
#pragma omp for schedule(static)
    for (int panel = 0; panel < panels; panel += PANELS) {
        int done = 0;
        for (int left = (rows + most - 1) / most; left > 0; left--) {
            int height = (rows - done + left - 1) / left;  // all of much the same
            some(w, panel, x + (int64_t)done * w.cols, height, y + (int64_t)done * w.rows, add);
            done += height;
        }
    }
}

void rms_norm(const float* x, const float* weight, int n, float epsilon, float* out) {
    vec squares{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec v = load<vec>(x + i);
        squares += v * v;
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += squares[lane];
    for (; i < n; i++) sum += x[i] * x[i];
    float scale = 1.0f / std::sqrt(sum / n + epsilon);
    for (i = 0; i < n; i++) out[i] = weight[i] * (x[i] * scale);
}

// Rotary embedding in the rotate-half convention, in place, on the first `dim` numbers of a head.
void rotate(float* x, const float* cos, const float* sin, int dim) {
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

// Lanes in groups of 2H: a's two halves added, then b's.
template <int H>
inline vec fold(vec a, vec b) {
    ivec low, high;
    for (int lane = 0; lane < LANES; lane++) {
        low[lane] = lane / (2 * H) * 2 * H + lane % H + (lane / H % 2) * LANES;
        high[lane] = low[lane] + H;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The sums of 2H vectors, each in the lane of its number.
template <int H>
inline vec folded(vec* p) {
    if constexpr (H == 0) return p[0];
    else {
#pragma GCC unroll 8
        for (int j = 0; j < H; j++) p[j] = fold<H>(p[j], p[j + H]);
        return folded<H / 2>(p);
    }
}

// The products of one query head with as many keys as there are lanes. N: vectors a head, 0 for any other size.
template <int N>
inline vec products(const float* query, const float* const* keys, int head_dim) {
    if constexpr (N == 0) {
        vec sums{};
        for (int j = 0; j < LANES; j++)
            for (int d = 0; d < head_dim; d++) sums[j] += query[d] * keys[j][d];
        return sums;
    }
    vec p[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
        p[j] = load<vec>(query) * load<vec>(keys[j]);
#pragma GCC unroll 32
        for (int i = 1; i < N; i++) p[j] += load<vec>(query + i * LANES) * load<vec>(keys[j] + i * LANES);
    }
    return folded<LANES / 2>(p);
}

// out += Σ weights[j] · values[j].
template <int N>
inline void accumulate(const float* weights, const float* const* values, int count, int head_dim, float* out) {
    if constexpr (N == 0) {
        for (int j = 0; j < count; j++)
            for (int d = 0; d < head_dim; d++) out[d] += weights[j] * values[j][d];
    } else {
        constexpr int HELD = std::min(N, 8);  // in registers
        for (int d = 0; d < N * LANES; d += HELD * LANES) {
            vec o[HELD];
            for (int i = 0; i < HELD; i++) o[i] = load<vec>(out + d + i * LANES);
            for (int j = 0; j < count; j++)
#pragma GCC unroll 8
                for (int i = 0; i < HELD; i++) o[i] += weights[j] * load<vec>(values[j] + d + i * LANES);
            for (int i = 0; i < HELD; i++) store(out + d + i * LANES, o[i]);
        }
    }
}

// What is the same for all heads of a layer.
struct Attention {
    int heads, kv_heads, head_dim;
    float scaling, softcap;
    int window;
    const float* queries;  // [tokens, query_stride]
    int64_t query_stride;
    const float *keys, *values;  // [slots, kv_heads, head_dim]
    float* out;                  // [tokens, heads × head_dim]
};

// Some tokens of one row that follow each other.
struct Block {
    int first, count;
};

std::vector<Block> blocks_of(const Batch& batch) {
    std::vector<Block> blocks;
    for (int t = 0; t < batch.tokens; t++) {
        bool more = t > 0 && batch.row[t] == batch.row[t - 1] && blocks.back().count < QUERIES;
        if (more) blocks.back().count++;
        else blocks.push_back({t, 1});
    }
    return blocks;
}

// A block's attention by the query heads of one key head: a running softmax for each token and head.
// All of them read KEYS keys and values while those are in the L1 cache. The rounds begin at multiples
// of KEYS, so that a token's result does not depend on its neighbours.
template <int N>
void attend(const Attention& a, const Batch& batch, Block block, int kv_head) {
    const int32_t* pages = batch.page_table + (int64_t)batch.row[block.first] * batch.pages;
    int group = a.heads / a.kv_heads;
    std::vector<float> best(block.count * group, -INFINITY), total(block.count * group, 0.0f);
    int last = batch.position[block.first + block.count - 1];
    int start = a.window ? std::max(0, batch.position[block.first] + 1 - a.window) : 0;
    for (int begin = start / KEYS * KEYS; begin <= last; begin += KEYS) {
        const float *keys[KEYS], *values[KEYS];
        for (int j = 0; j < KEYS; j++) {
            int position = std::min(begin + j, last);
            int64_t slot = (int64_t)pages[position / batch.page_size] * batch.page_size + position % batch.page_size;
            keys[j] = a.keys + (slot * a.kv_heads + kv_head) * a.head_dim;
            values[j] = a.values + (slot * a.kv_heads + kv_head) * a.head_dim;
        }
        for (int i = 0; i < block.count * group; i++) {
            int64_t token = block.first + i / group, head = kv_head * group + i % group;
            int context = batch.position[token] + 1;
            int from = a.window ? std::max(0, context - a.window - begin) : 0, to = std::min(KEYS, context - begin);
            if (from >= to) continue;
            const float* query = a.queries + token * a.query_stride + head * a.head_dim;
            float* out = a.out + (token * a.heads + head) * a.head_dim;
            alignas(64) float scores[KEYS];
            for (int j = 0; j < to; j += LANES) store(scores + j, products<N>(query, keys + j, a.head_dim) * a.scaling);
            if (a.softcap != 0)
                for (int j = from; j < to; j++) scores[j] = a.softcap * std::tanh(scores[j] / a.softcap);
            float high = std::max(best[i], *std::max_element(scores + from, scores + to));
            for (int j = 0; j < to; j += LANES) store(scores + j, exponential(load<vec>(scores + j) - high));
            float rescale = std::exp(best[i] - high);  // 0 at first
            best[i] = high;
            total[i] *= rescale;
            for (int d = 0; d < a.head_dim; d++) out[d] = rescale == 0 ? 0 : out[d] * rescale;
            for (int j = from; j < to; j++) total[i] += scores[j];
            accumulate<N>(scores + from, values + from, to - from, a.head_dim, out);
        }
    }
    for (int i = 0; i < block.count * group; i++) {
        float* out = a.out + ((int64_t)(block.first + i / group) * a.heads + kv_head * group + i % group) * a.head_dim;
        for (int d = 0; d < a.head_dim; d++) out[d] /= total[i];
    }
}

// Called by all threads of a team; ends in a barrier.
void attention(const Attention& a, const Batch& batch, const std::vector<Block>& blocks) {
    auto one = a.head_dim == 64 ? attend<64 / LANES> : a.head_dim == 128 ? attend<128 / LANES> : attend<0>;
#pragma omp for schedule(dynamic)
    for (int item = 0; item < (int)blocks.size() * a.kv_heads; item++)
        one(a, batch, blocks[item / a.kv_heads], item % a.kv_heads);
}

void decoder_layer(const Layer& layer, const Shape& s, const Batch& batch, const std::vector<Block>& blocks, const float* cos,
                   const float* sin, float* x, float* normed, float* qkv, float* mixed, float* gate_up) {
    int64_t q_width = (int64_t)s.heads * s.head_dim, kv_width = (int64_t)s.kv_heads * s.head_dim;
    int64_t qkv_width = q_width + 2 * kv_width;
#pragma omp for schedule(static)
    for (int t = 0; t < batch.tokens; t++)
        rms_norm(x + (int64_t)t * s.hidden, layer.attention_norm, s.hidden, s.epsilon, normed + (int64_t)t * s.hidden);
    linear(layer.qkv, normed, batch.tokens, qkv, false);
#pragma omp for schedule(static)
    for (int t = 0; t < batch.tokens; t++) {
        float* q = qkv + t * qkv_width;
        for (int h = 0; h < s.heads + s.kv_heads; h++) {
            float* head = q + (int64_t)h * s.head_dim;
            const float* norm = h < s.heads ? layer.query_norm : layer.key_norm;
            if (norm) rms_norm(head, norm, s.head_dim, s.epsilon, head);
            rotate(head, cos + (int64_t)t * s.rotary_dim, sin + (int64_t)t * s.rotary_dim, s.rotary_dim);
        }
        std::copy_n(q + q_width, kv_width, layer.keys + batch.slot[t] * kv_width);
        std::copy_n(q + q_width + kv_width, kv_width, layer.values + batch.slot[t] * kv_width);
    }
    attention({s.heads, s.kv_heads, s.head_dim, s.scaling, 0, layer.window, qkv, qkv_width, layer.keys, layer.values,
               mixed}, batch, blocks);
    linear(layer.out, mixed, batch.tokens, x, true);
#pragma omp for schedule(static)
    for (int t = 0; t < batch.tokens; t++)
        rms_norm(x + (int64_t)t * s.hidden, layer.mlp_norm, s.hidden, s.epsilon, normed + (int64_t)t * s.hidden);
    linear(layer.gate_up, normed, batch.tokens, gate_up, false);
#pragma omp for schedule(static)
    for (int t = 0; t < batch.tokens; t++) {
        float *gate = gate_up + (int64_t)t * 2 * s.intermediate, *up = gate + s.intermediate;
        float* to = mixed + (int64_t)t * s.intermediate;
        int i = 0;
        for (; i + LANES <= s.intermediate; i += LANES) {
            vec g = load<vec>(gate + i);
            store(to + i, g / (1.0f + exponential(-g)) * load<vec>(up + i));
        }
        for (; i < s.intermediate; i++) to[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
    linear(layer.down, mixed, batch.tokens, x, true);
}

}  // namespace

extern "C" {

// Weights, [rows, cols], as codes of `bits` bits in the layout of a Matrix: the nearest integers, least to most,
// to (weight − offset) / scale. scale, offset: [rows, cols / 32]. words: zeroed. Returns whether nothing is lost.
int32_t linalign_encode(const float* weights, int32_t rows, int32_t cols, const float* scale, const float* offset,
                        int32_t least, int32_t most, int32_t bits, uint32_t* words, int32_t threads) {
    int per_word = 32 / bits, inexact = 0;
    uint32_t mask = (1u << bits) - 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : inexact)
    for (int n = 0; n < rows; n++) {
        uint32_t* column = words + (int64_t)(n / COLUMNS) * (cols / per_word) * COLUMNS + n % COLUMNS;
        for (int g = 0; g < cols / GROUP; g++) {
            const float* from = weights + (int64_t)n * cols + g * GROUP;
            float s = scale[(int64_t)n * (cols / GROUP) + g], o = offset[(int64_t)n * (cols / GROUP) + g];
            float inverse = s == 0 ? 0 : 1 / s;
            int32_t codes[GROUP];
            for (int i = 0; i < GROUP; i++) {
                float code = std::min(std::max((from[i] - o) * inverse, (float)least), (float)most);
                code = (code + 12582912.0f) - 12582912.0f;  // rounds to an integer
                inexact |= code * s + o != from[i];
                codes[i] = (int32_t)code;
            }
            for (int i = 0; i < GROUP; i++)
                column[(int64_t)(g * GROUP + i) / per_word * COLUMNS] |= (codes[i] & mask) << (i % per_word * bits);
        }
    }
    return !inexact;
}

// The greatest of each line of y, [lines, vocab], and the log of Σ exp((y − greatest) / temperature).
void linalign_log_totals(const float* y, int32_t lines, int32_t vocab, const float* temperature, float* best,
                         float* log_total, int32_t threads) {
#pragma omp parallel for num_threads(std::min(threads, lines)) schedule(static)
    for (int n = 0; n < lines; n++) {
        const float* line = y + (int64_t)n * vocab;
        vec high = splat(-INFINITY), sum[4] = {};
        int i = 0;
        for (; i + LANES <= vocab; i += LANES) {
            vec v = load<vec>(line + i);
            high = v > high ? v : high;
        }
        best[n] = -INFINITY;
        for (int j = 0; j < LANES; j++) best[n] = std::max(best[n], high[j]);
        for (; i < vocab; i++) best[n] = std::max(best[n], line[i]);
        float scale = 1 / temperature[n], total = 0;
        for (i = 0; i + 4 * LANES <= vocab; i += 4 * LANES)
            for (int j = 0; j < 4; j++) sum[j] += exponential((load<vec>(line + i + j * LANES) - best[n]) * scale);
        for (; i < vocab; i++) total += std::exp((line[i] - best[n]) * scale);
        sum[0] += sum[1] + sum[2] + sum[3];
        for (int j = 0; j < LANES; j++) total += sum[0][j];
        log_total[n] = std::log(total);
    }
}

// The tokens of each line of y, [lines, vocab], at or above its bound, and their logits, in order of token id: the
// first `capacity` of them, filled up with token 0 at −inf. counts: how many there are, written or not.
void linalign_narrow(const float* y, int32_t lines, int32_t vocab, const float* bounds, int64_t* tokens,
                     float* candidates, int32_t capacity, int64_t* counts, int32_t threads) {
#pragma omp parallel for num_threads(std::min(threads, lines)) schedule(static)
    for (int n = 0; n < lines; n++) {
        const float* line = y + (int64_t)n * vocab;
        int64_t count = 0, *to = tokens + (int64_t)n * capacity;
        float* logits = candidates + (int64_t)n * capacity;
        for (int i = 0; i < vocab; i += 4 * LANES) {
            int end = std::min(i + 4 * LANES, vocab);
            if (end - i == 4 * LANES) {
                ivec found = {};
                for (int j = 0; j < 4; j++) found |= load<vec>(line + i + j * LANES) >= bounds[n];
                int32_t any = 0;
                for (int j = 0; j < LANES; j++) any |= found[j];
                if (!any) continue;
            }
            for (int token = i; token < end; token++) {
                if (!(line[token] >= bounds[n])) continue;
                if (count < capacity) to[count] = token, logits[count] = line[token];
                count++;
            }
        }
        counts[n] = count;
        for (; count < capacity; count++) to[count] = 0, logits[count] = -INFINITY;
    }
}

// Ends the threads that OpenMP keeps for the calling thread; its next parallel region makes new ones.
void linalign_release_threads() { omp_pause_resource_all(omp_pause_soft); }

// y: [tokens, w.rows].
void linalign_linear(const Matrix* w, const float* x, int32_t tokens, float* y, int32_t threads) {
#pragma omp parallel num_threads(threads)
    linear(*w, x, tokens, y, false);
}

void linalign_attention(const Batch* batch, int32_t heads, int32_t kv_heads, int32_t head_dim, float scaling,
                        int32_t window, float softcap, const float* queries, const float* keys, const float* values,
                        float* out, int32_t threads) {
    std::vector<Block> blocks = blocks_of(*batch);
#pragma omp parallel num_threads(threads)
    attention({heads, kv_heads, head_dim, scaling, softcap, window, queries, (int64_t)heads * head_dim, keys, values, out},
              *batch, blocks);
}

// Runs x, [tokens, hidden], through the layers in place. cos, sin: [tokens, rotary_dim].
void linalign_layers(const Layer* layers, int32_t count, const Shape* shape, const Batch* batch, const float* cos,
                     const float* sin, float* x, int32_t threads) {
    int64_t tokens = batch->tokens, q_width = (int64_t)shape->heads * shape->head_dim;
    int64_t qkv_width = q_width + 2 * (int64_t)shape->kv_heads * shape->head_dim;
    auto floats = [&](int64_t width) { return std::unique_ptr<float[]>(new float[tokens * width]); };
    auto normed = floats(shape->hidden), qkv = floats(qkv_width), gate_up = floats(2 * shape->intermediate);
    auto mixed = floats(std::max<int64_t>(q_width, shape->intermediate));
    std::vector<Block> blocks = blocks_of(*batch);
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < count; i++)
        decoder_layer(layers[i], *shape, *batch, blocks, cos, sin, x, normed.get(), qkv.get(), mixed.get(), gate_up.get());
}

}
