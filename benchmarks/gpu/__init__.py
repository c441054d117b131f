"""One prepared run for a GPU: step time, memory, kept activations and whole runs at full size, and PyTorch's times."""
