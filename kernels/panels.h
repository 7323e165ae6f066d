// Products of few rows with weights in panels: these go from memory to registers once, for all rows of a step.
// The packing: linear_cpu_naive.py. Sums are in fp32, in one order: no row's result depends on how many others there are.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "lanes.h"

namespace {

constexpr int kPanel = 16;  // output features whose weights lie together, input feature by input feature
constexpr int kPair = 2 * kPanel;   // output features that a thread takes at once
constexpr int kMostRows = 6;        // of a tile: 6 x 2 sums of 8, and what is multiplied, fill 16 registers
constexpr int64_t kDepth = 256;     // most products summed before they are added to the sum so far
constexpr int64_t kWork = 100'000;  // multiplications that are worth a thread

typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// The weights of an input feature in a panel.
inline void load(const float* from, Lanes& low, Lanes& high) {
  low = load(from);
  high = load(from + kLanes);
}

// Of output features j and j + 8 in turn: a word holds both, each the upper half of its value in fp32.
inline void load(const c10::BFloat16* from, Lanes& low, Lanes& high) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  low = std::bit_cast<Lanes>(words << 16);
  high = std::bit_cast<Lanes>(words & 0xffff0000u);
}

// out[i][0..width) += x[i] . w, for Rows rows and Panels panels of `depth` x kPanel weights, `panel_size` apart.
// Meanwhile what lies behind, needed next, is on its way into the cache.
template <int Rows, int Panels, typename W>
void tile(const float* x, int64_t ldx, const W* w, int64_t panel_size, int64_t depth, float* out, int64_t ldo,
          int64_t width) {
  constexpr int kSums = 2 * Panels;
  Lanes sum[Rows][kSums] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Lanes weights[kSums];
#pragma GCC unroll 4
    for (int j = 0; j < Panels; ++j) {
      const W* from = w + j * panel_size + k * kPanel;
      load(from, weights[2 * j], weights[2 * j + 1]);
      __builtin_prefetch(from + depth * kPanel, 0, 2);
    }
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const Lanes factor = x[i * ldx + k] - Lanes{};
#pragma GCC unroll 4
      for (int j = 0; j < kSums; ++j) sum[i][j] += factor * weights[j];
    }
  }
  if (width >= Panels * kPanel) {
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kSums; ++j) {
        float* to = out + i * ldo + j * kLanes;
        store(to, load(to) + sum[i][j]);
      }
  } else {
    float found[Rows][Panels * kPanel];
    std::memcpy(found, sum, sizeof found);
    for (int i = 0; i < Rows; ++i)
      for (int64_t j = 0; j < width; ++j) out[i * ldo + j] += found[i][j];
  }
}

// Up to a pair of panels: beside each other where rows are few, so that enough sums are in flight; else in turn.
template <int Rows, typename W>
void pair_tile(const float* x, int64_t ldx, const W* w, int64_t panel_size, int64_t depth, float* out, int64_t ldo,
               int64_t width) {
  if constexpr (2 * Rows <= kMostRows)
    if (width > kPanel) return tile<Rows, 2>(x, ldx, w, panel_size, depth, out, ldo, width);
  for (int64_t j = 0; j * kPanel < width; ++j)
    tile<Rows, 1>(x, ldx, w + j * panel_size, panel_size, depth, out + j * kPanel, ldo, width - j * kPanel);
}

template <typename W>
void multiply_tiles(const float* x, int64_t ldx, int64_t m, const W* w, int64_t panel_size, int64_t depth, float* out,
                   int64_t ldo, int64_t width) {
  constexpr decltype(&pair_tile<1, W>) kTiles[] = {pair_tile<1, W>, pair_tile<2, W>, pair_tile<3, W>,
                                                   pair_tile<4, W>, pair_tile<5, W>, pair_tile<6, W>};
  static_assert(std::size(kTiles) == kMostRows);
  const int64_t num_tiles = (m + kMostRows - 1) / kMostRows;
  for (int64_t t = 0; t < num_tiles; ++t) {
    const int64_t row = t * m / num_tiles, rows = (t + 1) * m / num_tiles - row;
    kTiles[rows - 1](x + row * ldx, ldx, w, panel_size, depth, out + row * ldo, ldo, width);
  }
}

// [panels, depth, kPanel] weights of one linear layer, or of several with the same number of inputs.
class Panels {
 public:
  const int64_t depth;

  explicit Panels(const at::Tensor& packed)
      : depth(packed.size(1)), half_(packed.scalar_type() == at::kBFloat16), data_(packed.const_data_ptr()) {
    TORCH_CHECK(packed.is_contiguous() && packed.dim() == 3 && packed.size(2) == kPanel &&
                    (half_ || packed.scalar_type() == at::kFloat),
                "weights must be as pack_linear leaves them");
  }

  // out[i][0..width) += x[i] . weights from output `column` on, a panel's first, for m rows; width <= kPair.
  void multiply(const float* x, int64_t ldx, int64_t m, int64_t column, int64_t width, float* out, int64_t ldo) const {
    if (half_)
      multiply(static_cast<const c10::BFloat16*>(data_), x, ldx, m, column, width, out, ldo);
    else
      multiply(static_cast<const float*>(data_), x, ldx, m, column, width, out, ldo);
  }

 private:
  const bool half_;
  const void* data_;

  template <typename W>
  void multiply(const W* weights, const float* x, int64_t ldx, int64_t m, int64_t column, int64_t width, float* out,
                int64_t ldo) const {
    const int64_t num_parts = (depth + kDepth - 1) / kDepth, part = (depth + num_parts - 1) / num_parts;
    for (int64_t k = 0; k < depth; k += part)
      multiply_tiles(x + k, ldx, m, weights + column * depth + k * kPanel, depth * kPanel, std::min(part, depth - k),
                     out, ldo, width);
  }
};

// Pairs of panels, of `work` multiplications each, that are worth a thread.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, kWork / std::max<int64_t>(1, work)); }

}  // namespace
