"""What this machine is, and how long a call takes on it."""

from lightning_quant.arguments.moved import by_main_module

__getattr__ = by_main_module(__name__)
