"""Ranges from data: observers, how those of several processes become one, and the ranges of all tensors."""

from lightning_quant.arguments.moved import by_main_module

__getattr__ = by_main_module(__name__)
