"""Triton kernels of BiTA and their naive torch twins; imports nothing of vLLM."""
