"""The blocks of one step: on the host, on the device, and in CUDA graphs."""
