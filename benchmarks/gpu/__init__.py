"""The parts of `make gpu-suite` (benchmarks/gpu_suite.py)."""
