"""Ranges from calls, and whatever a recipe does for accuracy, a file for each paper."""

from lightning_quant.arguments.moved import by_main_module

__getattr__ = by_main_module(__name__)
