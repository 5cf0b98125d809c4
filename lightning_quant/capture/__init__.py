"""The module to quantize and one real call of it."""

from lightning_quant.arguments.moved import by_main_module

__getattr__ = by_main_module(__name__)
