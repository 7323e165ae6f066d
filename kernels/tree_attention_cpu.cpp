// Tree attention over vLLM's paged KV cache. Its twin in torch: tree_attention_cpu_naive.py. Built by cpu_kernels.py.
// All arithmetic is in fp32 (bfloat16 on CPUs with AVX512-BF16: tree_attention_bf16_cpu.cpp). No result depends on what
// else is in the step.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "exponential.h"
#include "lanes.h"
#include "tree_attention_bf16_cpu.h"

namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr int kQueries = 8;     // query heads x rows of a task
constexpr int kTile = 4;        // of them, in registers at once
constexpr int kBeside = 2 * kLanes;  // floats in registers beside each
constexpr int64_t kChunk = 64;  // KV slots scored at once

// to[i][0..kBeside) += sum over k of a[i][k] * b[k][0..kBeside), for N values of i.
template <int N>
void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* to, int64_t ldt) {
  Lanes sum[N][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes low = load(b + k * ldb), high = load(b + k * ldb + kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Lanes factor = a[i * lda + k] - Lanes{};
      sum[i][0] += factor * low;
      sum[i][1] += factor * high;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    store(to + i * ldt, load(to + i * ldt) + sum[i][0]);
    store(to + i * ldt + kLanes, load(to + i * ldt + kLanes) + sum[i][1]);
  }
}

// to[n][width] += a[n][depth] b[depth][width]; the order of each sum does not depend on n.
void multiply(const float* a, int64_t lda, int64_t n, const float* b, int64_t ldb, int64_t depth, int64_t width,
              float* to, int64_t ldt) {
  int64_t j = 0;
  for (; j + kBeside <= width; j += kBeside) {
    int64_t i = 0;
    for (; i + kTile <= n; i += kTile)
      multiply_tile<kTile>(a + i * lda, lda, b + j, ldb, depth, to + i * ldt + j, ldt);
    for (; i < n; ++i) multiply_tile<1>(a + i * lda, lda, b + j, ldb, depth, to + i * ldt + j, ldt);
  }
  for (; j < width; ++j)
    for (int64_t i = 0; i < n; ++i) {
      float sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += a[i * lda + k] * b[k * ldb + j];
      to[i * ldt + j] += sum;
    }
}

// `count` rows of `width` values in fp32: where they lie if they are, else a copy.
template <typename T>
const float* as_floats(const T* from, int64_t ld, int64_t count, int64_t width, std::vector<float>& copy, int64_t* ldf) {
  if constexpr (std::is_same_v<T, float>) {
    *ldf = ld;
    return from;
  } else {
    copy.resize(count * width);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < width; ++j) copy[i * width + j] = static_cast<float>(from[i * ld + j]);
    *ldf = width;
    return copy.data();
  }
}

// Up to kQueries queries of a KV head, and what they have attended to so far (one softmax over all chunks).
struct Queries {
  int64_t n, dim;
  float softcap;
  std::vector<float> q, attended, scores;  // [n, D], [n, D], [n, kChunk]
  float top[kQueries], total[kQueries];

  Queries(int64_t n, int64_t dim, float softcap)
      : n(n), dim(dim), softcap(softcap), q(n * dim), attended(n * dim), scores(n * kChunk) {
    std::fill_n(top, n, kNegInf);
    std::fill_n(total, n, 0.0f);
  }

  // Query i has seen an attention sink, a key of that score without a value.
  void see_sink(int64_t i, float score) {
    top[i] = score;
    total[i] = 1.0f;
  }

  // `count` <= kChunk keys [D, count] and values [count, D]; query i sees slot j if sees(i, j).
  template <typename Sees>
  void attend(const float* keys, int64_t ldk, const float* values, int64_t ldv, int64_t count, Sees sees) {
    std::fill(scores.begin(), scores.end(), 0.0f);
    multiply(q.data(), dim, n, keys, ldk, dim, count, scores.data(), kChunk);
    for (int64_t i = 0; i < n; ++i) {
      float* row = scores.data() + i * kChunk;
      if (softcap > 0)
        for (int64_t j = 0; j < count; ++j) row[j] = std::tanh(row[j] / softcap) * softcap;
      for (int64_t j = 0; j < count; ++j)
        if (!sees(i, j)) row[j] = kNegInf;
      float highest = top[i];
#pragma omp simd reduction(max : highest)
      for (int64_t j = 0; j < count; ++j) highest = std::max(highest, row[j]);
      if (highest == kNegInf) {
        std::fill_n(row, count, 0.0f);
        continue;
      }
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < count; ++j) {
        row[j] = exp_of(row[j] - highest);
        sum += row[j];
      }
      const float kept = exp_of(top[i] - highest);
      top[i] = highest;
      total[i] = total[i] * kept + sum;
      if (kept != 1.0f)
        for (int64_t d = 0; d < dim; ++d) attended[i * dim + d] *= kept;
    }
    multiply(scores.data(), kChunk, n, values, ldv, count, dim, attended.data(), dim);
  }
};

template <typename T>
void tree_attention(const at::Tensor& query, const at::Tensor& kv_cache, const at::Tensor& block_table,
                    const at::Tensor& first_row, const at::Tensor& num_rows, const at::Tensor& context_len,
                    const at::Tensor& line, const at::Tensor& depth, const at::Tensor& ancestors,
                    const at::Tensor& mask_index, const at::Tensor& prompt_keys, const at::Tensor& prompt_values,
                    at::Tensor& out, float scale, float softcap, int64_t window, const float* sinks,
                    int64_t chunk) {
  const int64_t heads = kv_cache.size(1), block_size = kv_cache.size(2), dim = kv_cache.size(3) / 2;
  const int64_t group = query.size(1) / heads, most = depth.size(1), num_prompt = prompt_keys.size(2);
  const int64_t* first = first_row.const_data_ptr<int64_t>();
  const int64_t* rows = num_rows.const_data_ptr<int64_t>();
  const int64_t* context = context_len.const_data_ptr<int64_t>();
  const int64_t* lines = line.const_data_ptr<int64_t>();
  const int32_t* depths = depth.const_data_ptr<int32_t>();
  const bool* sees_row = ancestors.const_data_ptr<bool>();
  const int32_t* masks = mask_index.const_data_ptr<int32_t>();
  const at::Tensor prompt_k_floats = prompt_keys.to(at::kFloat), prompt_v_floats = prompt_values.to(at::kFloat);
  const float* prompt_k = prompt_k_floats.const_data_ptr<float>();
  const float* prompt_v = prompt_v_floats.const_data_ptr<float>();
  const T* q = query.const_data_ptr<T>();
  const T* cache = kv_cache.const_data_ptr<T>();
  const int32_t* pages = block_table.const_data_ptr<int32_t>();
  T* to = out.mutable_data_ptr<T>();

  struct Task {
    int64_t request, head, query;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0; b < line.size(0); ++b)
    if (lines[b] >= 0)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < rows[b] * group; i += kQueries) tasks.push_back({b, h, i});

  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> key_copy, value_copy;
    for (int64_t t = begin; t < end; ++t) {
      const auto [b, h, from] = tasks[t];
      const int64_t c = context[b];
      const int32_t* row_depth = depths + lines[b] * most;
      const bool* row_sees = sees_row + lines[b] * most * most;
      const int32_t* row_mask = masks + lines[b] * most;
      // How many positions a row of this depth sees, its own included; 0 for all.
      const auto reach_of = [&](int64_t depth) -> int64_t {
        return chunk > 0 ? (c + depth) % chunk + 1 : std::max<int64_t>(window, 0);
      };
      Queries queries(std::min<int64_t>(kQueries, rows[b] * group - from), dim, softcap);
      // Query i is of row (from + i) / group.
      bool any_mask = false;
      int64_t row_of[kQueries], reach[kQueries];
      for (int64_t i = 0; i < queries.n; ++i) {
        row_of[i] = (from + i) / group;
        reach[i] = reach_of(row_depth[row_of[i]]);
        any_mask |= row_mask[row_of[i]] >= 0;
        const T* source = q + (first[b] + row_of[i]) * query.stride(0) + (h * group + (from + i) % group) * query.stride(1);
        for (int64_t d = 0; d < dim; ++d) queries.q[i * dim + d] = static_cast<float>(source[d]) * scale;
        if (sinks != nullptr) queries.see_sink(i, sinks[h * group + (from + i) % group]);
      }
      if (any_mask)
        for (int64_t p = 0; p < num_prompt; p += kChunk)
          queries.attend(prompt_k + h * dim * num_prompt + p, num_prompt, prompt_v + (h * num_prompt + p) * dim, dim,
                         std::min(kChunk, num_prompt - p),
                         [&](int64_t i, int64_t) { return row_mask[row_of[i]] >= 0; });
      const int64_t length = c + rows[b];
      // No row sees further back than the root.
      const int64_t root_reach = reach_of(0);
      const int64_t begin_slot = root_reach > 0 ? std::max<int64_t>(0, c - root_reach + 1) / kChunk * kChunk : 0;
      for (int64_t slot = begin_slot; slot < length;) {
        const int64_t offset = slot % block_size;
        const int64_t count = std::min({kChunk, block_size - offset, length - slot});
        const int64_t page = pages[b * block_table.stride(0) + slot / block_size];
        const T* keys = cache + page * kv_cache.stride(0) + h * kv_cache.stride(1);
        int64_t ldk, ldv;
        const float* k = as_floats(keys + offset, block_size, dim, count, key_copy, &ldk);
        const float* v = as_floats(keys + (block_size + offset) * dim, dim, count, dim, value_copy, &ldv);
        if (root_reach == 0 && slot + count <= c) {
          queries.attend(k, ldk, v, ldv, count, [](int64_t, int64_t) { return true; });
        } else {
          queries.attend(k, ldk, v, ldv, count, [&](int64_t i, int64_t j) {
            const int64_t own = slot + j - c, row = row_of[i];
            if (own >= 0 && !row_sees[row * most + own]) return false;
            const int64_t distance = row_depth[row] - (own >= 0 ? row_depth[own] : own);
            return reach[i] == 0 || distance < reach[i];
          });
        }
        slot += count;
      }
      for (int64_t i = 0; i < queries.n; ++i) {
        T* target = to + (first[b] + row_of[i]) * out.stride(0) + (h * group + (from + i) % group) * out.stride(1);
        for (int64_t d = 0; d < dim; ++d)
          target[d] = static_cast<T>(queries.attended[i * dim + d] / queries.total[i]);
      }
    }
  });
}

void tree_attention_cpu(const at::Tensor& query, const at::Tensor& kv_cache, const at::Tensor& block_table,
                        const at::Tensor& first_row, const at::Tensor& num_rows, const at::Tensor& context_len,
                        const at::Tensor& line, const at::Tensor& depth, const at::Tensor& ancestors,
                        const at::Tensor& mask_index, const at::Tensor& prompt_keys, const at::Tensor& prompt_values,
                        at::Tensor out, double scale, double softcap, int64_t window,
                        const std::optional<at::Tensor>& sinks, int64_t chunk) {
  TORCH_CHECK(query.stride(2) == 1 && out.stride(2) == 1 && kv_cache.is_contiguous() && block_table.stride(1) == 1,
              "tree_attention_cpu: query, out, kv_cache and block_table must be contiguous in their last dimension");
  TORCH_CHECK(out.scalar_type() == query.scalar_type() && kv_cache.scalar_type() == query.scalar_type(),
              "tree_attention_cpu: query, kv_cache and out must have one dtype");
  TORCH_CHECK(!sinks || sinks->numel() == query.size(1), "tree_attention_cpu: sinks must have a number for each head");
  const at::Tensor sink_floats = sinks ? sinks->to(at::kFloat).contiguous() : at::Tensor();
  const float* sink = sinks ? sink_floats.const_data_ptr<float>() : nullptr;
#ifdef __AVX512BF16__
  if (takes_tree_attention_bf16(kv_cache))
    return tree_attention_bf16(query, kv_cache, block_table, first_row, num_rows, context_len, line, depth, ancestors,
                               mask_index, prompt_keys, prompt_values, out, static_cast<float>(scale),
                               static_cast<float>(softcap), window, sink, chunk);
#endif
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), "tree_attention_cpu", [&] {
    tree_attention<scalar_t>(query, kv_cache, block_table, first_row, num_rows, context_len, line, depth, ancestors,
                             mask_index, prompt_keys, prompt_values, out, static_cast<float>(scale),
                             static_cast<float>(softcap), window, sink, chunk);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(bita, CPU, m) { m.impl("tree_attention_cpu", &tree_attention_cpu); }
