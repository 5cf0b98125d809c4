"""What the machine is called where Linux's files are not there."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_quant.machine import machine


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hide /proc, as on Windows and macOS."""
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: not str(path).startswith("/proc/") and is_file(path))
    machine._cpu.cache_clear()
    yield
    machine._cpu.cache_clear()


@pytest.mark.usefixtures("elsewhere")
def test_processor_is_named_without_files_of_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("cpuinfo")
    library.get_cpu_info = lambda: {"brand_raw": "A processor", "flags": ["avx2", "avx512vnni", "sse"]}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cpuinfo", library)

    assert machine.cpu_name() == "A processor (avx2, avx512_vnni)"
    assert machine.cpu_flags() == {"avx2", "avx512_vnni", "sse"}


@pytest.mark.parametrize("platform", ["darwin", "win32"])
@pytest.mark.usefixtures("elsewhere")
def test_peak_memory_is_known_without_files_of_linux(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = ModuleType("psutil")
    psutil.Process = lambda: type("P", (), {"memory_info": lambda _: type("I", (), {"peak_wset": 12})})()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    monkeypatch.setattr(sys, "platform", platform)

    assert (machine.peak_bytes() == 12) == (platform == "win32")


def test_peak_memory_grows_with_what_is_held() -> None:
    before = machine.peak_bytes()
    held = torch.ones(before // 2, dtype=torch.uint8)

    assert machine.peak_bytes() > before + held.numel() // 2 > 10**6
