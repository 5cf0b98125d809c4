"""The module to quantize and one real call of it."""
