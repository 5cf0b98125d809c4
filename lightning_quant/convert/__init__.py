"""From fake quantization to the one form that all runtimes read."""

from lightning_quant.arguments.moved import by_main_module

__getattr__ = by_main_module(__name__)
