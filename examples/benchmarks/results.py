"""Tables of the benchmarks as files, and the pages that show them: no figure on a page is typed by hand.

A benchmark hands its tables to `publish`, which writes `results/NAME.md`. `python examples/benchmarks/results.py` puts
those files between the marks `<!-- results NAME -->` and `<!-- end -->` of the pages, and the best rows into README.md;
with names of examples that print a table, such as `lenet_all_ways`, it runs those first.
"""

import argparse
import datetime
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import machine, table

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", Path(__file__).parent / "README.md")
_BLOCK = re.compile(r"(<!-- results (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OURS = "lightning_quant"


@dataclass(frozen=True)
class Best:
    """A row of README.md's table: the first float row, the best peer and our best, out of one column of a file.

    Attributes:
        what: network and measure.
        name: of the file.
        column: its heading.
        higher: whether more is better.
    """

    what: str
    name: str
    column: str
    higher: bool = False


BEST = (
    Best("MobileNetV2 probe, accuracy, %", "accuracy-mobilenet", "accuracy %", higher=True),
    Best("ResNet18, 1 image, CPU ms", "engines", "median CPU ms"),
    Best("GPT-2 124M, MB on disk", "gpt2", "MB on disk"),
    Best("two LSTMs on bursts, dB of the output", "lstm-bursts", "dB", higher=True),
    Best("QAT step of ResNet18, times float", "qat_overhead", "this / float [95 %]"),
)


def publish(name: str, *tables: str, packages: Sequence[str] = ()) -> None:
    """Print tables, and keep them with what made them.

    Args:
        name: of the file in `results`, without suffix.
        tables: as Markdown.
        packages: whose versions the numbers depend on, beside torch and ONNX Runtime.
    """
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    _keep(name, shlex.join(["python", str(script), *_without_folders(sys.argv[1:])]), tables, packages)


def _without_folders(options: list[str]) -> list[str]:
    """Leave out where a run keeps what it has done, which is no number's cause and a folder of one machine."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--runs", "--state", "--log"):
        parser.add_argument(option)
    return parser.parse_known_args(options)[1]


def run_example(name: str) -> None:
    """Run a script of `examples` and keep the table that it prints."""
    torch.set_num_threads(1)  # as it does
    command = ["python", f"examples/{name}.py"]
    ran = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    rows = [line for line in ran.stdout.splitlines() if line.startswith("|")]
    _keep(name, " ".join(command), ["\n".join(rows)], ())


def _keep(name: str, command: str, tables: Sequence[str], packages: Sequence[str]) -> None:
    text = "\n\n".join([f"`{command}`, {datetime.date.today()}, {machine(*packages)}:", *tables])
    print(f"\n{text}\n", flush=True)
    (RESULTS / f"{name}.md").write_text(f"{text}\n", encoding="utf-8")


def page(text: str) -> str:
    """Return a page with its blocks filled from the files."""
    return _BLOCK.sub(lambda found: f"{found[1]}{_block(found[2])}\n{found[3]}", text)


def shown(text: str) -> set[str]:
    """Return the names of the files that a page shows."""
    return {found[2] for found in _BLOCK.finditer(text)}


def best_rows() -> str:
    """Return README.md's table."""
    return table([_best(best) for best in BEST], ("", "float", "best peer", _OURS, "in"))


def _block(name: str) -> str:
    return best_rows() if name == "BEST" else (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip()


def _best(best: Best) -> tuple[str, ...]:
    lines = [line for line in (RESULTS / f"{best.name}.md").read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = header.index(best.column)
    chosen = max if best.higher else min
    named = {row[0]: row[column] for row in rows}
    floats = {name: value for name, value in named.items() if "float" in name or "fp32" in name}
    ours = {name: value for name, value in named.items() if name.startswith(_OURS)}
    peers = {name: value for name, value in named.items() if name not in {*floats, *ours}}

    def cell(values: dict[str, str]) -> str:
        name = chosen(values, key=lambda name: _number(values[name]))
        detail = name.removeprefix(_OURS).lstrip(", ").strip()
        return f"{values[name].split()[0]} ({detail})"

    reference = next(iter(floats.values()), "").partition(" ")[0]
    return best.what, reference, cell(peers), cell(ours), f"`{best.name.split('-')[0]}.py`"


def _number(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


def main() -> None:
    """Run the examples that are named, and write every page anew."""
    for name in sys.argv[1:]:
        run_example(name)
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
