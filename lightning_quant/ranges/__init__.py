"""Ranges from data: observers, how those of several processes become one, and the ranges of all tensors."""
