// Products of few rows in bfloat16 with what lies in panels of sixteen columns, pair by pair of what is summed over:
// as vdpbf16ps, of CPUs with AVX512-BF16, takes them. Sums are in fp32, in one order, however many rows there are.

#pragma once

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

constexpr int64_t kPanel = 16;           // columns that lie together
constexpr int64_t kLine = 2 * kPanel;    // values of a panel that one instruction takes: two of each column
constexpr int kMostRows = 12;            // of a tile: 12 x 2 sums, the panels and what is multiplied fill 32 registers

using Half = uint16_t;  // the bits of a bfloat16

// Panels beside each other, so that sums enough are in flight for this many rows.
constexpr int wide_of(int rows) { return rows <= 6 ? 4 : 2; }

inline __mmask16 mask_of(int64_t count) { return count >= kPanel ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1; }

inline __m512bh pair_of(const Half* from) {
  int32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// Of two values of each column, the ones for even places of a line in `even`.
inline __m512i line_of(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// sum[i][j] += x[i] . w[j], for Rows rows and Wide panels. Meanwhile, with Prefetch, what lies behind is on its way
// into the cache.
template <int Rows, int Wide, bool Prefetch>
inline void accumulate(__m512 (&sum)[Rows][Wide], const Half* x, int64_t ldx, const Half* w, int64_t panel_size,
                       int64_t pairs) {
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh columns[Wide];
#pragma GCC unroll 4
    for (int j = 0; j < Wide; ++j) {
      const Half* from = w + j * panel_size + k * kLine;
      columns[j] = (__m512bh)_mm512_loadu_si512(from);
      if constexpr (Prefetch) _mm_prefetch(reinterpret_cast<const char*>(from + Wide * panel_size), _MM_HINT_T1);
    }
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const __m512bh both = pair_of(x + i * ldx + 2 * k);
#pragma GCC unroll 4
      for (int j = 0; j < Wide; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], columns[j], both);
    }
  }
}

// Of<1>::run, ..., Of<kMostRows>::run.
template <template <int> typename Of, int... Rows>
constexpr auto by_rows(std::integer_sequence<int, Rows...>) {
  return std::array{&Of<Rows + 1>::run...};
}

template <template <int> typename Of>
constexpr auto kByRows = by_rows<Of>(std::make_integer_sequence<int, kMostRows>());

}  // namespace

#endif
