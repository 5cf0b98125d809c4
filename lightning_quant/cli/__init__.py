"""The command `lightning-quant`, and LightningCLI's subcommands."""
