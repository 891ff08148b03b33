// A small fully connected network on a CPU: forward in one call, backward in another.
//
// For the networks of control torch spends more time around a product than in it. One product serves all: c = a b, with
// b laid out in panels as wide as a tile of registers and a read as it lies. Sums are float32, in one order whatever
// the threads. With `half` the products between hidden layers have bfloat16 factors, where the processor multiplies
// pairs of them. Compiled when first used; see __init__.py. A nan goes in and comes out.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#include <immintrin.h>
#define PAIRS 1
#endif

namespace {

using Long = int64_t;

#if defined(__AVX512F__)
constexpr int LANES = 16, TALL = 6, WIDE = 4;  // a tile of TALL rows and WIDE vectors, in 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, TALL = 6, WIDE = 2;  // in 16
#elif defined(__aarch64__)
constexpr int LANES = 4, TALL = 6, WIDE = 4;
#else
constexpr int LANES = 4, TALL = 6, WIDE = 2;
#endif
constexpr Long PANEL = LANES * WIDE;
constexpr Long FEW = 2;  // columns or rows up to which a product is not worth panels
typedef float Lanes __attribute__((vector_size(LANES * 4)));

inline Long least(Long a, Long b) { return a < b ? a : b; }
inline Long panels(Long columns) { return (columns + PANEL - 1) / PANEL * PANEL; }
inline Lanes load(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// -- products ------------------------------------------------------------------------------------------------------

struct Single {
    using Number = float;
    static Lanes take(const float* from) { return load(from); }
    static Lanes spread(float x) { return x - Lanes{}; }
    static Lanes add(Lanes sum, Lanes a, Lanes b) { return sum + a * b; }
};

#ifdef PAIRS
struct Pair {  // two bfloat16 that follow each other in the sum
    using Number = uint32_t;
    static __m512i take(const uint32_t* from) { return _mm512_loadu_si512(from); }
    static __m512i spread(uint32_t x) { return _mm512_set1_epi32(int(x)); }
    static Lanes add(Lanes sum, __m512i a, __m512i b) {
        return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// c [rows, columns] = start + a b for one panel: a(i, k) lies at a[i * row + k * step], b(k, .) at b[k * PANEL].
template <class Kind>
struct Strip {
    const typename Kind::Number* a;
    Long row, step;
    const typename Kind::Number* b;
    Long depth;
    const float* start;
    float* c;
    Long stride, columns;

    template <int H, int W>
    void tile(Long first) const {
        Lanes sums[H][W];
        for (int j = 0; j < W; j++)
            for (int i = 0; i < H; i++) sums[i][j] = start ? load(start + j * LANES) : Lanes{};
        const auto* left = a + first * row;
        for (Long k = 0; k < depth; k++) {
            decltype(Kind::take(b)) right[W];
#pragma GCC unroll 8
            for (int j = 0; j < W; j++) right[j] = Kind::take(b + k * PANEL + j * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < H; i++) {
                const auto one = Kind::spread(left[i * row + k * step]);
#pragma GCC unroll 8
                for (int j = 0; j < W; j++) sums[i][j] = Kind::add(sums[i][j], one, right[j]);
            }
        }
        for (int i = 0; i < H; i++)
            for (int j = 0; j < W; j++) {
                float* to = c + (first + i) * stride + j * LANES;
                if (columns >= (j + 1) * LANES)
                    std::memcpy(to, &sums[i][j], sizeof(Lanes));
                else if (columns > j * LANES)
                    std::memcpy(to, &sums[i][j], (columns - j * LANES) * 4);
            }
    }
    template <int H>
    void rows(Long first) const {
        if (columns <= LANES)
            tile<H, 1>(first);
        else if (columns <= 2 * LANES)
            tile<H, 2>(first);
        else
            tile<H, WIDE>(first);
    }
    template <int H>
    void rest(Long first, Long count) const {
        if (count == H)
            rows<H>(first);
        else if constexpr (H > 1)
            rest<H - 1>(first, count);
    }
};

// c [m, n] = start + a b, b in panels; start in whole panels too, or null.
template <class Kind>
void product(const typename Kind::Number* a, Long row, Long step, const typename Kind::Number* b, Long depth,
             const float* start, float* c, Long m, Long n) {
    for (Long first = 0; first < n; first += PANEL) {
        const Strip<Kind> strip{a,         row, step, b + first * depth, depth, start ? start + first : nullptr,
                                c + first, n,   least(PANEL, n - first)};
        Long i = 0;
        for (; i + TALL <= m; i += TALL) strip.template rows<TALL>(i);
        if (i < m) strip.template rest<TALL - 1>(i, m - i);
    }
}

// A matrix [depth, n] in panels.
template <class Number>
void laid(const Number* from, Long depth, Long n, Number* to) {
    for (Long first = 0; first < n; first += PANEL) {
        const Long width = least(PANEL, n - first);
        for (Long k = 0; k < depth; k++, to += PANEL) {
            std::memcpy(to, from + k * n + first, width * sizeof(Number));
            if (width < PANEL) std::memset(to + width, 0, (PANEL - width) * sizeof(Number));
        }
    }
}

// The transpose of [n, depth] in panels.
template <class Number>
void turned(const Number* from, Long n, Long depth, Number* to) {
    for (Long first = 0; first < n; first += PANEL, to += depth * PANEL) {
        const Long width = least(PANEL, n - first);
        if (width < PANEL) std::memset(to, 0, depth * PANEL * sizeof(Number));
        for (Long k = 0; k < depth; k += LANES)
            for (Long j = 0; j < width; j++)
                for (Long i = k; i < least(k + LANES, depth); i++) to[i * PANEL + j] = from[(first + j) * depth + i];
    }
}

// -- layers --------------------------------------------------------------------------------------------------------

inline float tangent(float x) {  // tanh by Eigen's rational approximation, a few units in the last place
    const float low = x < -7.9053111f ? -7.9053111f : x, y = low > 7.9053111f ? 7.9053111f : low, s = y * y;
    float p = -2.76076847742355e-16f, q = 1.19825839466702e-06f;
    p = p * s + 2.00018790482477e-13f;
    p = p * s - 8.60467152213735e-11f;
    p = p * s + 5.12229709037114e-08f;
    p = p * s + 1.48572235717979e-05f;
    p = p * s + 6.37261928875436e-04f;
    p = p * s + 4.89352455891786e-03f;
    q = q * s + 1.18534705686654e-04f;
    q = q * s + 2.26843463243900e-03f;
    q = q * s + 4.89352518554385e-03f;
    return y * p / q;
}

enum Activation : Long { TANH, RELU };

void activate(float* x, Long count, Long kind) {
    if (kind == RELU)
#pragma omp simd
        for (Long i = 0; i < count; i++) x[i] = x[i] < 0.f ? 0.f : x[i];
    else
#pragma omp simd
        for (Long i = 0; i < count; i++) x[i] = tangent(x[i]);
}

// The gradient before the activation, from the one behind it and what the activation gave.
void through(float* grad, const float* made, Long count, Long kind) {
    if (kind == RELU)
#pragma omp simd
        for (Long i = 0; i < count; i++) grad[i] = made[i] <= 0.f ? 0.f : grad[i];
    else
#pragma omp simd
        for (Long i = 0; i < count; i++) grad[i] *= 1.f - made[i] * made[i];
}

// to [n] = sums of [rows, n] over its rows.
void down(const float* from, Long rows, Long n, float* to) {
    std::memset(to, 0, n * 4);
    for (Long r = 0; r < rows; r++)
#pragma omp simd
        for (Long j = 0; j < n; j++) to[j] += from[r * n + j];
}

struct Scratch {  // of one thread, kept between calls
    std::vector<float> panels, start, grad, next, wide;
    static float* of(std::vector<float>& some, Long count) {
        if (Long(some.size()) < count) some.resize(count);
        return some.data();
    }
};
thread_local Scratch scratch;

// Layers of all members, in the order of `_Layers` in dense.py.
struct Layers {
    const float* x;             // [rows, widths[0]], which all members read
    const Long* widths;         // [count + 1]
    float* const* held;         // weight [members, O, I] and bias [members, O] of each layer
    float* out;                 // [members, rows, O]
    float* saved;               // what later layers read, [rows, I] after each other; then the next member's
    const float* grad;          // backward: of out
    float* const* into;         // of what is held, or null
    float* into_x;              // [rows, widths[0]], or null
    Long rows, members, count, activation, half;

    Long kept() const {  // numbers that one member saves
        Long sum = 0;
        for (Long i = 1; i < count; i++) sum += rows * widths[i];
        return sum;
    }
    bool paired(Long layer) const { return half && layer > 0 && layer < count - 1; }
};

// y [rows, O] = x W^T + b of one layer.
void forward_layer(const float* x, const float* weight, const float* bias, float* y, Long rows, Long inputs, Long outputs) {
    if (rows <= FEW || outputs <= FEW) {
        for (Long r = 0; r < rows; r++)
            for (Long o = 0; o < outputs; o++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (Long i = 0; i < inputs; i++) sum += x[r * inputs + i] * weight[o * inputs + i];
                y[r * outputs + o] = sum + bias[o];
            }
        return;
    }
    float* b = Scratch::of(scratch.panels, panels(outputs) * inputs);
    float* start = Scratch::of(scratch.start, panels(outputs));
    std::memcpy(start, bias, outputs * 4);
    std::memset(start + outputs, 0, (panels(outputs) - outputs) * 4);
    turned(weight, outputs, inputs, b);
    product<Single>(x, inputs, 1, b, inputs, start, y, rows, outputs);
}

// into_weight [O, I] = grad^T x.
void into_weight(const float* grad, const float* x, float* into, Long rows, Long inputs, Long outputs) {
    if (outputs <= FEW) {
        std::memset(into, 0, outputs * inputs * 4);
        for (Long r = 0; r < rows; r++)
            for (Long o = 0; o < outputs; o++) {
                const float g = grad[r * outputs + o];
#pragma omp simd
                for (Long i = 0; i < inputs; i++) into[o * inputs + i] += g * x[r * inputs + i];
            }
        return;
    }
    float* b = Scratch::of(scratch.panels, panels(inputs) * rows);
    laid(x, rows, inputs, b);
    product<Single>(grad, 1, outputs, b, rows, nullptr, into, outputs, inputs);
}

// into_x [rows, I] = grad W.
void into_read(const float* grad, const float* weight, float* into, Long rows, Long inputs, Long outputs) {
    if (outputs <= FEW) {
        for (Long r = 0; r < rows; r++) {
#pragma omp simd
            for (Long i = 0; i < inputs; i++) into[r * inputs + i] = grad[r * outputs] * weight[i];
            for (Long o = 1; o < outputs; o++)
#pragma omp simd
                for (Long i = 0; i < inputs; i++) into[r * inputs + i] += grad[r * outputs + o] * weight[o * inputs + i];
        }
        return;
    }
    float* b = Scratch::of(scratch.panels, panels(inputs) * outputs);
    laid(weight, outputs, inputs, b);
    product<Single>(grad, outputs, 1, b, outputs, nullptr, into, rows, inputs);
}

#ifdef PAIRS
inline __mmask16 some(Long left) { return __mmask16(left < 16 ? (1u << left) - 1 : 0xffff); }  // of sixteen lanes
inline __m256i narrow(const float* from, __mmask16 lanes) {
    return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, from));
}

// Numbers as bfloat16, pairs of neighbours.
void along(const float* from, Long count, uint32_t* to) {
    for (Long i = 0; i < count; i += 16)
        _mm256_mask_storeu_epi16(to + i / 2, some(count - i), narrow(from + i, some(count - i)));
}

// [rows, n] as bfloat16, pairs of rows: [rows / 2, n].
void across(const float* from, Long rows, Long n, uint32_t* to) {
    for (Long r = 0; r < rows; r += 2, to += n)
        for (Long j = 0; j < n; j += 16) {
            const __mmask16 lanes = some(n - j);
            const __m512i low = _mm512_cvtepu16_epi32(narrow(from + r * n + j, lanes));
            const __m512i high = _mm512_cvtepu16_epi32(narrow(from + (r + 1) * n + j, lanes));
            _mm512_mask_storeu_epi32(to + j, lanes, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

uint32_t* numbers(std::vector<float>& some, Long count) { return reinterpret_cast<uint32_t*>(Scratch::of(some, count)); }

void forward_pairs(const float* x, const float* weight, const float* bias, float* y, Long rows, Long inputs, Long outputs) {
    uint32_t *b = numbers(scratch.panels, panels(outputs) * inputs / 2), *narrow = numbers(scratch.wide, outputs * inputs / 2);
    float* start = Scratch::of(scratch.start, panels(outputs));
    std::memcpy(start, bias, outputs * 4);
    std::memset(start + outputs, 0, (panels(outputs) - outputs) * 4);
    along(weight, outputs * inputs, narrow);
    turned(narrow, outputs, inputs / 2, b);
    uint32_t* a = numbers(scratch.wide, rows * inputs / 2);
    along(x, rows * inputs, a);
    product<Pair>(a, inputs / 2, 1, b, inputs / 2, start, y, rows, outputs);
}

void into_weight_pairs(const float* grad, const float* x, float* into, Long rows, Long inputs, Long outputs) {
    uint32_t *b = numbers(scratch.panels, panels(inputs) * rows / 2), *a = numbers(scratch.wide, rows * inputs / 2);
    across(x, rows, inputs, a);
    laid(a, rows / 2, inputs, b);
    a = numbers(scratch.wide, rows * outputs / 2);
    across(grad, rows, outputs, a);
    product<Pair>(a, 1, outputs, b, rows / 2, nullptr, into, outputs, inputs);
}

void into_read_pairs(const float* grad, const float* weight, float* into, Long rows, Long inputs, Long outputs) {
    uint32_t *b = numbers(scratch.panels, panels(inputs) * outputs / 2), *a = numbers(scratch.wide, outputs * inputs / 2);
    across(weight, outputs, inputs, a);
    laid(a, outputs / 2, inputs, b);
    a = numbers(scratch.wide, rows * outputs / 2);
    along(grad, rows * outputs, a);
    product<Pair>(a, outputs / 2, 1, b, outputs / 2, nullptr, into, rows, inputs);
}
#else
constexpr auto forward_pairs = forward_layer, into_weight_pairs = into_weight, into_read_pairs = into_read;
#endif

void forward_member(const Layers& net, Long member) {
    const float* x = net.x;
    float* saved = net.saved + member * net.kept();
    for (Long i = 0; i < net.count; i++) {
        const Long inputs = net.widths[i], outputs = net.widths[i + 1], last = i == net.count - 1;
        const float *weight = net.held[2 * i] + member * outputs * inputs, *bias = net.held[2 * i + 1] + member * outputs;
        float* y = last ? net.out + member * net.rows * outputs : saved;
        (net.paired(i) ? forward_pairs : forward_layer)(x, weight, bias, y, net.rows, inputs, outputs);
        if (last) return;
        activate(y, net.rows * outputs, net.activation);
        x = y, saved += net.rows * outputs;
    }
}

void backward_member(const Layers& net, Long member) {
    const Long rows = net.rows;
    const float* saved = net.saved + (member + 1) * net.kept();
    const float* grad = net.grad + member * rows * net.widths[net.count];
    for (Long i = net.count - 1; i >= 0; i--) {
        const Long inputs = net.widths[i], outputs = net.widths[i + 1];
        if (i > 0) saved -= rows * inputs;
        const float* read = i > 0 ? saved : net.x;
        if (net.into) {
            down(grad, rows, outputs, net.into[2 * i + 1] + member * outputs);
            float* into = net.into[2 * i] + member * outputs * inputs;
            (net.paired(i) ? into_weight_pairs : into_weight)(grad, read, into, rows, inputs, outputs);
        }
        if (i == 0 && !net.into_x) return;
        const float* weight = net.held[2 * i] + member * outputs * inputs;
        float* next = i > 0 || member > 0 ? Scratch::of(scratch.next, rows * inputs) : net.into_x;
        (net.paired(i) ? into_read_pairs : into_read)(grad, weight, next, rows, inputs, outputs);
        if (i > 0) {
            through(next, read, rows * inputs, net.activation);
            scratch.grad.swap(scratch.next);
            grad = next;
        } else if (member > 0)
#pragma omp simd
            for (Long j = 0; j < rows * inputs; j++) net.into_x[j] += next[j];
    }
}

}  // namespace

extern "C" {
int64_t pairs() {
#ifdef PAIRS
    return 1;
#else
    return 0;
#endif
}
// Of actions [rows, n] under means and one log deviation for each column: z, and logp [rows] but for -n log(2 pi) / 2.
void gaussian(const float* mean, const float* action, const float* log_std, float* z, float* logp, Long rows, Long n) {
    float* inverse = Scratch::of(scratch.start, n);
    float level = 0;
    for (Long j = 0; j < n; j++) inverse[j] = std::exp(-log_std[j]), level += log_std[j];
    for (Long r = 0; r < rows; r++) {
        float sum = 0;
        for (Long j = 0; j < n; j++) {
            const float at = z[r * n + j] = (action[r * n + j] - mean[r * n + j]) * inverse[j];
            sum += at * at;
        }
        logp[r] = -0.5f * sum - level;
    }
}
// The gradients towards means and log deviations from that of logp.
void gaussian_back(const float* grad, const float* z, const float* log_std, float* into_mean, float* into_log_std,
                   Long rows, Long n) {
    float* inverse = Scratch::of(scratch.start, n);
    for (Long j = 0; j < n; j++) inverse[j] = std::exp(-log_std[j]), into_log_std[j] = 0;
    for (Long r = 0; r < rows; r++)
        for (Long j = 0; j < n; j++) {
            const float at = z[r * n + j], along = grad[r] * at;
            into_mean[r * n + j] = along * inverse[j];
            into_log_std[j] += along * at - grad[r];
        }
}
// The l2 norm of all numbers of some tensors, summed in float64.
void norm(float* const* tensors, const Long* sizes, Long count, float* to) {
    double total = 0;
    for (Long t = 0; t < count; t++) {
        const float* x = tensors[t];
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Long i = 0; i < sizes[t]; i++) sum += double(x[i]) * x[i];
        total += sum;
    }
    *to = float(std::sqrt(total));
}
void forward(const Layers* net) {
    for (Long e = 0; e < net->members; e++) forward_member(*net, e);
}
void backward(const Layers* net) {
    for (Long e = 0; e < net->members; e++) backward_member(*net, e);
}
}
