// Low-rank deltas of a linear layer for a step's mask rows. Its twin in torch, and the packing: add_mask_lora_cpu_naive.py.
// All arithmetic is in fp32. No row's result depends on what else is in the step. Built by cpu_kernels.py.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "panels.h"

namespace {

// A pair of panels of one part's B: where in the packed B, in the output, and in which part.
struct Unit {
  int64_t panel_column, column, width, part;
};

std::vector<Unit> units_of(const int32_t* ends, int64_t num_parts) {
  std::vector<Unit> units;
  int64_t panel_column = 0;
  for (int64_t part = 0; part < num_parts; ++part) {
    const int64_t first = ends[2 * part], size = ends[2 * part + 1] - first;
    for (int64_t j = 0; j < size; j += kPair)
      units.push_back({panel_column + j, first + j, std::min<int64_t>(kPair, size - j), part});
    panel_column += (size + kPanel - 1) / kPanel * kPanel;
  }
  return units;
}

template <typename T>
void add_mask_lora(at::Tensor& output, const at::Tensor& x, const Panels& a, const Panels& b, int64_t num_low,
                   const std::vector<Unit>& units, const int64_t* rows, int64_t m) {
  const int64_t in = a.depth, rank = b.depth, ldx = x.stride(0), ldo = output.stride(0);
  const T* from = x.const_data_ptr<T>();
  T* to = output.mutable_data_ptr<T>();
  std::vector<float> inputs, low(m * num_low);
  inputs.reserve(m * in);
  for (int64_t i = 0; i < m; ++i) {
    const T* row = from + rows[i] * ldx;
    inputs.insert(inputs.end(), row, row + in);
  }
  at::parallel_for(0, (num_low + kPair - 1) / kPair, grain(m * in * kPair), [&](int64_t begin, int64_t end) {
    for (int64_t l = begin * kPair; l < std::min(end * kPair, num_low); l += kPair)
      a.multiply(inputs.data(), in, m, l, std::min<int64_t>(kPair, num_low - l), low.data() + l, num_low);
  });
  at::parallel_for(0, units.size(), grain(m * rank * kPair), [&](int64_t begin, int64_t end) {
    std::vector<float> added(m * kPair);
    for (int64_t u = begin; u < end; ++u) {
      const Unit& unit = units[u];
      std::fill(added.begin(), added.end(), 0.0f);
      b.multiply(low.data() + unit.part * rank, num_low, m, unit.panel_column, unit.width, added.data(), kPair);
      for (int64_t i = 0; i < m; ++i) {
        T* target = to + rows[i] * ldo + unit.column;
        for (int64_t j = 0; j < unit.width; ++j)
          target[j] = static_cast<T>(static_cast<float>(target[j]) + added[i * kPair + j]);
      }
    }
  });
}

void add_mask_lora_cpu(at::Tensor output, const at::Tensor& x, const at::Tensor& packed_a, const at::Tensor& packed_b,
                       const at::Tensor& parts, const at::Tensor& mask_rows, const at::Tensor& num_mask_rows) {
  const int64_t m = *num_mask_rows.const_data_ptr<int64_t>();
  if (m == 0) return;
  const Panels a(packed_a), b(packed_b);
  const int64_t num_low = parts.size(0) * b.depth;
  TORCH_CHECK(output.stride(1) == 1 && x.stride(1) == 1 && x.size(1) == a.depth &&
                  packed_a.size(0) == (num_low + kPanel - 1) / kPanel,
              "add_mask_lora_cpu: rows must be contiguous, and deltas of this layer as pack_mask_lora leaves them");
  const std::vector<Unit> units = units_of(parts.const_data_ptr<int32_t>(), parts.size(0));
  const Unit& last = units.back();
  TORCH_CHECK(packed_b.size(0) == (last.panel_column + last.width + kPanel - 1) / kPanel &&
                  last.column + last.width <= output.size(1),
              "add_mask_lora_cpu: B must have the panels of its parts, as pack_mask_lora leaves them");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, output.scalar_type(), "add_mask_lora_cpu", [&] {
    add_mask_lora<scalar_t>(output, x, a, b, num_low, units, mask_rows.const_data_ptr<int64_t>(), m);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(bita, CPU, m) { m.impl("add_mask_lora_cpu", &add_mask_lora_cpu); }
