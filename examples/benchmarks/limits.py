"""Real nets with a limit on what they may lose: what the search finds, beside the recipes and NNCF's accuracy control.

`python examples/benchmarks/limits.py` prints a table for each of three nets:
- mobilenet: the MobileNetV2 probe on FashionMNIST, accuracy down by 0.2 points at most, the smallest file;
- minilm: MiniLM on SMS spam, F1 down by 0.3 points at most, the quickest file;
- audio: the transformer of `examples/audio_classifier.py`, trained here, accuracy down by a point at most in three
  tenths of the bytes, the smallest file.
The search and NNCF validate on training samples that nothing was fitted or calibrated on. Test samples are read once,
at the end, by all. NNCF decides on what it measures; it reverts `NNCF_ITERATIONS` operators at most here, since it
validates once for each, without end otherwise.
"""

import argparse
import functools
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from dynamic_peers import export_onnx, quiet
from limits_cases import CASES, Case, answers
from nncf_control import accuracy_control
from results import publish
from timing import Estimate, bootstrap_ratio, interleaved, median_ms, table
from torch import Tensor

import lightning_quant as lq

NNCF_ITERATIONS = 10
NNCF = f"NNCF accuracy control, {NNCF_ITERATIONS} iterations"
NUM_RESAMPLES = 2000

Model = Callable[..., Tensor]


class Made(NamedTuple):
    """What one way has made.

    Attributes:
        model: takes inputs by name.
        num_bytes: of its file.
        validations: files that were validated, on all samples or a part; None where nothing was.
        readings: how often all samples of validation were read for files.
        seconds: that making it took, with its validations.
        cpu_seconds: likewise.
        says: of itself.
    """

    model: Model
    num_bytes: int
    validations: int | None = None
    readings: float | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    says: str = ""


def recipe_alone(case: Case, folder: Path, recipe: str) -> Made:
    """Quantize with a recipe, which nothing validates."""
    artifact = lq.quantize(case.net, recipe, calibration_data=case.calls, output_dir=folder, threads=1)
    return Made(lq.load(folder, threads=1), artifact.size_bytes)


def searched(case: Case, folder: Path) -> Made:
    """Search for what keeps the limits."""
    judged: dict[str, Any] = {"limits": case.limits, "objective": case.objective, "evaluate": case.evaluate}
    artifact = lq.quantize(case.net, calibration_data=case.calls, output_dir=folder, threads=1, **judged)
    search = artifact.report["search"]
    readings = sum(trial["validations"] for trial in search["trials"])
    made = Made(lq.load(folder, threads=1), artifact.size_bytes, len(search["trials"]), readings)
    return made._replace(says=_said(search))


def _said(search: dict[str, Any]) -> str:
    """Return the words of a search: how it ended, what each limit reached, and what relaxing it would buy."""
    bound = math.ceil(math.log2(search["num_steps"] + 1)) + 3 if search["num_steps"] else 3
    kept: dict[str, int] = {}
    for scheme in search["chosen"]["kept"].values():
        kept[scheme] = kept.get(scheme, 0) + 1
    schemes = ", ".join(f"{number} in {scheme}" for scheme, number in kept.items()) or "none in a safer scheme"
    parts = [
        f"The search ended with {search['ended']}: operators that are kept out, {schemes}; its ranking has "
        f"{search['num_steps']} steps, for which {bound} readings of the data are allowed."
    ]
    for verdict in search["verdicts"]:
        reached, allowed = (f"{verdict[name]:.4g}" for name in ("reached", "allowed"))
        ends = "kept" if verdict["kept"] else "missed"
        parts.append(f"{verdict['limit']} may be {allowed}, and is {reached} at most ({verdict['basis']}): {ends}.")
    rows = search["relaxations"]
    header = ("missed limit", "allowed", "reached", "next option", "reaches", "its price")
    return "\n\n".join([" ".join(parts), *([table(rows, header)] if rows else [])])


def nncf_control(case: Case, folder: Path) -> Made:
    """Let NNCF revert operators until what its validation measures keeps the limit on the metric."""
    import nncf
    import openvino as ov

    options = dict(case.nncf)
    exported = export_onnx(case.net, case.calls[0], folder / "float.onnx", varying=options.pop("varying", 1))
    core = ov.Core()
    if "model_type" in options:
        options["model_type"] = nncf.ModelType(options["model_type"])

    def score(predicted: np.ndarray, labels: np.ndarray) -> float:
        return float(case.score(predicted, labels, np.ones((1, len(labels))))[0]) / 100

    calls = [_numpy(call) for call in case.calls]
    items = [(_numpy(inputs), labels.numpy()) for inputs, labels in case.batches("validation")]
    drop = -case.limits[case.metric]
    with quiet():
        model = core.read_model(str(exported))
        done = accuracy_control(model, calls, items, score, drop, NNCF_ITERATIONS, **options)
    ov.save_model(done.model, folder / "nncf.xml", compress_to_fp16=False)
    size = sum((folder / f"nncf.{suffix}").stat().st_size for suffix in ("xml", "bin"))
    compiled = core.compile_model(done.model, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return Made(lambda **call: torch.from_numpy(compiled(_numpy(call))[0].copy()), size, done.files, done.readings)


def _numpy(call: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in call.items()}


def predicted_and_scored(case: Case, model: Model, split: str) -> tuple[np.ndarray, float]:
    """Return the predictions of a model, and its metric in percent."""
    predicted, labels = (torch.cat(list(x)).numpy() for x in zip(*answers(model, case.batches(split)), strict=True))
    return predicted, float(case.score(predicted, labels, np.ones((1, len(labels))))[0])


def timed(way: Callable[[Case, Path], Made], case: Case, folder: Path) -> Made:
    """Make something and note what it took."""
    folder.mkdir()
    started, cpu = time.perf_counter(), time.process_time()
    made = way(case, folder.resolve() / "file")
    return made._replace(seconds=time.perf_counter() - started, cpu_seconds=time.process_time() - cpu)


def from_float(case: Case, predicted: np.ndarray, floating: np.ndarray, labels: np.ndarray) -> Estimate:
    """Estimate a metric minus float's on the same samples, which are resampled."""
    counts = np.random.default_rng(0).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), NUM_RESAMPLES)
    weights = np.concatenate([np.ones((1, len(labels))), counts])
    apart = case.score(predicted, labels, weights) - case.score(floating, labels, weights)
    return Estimate(float(apart[0]), *map(float, np.percentile(apart[1:], [2.5, 97.5])))


def rows_of(case: Case, every: dict[str, Made], split: str) -> list[tuple[str, ...]]:
    """Read the data to score on once, time everything, and return a row for each."""
    labels = torch.cat([part for _, part in case.batches(split)]).numpy()
    scored = {name: predicted_and_scored(case, made.model, split) for name, made in every.items()}
    with torch.no_grad():
        calls = {name: functools.partial(made.model, **case.calls[0]) for name, made in every.items()}
        seconds = interleaved(calls, rounds=25)
    rows = []
    for name, made in every.items():
        predicted, value = scored[name]
        apart = from_float(case, predicted, scored["float"][0], labels)
        ratio = bootstrap_ratio(seconds[name], seconds["float"])
        number = "-" if made.readings is None else f"{made.readings:.3g} ({made.validations} files)"
        cost = "-" if name == "float" else f"{made.seconds:.0f} ({made.cpu_seconds:.0f})"
        speed = f"{median_ms(seconds[name]):.1f}", f"{ratio:.2f}"
        rows.append((name, f"{value:.2f}", f"{apart:+.2f}", f"{made.num_bytes:,}", *speed, number, cost))
    return rows


def run(name: str, split: str, num_validation: int, num_test: int, only: list[str]) -> None:
    """Make, score and publish one net."""
    case = CASES[name](num_validation, num_test)
    ways: dict[str, Callable[[Case, Path], Made]] = {NNCF: nncf_control} if importlib.util.find_spec("nncf") else {}
    ways |= {recipe: functools.partial(recipe_alone, recipe=recipe) for recipe in ("int8", "int8_accurate")}
    ways["found"] = searched
    size = sum(tensor.nbytes for tensor in case.net.state_dict().values())
    every = {"float": Made(case.net, size)}
    with tempfile.TemporaryDirectory() as folder:
        for index, (way, make) in enumerate(ways.items()):
            if any(part in way for part in only):
                every[way] = timed(make, case, Path(folder) / str(index))
                print(f"{way}: {every[way]}", flush=True)
        if NNCF in every:
            every[NNCF] = every.pop(NNCF)
        rows = rows_of(case, every, split)
    allowed = ", ".join(f"{limit} {value:g}" for limit, value in case.limits.items())
    samples = f"{num_validation} samples to search on, {sum(len(part) for _, part in case.batches(split))} of {split}"
    batch = len(next(iter(case.calls[0].values())))
    header = [f"{name}: {allowed}, best {case.objective}; {samples}", f"{case.metric} %", "- float [95 %]", "bytes"]
    header += [f"CPU ms for {batch}", "/ float", "readings of the data", "s (CPU s)"]
    publish(f"limits-{name}", table(rows, header), *(made.says for made in every.values() if made.says))


def main() -> None:
    """Run every net."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--num-validation", type=int, default=4000)
    parser.add_argument("--num-test", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.cases:
        run(name, arguments.split, arguments.num_validation, arguments.num_test, arguments.only)


if __name__ == "__main__":
    main()
