"""From fake quantization to the one form that all runtimes read."""

from typing import TYPE_CHECKING

from lightning_quant.arguments.moved import by_main_module

# Type checkers are to miss what is not there.
if not TYPE_CHECKING:
    __getattr__ = by_main_module(__name__)
