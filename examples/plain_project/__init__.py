"""A project that knows nothing of quantization."""
