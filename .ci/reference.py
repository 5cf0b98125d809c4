"""The API reference from the docstrings: `python .ci/reference.py FOLDER`; anything doubtful is an error."""

import sys
import warnings
from pathlib import Path

import pdoc

import lightning_quant

MODULES = ("callbacks", "errors", "recipe.recipe", "ranges.observers", "report.limits")

if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    for name in lightning_quant.__all__:
        # What is loaded on first use is found by nobody who only looks.
        setattr(lightning_quant, name, getattr(lightning_quant, name))
    pdoc.render.configure(docformat="google", show_source=False)
    modules = (f"lightning_quant.{name}" for name in MODULES)
    pdoc.pdoc("lightning_quant", r"!lightning_quant\.", *modules, output_directory=Path(sys.argv[1]))
