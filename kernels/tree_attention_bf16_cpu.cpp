// Tree attention in bfloat16, for CPUs with AVX512-BF16. Its twin in torch: tree_attention_cpu_naive.py.
// Products are of bfloat16 (probabilities are rounded to it), sums in fp32. No result depends on what else is in the step.
// Built by cpu_kernels.py.

#include "tree_attention_bf16_cpu.h"

#ifdef __AVX512BF16__

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bf16_panels.h"

namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr int64_t kChunk = 64;               // KV slots of a round
constexpr int64_t kPanels = kChunk / kPanel;

// e^x for x <= 0.
inline __m512 exp_of(__m512 x) {
  const __m512 clamped = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), clamped);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 e = _mm512_set1_ps(1.0f / 720);
  for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(term));
  return _mm512_scalef_ps(e, n);
}

inline __m512 floats_of(__m256bh halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16));
}

// Up to kMostRows queries of a KV head, the KV slots of a round, and what the queries have attended to so far.
struct Round {
  const int64_t dim;
  const float scale, softcap;
  std::vector<Half> queries;           // [n, D]
  std::vector<float> attended;         // [n, D]
  std::vector<Half> keys, values;      // [kPanels, D / 2, kPanel, 2] and [D / kPanel, kChunk / 2, kPanel, 2]
  uint64_t seen[kMostRows];            // by query, a bit for each slot
  float top[kMostRows], total[kMostRows];
  alignas(64) float scores[kMostRows][kChunk];
  alignas(64) Half chances[kMostRows][kChunk];

  Round(int64_t dim, float scale, float softcap)
      : dim(dim), scale(scale), softcap(softcap), queries(kMostRows * dim), attended(kMostRows * dim),
        keys(kChunk * dim), values(kChunk * dim) {}

  void begin() {
    std::fill(attended.begin(), attended.end(), 0.0f);
    std::fill_n(top, kMostRows, kNegInf);
    std::fill_n(total, kMostRows, 0.0f);
  }

  // Query i has seen an attention sink, a key of that score without a value.
  void see_sink(int64_t i, float score) {
    top[i] = score;
    total[i] = 1.0f;
  }

  // Sixteen slots, `count` of them: keys [D, ldk], values [sixteen, D]; the others become zero.
  void put(int64_t panel, const Half* k, int64_t ldk, const Half* v, int64_t count) {
    const __mmask16 kept = mask_of(count);
    Half* to = keys.data() + panel * dim * kPanel;
    for (int64_t d = 0; d < dim; d += 2, to += kLine)
      _mm512_storeu_si512(to, line_of(_mm256_maskz_loadu_epi16(kept, k + d * ldk),
                                      _mm256_maskz_loadu_epi16(kept, k + (d + 1) * ldk)));
    for (int64_t slot = 0; slot < kPanel; slot += 2) {
      const __mmask16 first = slot < count ? 0xffff : 0, second = slot + 1 < count ? 0xffff : 0;
      for (int64_t d = 0; d < dim; d += kPanel)
        _mm512_storeu_si512(values.data() + d * kChunk + (panel * kPanel + slot) * kPanel,
                            line_of(_mm256_maskz_loadu_epi16(first, v + slot * dim + d),
                                    _mm256_maskz_loadu_epi16(second, v + (slot + 1) * dim + d)));
    }
  }

  // One more round of the softmax of query i over `panels` panels of scores; returns what to scale its sums with.
  float soften(int64_t i, int64_t panels) {
    float* row = scores[i];
    if (softcap > 0)
      for (int64_t j = 0; j < panels * kPanel; ++j) row[j] = std::tanh(row[j] * scale / softcap) * softcap;
    const __m512 factor = _mm512_set1_ps(softcap > 0 ? 1.0f : scale), lowest = _mm512_set1_ps(kNegInf);
    __m512 score[kPanels], highest = lowest;
    for (int64_t p = 0; p < panels; ++p) {
      const __mmask16 sees = static_cast<__mmask16>(seen[i] >> (p * kPanel));
      score[p] = _mm512_mask_mul_ps(lowest, sees, _mm512_load_ps(row + p * kPanel), factor);
      highest = _mm512_max_ps(highest, score[p]);
    }
    const float now = std::max(top[i], _mm512_reduce_max_ps(highest));
    if (now == kNegInf) {
      std::fill_n(chances[i], panels * kPanel, 0);
      return 1.0f;
    }
    __m512 sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < panels; ++p) {
      const __mmask16 sees = static_cast<__mmask16>(seen[i] >> (p * kPanel));
      const __m512 chance = exp_of(_mm512_sub_ps(score[p], _mm512_set1_ps(now)));
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_mov_ps(sees, chance));
      _mm256_store_si256(reinterpret_cast<__m256i*>(chances[i] + p * kPanel), (__m256i)rounded);
      sum = _mm512_add_ps(sum, floats_of(rounded));
    }
    const float kept = top[i] == kNegInf ? 0.0f : _mm512_cvtss_f32(exp_of(_mm512_set1_ps(top[i] - now)));
    top[i] = now;
    total[i] = total[i] * kept + _mm512_reduce_add_ps(sum);
    return kept;
  }
};

// Queries attend to the first `panels` panels of the round.
template <int Rows>
struct Attend {
  static void run(Round& round, int64_t panels) {
    constexpr int kWide = wide_of(Rows);
    const int64_t dim = round.dim;
    int64_t p = 0;
    for (; p + kWide <= panels; p += kWide) score<kWide>(round, p);
    for (; p < panels; ++p) score<1>(round, p);
    float kept[Rows];
    for (int i = 0; i < Rows; ++i) kept[i] = round.soften(i, panels);
    int64_t d = 0;
    for (; d + kWide * kPanel <= dim; d += kWide * kPanel) gather<kWide>(round, kept, d, panels);
    for (; d < dim; d += kPanel) gather<1>(round, kept, d, panels);
  }

  template <int Wide>
  static void score(Round& round, int64_t panel) {
    __m512 sum[Rows][Wide] = {};
    accumulate<Rows, Wide, false>(sum, round.queries.data(), round.dim, round.keys.data() + panel * round.dim * kPanel,
                                  round.dim * kPanel, round.dim / 2);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Wide; ++j) _mm512_store_ps(round.scores[i] + (panel + j) * kPanel, sum[i][j]);
  }

  template <int Wide>
  static void gather(Round& round, const float (&kept)[Rows], int64_t d, int64_t panels) {
    float* to = round.attended.data() + d;
    __m512 sum[Rows][Wide];
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Wide; ++j)
        sum[i][j] = _mm512_mul_ps(_mm512_loadu_ps(to + i * round.dim + j * kPanel), _mm512_set1_ps(kept[i]));
    accumulate<Rows, Wide, false>(sum, round.chances[0], kChunk, round.values.data() + d * kChunk, kChunk * kPanel,
                                  panels * kPanel / 2);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Wide; ++j) _mm512_storeu_ps(to + i * round.dim + j * kPanel, sum[i][j]);
  }
};

}  // namespace

bool takes_tree_attention_bf16(const at::Tensor& kv_cache) {
  return kv_cache.scalar_type() == at::kBFloat16 && kv_cache.size(2) % kPanel == 0 &&
         kv_cache.size(3) % (2 * kPanel) == 0;
}

void tree_attention_bf16(const at::Tensor& query, const at::Tensor& kv_cache, const at::Tensor& block_table,
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
  const at::Tensor prompt_k = prompt_keys.to(at::kBFloat16), prompt_v = prompt_values.to(at::kBFloat16);
  const Half* q = static_cast<const Half*>(query.const_data_ptr());
  const Half* cache = static_cast<const Half*>(kv_cache.const_data_ptr());
  const Half* prompt_key = static_cast<const Half*>(prompt_k.const_data_ptr());
  const Half* prompt_value = static_cast<const Half*>(prompt_v.const_data_ptr());
  const int32_t* pages = block_table.const_data_ptr<int32_t>();
  Half* to = static_cast<Half*>(out.mutable_data_ptr());

  struct Task {
    int64_t request, head, query;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0; b < line.size(0); ++b)
    if (lines[b] >= 0)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < rows[b] * group; i += kMostRows) tasks.push_back({b, h, i});

  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    Round round(dim, scale, softcap);
    for (int64_t t = begin; t < end; ++t) {
      const auto [b, h, from] = tasks[t];
      const int64_t c = context[b], length = c + rows[b], n = std::min<int64_t>(kMostRows, rows[b] * group - from);
      const int32_t* row_depth = depths + lines[b] * most;
      const bool* row_sees = sees_row + lines[b] * most * most;
      const int32_t* row_mask = masks + lines[b] * most;
      // How many positions a row of this depth sees, its own included; 0 for all.
      const auto reach_of = [&](int64_t depth) -> int64_t {
        return chunk > 0 ? (c + depth) % chunk + 1 : std::max<int64_t>(window, 0);
      };
      const auto attend = kByRows<Attend>[n - 1];
      // Query i is of row (from + i) / group.
      bool any_mask = false;
      int64_t row_of[kMostRows];
      round.begin();
      for (int64_t i = 0; i < n; ++i) {
        row_of[i] = (from + i) / group;
        any_mask |= row_mask[row_of[i]] >= 0;
        std::memcpy(round.queries.data() + i * dim,
                    q + (first[b] + row_of[i]) * query.stride(0) + (h * group + (from + i) % group) * query.stride(1),
                    dim * sizeof(Half));
        if (sinks != nullptr) round.see_sink(i, sinks[h * group + (from + i) % group]);
      }
      if (any_mask)
        for (int64_t p = 0; p < num_prompt; p += kChunk) {
          const int64_t count = std::min(kChunk, num_prompt - p), panels = (count + kPanel - 1) / kPanel;
          for (int64_t j = 0; j < panels; ++j) {
            const int64_t place = p + j * kPanel;
            round.put(j, prompt_key + h * dim * num_prompt + place, num_prompt,
                      prompt_value + (h * num_prompt + place) * dim, num_prompt - place);
          }
          for (int64_t i = 0; i < n; ++i)
            round.seen[i] = row_mask[row_of[i]] >= 0 ? ~uint64_t{0} >> (kChunk - count) : 0;
          attend(round, panels);
        }
      // No row sees further back than the root.
      const int64_t root_reach = reach_of(0);
      const int64_t begin_slot = root_reach > 0 ? std::max<int64_t>(0, c - root_reach + 1) / kChunk * kChunk : 0;
      for (int64_t slot = begin_slot; slot < length; slot += kChunk) {
        const int64_t count = std::min(kChunk, length - slot), panels = (count + kPanel - 1) / kPanel;
        for (int64_t j = 0; j < panels; ++j) {
          const int64_t place = slot + j * kPanel, offset = place % block_size;
          const int64_t page = pages[b * block_table.stride(0) + place / block_size];
          const Half* keys = cache + page * kv_cache.stride(0) + h * kv_cache.stride(1);
          round.put(j, keys + offset, block_size, keys + (block_size + offset) * dim, length - place);
        }
        const uint64_t inside = ~uint64_t{0} >> (kChunk - count);
        for (int64_t i = 0; i < n; ++i) {
          if (i > 0 && row_of[i] == row_of[i - 1]) {
            round.seen[i] = round.seen[i - 1];
            continue;
          }
          round.seen[i] = inside;
          if (root_reach == 0 && slot + count <= c) continue;
          const int64_t row = row_of[i], reach = reach_of(row_depth[row]);
          for (int64_t j = reach > 0 ? 0 : std::max<int64_t>(0, c - slot); j < count; ++j) {
            const int64_t own = slot + j - c;
            const int64_t distance = row_depth[row] - (own >= 0 ? row_depth[own] : own);
            if ((own >= 0 && !row_sees[row * most + own]) || (reach > 0 && distance >= reach))
              round.seen[i] &= ~(uint64_t{1} << j);
          }
        }
        attend(round, panels);
      }
      for (int64_t i = 0; i < n; ++i) {
        Half* target = to + (first[b] + row_of[i]) * out.stride(0) + (h * group + (from + i) % group) * out.stride(1);
        const __m512 total = _mm512_set1_ps(round.total[i]);
        for (int64_t d = 0; d < dim; d += kPanel)
          _mm256_storeu_si256(
              reinterpret_cast<__m256i*>(target + d),
              (__m256i)_mm512_cvtneps_pbh(_mm512_div_ps(_mm512_loadu_ps(round.attended.data() + i * dim + d), total)));
      }
    }
  });
}

#endif
