"""Nets with planted bad layers, and limits drawn at random: what the search finds, and what it costs in validations.

`python examples/benchmarks/search.py` prints a table. Every net is a teacher of its own: labels are its float answers,
one in ten of them wrong, so that float is 90 % right. One or two of its layers answer with channels that are far too
large and that nobody reads, which leaves the others few of the 256 steps. The limit is a fall of 1 to 6 points.
"unseen" are 10,000 samples that no search has seen. The greedy search keeps one operator more in float after the other,
most harmful first, and validates each time. NNCF's accuracy control runs where it is installed. "readings" is how often
all samples of validation were read for files: ours end where a part decides. In brackets is what violations are at most
in the long run, with 95 % confidence. Nets of at most 12 operators are searched exhaustively, too: all sets in the
order of their bytes, each simulated, until a file keeps the limit.
Modules that differ in numbers alone are exported once, by what the tests have for that, so no times are told.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nncf_control import accuracy_control
from results import publish
from scipy.special import betaincinv
from search_exhaustive import Outcome, correct, correct_in_parts, exhaustive, outcome, prepared
from search_nets import Task, task
from timing import table
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.errors import QuantizationError
from lightning_quant.export.export import export
from lightning_quant.graph.table import Selection
from lightning_quant.search.candidates import Candidates
from lightning_quant.search.choice import FLOAT, Choice
from lightning_quant.search.relaxations import relaxations

OURS, GREEDY, NNCF = "lightning_quant", "greedy, one operator at a time", "NNCF accuracy control (OpenVINO)"
EXHAUSTIVE = "exhaustive"
NNCF_BATCH = 20  # items that NNCF ranks by have samples of their own


def ours(task: Task, folder: Path) -> Outcome | None:
    """Search; nothing where no file keeps the limit, and the report says so."""
    batches = list(task.data["calibration"][0].split(64))
    judged: dict[str, Any] = {"evaluate": correct_in_parts(task), "limits": {"accuracy": -task.limit}}
    with mock.patch("lightning_quant.report.make_report.measure_latency", return_value=((), ())):
        artifact = lq.quantize(task.net, calibration_data=batches, output_dir=folder, threads=1, **judged)
    search = artifact.report["search"]
    if not all(verdict["kept"] for verdict in search["verdicts"]):
        return None
    readings = sum(trial["validations"] for trial in search["trials"])
    return outcome(task, lq.load(folder), readings, artifact.size_bytes, len(search["trials"]))


def greedy(task: Task, folder: Path) -> Outcome | None:
    """Keep one operator more in float after the other, and validate each time, on a point estimate."""
    whole, calls = prepared(task)
    ranked, makes = relaxations(whole, calls[-2:]), Candidates(whole, calls, Selection())
    harm = {name: sum(part.error for part in ranked.parts if name in part.users) for name in ranked.operators}
    kept: list[tuple[str, str]] = []
    evaluate = correct(task, "validation")
    floating = evaluate(task.net)["accuracy"].mean()
    for number, name in enumerate(sorted(ranked.operators, key=lambda name: -harm[name])):
        try:
            artifact = export(makes.make(Choice(tuple(kept))).on_host(), folder)
        except QuantizationError:  # What is left is no operator without the others.
            return None
        model = lq.load(folder)
        if floating - evaluate(model)["accuracy"].mean() <= task.limit:
            return outcome(task, model, number + 1, artifact.size_bytes)
        kept.append((name, FLOAT))
    return None


def nncf_control(task: Task, folder: Path) -> Outcome | None:
    """Let NNCF revert operators until its validation keeps the limit."""
    import openvino as ov

    example = torch.zeros(2, *task.net.shape)
    converted = ov.convert_model(task.net, example_input=example, input=[(-1, *task.net.shape)])
    name = converted.input(0).get_any_name()
    calls = [{name: batch.numpy()} for batch in task.data["calibration"][0].split(64)]
    batches = (part.split(NNCF_BATCH) for part in task.data["validation"])
    items = [({name: inputs.numpy()}, labels.numpy()) for inputs, labels in zip(*batches, strict=True)]
    try:
        done = accuracy_control(converted, calls, items, lambda a, b: (a == b).mean(), task.limit)
    except KeyError as error:  # Of a node that its own passes have taken away, where a net has an LSTM.
        print(f"NNCF fails with KeyError {error}.")
        return None
    ov.save_model(done.model, folder / "nncf.xml", compress_to_fp16=False)
    compiled = ov.compile_model(done.model, "CPU")

    class Loaded(nn.Module):
        """The compiled file as a module."""

        def forward(self, x: Tensor) -> Tensor:
            """Run it."""
            return torch.from_numpy(compiled([x.numpy()])[0])

    made = outcome(task, Loaded(), done.readings, (folder / "nncf.bin").stat().st_size, done.files)
    return made if made.validated_drop <= task.limit else None


def is_found_first(task: Task) -> bool:
    """Tell whether the first step of the ranking keeps a planted bad layer out of the integers."""
    whole, calls = prepared(task)
    return bool(set(dict(relaxations(whole, calls[-2:]).steps()[0].kept)) & set(task.bad))


def row(name: str, outcomes: list[tuple[float, Outcome | None]]) -> list[str]:
    """Return a row of the table, of limits and what was found for them."""
    made = [(limit, got) for limit, got in outcomes if got is not None]
    unseen = sum(got.drop > limit for limit, got in made)
    validated = sum(got.validated_drop > limit + 1e-6 for limit, got in made)
    mean = sum(got.validations for _, got in made) / max(len(made), 1)
    most = max((got.validations for _, got in made), default=0)
    files = sum(got.files or got.validations for _, got in made) / max(len(made), 1)
    kilobytes = sum(got.num_bytes for _, got in made) / 1000 / max(len(made), 1)
    at_most = 100 * upper_bound(unseen, len(made))
    cells = [f"{len(made)}/{len(outcomes)}", f"{unseen}/{len(made)} (at most {at_most:.1f} %)"]
    return [name, *cells, f"{validated}/{len(made)}", f"{mean:.1f} ({most:.1f})", f"{files:.1f}", f"{kilobytes:.1f}"]


def upper_bound(events: int, number: int) -> float:
    """Return the share that events have at most, with 95 % confidence: Clopper and Pearson (1934)."""
    return float(betaincinv(events + 1, number - events, 0.95)) if events < number else 1.0


def against_exhaustive(pairs: list[tuple[Outcome, Outcome]]) -> str:
    """Return in words how far a search is from the exhaustive one."""
    ratios = [one.num_bytes / best.num_bytes for one, best in pairs]
    points = [100 * (one.validated_drop - best.validated_drop) for one, best in pairs]
    if not pairs:
        return "No net was searched exhaustively."
    near = sum(ratio <= 1.05 and point <= 0.2 for ratio, point in zip(ratios, points, strict=True))
    return (
        f"Of {len(pairs)} nets that were searched exhaustively, {near} have a file within 5 % of the bytes and 0.2 "
        f"points of the best there is: {statistics.median(ratios):.3f} of its bytes in the middle, "
        f"{max(ratios):.3f} at most, and {max(points):+.2f} points of accuracy lost at most against it."
    )


def searched(seed: int, ways: Mapping[str, Callable[[Task, Path], Outcome | None]]) -> dict[str, Any]:
    """Search one net in some ways; return what JSON can hold."""
    made, outcomes = task(seed), dict[str, Outcome | None]()
    for name, way in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = way(made, Path(folder).resolve() / "file")
    if (one := outcomes.get(OURS)) is not None:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[EXHAUSTIVE] = exhaustive(made, Path(folder).resolve() / "file", one.files)
    said = {name: None if got is None else dataclasses.asdict(got) for name, got in outcomes.items()}
    return {"seed": seed, "kind": made.net.kind, "limit": made.limit, "outcomes": said}


def main() -> None:
    """Run all ways on all nets, and print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="only nets from this one on")
    parser.add_argument("--ranked", type=int, default=100)
    parser.add_argument("--log", type=Path, help="a file of what is done, which is not searched again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
    from quick_exports import make_exports_quick

    make_exports_quick()
    ways: dict[str, Callable[[Task, Path], Outcome | None]] = {OURS: ours, GREEDY: greedy}
    try:
        import nncf

        nncf.set_log_level("ERROR")
        ways[NNCF] = nncf_control
    except ImportError:
        print("NNCF is not installed: its row says so.")
    lines = options.log.read_text().splitlines() if options.log and options.log.exists() else []
    done = {net["seed"]: net for net in map(json.loads, lines)}
    for seed in range(options.first, options.nets):
        known = done[seed]["outcomes"] if seed in done else {}
        if left := {name: way for name, way in ways.items() if name not in known}:
            done[seed] = searched(seed, left)
            done[seed]["outcomes"] = known | done[seed]["outcomes"]
            print(json.dumps(done[seed]), flush=True)
            if options.log:
                with options.log.open("a") as file:
                    file.write(json.dumps(done[seed]) + "\n")
    # The table itself says which nets it is of.
    sys.argv = sys.argv[:1]
    show([done[seed] for seed in sorted(done)], list(ways), options.ranked)


def show(nets: list[dict[str, Any]], ways: list[str], ranked: int) -> None:
    """Publish the table of all nets, and how often a bad layer is found first."""

    def outcome_of(net: dict[str, Any], way: str) -> Outcome | None:
        return None if (got := net["outcomes"].get(way)) is None else Outcome(**got)

    pairs = [(outcome_of(net, OURS), outcome_of(net, EXHAUSTIVE)) for net in nets]
    first = sum(is_found_first(task(1000 + seed, ("calibration",))) for seed in range(ranked))
    header = ["way", "files that keep the limit", "violations, unseen", "violations, validation"]
    header += ["readings of the data (most)", "files", "KB"]
    rows = [row(name, [(net["limit"], outcome_of(net, name)) for net in nets]) for name in ways]
    if NNCF not in ways:
        rows.append([NNCF, "not installed", *["-"] * (len(header) - 2)])
    seeds = f"Nets of seeds {', '.join(str(net['seed']) for net in nets)}."
    note = f"A planted bad layer was in the first step of the ranking for {first} of {ranked} other nets."
    both = [(one, best) for one, best in pairs if one is not None and best is not None]
    publish("search", f"{table(rows, header)}\n\n{seeds}\n\n{against_exhaustive(both)}\n\n{note}")


if __name__ == "__main__":
    main()
