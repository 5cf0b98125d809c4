"""Calls as data: which tensors go in under which names, what comes out, and what batches are made of."""

from lightning_quant.arguments.moved import by_main_module

__getattr__ = by_main_module(__name__)
