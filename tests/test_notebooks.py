"""Every notebook runs from its first cell to its last."""

import shutil
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_notebook(name: str, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    # In a copy, beside copies of the scripts that it reads: what it writes stays there.
    for script in NOTEBOOKS.parent.glob("*.*"):
        shutil.copy(script, tmp_path)
    (folder := tmp_path / "notebooks").mkdir()
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()

    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", ()))
    assert (folder / "quantized").is_dir()
