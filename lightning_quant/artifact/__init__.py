"""The folder on disk: model files, manifest, golden batch, hashes, signature."""

from lightning_quant.arguments.moved import by_main_module

__getattr__ = by_main_module(__name__)
