"""Trainers of the emulated device, and Trainers of whatever accelerator is meant."""

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

import emulated


class EmulatedAccelerator(Accelerator):
    """Places modules and batches on the emulated device, as CUDAAccelerator does on a GPU."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == emulated.NAME

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [emulated.load()]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return emulated.NAME


def options(precision: str = "32-true") -> dict[str, Any]:
    """Return a Trainer's arguments for the emulated device; mixed precision needs the device's name."""
    where = {"accelerator": EmulatedAccelerator(), "devices": 1, "strategy": SingleDeviceStrategy(emulated.load())}
    if precision.endswith("-mixed"):
        return {**where, "plugins": [MixedPrecision(precision, emulated.NAME)]}
    return {**where, "precision": precision}
