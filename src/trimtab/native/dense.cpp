// A small fully connected network on a CPU: forward in one call, backward in another.
//
// For the networks of control torch spends more time around a product than in it. One product serves all: c = a b, with
// b laid out in panels as wide as a tile of registers and a read as it lies. Sums are float32, in one order whatever
// the threads. With `half` the products between hidden layers have bfloat16 factors, where the processor multiplies
// pairs of them. What ReLU made zero is not multiplied: with half of the numbers zero that is most of half the work.
// Compiled when first used; see __init__.py. A nan goes in and comes out.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "smooth.h"
#ifdef __AVX512F__
#include <immintrin.h>
#define SKIPS 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#define PAIRS 1
#endif

namespace {


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

struct Scratch {  // of one thread, kept between calls
    std::vector<float> panels, start, grad, next, wide, values, places, counts, sums;
    static float* of(std::vector<float>& some, Long count) {  // from the start of a cache line
        if (Long(some.size()) < count + 15) some.resize(count + 15);
        return some.data() + (64 - reinterpret_cast<uintptr_t>(some.data()) % 64) % 64 / 4;
    }
    static uint32_t* numbers(std::vector<float>& some, Long count) { return reinterpret_cast<uint32_t*>(of(some, count)); }
};
thread_local Scratch scratch;

#ifdef SKIPS
inline __mmask16 some(Long left) { return __mmask16(left < 16 ? (1u << left) - 1 : 0xffff); }  // of sixteen lanes

// to [16, .] = the transpose of the first rows and columns of `from`, up to 16 of each; nothing beyond them is read.
inline void transposed(const void* from, Long stride, Long rows, Long columns, void* to, Long apart) {
    __m512i x[16], y[16];
    for (Long i = 0; i < 16; i++)
        x[i] = i < rows ? _mm512_maskz_loadu_epi32(some(columns), (const uint32_t*)from + i * stride) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2)
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]), x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]), x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        const __m512i even = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), odd = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        const __m512i even2 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        const __m512i odd2 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
        y[i] = _mm512_shuffle_i32x4(even, even2, 0x88), y[i + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        y[i + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd), y[i + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_si512((uint32_t*)to + i * apart, y[i]);
}

// How zeros are skipped: one number times a row of the panel at a time, ...
struct Alone {
    using Number = float;
    static constexpr int TAKES = 1, FIFTHS = 4;  // of all numbers may be other than zero, else tiles are faster
    static constexpr Long CHUNK = 64;            // of a sum at a time: so much of a panel stays in the nearest cache
    static void keep(float* to, __mmask16 held, __m512i x) { _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(held, x)); }
    template <int W>
    static void add(Lanes* sum, const float* value, const uint32_t* place, const float* b) {
        const Lanes one = *value - Lanes{};
        const float* right = b + *place;
#pragma GCC unroll 8
        for (int j = 0; j < W; j++) sum[j] += one * load(right + j * LANES);
    }
};
#ifdef PAIRS
struct Couple {  // ... or two bfloat16 times two rows, whose columns lie in the order in which they are brought together
    using Number = uint16_t;
    static constexpr int TAKES = 2, FIFTHS = 3;
    static constexpr Long CHUNK = 128;
    static void keep(uint16_t* to, __mmask16 held, __m512i x) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)_mm512_maskz_compress_epi32(held, x)));
    }
    template <int W>
    static void add(Lanes* sum, const uint16_t* value, const uint32_t* place, const uint16_t* b) {
        int both;
        std::memcpy(&both, value, 4);
        const __m512bh one = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 8
        for (int j = 0; j < W; j += 2) {
            const __m512i x = _mm512_loadu_si512(b + place[0] + j * LANES), y = _mm512_loadu_si512(b + place[1] + j * LANES);
            sum[j] = (Lanes)_mm512_dpbf16_ps((__m512)sum[j], one, (__m512bh)_mm512_unpacklo_epi16(x, y));
            sum[j + 1] = (Lanes)_mm512_dpbf16_ps((__m512)sum[j + 1], one, (__m512bh)_mm512_unpackhi_epi16(x, y));
        }
    }
};
#endif

constexpr Long LISTED = 1 << 17;  // numbers that are looked at before they are used

// The numbers of `a` that are not zero, with their places in a panel: of the first CHUNK of each row, then of the next.
template <class How>
struct Lists {
    const typename How::Number* values;
    const uint32_t *places, *counts;  // a count is of whole TAKES
    bool worth;                       // enough zeros to go by lists
};

// a(i, k) lies at a[i * row + k * step]; one of the two is 1.
template <class How>
Lists<How> listed(const float* a, Long row, Long step, Long m, Long depth) {
    const Long chunks = (depth + How::CHUNK - 1) / How::CHUNK, most = m * (depth + chunks) + 16;
    auto* values = reinterpret_cast<typename How::Number*>(Scratch::of(scratch.values, most));
    uint32_t *places = Scratch::numbers(scratch.places, most), *counts = Scratch::numbers(scratch.counts, m * chunks);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Long made = 0;
    alignas(64) float block[16 * How::CHUNK];
    for (Long first = 0, at = 0; first < depth; first += How::CHUNK) {
        const Long width = least(How::CHUNK, depth - first);
        for (Long i = 0; i < m; i++) {
            const float* from = a + i * row + first * step;
            if (step != 1) {
                if (i % 16 == 0)
                    for (Long k = 0; k < width; k += 16)
                        transposed(from + k * step, step, least(16, width - k), least(16, m - i), block + k, How::CHUNK);
                from = block + i % 16 * How::CHUNK;
            }
            const Long before = made;
            for (Long k = 0; k < width; k += 16) {
                const __m512i x = _mm512_maskz_loadu_epi32(some(width - k), from + k);
                const __mmask16 held = _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x7fffffff));
                const __m512i place = _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(int(first + k))), 6);
                How::keep(values + made, held, x);
                _mm512_storeu_si512(places + made, _mm512_maskz_compress_epi32(held, place));
                made += __builtin_popcount(held);
            }
            if ((made - before) % How::TAKES) values[made] = 0, places[made] = places[made - 1], made++;
            counts[at++] = uint32_t(made - before) / How::TAKES;
        }
    }
    return {values, places, counts, 5 * made <= How::FIFTHS * m * depth};
}

// One panel of c [m, columns] = start + a b, W vectors wide, by the lists of `a`.
template <class How, int W>
void skip(const Lists<How>& lists, const typename How::Number* b, Long depth, const float* start, float* c, Long stride,
          Long columns, Long m) {
    const bool whole = columns == W * LANES;
    float* sums = whole ? c : Scratch::of(scratch.sums, m * PANEL);
    const Long apart = whole ? stride : PANEL;
    const auto* value = lists.values;
    const uint32_t *place = lists.places, *count = lists.counts;
    for (Long first = 0; first < depth; first += How::CHUNK)
        for (Long i = 0; i < m; i++, count++) {
            float* to = sums + i * apart;
            const float* from = first ? to : start;
            Lanes sum[W];
            for (int j = 0; j < W; j++) sum[j] = from ? load(from + j * LANES) : Lanes{};
            for (uint32_t k = 0; k < *count; k++, value += How::TAKES, place += How::TAKES)
                How::template add<W>(sum, value, place, b);
            for (int j = 0; j < W; j++) std::memcpy(to + j * LANES, &sum[j], sizeof(Lanes));
        }
    if (!whole)
        for (Long i = 0; i < m; i++) std::memcpy(c + i * stride, sums + i * PANEL, columns * 4);
}
#endif

// c [m, n] = start + a b, b in panels; start in whole panels too, or null.
template <class Kind>
void tiles(const typename Kind::Number* a, Long row, Long step, const typename Kind::Number* b, Long depth,
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
#ifdef SKIPS
        Long whole = 0;  // a block of sixteen writes sixteen rows
        for (; whole + 16 <= depth; whole += 16)
            for (Long j = 0; j < width; j += 16)
                transposed(from + (first + j) * depth + whole, depth, least(16, width - j), 16, to + whole * PANEL + j, PANEL);
#else
        const Long whole = 0;
#endif
        for (Long k = whole; k < depth; k += LANES)
            for (Long j = 0; j < width; j++)
                for (Long i = k; i < least(k + LANES, depth); i++) to[i * PANEL + j] = from[(first + j) * depth + i];
    }
}

// c [m, n] = bias + a b in float32: a(i, k) lies at a[i * row + k * step], one of the two 1; b is [depth, n], or turned.
struct Product {
    const float* a;
    Long row, step;
    const float* b;
    bool transposed;
    const float* bias;  // [n], or null
    float* c;
    Long m, depth, n;
};

void laid_out(const Product& p, float* to) { p.transposed ? turned(p.b, p.n, p.depth, to) : laid(p.b, p.depth, p.n, to); }

void singly(const Product& p, const float* start) {
    float* b = Scratch::of(scratch.panels, panels(p.n) * p.depth);
    laid_out(p, b);
    tiles<Single>(p.a, p.row, p.step, b, p.depth, start, p.c, p.m, p.n);
}

#ifdef PAIRS
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

void in_pairs(const Product& p, const float* start) {
    const Long depth = p.depth / 2;
    const bool beside = p.step == 1;
    uint32_t *b = Scratch::numbers(scratch.panels, panels(p.n) * depth), *half = Scratch::numbers(scratch.wide, p.n * depth);
    if (p.transposed)
        along(p.b, p.n * p.depth, half), turned(half, p.n, depth, b);
    else
        across(p.b, p.depth, p.n, half), laid(half, depth, p.n, b);
    uint32_t* a = Scratch::numbers(scratch.wide, p.m * depth);
    beside ? along(p.a, p.m * p.depth, a) : across(p.a, p.depth, p.m, a);
    tiles<Pair>(a, beside ? depth : 1, beside ? 1 : p.m, b, depth, start, p.c, p.m, p.n);
}

// As `Couple` wants it: bfloat16, of 32 columns 0 - 3, 16 - 19, 4 - 7, ...
void laid_out(const Product& p, uint16_t* to) {
    const __m512i steps = _mm512_setr_epi64(0x0003000200010000, 0x0013001200110010, 0x0007000600050004, 0x0017001600150014,
                                            0x000b000a00090008, 0x001b001a00190018, 0x000f000e000d000c, 0x001f001e001d001c);
    alignas(64) float block[16 * PANEL] = {};
    for (Long first = 0; first < p.n; first += PANEL) {
        const Long width = least(PANEL, p.n - first);
        for (Long k = 0; k < p.depth; k += 16) {
            const Long rows = least(16, p.depth - k);
            if (p.transposed)
                for (Long j = 0; j < width; j += 16)
                    transposed(p.b + (first + j) * p.depth + k, p.depth, least(16, width - j), rows, block + j, PANEL);
            else
                for (Long i = 0; i < rows; i++) std::memcpy(block + i * PANEL, p.b + (k + i) * p.n + first, width * 4);
            for (Long i = 0; i < rows * PANEL; i += 32, to += 32) {
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(block + i + 16), _mm512_load_ps(block + i));
                _mm512_storeu_si512(to, _mm512_permutexvar_epi16(steps, both));
            }
        }
    }
}
#else
constexpr auto in_pairs = singly;
#endif

#ifdef SKIPS
#ifndef PAIRS
using Couple = Alone;
#endif
// Whether zero times any of these numbers is zero: none is infinite, nan or so large that bfloat16 would make it so.
bool tame(const float* from, Long count) {
    int wild = 0;
#pragma omp simd reduction(| : wild)
    for (Long i = 0; i < count; i++) {
        int bits;
        std::memcpy(&bits, from + i, 4);
        wild |= (bits & 0x7fffffff) >= 0x7f000000;
    }
    return !wild;
}

// The product by lists of so many rows of `a` at a time that they stay in the cache; false, and nothing done, where the
// first of them have too few zeros.
template <class How>
bool skipped(const Product& p, const float* start) {
    static_assert(PANEL == 64 && WIDE == 4, "places are shifted by 6 bits");
    const Long rows = (LISTED / p.depth / 16 + 1) * 16;
    auto* b = reinterpret_cast<typename How::Number*>(Scratch::of(scratch.panels, panels(p.n) * p.depth));
    for (Long from = 0; from < p.m; from += rows) {
        const Long m = least(rows, p.m - from);
        const Lists<How> lists = listed<How>(p.a + from * p.row, p.row, p.step, m, p.depth);
        if (from == 0) {
            if (!lists.worth) return false;
            laid_out(p, b);
        }
        for (Long first = 0; first < p.n; first += PANEL) {
            const Long columns = least(PANEL, p.n - first);
            const auto one = columns > 2 * LANES ? skip<How, 4> : skip<How, 2>;
            float* c = p.c + from * p.n + first;
            one(lists, b + first * p.depth, p.depth, start ? start + first : nullptr, c, p.n, columns, m);
        }
    }
    return true;
}
#endif

// half: with bfloat16 factors. zeros: look for zeros in `a`.
void multiply(const Product& p, bool half, bool zeros) {
    float* start = nullptr;
    if (p.bias) {
        start = Scratch::of(scratch.start, panels(p.n));
        std::memcpy(start, p.bias, p.n * 4);
        std::memset(start + p.n, 0, (panels(p.n) - p.n) * 4);
    }
#ifdef SKIPS
    if (zeros && p.depth >= LANES && p.n > 2 * LANES && tame(p.b, p.depth * p.n))
        if ((half ? skipped<Couple> : skipped<Alone>)(p, start)) return;
#endif
    (half ? in_pairs : singly)(p, start);
}

// -- layers --------------------------------------------------------------------------------------------------------

enum Activation : Long { TANH, RELU };

void activate(float* x, Long count, Long kind) {
    if (kind == RELU)
#pragma omp simd
        for (Long i = 0; i < count; i++) x[i] = x[i] < 0.f ? 0.f : x[i];
    else
#pragma omp simd
        for (Long i = 0; i < count; i++) x[i] = tangent(x[i]);
}

// The gradient before the activation, from the one behind it and what the activation gave, both [rows, n]; and unless
// null, to [n] its sums over rows.
void through(float* grad, const float* made, Long rows, Long n, Long kind, float* to) {
    float* sums = to ? to : Scratch::of(scratch.start, n);
    std::memset(sums, 0, n * 4);
    for (Long r = 0; r < rows; r++, grad += n, made += n)
        if (kind == RELU)
#pragma omp simd
            for (Long i = 0; i < n; i++) sums[i] += grad[i] = made[i] <= 0.f ? 0.f : grad[i];
        else
#pragma omp simd
            for (Long i = 0; i < n; i++) sums[i] += grad[i] *= 1.f - made[i] * made[i];
}

// to [n] = sums of [rows, n] over its rows.
void down(const float* from, Long rows, Long n, float* to) {
    std::memset(to, 0, n * 4);
    for (Long r = 0; r < rows; r++)
#pragma omp simd
        for (Long j = 0; j < n; j++) to[j] += from[r * n + j];
}

// Layers of all members, from numbers and addresses in the order of `_call` in dense.py.
struct Layers {
    Long rows, members, count, activation, half;
    const float* x;            // [rows, widths[0]], which all members read
    float* out;                // [members, rows, O]
    float* saved;              // what later layers read, [rows, I] after each other; then the next member's; or null
    const float* grad;         // backward: of out
    float* into_x;             // [rows, widths[0]], or null
    const Long* widths;        // [count + 1]
    const float* const* held;  // weight [members, O, I] and bias [members, O] of each layer
    float* const* into;        // of what is held, or null

    explicit Layers(const Long* of)
        : rows(of[0]), members(of[1]), count(of[2]), activation(of[3]), half(of[4]), x((const float*)of[6]), out((float*)of[7]),
          saved((float*)of[8]), grad((const float*)of[9]), into_x((float*)of[10]), widths(of + 11),
          held((const float* const*)(widths + count + 1)), into(of[5] ? (float* const*)(held + 2 * count) : nullptr) {}

    Long kept() const {  // numbers that one member saves
        Long sum = 0;
        for (Long i = 1; i < count; i++) sum += rows * widths[i];
        return sum;
    }
    bool paired(Long layer) const { return half && layer > 0 && layer < count - 1; }
    bool zeros(Long layer) const { return activation == RELU && layer > 0 && layer < count; }  // in what it reads
};

// y [rows, O] = x W^T + b of one layer.
void forward_layer(const float* x, const float* weight, const float* bias, float* y, Long rows, Long inputs, Long outputs,
                   bool half, bool zeros) {
    if (rows > FEW && outputs > FEW)
        return multiply({x, inputs, 1, weight, true, bias, y, rows, inputs, outputs}, half, zeros);
    for (Long r = 0; r < rows; r++)
        for (Long o = 0; o < outputs; o++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (Long i = 0; i < inputs; i++) sum += x[r * inputs + i] * weight[o * inputs + i];
            y[r * outputs + o] = sum + bias[o];
        }
}

// into_weight [O, I] = grad^T x.
void into_weight(const float* grad, const float* x, float* into, Long rows, Long inputs, Long outputs, bool half, bool zeros) {
    if (outputs > FEW)
        return multiply({grad, 1, outputs, x, false, nullptr, into, outputs, rows, inputs}, half, zeros);
    std::memset(into, 0, outputs * inputs * 4);
    for (Long r = 0; r < rows; r++)
        for (Long o = 0; o < outputs; o++) {
            const float g = grad[r * outputs + o];
#pragma omp simd
            for (Long i = 0; i < inputs; i++) into[o * inputs + i] += g * x[r * inputs + i];
        }
}

// into_x [rows, I] = grad W.
void into_read(const float* grad, const float* weight, float* into, Long rows, Long inputs, Long outputs, bool half, bool zeros) {
    if (outputs > FEW)
        return multiply({grad, outputs, 1, weight, false, nullptr, into, rows, outputs, inputs}, half, zeros);
    for (Long r = 0; r < rows; r++) {
#pragma omp simd
        for (Long i = 0; i < inputs; i++) into[r * inputs + i] = grad[r * outputs] * weight[i];
        for (Long o = 1; o < outputs; o++)
#pragma omp simd
            for (Long i = 0; i < inputs; i++) into[r * inputs + i] += grad[r * outputs + o] * weight[o * inputs + i];
    }
}

void forward_member(const Layers& net, Long member) {
    const float* x = net.x;
    float* saved = net.saved ? net.saved + member * net.kept() : nullptr;
    for (Long i = 0; i < net.count; i++) {
        const Long inputs = net.widths[i], outputs = net.widths[i + 1], last = i == net.count - 1;
        const float *weight = net.held[2 * i] + member * outputs * inputs, *bias = net.held[2 * i + 1] + member * outputs;
        float* y = last ? net.out + member * net.rows * outputs : saved;
        if (!y) y = Scratch::of(i % 2 ? scratch.grad : scratch.next, net.rows * outputs);
        forward_layer(x, weight, bias, y, net.rows, inputs, outputs, net.paired(i), net.zeros(i));
        if (last) return;
        activate(y, net.rows * outputs, net.activation);
        x = y;
        if (saved) saved += net.rows * outputs;
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
            if (i == net.count - 1) down(grad, rows, outputs, net.into[2 * i + 1] + member * outputs);
            float* into = net.into[2 * i] + member * outputs * inputs;
            into_weight(grad, read, into, rows, inputs, outputs, net.paired(i), net.zeros(i + 1));
        }
        if (i == 0 && !net.into_x) return;
        const float* weight = net.held[2 * i] + member * outputs * inputs;
        float* next = i > 0 || member > 0 ? Scratch::of(scratch.next, rows * inputs) : net.into_x;
        into_read(grad, weight, next, rows, inputs, outputs, net.paired(i), net.zeros(i + 1));
        if (i > 0) {
            through(next, read, rows, inputs, net.activation, net.into ? net.into[2 * i - 1] + member * inputs : nullptr);
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
// A Gaussian squashed by tanh: of a network's [rows, 2 n], means and what becomes log deviations, and noise [rows, n].
// y = tanh(u), u = mean + step, step = deviation * noise, and logp [rows] as policies/squashed.py defines them. The
// log deviation is clamped to [low, high], or spread over it by tanh; `slope` is its derivative.
void squash(const float* made, const float* noise, float* y, float* step, float* slope, float* logp, Long rows, Long n,
            Long clamped, float low, float high, float level) {
    const Long count = rows * n;
    float *mean = Scratch::of(scratch.grad, count), *raw = Scratch::of(scratch.next, count);
    for (Long r = 0; r < rows; r++)
        for (Long j = 0; j < n; j++) mean[r * n + j] = made[r * 2 * n + j], raw[r * n + j] = made[(r * 2 + 1) * n + j];
    const float half = 0.5f * (high - low), middle = low + half;
    if (clamped)
#pragma omp simd
        for (Long i = 0; i < count; i++) {
            const float x = raw[i];
            slope[i] = x < low || x > high ? 0.f : 1.f;
            raw[i] = x < low ? low : x > high ? high : x;
        }
    else
#pragma omp simd
        for (Long i = 0; i < count; i++) {
            const float t = tangent(raw[i]);
            slope[i] = half * (1.f - t * t);
            raw[i] = middle + half * t;
        }
#pragma omp simd
    for (Long i = 0; i < count; i++) {
        const float off = exponential(raw[i]) * noise[i], u = mean[i] + off, size = std::fabs(u);
        step[i] = off;
        y[i] = tangent(u);
        raw[i] = 2.f * (size + log_beyond_one(exponential(-2.f * size))) - raw[i] - 0.5f * noise[i] * noise[i];
    }
    for (Long r = 0; r < rows; r++) {
        float sum = 0;
        for (Long j = 0; j < n; j++) sum += raw[r * n + j];
        logp[r] = sum - level;
    }
}
// The gradient towards what the network gave, from those of y and logp; either may be null.
void squash_back(const float* into_y, const float* into_logp, const float* y, const float* step, const float* slope,
                 float* into_made, Long rows, Long n) {
    for (Long r = 0; r < rows; r++) {
        const float of_logp = into_logp ? into_logp[r] : 0.f;
        for (Long j = 0; j < n; j++) {
            const Long i = r * n + j;
            const float into_u = (into_y ? into_y[i] * (1.f - y[i] * y[i]) : 0.f) + 2.f * of_logp * y[i];
            into_made[r * 2 * n + j] = into_u;
            into_made[(r * 2 + 1) * n + j] = (into_u * step[i] - of_logp) * slope[i];
        }
    }
}
// The l2 norm of all numbers of some tensors, summed in float64.
void norm(const Long* tensors, Long count, float* to) {
    double total = 0;
    for (Long t = 0; t < count; t++) {
        const float* x = (const float*)tensors[2 * t];  // and its size
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Long i = 0; i < tensors[2 * t + 1]; i++) sum += double(x[i]) * x[i];
        total += sum;
    }
    *to = float(std::sqrt(total));
}
void forward(const Long* numbers) {
    const Layers net(numbers);
    for (Long e = 0; e < net.members; e++) forward_member(net, e);
}
void backward(const Long* numbers) {
    const Layers net(numbers);
    for (Long e = 0; e < net.members; e++) backward_member(net, e);
}
}
