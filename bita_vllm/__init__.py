"""BiTA (Bi-directional Tuning) for vLLM: lossless speculative decoding without a draft model."""

__version__ = "0.1.0"
