"""The package is laid out in rooms: few, one way, and with a test file for what is in them."""

import ast
from pathlib import Path

import lightning_quant

PACKAGE = Path(lightning_quant.__file__).parent
TESTS = Path(__file__).parent
# As lightning_quant/README.md lists them: each imports those before it.
ORDER = (
    "errors", "arguments", "terminal", "machine", "calls", "surgery", "numerics", "graph", "recipe", "layers",
    "runtimes", "artifact", "ranges", "capture", "planned", "simulate", "calibrate", "export", "measure",
    "report", "search", "doors", "callbacks", "cli",
)  # fmt: skip
# What is looked up by a call and not by an import: names in recipes, by those who know them, when one is written; a
# loaded module that another process loads again; operators that an exporter meets.
LOOKED_UP = {"recipe_names.py": {"calibrate", "layers", "ranges", "planned", "runtimes"}, "loaded.py": {"artifact"},
             "foreign_operators.py": {"layers"}, "shorthand.py": {"callbacks"}}  # fmt: skip


def imported(file: Path) -> list[tuple[str, bool]]:
    """Return the rooms that a file imports from, each with whether it does so when it is imported itself."""
    found = []

    def visit(node: ast.AST, at_once: bool) -> None:
        for child in ast.iter_child_nodes(node):
            names = [alias.name for alias in child.names] if isinstance(child, ast.Import) else []
            if isinstance(child, ast.ImportFrom) and child.module == "lightning_quant":
                names = [f"lightning_quant.{alias.name}" for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                names = [child.module or ""]
            found.extend((n.split(".")[1], at_once) for n in names if n.startswith("lightning_quant."))
            visit(child, at_once and not isinstance(child, ast.FunctionDef))

    visit(ast.parse(file.read_text()), True)
    return [(room, at_once) for room, at_once in found if room in ORDER]


def test_every_room_imports_only_what_stands_before_it() -> None:
    upward = []
    for file in PACKAGE.glob("*/*.py"):
        place = ORDER.index(file.parent.name)
        for room, at_once in imported(file):
            looked_up = not at_once and room in LOOKED_UP.get(file.name, ())
            if ORDER.index(room) > place and not looked_up:
                upward.append(f"{file.parent.name}/{file.name} imports {room}")
    assert not upward


def test_the_listing_is_short_and_complete() -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert entries == {"__init__", *ORDER}
    assert len(entries) <= 25
    page = (PACKAGE / "README.md").read_text()
    assert all(f"`{room}/`" in page or f"`{room}.py`" in page for room in ORDER)


def test_files_are_of_a_length_that_is_read_at_once() -> None:
    long = {file.name: n for file in PACKAGE.rglob("*.py") if (n := len(file.read_text().splitlines())) > 300}
    assert not long


def lines_of_code(function: ast.FunctionDef) -> int:
    """Return how many lines a function has beside its docstring, those of its signature included."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_functions_are_of_a_length_that_is_read_at_once() -> None:
    long = {
        f"{file.stem}.{node.name}"
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and lines_of_code(node) > 40
    }
    assert not long


def test_tests_lie_beside_what_they_test() -> None:
    files = {(file.parent.name, file.stem) for file in PACKAGE.glob("*/*.py")}
    names = {name for _, name in files}
    apart = [
        f"{file.parent.name}/{file.name}"
        for file in TESTS.glob("*/test_*.py")
        if file.parent.name in ORDER and file.stem[5:] in names and (file.parent.name, file.stem[5:]) not in files
    ]
    assert not apart


def test_names_of_test_files_are_their_own() -> None:
    # Of two with one name pytest can collect one.
    names = [file.name for file in TESTS.glob("**/test_*.py")]
    assert len(names) == len(set(names))


def test_every_module_has_a_test_file_of_its_name() -> None:
    # Names of files are unique, so that where two rooms have a module of one name, the room's stands before it.
    missing = []
    for file in PACKAGE.rglob("*.py"):
        room, module = file.relative_to(PACKAGE).parent.name, file.stem.lstrip("_")
        names = (f"test_{module}.py", f"test_{room}_{module}.py")
        if file.name != "__init__.py" and not any((TESTS / room / name).is_file() for name in names):
            missing.append(f"tests/{room}/test_{module}.py")
    assert not missing
