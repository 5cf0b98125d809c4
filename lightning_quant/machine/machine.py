"""What this machine is, for reports, and what a process took of it."""

import functools
import platform
import sys
from pathlib import Path

# Decide how fast int8 is; spelled as Linux does.
_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def cpu_name() -> str:
    """Return the processor's name and the instruction sets that decide how fast int8 is."""
    name, flags = _cpu()
    sets = [each for each in _SETS if each in flags]
    return f"{name} ({', '.join(sets)})" if sets else name


def cpu_flags() -> set[str]:
    """Return what Linux calls the processor's instruction sets; empty where the system does not say."""
    return set(_cpu()[1])


@functools.cache
def _cpu() -> tuple[str, frozenset[str]]:
    """Return name and instruction sets of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        first = info.read_text().split("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
        named = fields.get("flags", fields.get("Features", ""))
        return fields.get("model name", platform.machine()), frozenset(named.split())
    # Takes two seconds, which Linux users need not wait for.
    import cpuinfo

    cpu = cpuinfo.get_cpu_info()
    spelled = {name.replace("_", ""): name for name in _SETS}
    flags = frozenset(spelled.get(flag.replace("_", ""), flag) for flag in cpu.get("flags", []))
    return cpu.get("brand_raw") or platform.processor() or platform.machine(), flags


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux hands a child its parent's peak through `getrusage`, but not through this.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return 1024 * int(fields["VmHWM"].split()[0])
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else 1024 * value
