"""Stage 5: from fake quantization to the one form that all runtimes read."""
