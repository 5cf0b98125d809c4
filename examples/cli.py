"""LightningCLI with quantization-aware training from YAML: `python examples/cli.py fit --config examples/qat.yaml`."""

from digits import DigitClassifier, Digits
from lightning.pytorch.cli import LightningCLI


def main(args: list[str] | None = None) -> LightningCLI:
    """Run a subcommand of LightningCLI on the digit classifier."""
    return LightningCLI(DigitClassifier, Digits, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
