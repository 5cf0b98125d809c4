"""The folder on disk: model files, manifest, golden batch, hashes, signature."""

from typing import TYPE_CHECKING

from lightning_quant.arguments.moved import by_main_module

# Type checkers are to miss what is not there.
if not TYPE_CHECKING:
    __getattr__ = by_main_module(__name__)
