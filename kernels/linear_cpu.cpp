// A linear layer on few rows. Its twin in torch, and the packing: linear_cpu_naive.py. Built by cpu_kernels.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "panels.h"

namespace {

constexpr int64_t kCached = 65'536;  // values of rows that stay in a core's cache

void linear(const at::Tensor& x, const Panels& weights, const float* bias, at::Tensor& out) {
  const int64_t m = x.size(0), depth = x.size(1), n = out.size(1), ldx = x.stride(0), ldo = out.stride(0);
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const int64_t block = std::max<int64_t>(1, kCached / (depth * kMostRows)) * kMostRows;
  at::parallel_for(0, (n + kPair - 1) / kPair, grain(m * depth * kPair), [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < m; row += block)
      for (int64_t column = begin * kPair; column < std::min(end * kPair, n); column += kPair) {
        const int64_t rows = std::min(block, m - row), width = std::min<int64_t>(kPair, n - column);
        float* target = to + row * ldo + column;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < width; ++j) target[i * ldo + j] = bias == nullptr ? 0.0f : bias[column + j];
        weights.multiply(from + row * ldx, ldx, rows, column, width, target, ldo);
      }
  });
}

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                      int64_t out_features) {
  const at::Tensor rows = x.reshape({-1, x.size(-1)}).contiguous();
  const Panels weights(packed);
  TORCH_CHECK(rows.scalar_type() == at::kFloat && weights.depth == rows.size(1) &&
                  packed.size(0) == (out_features + kPanel - 1) / kPanel,
              "linear_cpu: rows must be fp32, and weights of this layer as pack_linear leaves them");
  const at::Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor out = at::empty({rows.size(0), out_features}, rows.options());
  linear(rows, weights, bias ? added.const_data_ptr<float>() : nullptr, out);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out_features;
  return out.view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(bita, CPU, m) { m.impl("linear_cpu", &linear_cpu); }
