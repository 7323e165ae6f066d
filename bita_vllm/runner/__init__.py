"""Model runners: where a step block enters and leaves vLLM's own runners."""
