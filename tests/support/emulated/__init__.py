"""A device that the CPU emulates, so that tests meet what users of accelerators meet; see `backend.cpp`."""

import contextlib
import hashlib
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock
from torch.utils import cpp_extension

NAME = "emulated"
_SOURCE = Path(__file__).with_name("backend.cpp")


class _Module(ModuleType):
    """What stands at `torch.emulated`, as `torch.cuda` does for CUDA."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    device = staticmethod(contextlib.nullcontext)
    synchronize = staticmethod(lambda device=None: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed = manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


def load() -> torch.device:
    """Return the emulated device, which this process has from the first call on."""
    if not hasattr(torch, NAME):
        torch.ops.load_library(_built())
        torch.utils.rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, _Module(NAME))
        torch.utils.generate_methods_for_privateuse1_backend()
        torch.ops.emulated_device.begin()
    return torch.device(NAME, 0)


def _built() -> Path:
    """Compile the backend for this PyTorch, unless it was compiled before; takes about half a minute."""
    digest = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"lightning_quant_emulated_{digest}.so"
    with FileLock(f"{library}.lock"):
        if not library.exists():
            partial = library.with_suffix(".partial")
            include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
            link = [f"-L{path}" for path in cpp_extension.library_paths()]
            compiler = cpp_extension.get_cxx_compiler()
            options = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w", *include]
            libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
            subprocess.run([compiler, *options, str(_SOURCE), "-o", str(partial), *link, *libraries], check=True)
            partial.replace(library)
    return library
