// The most likely tokens of some rows of logits, and their probabilities, in one pass a row. Its twin in torch:
// top_tokens_cpu_naive.py. Built by cpu_kernels.py.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "exponential.h"

namespace {

constexpr int64_t kPiece = 256;  // logits looked at together

// The k highest of `row`, highest first, the first of equal ones before the next.
template <typename T>
void read_row(const T* row, int64_t size, int64_t k, int64_t* tokens, float* probabilities) {
  float logits[kPiece];
  std::vector<float> best(k, -std::numeric_limits<float>::infinity());
  std::fill_n(tokens, k, 0);
  float top = -std::numeric_limits<float>::infinity(), sum = 0;
  for (int64_t begin = 0; begin < size; begin += kPiece) {
    const int64_t count = std::min(kPiece, size - begin);
    for (int64_t i = 0; i < count; ++i) logits[i] = static_cast<float>(row[begin + i]);
    float highest = logits[0];
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < count; ++i) highest = std::max(highest, logits[i]);
    if (highest == -std::numeric_limits<float>::infinity()) continue;
    if (highest > best[k - 1])
      for (int64_t i = 0; i < count; ++i) {
        if (logits[i] <= best[k - 1]) continue;
        int64_t place = k - 1;
        for (; place > 0 && logits[i] > best[place - 1]; --place) {
          best[place] = best[place - 1];
          tokens[place] = tokens[place - 1];
        }
        best[place] = logits[i];
        tokens[place] = begin + i;
      }
    const float before = top;
    top = std::max(top, highest);
    float added = 0;
#pragma omp simd reduction(+ : added)
    for (int64_t i = 0; i < count; ++i) added += exp_of(logits[i] - top);
    sum = sum * exp_of(before - top) + added;
  }
  for (int64_t i = 0; i < k; ++i) probabilities[i] = exp_of(best[i] - top) / sum;
}

std::tuple<at::Tensor, at::Tensor> top_tokens_cpu(const at::Tensor& logits, const at::Tensor& rows, int64_t k) {
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && k > 0 && k <= logits.size(1),
              "top_tokens_cpu: logits must be rows that are contiguous, of k tokens at least");
  const int64_t n = rows.numel();
  at::Tensor tokens = at::empty({n, k}, rows.options()), probabilities = at::empty({n, k}, at::kFloat);
  const int64_t* of = rows.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "top_tokens_cpu", [&] {
    const scalar_t* from = logits.const_data_ptr<scalar_t>();
    int64_t* to = tokens.mutable_data_ptr<int64_t>();
    float* chances = probabilities.mutable_data_ptr<float>();
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        read_row(from + of[i] * logits.stride(0), logits.size(1), k, to + i * k, chances + i * k);
    });
  });
  return {tokens, probabilities};
}

}  // namespace

TORCH_LIBRARY_IMPL(bita, CPU, m) { m.impl("top_tokens_cpu", &top_tokens_cpu); }
