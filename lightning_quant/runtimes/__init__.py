"""WHERE a quantized model runs: one file per runtime, and the file name is the runtime's name.

A runtime module offers `TABLE`, `REQUIRES`, `MODEL_FILE`, `export`, `check`, `load` (which gives a `LoadedModule` and
takes `OPTIONS`), `standalone`, `count_operators` and `still_float`, and where its files keep the names of edges
`quantized_edges` and `run_forced`, as in `onnxruntime.py`; where they have room for notes, `describe`. One with
kernels of several engines offers `engines` and `set_engine` as in `torch.py`. `HALF_ARITHMETIC` says whether layers
compute in half precision or only store their weights so, None that recipes of layers do not run; `LAYER_REFUSALS` has
scheme to reason for those that do not. `LAYERS_IN_GRAPHS` says whether a static recipe may leave layers to them.
`IN_PROCESS` says that the float peer of comparisons is the float module itself.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lightning_quant.arguments import check_threads
from lightning_quant.choice import check_choice, did_you_mean
from lightning_quant.errors import MissingRuntimeError, QuantizationError


def names() -> list[str]:
    """Return the names of all runtimes of this version."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def check_name(name: str) -> None:
    """Make sure that `runtime=` names a runtime, or leaves the choice to "auto".

    Raises:
        QuantizationError: it does not.
    """
    check_choice("runtime", name, ["auto", *names()])


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Make sure that what `load` is given is for a runtime.

    Raises:
        QuantizationError: it knows no such option, or the number of threads is none.
    """
    known = get(name).OPTIONS
    # Where there is nothing to fill, the runtime itself says why.
    unknown = [option for option in options if option not in known and option != "into"]
    if unknown:
        raise QuantizationError(
            f"Expected options of `load` for runtime {name!r} to be out of {list(known)}, but got {unknown[0]!r}."
            f"{did_you_mean(unknown[0], known)}"
        )
    check_threads(options.get("threads"))


def get(name: str, *, exporting: bool = False) -> ModuleType:
    """Return a runtime's module.

    Args:
        name: of the runtime.
        exporting: whether what only exporting needs, such as a compiler, has to be there as well.

    Raises:
        QuantizationError: no runtime has that name.
        MissingRuntimeError: it is not installed here; the message carries the pip command.
    """
    check_choice("runtime", name, names())
    runtime = importlib.import_module(f"{__name__}.{name}")
    missing = [package for package in runtime.REQUIRES if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingRuntimeError(
            f"Expected `runtime` {name!r} to be installed, but {', '.join(missing)} is missing: "
            f"pip install {' '.join(runtime.REQUIRES)}"
        )
    if exporting and hasattr(runtime, "check_machine"):
        runtime.check_machine()
    return runtime
