"""One step of the engine: its blocks on the host, on the device and in CUDA graphs, and the settings they follow."""
