"""What benchmarks and tests share: tiny models, server processes, the GPU runner on a CPU, naive training."""
