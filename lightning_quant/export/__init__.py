"""From a planned model to an artifact, its trial before training, and the choice of runtime and engine."""

from lightning_quant.arguments.moved import by_main_module

__getattr__ = by_main_module(__name__)
