// Copies for the requests of a step: the tokens that followed where a request's last tokens occurred before, found
// through hash chains as in LZ77. Its twin: find_copies_cpu_naive.py, which says what the arguments are. Built by
// cpu_kernels.py.
//
// A slot's first table holds the last place where a pair of tokens with that hash ended, `previous` the one before it
// for each place. So a search visits only places whose last two tokens may be the text's last two. Where none are, the
// last place of the last token alone counts, which the second table holds. Every place is compared with the text as it
// is now: an index that missed a change costs copies, never wrong ones.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace {

constexpr int64_t kPair = 2, kMaxMatch = 32;
constexpr int32_t kNone = -1;
// Columns of a slot's state.
enum : int64_t { kIndexed, kLastPair, kCopyFrom, kTokenBefore, kColumns };

uint32_t hash_token(const int32_t* last) { return static_cast<uint32_t>(last[0]) * 0x9E3779B1u; }

uint32_t hash_pair(const int32_t* last) {
  return (hash_token(last - 1) + static_cast<uint32_t>(last[0])) * 0x85EBCA77u;
}

// Tokens in a row that are equal before and at both places.
int64_t match_length(const int32_t* text, int64_t place, int64_t end) {
  const int64_t most = std::min(kMaxMatch, place + 1);
  int64_t length = 0;
  while (length < most && text[place - length] == text[end - length]) ++length;
  return length;
}

struct Slot {
  int32_t *pairs, *tokens, *previous, *state;
  int64_t num_heads;
  int hash_shift;

  // Whether the text begins with the one that is indexed, as far as its last two tokens say it.
  bool holds(const int32_t* text, int64_t size) const {
    const int64_t indexed = state[kIndexed];
    return indexed >= kPair && indexed <= size &&
           state[kLastPair] == static_cast<int32_t>(hash_pair(text + indexed - 1));
  }

  // Compares the last copy with what the text became: tokens that it took, and whether it then took another one.
  void compare(const int32_t* text, int64_t size, int64_t depth, int32_t* outcome) const {
    const int64_t from = state[kCopyFrom], begin = state[kIndexed], end = std::min(begin + depth, size);
    if (from == kNone) return;
    // A copy that came to the text's end went on with its own tokens; a text that took them has them here.
    for (int64_t i = begin; i < end && outcome[1] == 0; ++i) ++outcome[text[from + i - begin] != text[i]];
  }

  void clear() const {
    std::fill_n(pairs, num_heads, kNone);
    std::fill_n(tokens, num_heads, kNone);
    state[kIndexed] = 0;
    state[kCopyFrom] = state[kTokenBefore] = kNone;
  }

  void index(const int32_t* text, int64_t size) const {
    for (int64_t i = state[kIndexed]; i < size; ++i) {
      state[kTokenBefore] = std::exchange(tokens[hash_token(text + i) >> hash_shift], static_cast<int32_t>(i));
      previous[i] = kNone;  // no pair ends at the first token
      if (i) previous[i] = std::exchange(pairs[hash_pair(text + i) >> hash_shift], static_cast<int32_t>(i));
    }
    state[kIndexed] = static_cast<int32_t>(size);
    if (size >= kPair) state[kLastPair] = static_cast<int32_t>(hash_pair(text + size - 1));
  }

  // The length of the longest match, and where the tokens after it begin; of equally long ones the last.
  std::pair<int64_t, int64_t> longest_match(const int32_t* text, int64_t size, int64_t max_places) const {
    int64_t longest = 0, from = kNone;
    const auto compare_at = [&](int64_t place) {
      const int64_t matched = match_length(text, place, size - 1);
      if (matched > longest) longest = matched, from = place + 1;
    };
    int64_t place = size ? previous[size - 1] : kNone;
    for (int64_t i = 0; i < max_places && place != kNone && longest < kMaxMatch; ++i, place = previous[place])
      compare_at(place);
    if (longest < kPair) {  // what pairs with the same hash share by chance is not the last place of the token
      longest = 0, from = kNone;
      if (state[kTokenBefore] != kNone) compare_at(state[kTokenBefore]);
    }
    return {longest, from};
  }
};

void find_copies_cpu(const at::Tensor& token_ids, const at::Tensor& num_tokens, const at::Tensor& slots,
                     int64_t max_places, const at::Tensor& head, const at::Tensor& previous, const at::Tensor& state,
                     const at::Tensor& copies, const at::Tensor& length, const at::Tensor& outcome) {
  const int64_t num_requests = num_tokens.numel(), depth = copies.size(1), num_heads = head.size(2);
  TORCH_CHECK(token_ids.stride(1) == 1 && copies.is_contiguous() && outcome.is_contiguous() && head.is_contiguous() &&
                  previous.is_contiguous() && state.is_contiguous() && state.size(1) == kColumns,
              "find_copies_cpu: all tensors must be contiguous, token_ids by row");
  TORCH_CHECK(num_heads >= 2 && (num_heads & (num_heads - 1)) == 0 && previous.size(1) >= token_ids.size(1),
              "find_copies_cpu: the head tables must have a power of two of entries, previous one for each token");
  const int hash_shift = 33 - __builtin_ffsll(num_heads);
  const int64_t *sizes = num_tokens.const_data_ptr<int64_t>(), *slot_of = slots.const_data_ptr<int64_t>();
  const int32_t* texts = token_ids.const_data_ptr<int32_t>();
  int32_t *heads = head.mutable_data_ptr<int32_t>(), *links = previous.mutable_data_ptr<int32_t>();
  int32_t *states = state.mutable_data_ptr<int32_t>(), *outcomes = outcome.mutable_data_ptr<int32_t>();
  int64_t *found = copies.mutable_data_ptr<int64_t>(), *lengths = length.mutable_data_ptr<int64_t>();
  at::parallel_for(0, num_requests, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int32_t* text = texts + b * token_ids.stride(0);
      const int64_t size = sizes[b], slot = slot_of[b];
      int32_t* const tables = heads + slot * 2 * num_heads;
      const Slot own{tables, tables + num_heads, links + slot * previous.size(1), states + slot * kColumns, num_heads,
                     hash_shift};
      int32_t* outcome_of = outcomes + 2 * b;
      outcome_of[0] = outcome_of[1] = 0;
      if (own.holds(text, size))
        own.compare(text, size, depth, outcome_of);
      else
        own.clear();
      own.index(text, size);
      const auto [longest, from] = own.longest_match(text, size, max_places);
      own.state[kCopyFrom] = static_cast<int32_t>(from);
      lengths[b] = longest;
      int64_t* copy = found + b * depth;
      for (int64_t i = 0; i < depth; ++i)
        copy[i] = longest == 0 ? 0 : from + i < size ? text[from + i] : copy[from + i - size];
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(bita, CPU, m) { m.impl("find_copies_cpu", &find_copies_cpu); }
