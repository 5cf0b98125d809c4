"""From fake quantization to the one form that all runtimes read."""
