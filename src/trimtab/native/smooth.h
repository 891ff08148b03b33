// Functions of one number that a compiler can make sixteen at a time. A nan goes in and comes out.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using Long = int64_t;

// e^x, relative error below 2e-7; 0 below -87.7. Cephes' polynomial after x = n log 2 + r.
inline float exponential(float x) {
    float low = x < -88.f ? -88.f : x;  // there n is -127, and the scale 0
    low = low > 88.f ? 88.f : low;
    float n = std::nearbyintf(low * 1.44269504088896341f);
    float r = low - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

// tanh by Eigen's rational approximation, a few units in the last place.
inline float tangent(float x) {
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

// log(1 + x) of x in [0, 1], relative error below 2e-7: 2 artanh(x / (2 + x)), by its series.
inline float log_beyond_one(float x) {
    const float r = x / (2.f + x), s = r * r;
    float p = 1.f / 15.f;
    p = p * s + 1.f / 13.f;
    p = p * s + 1.f / 11.f;
    p = p * s + 1.f / 9.f;
    p = p * s + 1.f / 7.f;
    p = p * s + 1.f / 5.f;
    p = p * s + 1.f / 3.f;
    return 2.f * r * (p * s + 1.f);
}

}  // namespace
