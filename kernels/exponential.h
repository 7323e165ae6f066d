// The exponential function, for loops that compilers make vectors of.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace {

// e^x for x <= 0 within 2 units in the last place, in operations that compilers make vectors of.
inline float exp_of(float x) {
  const float clamped = std::max(x, -87.0f);
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // its low bits are the nearest integer, n
  const float n = shifted - 12582912.0f;
  const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float e = r * (1.0f / 5040) + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
  return x < -87.0f ? 0.0f : e * power;
}

}  // namespace
