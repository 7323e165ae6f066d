// Moves accepted rows to their slots in the KV caches of all layers. Its twin in torch: move_kv_cpu_naive.py.
// Built by cpu_kernels.py.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

namespace {

template <typename T>
void move_layer(T* cache, int64_t page_size, int64_t heads, int64_t block_size, int64_t dim, const int64_t* source,
                const int64_t* target, int64_t moves, std::vector<T>& held) {
  // Reads come before writes: moves may overlap.
  held.resize(moves * 2 * dim);
  for (int64_t head = 0; head < heads; ++head) {
    T* of_head = cache + head * block_size * 2 * dim;
    for (int64_t i = 0; i < moves; ++i) {
      const int64_t offset = source[i] % block_size;
      const T* keys = of_head + source[i] / block_size * page_size;
      const T* values = keys + (block_size + offset) * dim;
      for (int64_t d = 0; d < dim; ++d) held[2 * i * dim + d] = keys[d * block_size + offset];
      std::copy_n(values, dim, held.data() + (2 * i + 1) * dim);
    }
    for (int64_t i = 0; i < moves; ++i) {
      const int64_t offset = target[i] % block_size;
      T* keys = of_head + target[i] / block_size * page_size;
      for (int64_t d = 0; d < dim; ++d) keys[d * block_size + offset] = held[2 * i * dim + d];
      std::copy_n(held.data() + (2 * i + 1) * dim, dim, keys + (block_size + offset) * dim);
    }
  }
}

void move_kv_cpu(at::TensorList kv_caches, const at::Tensor& source, const at::Tensor& target) {
  TORCH_CHECK(source.is_contiguous() && target.is_contiguous() && source.numel() == target.numel(),
              "move_kv_cpu: source and target must be contiguous, and as many");
  for (const at::Tensor& cache : kv_caches) {
    TORCH_CHECK(cache.is_contiguous(), "move_kv_cpu: a KV cache must be contiguous");
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, cache.scalar_type(), "move_kv_cpu", [&] {
      std::vector<scalar_t> held;
      move_layer(cache.mutable_data_ptr<scalar_t>(), cache.stride(0), cache.size(1), cache.size(2), cache.size(3) / 2,
                 source.const_data_ptr<int64_t>(), target.const_data_ptr<int64_t>(), source.numel(), held);
    });
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(bita, CPU, m) { m.impl("move_kv_cpu", &move_kv_cpu); }
