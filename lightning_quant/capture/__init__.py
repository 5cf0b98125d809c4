"""Stage 1: the module to quantize and one real call of it."""
