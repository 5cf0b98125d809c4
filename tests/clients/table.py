"""Fits every model of every client, and writes what came of it to README.md.

`python tests/clients/table.py [CLIENT ...]`: results stay beside this file, a line of JSON for each fit;
`--from-results` fits nothing and writes the table alone.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from environment import REQUIREMENTS, is_made

FOLDER = Path(__file__).parent
RESULTS, README = FOLDER / "results", FOLDER / "README.md"
RECIPES = {
    "qat": "QAT int8",
    "int8": "PTQ int8",
    "int8_dynamic": "int8_dynamic",
    "int8_weight_only": "int8_weight_only",
}
_KEPT = ("model", "recipe", "outcome", "batches", "why", "metrics", "apart", "coverage", "saved", "runtime")


def run(client: str) -> None:
    """Fit every model of a client and keep what came of it."""
    from test_clients import results

    lines = [json.dumps({key: fit[key] for key in _KEPT if key in fit}) for fit in results(client)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{client}.jsonl").write_text("\n".join(lines) + "\n")


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page of all results, by client."""
    fits = [fit for client in found.values() for fit in client]
    counts = Counter(_kind(fit) for fit in fits)
    inside = sum("runtime" in fit and _kind(fit) == "artifact" for fit in fits)
    lines = [
        "# Other people's projects",
        "",
        "Callbacks in the place that each project offers, with `output_dir` and a recipe alone: the project's own",
        "Trainer, loaders, checkpoints and saving. Written by `python tests/clients/table.py` from results/.",
        "",
        f"{counts['artifact']} of {len(fits)} fits end with an artifact whose metrics are those of the project's own",
        f"validation of the loaded artifact, {inside} of them (inside) in the project's own module, after a refusal",
        f'that names `runtime="torch"`; {counts["refused"]} are refused before the first batch, {counts["fault"]} fail',
        "otherwise.",
        "",
        f"| project | model | {' | '.join(RECIPES.values())} |",
        f"|---|---|{'---|' * len(RECIPES)}",
    ]
    reasons: list[str] = []
    for client, of_client in found.items():
        for model in dict.fromkeys(fit["model"] for fit in of_client):
            by_recipe = {fit["recipe"]: fit for fit in of_client if fit["model"] == model}
            cells = [_cell(by_recipe.get(recipe), reasons) for recipe in RECIPES]
            lines.append(f"| {client} | {model} | {' | '.join(cells)} |")
    lines += ["", "The share is of the multiply-adds of the module that the artifact is.", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines).rstrip() + "\n"


def _kind(fit: dict[str, Any]) -> str:
    if fit["outcome"] == "artifact":
        return "artifact" if fit["saved"] and not fit["apart"] else "fault"
    return "refused" if fit["outcome"] == "refused" and not fit["batches"] else "fault"


def _cell(fit: dict[str, Any] | None, reasons: list[str]) -> str:
    if fit is None:
        return ""
    kind = _kind(fit)
    if kind == "artifact":
        return f"{fit['coverage']:.0%}{' inside' * ('runtime' in fit)}"
    why = _plain(fit["why"]) if "why" in fit else f"metrics apart: {fit['apart']}, saved: {fit['saved']}"
    if why not in reasons:
        reasons.append(why)
    return f"{kind} ({reasons.index(why) + 1})"


def _plain(why: str) -> str:
    """Return a reason without the folders of a machine."""
    words = why.removeprefix("MisconfigurationException: ").rpartition(" (")[0].split(" ")
    return " ".join(word.rpartition("site-packages/")[2] for word in words).replace("|", "\\|")


def read() -> dict[str, list[dict[str, Any]]]:
    """Return the results that are kept, by client."""
    paths = [RESULTS / f"{client}.jsonl" for client in REQUIREMENTS]
    return {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in paths if p.is_file()}


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    if "--from-results" not in sys.argv:
        for name in names or filter(is_made, REQUIREMENTS):
            run(name)
    README.write_text(table(read()))
