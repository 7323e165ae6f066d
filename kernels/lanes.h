// Eight floats in a register. Spelt out, as compilers do not keep an array of sums in registers.
// Both GCC and Clang have these types.

#pragma once

#include <cstring>

namespace {

constexpr int kLanes = 8;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

}  // namespace
