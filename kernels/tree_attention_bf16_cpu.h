// Tree attention in bfloat16, for CPUs with AVX512-BF16. The arguments are those of tree_attention_cpu; sinks may be null.

#pragma once

#ifdef __AVX512BF16__

#include <ATen/core/Tensor.h>

bool takes_tree_attention_bf16(const at::Tensor& kv_cache);

void tree_attention_bf16(const at::Tensor& query, const at::Tensor& kv_cache, const at::Tensor& block_table,
                         const at::Tensor& first_row, const at::Tensor& num_rows, const at::Tensor& context_len,
                         const at::Tensor& line, const at::Tensor& depth, const at::Tensor& ancestors,
                         const at::Tensor& mask_index, const at::Tensor& prompt_keys, const at::Tensor& prompt_values,
                         at::Tensor& out, float scale, float softcap, int64_t window, const float* sinks,
                         int64_t chunk);

#endif
