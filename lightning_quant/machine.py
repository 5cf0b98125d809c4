"""What this machine is, for reports."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """Return the processor's name and the instruction sets that decide how fast int8 is."""
    fields, flags = _cpuinfo(), cpu_flags()
    if not fields:
        return platform.processor() or platform.machine()
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if name in flags]
    name = fields.get("model name", platform.machine())
    return f"{name} ({', '.join(sets)})" if sets else name


def cpu_flags() -> set[str]:
    """Return what the system calls the processor's instruction sets; empty where it does not say."""
    return set(_cpuinfo().get("flags", "").split())


def _cpuinfo() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return {}
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in fields.items()}
