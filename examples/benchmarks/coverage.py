"""Whatever people train: int8 of many architectures beside onnxruntime's and NNCF's own, on the same calls.

`python examples/benchmarks/coverage.py` quantizes each network of `networks_*.py`, with random weights, by
`lq.quantize` for ONNX Runtime and OpenVINO, by onnxruntime's `quantize_static`, and by NNCF where that is installed
(`pip install nncf`). Noise is that of held-back inputs. Shares in integers are read from what the engines make of the
files: multiply-adds from ONNX Runtime's profile and OpenVINO's compiled layers, weights from the constants.
Times are CPU time for one sample, one thread, interleaved rounds, of bare sessions: ours are those that `load` opens,
called as the peers' are. Slower is what is so in 95 % of all drawings of the rounds. `--only NAME ...` runs some; what
has run is kept in `--state` and not run again.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import json
import math
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks_dense
import networks_images
import networks_mobile
import networks_sequences
import networks_tables
import torch
from integer_shares import Shares, onnxruntime_shares, openvino_shares
from network_cases import Case, settled
from peers import OrtModel, nncf_quantize, openvino_float, ort_float, ort_quantize_static, results_of
from results import publish
from timing import bootstrap_ratio, interleaved, median_ms, table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lightning_quant as lq
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.errors import NoEffectWarning, QuantizationError
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.runtimes.onnxruntime import OnnxRuntimeModule
from lightning_quant.runtimes.openvino import OpenVinoModule

OURS = ("onnxruntime", "openvino")
FLOATS = ("eager", "float, ONNX Runtime", "float, OpenVINO")
ORT_PEER, NNCF = "quantize_static", "NNCF"
TIMED = (*OURS, ORT_PEER, NNCF)
NUM_CALIBRATION_CALLS, BATCH = 8, 8
_MODULES = (networks_images, networks_mobile, networks_dense, networks_sequences, networks_tables)
NETWORKS: dict[str, Callable[[], Case]] = {
    name: make
    for module in _MODULES
    for name, make in vars(module).items()
    if inspect.isfunction(make) and make.__module__ == module.__name__ and make.__annotations__ == {"return": Case}
}
# Of one contestant: decibels, share of multiply-adds, share of weights; or why there are none.
Cells = dict[str, Any]


def run(name: str, rounds: int, *, auto: bool) -> dict[str, Any]:
    """Quantize one network with every tool; a peer that fails is a cell, ours is an error.

    Args:
        name: of the network.
        rounds: of the times; none where it is 0.
        auto: whether to try `runtime="auto"` where neither runtime of ours is as fast as the best float peer.
    """
    torch.manual_seed(0)
    case = NETWORKS[name]()
    net = settled(case.net, case.inputs)
    calibration = [case.inputs(BATCH, seed) for seed in range(NUM_CALIBRATION_CALLS)]
    held_back = [case.inputs(BATCH, 500 + seed) for seed in range(4)]
    found: dict[str, Any] = {"cells": {}}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        calls: dict[str, Callable[[Tensor], Any]] = {"eager": net}
        references = [pytree.tree_leaves(net(inputs)) for inputs in held_back]
        for tool, build in _tools(case, net, calibration, Path(folder), reported=rounds > 0).items():
            started = time.perf_counter()
            cells, predict = _attempt(tool, build, held_back, references)
            found["cells"][tool] = cells | {"seconds": round(time.perf_counter() - started, 1)}
            if predict is not None:
                calls[tool] = predict
        if rounds:
            fixed = case.one_size or any(map(_is_of_one_size, calls.values()))
            found["batch"] = BATCH if fixed else 1
            one = held_back[0][: found["batch"]]
            found["ms"], found["times"] = _timed(calls, one, rounds)
            if auto and _slower(found):
                build = functools.partial(_ours, case, net, calibration, Path(folder), "auto", reported=True)
                found["cells"]["auto"], predict = _attempt("auto", build, held_back, references)
                if predict is not None:
                    floats = {tool: call for tool, call in calls.items() if tool in FLOATS}
                    found["auto_ms"], found["auto_times"] = _timed(floats | {"auto": predict}, one, rounds)
    return found


def _timed(
    calls: dict[str, Callable[[Tensor], Any]], inputs: Tensor, rounds: int
) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """Return milliseconds of each call, and how many times those of the best float peer, with its interval."""
    contestants = {tool: functools.partial(_bare(call), inputs) for tool, call in calls.items()}
    seconds = interleaved(contestants, rounds=rounds, warm=True)
    ms = {tool: median_ms(values) for tool, values in seconds.items()}
    best = seconds[_best_float(ms)]
    return ms, {tool: tuple(bootstrap_ratio(values, best)) for tool, values in seconds.items()}


def _bare(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Return the engine's own call of a loaded artifact, as those of the peers are."""
    if isinstance(call, OnnxRuntimeModule):
        session, name = call.session, call.session.get_inputs()[0].name
        return lambda inputs: results_of(session.run(None, {name: inputs.numpy()}))
    if isinstance(call, OpenVinoModule):
        return lambda inputs: results_of([result.copy() for result in call.compiled(inputs.numpy()).values()])
    if isinstance(call, LoadedModule):
        return lambda inputs: call.run([inputs])
    return call


def _is_of_one_size(call: Any) -> bool:
    return isinstance(call, LoadedModule) and isinstance(call.signature.inputs[0].shape[0], int)


def _slower(found: dict[str, Any]) -> bool:
    ms = found.get("ms", {})
    ours = [tool for tool in OURS if tool in ms]
    if not ours:
        return False
    fastest = min(ours, key=lambda tool: ms[tool])
    # States of earlier versions have no interval.
    return (found["times"][fastest][1] if "times" in found else ms[fastest] / ms[_best_float(ms)]) > 1


def _tools(
    case: Case, net: nn.Module, calibration: list[Tensor], folder: Path, *, reported: bool
) -> dict[str, Callable[[], Any]]:
    """Return, by name, functions that give a predictor, and the artifact where it is ours."""
    example, path = calibration[0], folder / "float.onnx"
    ours = functools.partial(_ours, case, net, calibration, folder, reported=reported)

    def float_openvino() -> Any:
        return openvino_float(path), None

    def static() -> Any:
        # Inference of symbolic shapes stops at some of these.
        return ort_quantize_static(net, calibration, folder / "static.onnx", exported=path, symbolic_shapes=False), None

    tools: dict[str, Callable[[], Any]] = {
        FLOATS[1]: lambda: (ort_float(net, example, path, one_size=case.one_size), None),
        FLOATS[2]: float_openvino,
        **{runtime: functools.partial(ours, runtime) for runtime in OURS},
        ORT_PEER: static,
    }
    if importlib.util.find_spec("nncf"):
        tools[NNCF] = lambda: (nncf_quantize(net, calibration, path, exported=path), None)
    return tools


def _ours(
    case: Case, net: nn.Module, calibration: list[Tensor], folder: Path, runtime: str, *, reported: bool
) -> tuple[nn.Module, lq.Artifact]:
    """Return an artifact, loaded, and itself."""
    shapes: Any = "static" if case.one_size else None
    if not reported:
        prepared = prepare(net, (calibration[0],), runtime=runtime, observer="mse", trains=False)
        calibrate(prepared, steps_of(prepared, calibration))
        artifact = export(prepared, folder / runtime, dynamic_shapes=shapes)
        return lq.load(artifact.path, threads=1), artifact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        artifact = lq.quantize(
            net,
            runtime=runtime,  # type: ignore[arg-type]
            calibration_data=calibration,
            output_dir=folder / runtime,
            dynamic_shapes=shapes,
            threads=1,
        )
    return lq.load(artifact.path, threads=1), artifact


def _attempt(tool: str, build: Callable[[], Any], held_back: list[Tensor], references: list[Any]) -> tuple[Cells, Any]:
    try:
        predict, artifact = build()
        results = [pytree.tree_leaves(predict(inputs)) for inputs in held_back]
    except QuantizationError as error:
        return {"refused": str(error)}, None
    except Exception as error:
        if tool in (*OURS, "auto"):
            raise
        return {"failed": f"{type(error).__name__}: {error}"[:300]}, None
    cells: Cells = {"db": signal_to_noise(references, results)}
    if artifact is not None:
        cells["planned"] = artifact.manifest["plan"]["coverage"]
        cells["notes"] = artifact.report["warnings"] if artifact.report else []
        cells["runtime"] = artifact.manifest["runtime"]
    if tool not in (*FLOATS, "auto"):
        # OpenVINO does not compile every model with fixed sizes, from which shares are read.
        with contextlib.suppress(RuntimeError):
            cells |= _shares(predict, artifact, held_back[0])._asdict()
    return cells, predict


def _shares(predict: Any, artifact: lq.Artifact | None, inputs: Tensor) -> Shares:
    if artifact is None:
        is_ort = isinstance(predict, OrtModel)
        return onnxruntime_shares(predict.model_path, inputs) if is_ort else openvino_shares(predict.model, inputs)
    if artifact.model_path.suffix == ".onnx":
        return onnxruntime_shares(artifact.model_path, inputs)
    return openvino_shares(openvino_float(artifact.model_path).model, inputs)


def rows(found: dict[str, dict[str, Any]]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return the rows of the table and its header."""
    header = ["network"]
    header += [f"{measure}: {tool}" for measure in ("dB", "computed %", "stored %") for tool in TIMED]
    header += ["best float, ms", *(f"times faster: {tool}" for tool in TIMED), "slower, said", '"auto"']
    lines = []
    for name, result in found.items():
        cells = result["cells"]
        line = [name]
        for measure, scale in (("db", 1), ("computed", 100), ("stored", 100)):
            line += [_cell(cells.get(tool, {}), measure, scale) for tool in TIMED]
        lines.append((*line, *_times(result)))
    return lines, tuple(header)


def _cell(cells: Cells, measure: str, scale: int) -> str:
    if measure in cells:
        return f"{scale * cells[measure]:.{1 if scale == 1 else 0}f}"
    return next((word for word in ("refused", "failed") if word in cells), "")


def _times(result: dict[str, Any]) -> tuple[str, ...]:
    """Return the best float time, how many times faster each of the others is, and what `"auto"` makes of it."""
    ms = result.get("ms")
    if ms is None:
        return ("",) * (len(TIMED) + 3)
    best = _best_float(ms)
    faster = [f"{ms[best] / ms[tool]:.2f}" if tool in ms else "" for tool in TIMED]
    batch = "" if result["batch"] == 1 else f", batch {result['batch']}"
    batch += "" if "times" in result else ", through `load`"
    said = _said(result["cells"][min(OURS, key=lambda tool: ms.get(tool, math.inf))]) if _slower(result) else ""
    return f"{ms[best]:.2f} ({best.removeprefix('float, ')}{batch})", *faster, said, _auto(result)


def _best_float(ms: dict[str, float]) -> str:
    return min((tool for tool in FLOATS if tool in ms), key=lambda tool: ms[tool])


def _said(cells: Cells) -> str:
    return "yes" if any("slower" in note for note in cells["notes"]) else "no"


def _auto(result: dict[str, Any]) -> str:
    ms, cells = result.get("auto_ms"), result["cells"].get("auto", {})
    if ms is None:
        return _cell(cells, "", 1)
    said = ", said" * (_said(cells) == "yes")
    return f"{ms[_best_float(ms)] / ms['auto']:.2f} ({cells['runtime']}{said})"


def main() -> None:
    """Run the networks one after the other, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    parser.add_argument("--no-latency", action="store_true", help="leave out the times and the reports")
    parser.add_argument(
        "--no-auto", action="store_true", help='leave out `runtime="auto"` where ours is slower than float'
    )
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--state", type=Path, help="JSON file of what has run")
    parser.add_argument("--found", action="store_true", help="run nothing, and take what the state holds")
    parser.add_argument("--no-publish", action="store_true", help="print the table only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state = arguments.state
    found = json.loads(state.read_text()) if state is not None and state.exists() else {}
    names = [name for name in arguments.only if name in found or not arguments.found]
    for name in () if arguments.found else names:
        if name in found and (arguments.no_auto or not _slower(found[name]) or "auto" in found[name]["cells"]):
            continue
        started = time.perf_counter()
        try:
            found[name] = run(name, 0 if arguments.no_latency else arguments.rounds, auto=not arguments.no_auto)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"cells": {tool: {"failed": f"{type(error).__name__}: {error}"} for tool in OURS}}
        print(f"{name}: {time.perf_counter() - started:.0f} s {json.dumps(found[name])}", flush=True)
        if state is not None:
            state.write_text(json.dumps(found))
    lines, header = rows({name: found[name] for name in names})
    if arguments.no_publish:
        print(table(lines, header))
    else:
        publish("coverage", table(lines, header), packages=["openvino"])


if __name__ == "__main__":
    main()
