// Kernels between the matrix products of a language model on a CPU: decoding, and the training pass.
//
// What torch does in some twenty calls a layer, each with a pass over memory, is one pass here. Sums are float32.
// T is what numbers are stored as: float, or bfloat16 as its sixteen bits. Compiled when first used; see __init__.py.
// Nothing here assumes finite numbers: a nan goes in and comes out.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "smooth.h"

namespace {

struct bf16 {
    uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // to the nearest, ties to even; a nan stays one whatever its bits
    uint32_t u;
    std::memcpy(&u, &x, 4);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    to.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}
constexpr Long LANES = 16, STEP = 2 * LANES;  // of a small product; places behind a row are read up to the next STEP
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
#ifdef __clang__
#define SHUFFLED(u, v, ...) __builtin_shufflevector(u, v, __VA_ARGS__)
#else  // which every version of g++ has
#define SHUFFLED(u, v, ...) __builtin_shuffle(u, v, Bits{__VA_ARGS__})
#endif

inline Lanes load(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline Lanes load(const bf16* from) {
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return (Lanes)(__builtin_convertvector(h, Bits) << 16);
}

// -- decoding ------------------------------------------------------------------------------------------------------

// Rows [n, H]: x += delta (unless null), out = x / sqrt(mean(x^2) + eps) * weight.
template <class T>
void add_norm(float* x, const T* delta, const float* weight, T* out, Long n, Long size, float eps) {
#pragma omp parallel for schedule(static) if (n * size > 16384)
    for (Long i = 0; i < n; i++) {
        float* row = x + i * size;
        if (delta)
#pragma omp simd
            for (Long j = 0; j < size; j++) row[j] += wide(delta[i * size + j]);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Long j = 0; j < size; j++) sum += row[j] * row[j];
        float inverse = 1.f / std::sqrt(sum / size + eps);
        for (Long j = 0; j < size; j++) put(out[i * size + j], row[j] * inverse * weight[j]);
    }
}

// silu(gate) * up of rows [n, 2 size], gate first.
template <class T>
void gated(const T* both, T* out, Long n, Long size) {
#pragma omp parallel for schedule(static) if (n * size > 8192)
    for (Long i = 0; i < n; i++) {
        const T *gate = both + 2 * i * size, *up = gate + size;
#pragma omp simd
        for (Long j = 0; j < size; j++) {
            float g = wide(gate[j]);
            put(out[i * size + j], g * sigmoid(g) * wide(up[j]));
        }
    }
}

// What a step's attention reads, in the order of `_Attend` in language.py.
struct Attend {
    void *qkv, *out;                             // [n, (H G + 2 H) w] and [n, H G w]
    const float *cos, *sin;                      // [n, w]; sin with the sign of the half it is added to
    const float *query_norm, *key_norm;          // [w] each, or null
    void *prompt_keys, *prompt_values;           // of this layer, [P, H, w, prompt_places] and [P, H, prompt_places, w]
    void *said_keys, *said_values;               // of this layer, [N, H, w, said_places] and [N, H, said_places, w]
    const Long *owner, *lengths, *born;          // of each row its prompt; of each prompt; of each row its first time
    Long n, heads, groups, width, prompt_places, said_places;
    Long room, time;                             // what is said at `time` stands in column `time % room`
    float scale, eps;
};

// A head of queries or keys: normalised where the model does so, turned by its place, and scaled.
template <class T>
inline void turned(const T* from, const float* norm, float eps, const float* cos, const float* sin, float scale, float* x,
                   float* to, Long w) {
    const Long half = w / 2;
    for (Long i = 0; i < w; i++) x[i] = wide(from[i]);
    if (norm) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Long i = 0; i < w; i++) sum += x[i] * x[i];
        const float inverse = 1.f / std::sqrt(sum / w + eps);
        for (Long i = 0; i < w; i++) x[i] = x[i] * inverse * norm[i];
    }
    for (Long i = 0; i < half; i++) to[i] = (x[i] * cos[i] + x[i + half] * sin[i]) * scale;
    for (Long i = half; i < w; i++) to[i] = (x[i] * cos[i] + x[i - half] * sin[i]) * scale;
}

// out [G, N] = A [G, K] B [K, N], or += where there is `more`. B is read and out is written up to STEP - 1 places beyond a
// row's end. A's rows are `lda` apart and its columns `next`.
template <class T, int G>
inline void small_product(const float* a, Long lda, const T* b, Long ldb, float* out, Long ldo, Long k, Long n, bool more,
                          Long next) {
    for (Long j = 0; j < n; j += STEP) {
        Lanes low[G] = {}, high[G] = {};
        if (more)
            for (int g = 0; g < G; g++) low[g] = load(out + g * ldo + j), high[g] = load(out + g * ldo + j + LANES);
        for (Long i = 0; i < k; i++) {
            const Lanes x = load(b + i * ldb + j), y = load(b + i * ldb + j + LANES);
            for (int g = 0; g < G; g++) low[g] += a[g * lda + i * next] * x, high[g] += a[g * lda + i * next] * y;
        }
        for (int g = 0; g < G; g++) {
            std::memcpy(out + g * ldo + j, &low[g], sizeof(Lanes));
            std::memcpy(out + g * ldo + j + LANES, &high[g], sizeof(Lanes));
        }
    }
}

template <class T>
void product(const float* a, Long lda, const T* b, Long ldb, float* out, Long ldo, Long g, Long k, Long n,
             bool more = false, Long next = 1) {
    for (; g >= 4; g -= 4, a += 4 * lda, out += 4 * ldo) small_product<T, 4>(a, lda, b, ldb, out, ldo, k, n, more, next);
    if (g == 3) small_product<T, 3>(a, lda, b, ldb, out, ldo, k, n, more, next);
    if (g == 2) small_product<T, 2>(a, lda, b, ldb, out, ldo, k, n, more, next);
    if (g == 1) small_product<T, 1>(a, lda, b, ldb, out, ldo, k, n, more, next);
}

inline Long rounded(Long count) { return (count + LANES - 1) / LANES * LANES; }

// So many numbers, from the start of a line of memory: a load across two takes twice as long.
inline float* aligned(std::vector<float>& held, Long count) {
    held.resize(count + LANES);
    return (float*)((uintptr_t(held.data()) + sizeof(Lanes) - 1) / sizeof(Lanes) * sizeof(Lanes));
}

// Softmax of s[0 .. count); the places behind become 0 up to the next LANES.
inline void softmax(float* s, Long count) {
    const Long end = rounded(count);
    for (Long j = count; j < end; j++) s[j] = -INFINITY;
    float most = s[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (Long j = 0; j < end; j++) most = s[j] > most ? s[j] : most;
#pragma omp simd reduction(+ : sum)
    for (Long j = 0; j < end; j++) sum += s[j] = exponential(s[j] - most);
    const float inverse = 1.f / sum;
    for (Long j = 0; j < end; j++) s[j] *= inverse;
}

template <class T>
void attend(const Attend& a) {
    const Long w = a.width, all = (a.groups + 2) * a.heads * w, column = a.time % a.room, wider = rounded(w) + STEP;
#pragma omp parallel if (a.n * a.heads > 1)
    {
        std::vector<float> held;
#pragma omp for schedule(static)
        for (Long b = 0; b < a.n * a.heads; b++) {
            const Long row = b / a.heads, h = b % a.heads, mine = a.owner[row], before = a.lengths[mine];
            const Long said = a.time - a.born[row] + 1, total = before + said, stride = rounded(total) + STEP;
            // Where the ring holds its oldest token, how many follow up to the ring's end, and how many from its start.
            const Long first = (a.time - said + 1) % a.room, straight = said < a.room - first ? said : a.room - first;
            float *out = aligned(held, a.groups * (w + stride + wider) + 2 * w), *s = out + a.groups * wider;
            float *query = s + a.groups * stride, *x = query + a.groups * w, *key = x + w;
            const T* qkv = (const T*)a.qkv + row * all;
            const float *cos = a.cos + row * w, *sin = a.sin + row * w;
            for (Long g = 0; g < a.groups; g++)
                turned(qkv + (h * a.groups + g) * w, a.query_norm, a.eps, cos, sin, a.scale, x, query + g * w, w);
            turned(qkv + (a.heads * a.groups + h) * w, a.key_norm, a.eps, cos, sin, 1.f, x, key, w);

            const Long here = (row * a.heads + h) * a.said_places * w, there = (mine * a.heads + h) * a.prompt_places * w;
            T *keys = (T*)a.said_keys + here, *values = (T*)a.said_values + here;
            for (Long i = 0; i < w; i++) put(keys[i * a.said_places + column], key[i]);
            std::memcpy(values + column * w, qkv + (a.heads * (a.groups + 1) + h) * w, w * sizeof(T));
            const T *prompt_keys = (const T*)a.prompt_keys + there, *prompt_values = (const T*)a.prompt_values + there;

            product(query, w, prompt_keys, a.prompt_places, s, stride, a.groups, w, before);
            product(query, w, keys + first, a.said_places, s + before, stride, a.groups, w, straight);
            product(query, w, keys, a.said_places, s + before + straight, stride, a.groups, w, said - straight);
            for (Long g = 0; g < a.groups; g++) softmax(s + g * stride, total);
            product(s, stride, prompt_values, w, out, wider, a.groups, before, w);
            product(s + before, stride, values + first * w, w, out, wider, a.groups, straight, w, true);
            product(s + before + straight, stride, values, w, out, wider, a.groups, said - straight, w, true);
            T* to = (T*)a.out + (row * a.heads + h) * a.groups * w;
            for (Long g = 0; g < a.groups; g++)
                for (Long i = 0; i < w; i++) put(to[g * w + i], out[g * wider + i]);
        }
    }
}

// Queries and keys of prompts [m, t, (H G + 2 H) w], turned, and values: [m, H G, t, w] and [m, H, t, w] twice.
template <class T>
void split(const T* qkv, const float* cos, const float* sin, const float* query_norm, const float* key_norm, T* query, T* key,
           T* value, Long m, Long t, Long heads, Long groups, Long w, float eps) {
    const Long queries = heads * groups, all = queries + 2 * heads;
#pragma omp parallel
    {
        std::vector<float> held(2 * w);
        float *x = held.data(), *to = x + w;
#pragma omp for schedule(static)
        for (Long i = 0; i < m * t; i++) {
            const Long row = i / t, place = i % t;
            for (Long h = 0; h < all; h++) {
                const T* from = qkv + (i * all + h) * w;
                T* out = h < queries         ? query + ((row * queries + h) * t + place) * w
                         : h < queries + heads ? key + ((row * heads + h - queries) * t + place) * w
                                               : value + ((row * heads + h - queries - heads) * t + place) * w;
                if (h >= queries + heads) {
                    std::memcpy(out, from, w * sizeof(T));
                    continue;
                }
                turned(from, h < queries ? query_norm : key_norm, eps, cos + place * w, sin + place * w, 1.f, x, to, w);
                for (Long j = 0; j < w; j++) put(out[j], to[j]);
            }
        }
    }
}

// -- drawing a token -----------------------------------------------------------------------------------------------

constexpr Long BLOCK = 128;  // tokens whose probabilities are summed before any cumulative sum is taken

// For each row of logits [m, V], times `inverse`, the samples of that row (slot[j] == row): the first token whose
// cumulative probability exceeds noise[j], and its log-probability.
template <class T>
void draw(const T* logits, const Long* slot, const double* noise, float inverse, Long* token, float* logp, Long m, Long n,
          Long size) {
    const Long blocks = (size + BLOCK - 1) / BLOCK;
#pragma omp parallel if (m > 1)
    {
        std::vector<double> cdf(blocks);
#pragma omp for schedule(static)
        for (Long i = 0; i < m; i++) {
            const T* z = logits + i * size;
            float most = wide(z[0]) * inverse;
#pragma omp simd reduction(max : most)
            for (Long j = 0; j < size; j++) {
                const float x = wide(z[j]) * inverse;
                most = x > most ? x : most;
            }
            double total = 0;
            for (Long b = 0; b < blocks; b++) {
                const Long end = (b + 1) * BLOCK < size ? (b + 1) * BLOCK : size;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (Long j = b * BLOCK; j < end; j++) sum += exponential(wide(z[j]) * inverse - most);
                cdf[b] = total += sum;
            }
            for (Long k = 0; k < n; k++) {
                if (slot[k] != i) continue;
                // A target that rounds up to the total would land behind the last token of positive probability.
                const double below = std::nextafter(total, 0.), asked = noise[k] * total, target = asked < below ? asked : below;
                Long b = 0;
                while (b < blocks - 1 && !(cdf[b] > target)) b++;
                const Long start = b * BLOCK, end = start + BLOCK < size ? start + BLOCK : size;
                double inside[BLOCK], sum = 0;
                for (Long j = start; j < end; j++) inside[j - start] = sum += exponential(wide(z[j]) * inverse - most);
                const double limit = std::nextafter(sum, 0.);
                double rest = target - (b ? cdf[b - 1] : 0.);
                rest = rest < limit ? rest : limit;
                Long j = start;
                while (j < end - 1 && !(inside[j - start] > rest)) j++;
                token[k] = j;
                logp[k] = float(wide(z[j]) * inverse - most - std::log(total));
            }
        }
    }
}

// -- the training pass ---------------------------------------------------------------------------------------------

// The gradient of x / sqrt(mean(x^2) + eps) * weight towards x, rows [n, H].
template <class T>
void norm_back(const T* grad, const float* x, const float* weight, float* out, Long n, Long size, float eps) {
#pragma omp parallel for schedule(static) if (n * size > 16384)
    for (Long i = 0; i < n; i++) {
        const float* row = x + i * size;
        const T* g = grad + i * size;
        float square = 0, along = 0;
#pragma omp simd reduction(+ : square, along)
        for (Long j = 0; j < size; j++) square += row[j] * row[j], along += wide(g[j]) * weight[j] * row[j];
        const float inverse = 1.f / std::sqrt(square / size + eps), pull = along / size * inverse * inverse * inverse;
        float* to = out + i * size;
        for (Long j = 0; j < size; j++) to[j] = wide(g[j]) * weight[j] * inverse - row[j] * pull;
    }
}

// silu(gate) * up of two tensors.
template <class T>
void gate_up(const T* gate, const T* up, T* out, Long count) {
#pragma omp parallel for simd schedule(static) if (count > 8192)
    for (Long i = 0; i < count; i++) {
        const float g = wide(gate[i]);
        put(out[i], g * sigmoid(g) * wide(up[i]));
    }
}

// The same once more, and its gradients towards both.
template <class T>
void gate_up_back(const T* grad, const T* gate, const T* up, T* out, T* into_gate, T* into_up, Long count) {
#pragma omp parallel for simd schedule(static) if (count > 8192)
    for (Long i = 0; i < count; i++) {
        const float g = wide(gate[i]), s = sigmoid(g), open = g * s, u = wide(up[i]), upstream = wide(grad[i]);
        put(out[i], open * u);
        put(into_gate[i], upstream * u * (s + open * (1.f - s)));
        put(into_up[i], upstream * open);
    }
}

// Heads [tokens, heads, w] turned by their places, then scaled; cos and sin [tokens, w], the same in both halves.
// `sign` -1 turns them back, which is the gradient.
template <class T>
void turn(const T* x, const float* cos, const float* sin, T* out, Long tokens, Long heads, Long w, float sign, float scale) {
    const Long half = w / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * w > 8192)
    for (Long t = 0; t < tokens; t++) {
        const float *c = cos + t * w, *s = sin + t * w;
        for (Long h = 0; h < heads; h++) {
            const T* from = x + (t * heads + h) * w;
            T* to = out + (t * heads + h) * w;
            for (Long i = 0; i < half; i++) {
                const float low = wide(from[i]), high = wide(from[i + half]);
                put(to[i], (low * c[i] - sign * high * s[i]) * scale);
                put(to[i + half], (high * c[i] + sign * low * s[i]) * scale);
            }
        }
    }
}

// Attention of a packed row, in the order of `_Packed` in language.py: what its tokens read or, where there is a `grad`,
// the gradients of that.
struct Packed {
    const void *q, *k, *v;  // [S, H G, w], scaled, and [S, H, w] twice
    const Long *rows;       // [R, 4]: tokens from [2] to [3] see those from [0] to [1], and those of themselves up to them
    const Long *first;      // [F + 1]: the rows of each family; the first of them is what the others see, or sees nothing
    const void *grad;       // [S, H G, w], or null
    void *out;              // what is read, or the gradient of q
    void *into_k, *into_v;  // [S, H, w]
    Long families, heads, groups, width;
};

constexpr Long QUERIES = 16;  // so many are read at a time; what only later ones see is left out

// Rows [n, w] in float.
template <class T>
inline void widened(const T* x, Long ldx, float* to, Long n, Long w) {
    for (Long j = 0; j < n; j++)
        for (Long i = 0; i < w; i++) to[j * w + i] = wide(x[j * ldx + i]);
}

// The same on its side: [w, n], LANES x LANES at a time: four rounds of a perfect shuffle.
template <class T>
inline void on_its_side(const T* x, Long ldx, float* to, Long ld, Long n, Long w) {
    for (Long j = 0; j < n; j += LANES)
        for (Long i = 0; i < w; i += LANES) {
            Lanes a[LANES] = {}, b[LANES];
            for (Long r = 0; r < std::min(LANES, n - j); r++) a[r] = load(x + (j + r) * ldx + i);
            for (int round = 0; round < 4; round++) {
                for (Long r = 0; r < LANES / 2; r++) {
                    const Lanes u = a[r], v = a[r + LANES / 2];
                    b[2 * r] = SHUFFLED(u, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                    b[2 * r + 1] = SHUFFLED(u, v, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
                }
                std::memcpy(a, b, sizeof a);
            }
            for (Long r = 0; r < LANES; r++) std::memcpy(to + (i + r) * ld + j, &a[r], sizeof a[r]);
        }
}

// One key head of a family, the rows from `row` on.
template <class T>
void packed_head(const Packed& a, const Long* row, const Long* last, Long head, std::vector<float>& held) {
    const Long w = a.width, all = a.heads * a.groups * w, kept = a.heads * w, *const prompt = row;
    Long longest = 0;
    for (const Long* r = row; r < last; r += 4) longest = std::max(longest, r[1] - r[0] + r[3] - r[2]);
    const Long ld = rounded(longest) + STEP;
    // What is seen stands before what is the row's own, here and in the scores; it is there from the first row on.
    float *keys = aligned(held, 4 * w * ld + 2 * QUERIES * ld + 3 * QUERIES * w), *values = keys + w * ld;  // [w, ld]
    float *into_k = values + w * ld, *into_v = into_k + ld * w;        // [ld, w]
    float *p = into_v + ld * w, *slope = p + QUERIES * ld;             // [QUERIES, ld]
    float *query = slope + QUERIES * ld, *grad = query + QUERIES * w;  // [QUERIES, w]
    float* made = grad + QUERIES * w;
    const auto give = [&](const Long* r, Long from) {
        for (Long j = 0; j < r[3] - r[2]; j++)
            for (Long i = 0; i < w; i++) {
                const Long to = (r[2] + j) * kept + head * w + i;
                put(((T*)a.into_k)[to], into_k[(from + j) * w + i]), put(((T*)a.into_v)[to], into_v[(from + j) * w + i]);
            }
    };
    for (; row < last; row += 4) {
        const Long before = row[1] - row[0], own = row[3] - row[2];
        const Long there = row[0] * kept + head * w, here = row[2] * kept + head * w;
        const T *k_there = (const T*)a.k + there, *k_here = (const T*)a.k + here;
        const T *v_there = (const T*)a.v + there, *v_here = (const T*)a.v + here;
        on_its_side(k_here, kept, keys + before, ld, own, w);
        if (a.grad) {
            on_its_side(v_here, kept, values + before, ld, own, w);
            std::fill(into_k + before * w, into_k + (before + own) * w, 0.f);
            std::fill(into_v + before * w, into_v + (before + own) * w, 0.f);
        }
        for (Long start = 0; start < own; start += QUERIES)
            for (Long g = 0; g < a.groups; g++) {
                const Long t = std::min(QUERIES, own - start), seen = before + start + 1, n = seen + t - 1;
                const Long end = rounded(n), place = (row[2] + start) * all + (head * a.groups + g) * w;
                widened((const T*)a.q + place, all, query, t, w);
                product(query, w, keys, ld, p, ld, t, w, n);
                for (Long i = 0; i < t; i++) {
                    for (Long j = seen + i; j < n; j++) p[i * ld + j] = -INFINITY;
                    softmax(p + i * ld, n);
                }
                if (a.grad) {
                    widened((const T*)a.grad + place, all, grad, t, w);
                    product(grad, w, values, ld, slope, ld, t, w, n);
                    for (Long i = 0; i < t; i++) {
                        float *s = slope + i * ld, *q = p + i * ld, along = 0;
#pragma omp simd reduction(+ : along)
                        for (Long j = 0; j < end; j++) along += j < seen + i ? s[j] * q[j] : 0.f;
#pragma omp simd
                        for (Long j = 0; j < end; j++) s[j] = j < seen + i ? q[j] * (s[j] - along) : 0.f;
                    }
                    product(slope, 1, query, w, into_k, w, n, t, w, true, ld);
                    product(p, 1, grad, w, into_v, w, n, t, w, true, ld);
                }
                const float* weight = a.grad ? slope : p;
                product(weight, ld, a.grad ? k_there : v_there, kept, made, w, t, before, w);
                product(weight + before, ld, a.grad ? k_here : v_here, kept, made, w, t, start + t, w, true);
                for (Long i = 0; i < t; i++)
                    for (Long j = 0; j < w; j++) put(((T*)a.out)[place + i * all + j], made[i * w + j]);
            }
        if (a.grad && row != prompt) give(row, before);
    }
    if (a.grad) give(prompt, 0);
}

template <class T>
void packed(const Packed& a) {
#pragma omp parallel
    {
        std::vector<float> held;
#pragma omp for collapse(2) schedule(dynamic)
        for (Long f = 0; f < a.families; f++)
            for (Long head = 0; head < a.heads; head++)
                packed_head<T>(a, a.rows + 4 * a.first[f], a.rows + 4 * a.first[f + 1], head, held);
    }
}

// Rows of logits [n, V], times scale[i] unless null: logp[i] of token[i], and the entropy unless null. With `slopes`
// the logits become p, and, unless null, `entropy_slopes` becomes -p (log p + entropy).
template <class T>
void read_out(T* logits, const Long* token, const float* scale, float* logp, float* entropy, T* entropy_slopes, Long n,
              Long size, int64_t slopes) {
#pragma omp parallel for schedule(static)
    for (Long i = 0; i < n; i++) {
        T* z = logits + i * size;
        const float factor = scale ? scale[i] : 1.f;
        float most = wide(z[0]) * factor;
#pragma omp simd reduction(max : most)
        for (Long j = 0; j < size; j++) {
            const float x = wide(z[j]) * factor;
            most = x > most ? x : most;
        }
        double total = 0, along = 0;
        for (Long first = 0; first < size; first += 4 * BLOCK) {  // sums of sums: float32 alone loses a digit
            const Long end = first + 4 * BLOCK < size ? first + 4 * BLOCK : size;
            float sum = 0, weighted = 0;
            if (entropy) {
#pragma omp simd reduction(+ : sum, weighted)
                for (Long j = first; j < end; j++) {
                    const float x = wide(z[j]) * factor - most, e = exponential(x);
                    sum += e, weighted += e > 0.f ? e * x : 0.f;
                }
            } else {
#pragma omp simd reduction(+ : sum)
                for (Long j = first; j < end; j++) sum += exponential(wide(z[j]) * factor - most);
            }
            total += sum, along += weighted;
        }
        const float log_total = float(std::log(total)), inverse = float(1. / total), h = float(std::log(total) - along / total);
        logp[i] = wide(z[token[i]]) * factor - most - log_total;
        if (entropy) entropy[i] = h;
        if (!slopes) continue;
        if (entropy_slopes) {
            T* to = entropy_slopes + i * size;
#pragma omp simd
            for (Long j = 0; j < size; j++) {
                const float x = wide(z[j]) * factor - most, e = exponential(x);
                put(to[j], e > 0.f ? -e * inverse * (x - log_total + h) : 0.f);
            }
        }
#pragma omp simd
        for (Long j = 0; j < size; j++) put(z[j], exponential(wide(z[j]) * factor - most) * inverse);
    }
}

}  // namespace

extern "C" {
#define KERNELS(T, name)                                                                                              \
    void add_norm_##name(float* x, const T* delta, const float* weight, T* out, Long n, Long size, float eps) {       \
        add_norm(x, delta, weight, out, n, size, eps);                                                                \
    }                                                                                                                 \
    void gated_##name(const T* both, T* out, Long n, Long size) { gated(both, out, n, size); }                        \
    void attend_##name(const Attend* a) { attend<T>(*a); }                                                            \
    void split_##name(const T* qkv, const float* cos, const float* sin, const float* query_norm,                      \
                      const float* key_norm, T* query, T* key, T* value, Long m, Long t, Long heads, Long groups,     \
                      Long w, float eps) {                                                                            \
        split(qkv, cos, sin, query_norm, key_norm, query, key, value, m, t, heads, groups, w, eps);                   \
    }                                                                                                                 \
    void draw_##name(const T* logits, const Long* slot, const double* noise, float inverse, Long* token, float* logp, \
                     Long m, Long n, Long size) {                                                                     \
        draw(logits, slot, noise, inverse, token, logp, m, n, size);                                                  \
    }                                                                                                                 \
    void norm_back_##name(const T* grad, const float* x, const float* weight, float* out, Long n, Long size,          \
                          float eps) {                                                                                \
        norm_back(grad, x, weight, out, n, size, eps);                                                                \
    }                                                                                                                 \
    void gate_up_##name(const T* gate, const T* up, T* out, Long count) { gate_up(gate, up, out, count); }            \
    void gate_up_back_##name(const T* grad, const T* gate, const T* up, T* out, T* into_gate, T* into_up, Long count) { \
        gate_up_back(grad, gate, up, out, into_gate, into_up, count);                                                 \
    }                                                                                                                 \
    void turn_##name(const T* x, const float* cos, const float* sin, T* out, Long tokens, Long heads, Long w,         \
                     float sign, float scale) {                                                                       \
        turn(x, cos, sin, out, tokens, heads, w, sign, scale);                                                        \
    }                                                                                                                 \
    void packed_##name(const Packed* a) { packed<T>(*a); }                                                            \
    void read_out_##name(T* logits, const Long* token, const float* scale, float* logp, float* entropy,               \
                         T* entropy_slopes, Long n, Long size, Long slopes) {                                         \
        read_out(logits, token, scale, logp, entropy, entropy_slopes, n, size, slopes);                               \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
}
