"""Attention backends: tree attention over vLLM's paged KV cache."""
