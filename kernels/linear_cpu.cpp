// A linear layer on few rows: weights go from memory to registers once, for all rows of a step.
// Its twin in torch, and the packing: linear_cpu_naive.py. Built by cpu_kernels.py.
// Sums are in fp32, in one order: no row's result depends on how many others there are.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

constexpr int kLanes = 8;
constexpr int kPanel = 16;  // output features whose weights lie together, input feature by input feature
constexpr int kPair = 2;    // panels that a thread takes at once
constexpr int kMostRows = 6;        // of a tile: 6 x 2 sums of 8, and what is multiplied, fill 16 registers
constexpr int64_t kDepth = 256;     // most products summed before they are added to the sum so far
constexpr int64_t kCached = 65'536; // values of rows that stay in a core's cache
constexpr int64_t kWork = 100'000;  // multiplications that are worth a thread

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

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

// A pair of panels beside each other where rows are few, so that enough sums are in flight; else in turn.
template <int Rows, typename W>
void pair_tile(const float* x, int64_t ldx, const W* w, int64_t panel_size, int64_t depth, float* out, int64_t ldo,
               int64_t width) {
  constexpr int kBeside = 2 * Rows <= kMostRows ? kPair : 1;
  for (int64_t j = 0; j < kPair && j * kPanel < width; j += kBeside)
    tile<Rows, kBeside>(x, ldx, w + j * panel_size, panel_size, depth, out + j * kPanel, ldo, width - j * kPanel);
}

template <typename W>
void multiply_rows(const float* x, int64_t ldx, int64_t m, const W* w, int64_t panel_size, int64_t depth, float* out,
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

template <typename W>
void linear(const at::Tensor& x, const at::Tensor& packed, const float* bias, at::Tensor& out) {
  const int64_t m = x.size(0), depth = x.size(1), n = out.size(1), ldx = x.stride(0), ldo = out.stride(0);
  const int64_t panel_size = depth * kPanel, wide = kPair * kPanel;
  const float* from = x.const_data_ptr<float>();
  const W* weights = packed.const_data_ptr<W>();
  float* to = out.mutable_data_ptr<float>();
  const int64_t num_parts = (depth + kDepth - 1) / kDepth, part = (depth + num_parts - 1) / num_parts;
  const int64_t block = std::max<int64_t>(1, kCached / (depth * kMostRows)) * kMostRows;
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, m * depth * wide));
  at::parallel_for(0, packed.size(0) / kPair, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < m; row += block)
      for (int64_t column = begin * wide; column < end * wide; column += wide) {
        const int64_t rows = std::min(block, m - row), width = std::min(wide, n - column);
        float* target = to + row * ldo + column;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < width; ++j) target[i * ldo + j] = bias == nullptr ? 0.0f : bias[column + j];
        for (int64_t k = 0; k < depth; k += part)
          multiply_rows(from + row * ldx + k, ldx, rows, weights + column * depth + k * kPanel, panel_size,
                        std::min(part, depth - k), target, ldo, width);
      }
  });
}

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                      int64_t out_features) {
  const at::Tensor rows = x.reshape({-1, x.size(-1)}).contiguous();
  TORCH_CHECK(rows.scalar_type() == at::kFloat && packed.is_contiguous() && packed.size(0) % kPair == 0 &&
                  packed.size(1) == rows.size(1) && packed.size(2) == kPanel &&
                  packed.size(0) * kPanel >= out_features,
              "linear_cpu: rows must be fp32, and weights as pack_linear leaves them");
  const at::Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor out = at::empty({rows.size(0), out_features}, rows.options());
  const float* addend = bias ? added.const_data_ptr<float>() : nullptr;
  if (packed.scalar_type() == at::kBFloat16)
    linear<c10::BFloat16>(rows, packed, addend, out);
  else
    linear<float>(rows, packed, addend, out);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out_features;
  return out.view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(bita, CPU, m) { m.impl("linear_cpu", &linear_cpu); }
