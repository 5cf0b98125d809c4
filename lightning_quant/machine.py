"""What this machine is, for reports."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """Return the processor's name and the instruction sets that decide how fast int8 is."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if name in flags]
    name = fields.get("model name", platform.machine())
    return f"{name} ({', '.join(sets)})" if sets else name
