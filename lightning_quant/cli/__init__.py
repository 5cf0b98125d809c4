"""The command `lightning-quant`, and LightningCLI's subcommands."""

from lightning_quant.arguments.moved import by_main_module

__getattr__ = by_main_module(__name__)
