"""What is neither trees nor vLLM: this machine, and the files that are read and written."""
