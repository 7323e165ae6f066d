// A linear layer in bfloat16 on the few rows of step blocks, and the low-rank deltas of its mask rows in the same pass.
// Its twin in torch, and the packing: linear_bf16_cpu_naive.py. Built by cpu_kernels.py, for CPUs with AVX512-BF16.
//
// Weights go from memory to registers once for up to twelve rows, in pairs of input features, as vdpbf16ps takes them.
// Sums are in fp32, in one order: no row's result depends on how many others there are.

#ifdef __AVX512BF16__

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "bf16_panels.h"

namespace {

constexpr int64_t kWork = 200'000;  // multiplications that are worth a thread

// [panels, pairs, kPanel, 2] weights.
struct Panels {
  const Half* data;
  int64_t count, pairs;

  explicit Panels(const at::Tensor& packed)
      : data(static_cast<const Half*>(packed.const_data_ptr())), count(packed.size(0)), pairs(packed.size(1)) {
    TORCH_CHECK(packed.is_contiguous() && packed.dim() == 4 && packed.size(2) == kPanel && packed.size(3) == 2 &&
                    packed.scalar_type() == at::kBFloat16,
                "linear_bf16_cpu: weights must be as pack_linear_bf16 leaves them");
  }
  int64_t panel_size() const { return pairs * kLine; }
  const Half* panel(int64_t index) const { return data + index * panel_size(); }
};

// What is added to the outputs of the mask rows: low . B, low = x . A of each part.
struct Deltas {
  Panels b;
  const int32_t* part_of_panel;   // [panels], -1 where a panel of outputs has no delta
  std::vector<Half> low;          // [rows, parts * rank], zero for rows that are not mask rows
  std::vector<uint8_t> is_mask;   // [rows]
  int64_t width;                  // parts * rank
};

inline void store(Half* to, __m512 sum, __mmask16 kept) {
  _mm256_mask_storeu_epi16(to, kept, (__m256i)_mm512_cvtneps_pbh(sum));
}

// out[i][0..width) of Wide panels from `panel` on, for Rows rows from `row` on.
template <int Rows, int Wide>
void tile(const Half* x, int64_t ldx, const Panels& weights, const float* bias, const Deltas* deltas, int64_t row,
          int64_t panel, Half* out, int64_t ldo, int64_t width) {
  __m512 sum[Rows][Wide];
#pragma GCC unroll 4
  for (int j = 0; j < Wide; ++j) {
    const __mmask16 kept = mask_of(width - j * kPanel);
    const __m512 first =
        bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(kept, bias + (panel + j) * kPanel);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) sum[i][j] = first;
  }
  accumulate<Rows, Wide, true>(sum, x + row * ldx, ldx, weights.panel(panel), weights.panel_size(), weights.pairs);
  if (deltas != nullptr && std::any_of(&deltas->is_mask[row], &deltas->is_mask[row] + Rows, [](bool is) { return is; })) {
    const Half* low = deltas->low.data() + row * deltas->width;
    // A row that is not a mask row gets products with zero.
#pragma GCC unroll 4
    for (int j = 0; j < Wide; ++j) {
      const int64_t part = deltas->part_of_panel[panel + j];
      if (part < 0) continue;
      const Half* b = deltas->b.panel(panel + j);
      for (int64_t k = 0; k < deltas->b.pairs; ++k) {
        const __m512bh factors = (__m512bh)_mm512_loadu_si512(b + k * kLine);
#pragma GCC unroll 12
        for (int i = 0; i < Rows; ++i) {
          const Half* from = low + i * deltas->width + 2 * (part * deltas->b.pairs + k);
          sum[i][j] = _mm512_dpbf16_ps(sum[i][j], factors, pair_of(from));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < Wide; ++j) {
    const __mmask16 kept = mask_of(width - j * kPanel);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) store(out + (row + i) * ldo + j * kPanel, sum[i][j], kept);
  }
}

// `count` panels from `panel` on.
template <int Rows>
struct RowTile {
  static void run(const Half* x, int64_t ldx, const Panels& weights, const float* bias, const Deltas* deltas,
                  int64_t row, int64_t panel, int64_t count, Half* out, int64_t ldo, int64_t width) {
    constexpr int kWide = wide_of(Rows);
    for (; count >= kWide; count -= kWide) {
      tile<Rows, kWide>(x, ldx, weights, bias, deltas, row, panel, out, ldo, width);
      panel += kWide, out += kWide * kPanel, width -= kWide * kPanel;
    }
    for (; count > 0; --count) {
      tile<Rows, 1>(x, ldx, weights, bias, deltas, row, panel, out, ldo, width);
      ++panel, out += kPanel, width -= kPanel;
    }
  }
};

void multiply(const Half* x, int64_t ldx, int64_t m, const Panels& weights, const float* bias, const Deltas* deltas,
              Half* out, int64_t ldo, int64_t width) {
  const int64_t num_tiles = (m + kMostRows - 1) / kMostRows;
  const int64_t work = std::max<int64_t>(1, m * weights.pairs * kLine);
  at::parallel_for(0, weights.count, std::max<int64_t>(1, kWork / work), [&](int64_t first, int64_t end) {
    // Few panels at a time, which stay in a core's cache for the next tile of rows.
    const int64_t group = num_tiles == 1 ? end - first : 4;
    for (int64_t panel = first; panel < end; panel += group)
      for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t row = t * m / num_tiles, rows = (t + 1) * m / num_tiles - row;
        kByRows<RowTile>[rows - 1](x, ldx, weights, bias, deltas, row, panel, std::min(group, end - panel),
                         out + panel * kPanel, ldo, width - panel * kPanel);
      }
  });
}

// low = x . A for the mask rows, rounded to bfloat16, and zero for the others.
Deltas deltas_of(const at::Tensor& x, const at::Tensor& packed_a, const at::Tensor& packed_b,
                 const at::Tensor& part_of_panel, const at::Tensor& mask_rows, int64_t num_mask_rows) {
  const Panels a(packed_a);
  Deltas deltas{Panels(packed_b), part_of_panel.const_data_ptr<int32_t>(), {}, {}, a.count * kPanel};
  TORCH_CHECK(a.pairs * 2 == x.size(1) && part_of_panel.size(0) == deltas.b.count,
              "linear_bf16_cpu: deltas must be of this layer, as pack_deltas_bf16 leaves them");
  const int64_t* rows = mask_rows.const_data_ptr<int64_t>();
  const Half* from = static_cast<const Half*>(x.const_data_ptr());
  const int64_t in = x.size(1), ldx = x.stride(0);
  std::vector<Half> inputs(num_mask_rows * in), low(num_mask_rows * deltas.width);
  for (int64_t i = 0; i < num_mask_rows; ++i)
    std::memcpy(inputs.data() + i * in, from + rows[i] * ldx, in * sizeof(Half));
  multiply(inputs.data(), in, num_mask_rows, a, nullptr, nullptr, low.data(), deltas.width, deltas.width);
  deltas.low.resize(x.size(0) * deltas.width);
  deltas.is_mask.resize(x.size(0));
  for (int64_t i = 0; i < num_mask_rows; ++i) {
    std::memcpy(deltas.low.data() + rows[i] * deltas.width, low.data() + i * deltas.width, deltas.width * sizeof(Half));
    deltas.is_mask[rows[i]] = true;
  }
  return deltas;
}

at::Tensor linear_bf16_cpu(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                           int64_t out_features, const std::optional<at::Tensor>& packed_a,
                           const std::optional<at::Tensor>& packed_b, const std::optional<at::Tensor>& part_of_panel,
                           const std::optional<at::Tensor>& mask_rows, const std::optional<at::Tensor>& num_mask_rows) {
  at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  if (rows.stride(1) != 1) rows = rows.contiguous();
  const Panels weights(packed);
  TORCH_CHECK(rows.scalar_type() == at::kBFloat16 && weights.pairs * 2 == rows.size(1) &&
                  weights.count == (out_features + kPanel - 1) / kPanel,
              "linear_bf16_cpu: rows must be bfloat16, and weights of this layer as pack_linear_bf16 leaves them");
  const at::Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor out = at::empty({rows.size(0), out_features}, rows.options());
  std::optional<Deltas> deltas;
  const int64_t num_masks = packed_a ? *num_mask_rows->const_data_ptr<int64_t>() : 0;
  if (num_masks > 0) deltas.emplace(deltas_of(rows, *packed_a, *packed_b, *part_of_panel, *mask_rows, num_masks));
  multiply(static_cast<const Half*>(rows.const_data_ptr()), rows.stride(0), rows.size(0), weights,
           bias ? added.const_data_ptr<float>() : nullptr, deltas ? &*deltas : nullptr,
           static_cast<Half*>(out.mutable_data_ptr()), out_features, out_features);
  if (x.dim() == 2) return out;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out_features;
  return out.view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(bita, CPU, m) { m.impl("linear_bf16_cpu", &linear_bf16_cpu); }

#endif
