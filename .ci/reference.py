"""The API reference from the docstrings: `python .ci/reference.py FOLDER`; anything doubtful is an error."""

import sys
import warnings
from pathlib import Path

import pdoc

import lightning_quant

MODULES = ("callbacks", "recipe", "observers", "errors")

if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    for name in lightning_quant.__all__:
        # What is loaded on first use is found by nobody who only looks.
        setattr(lightning_quant, name, getattr(lightning_quant, name))
    pdoc.render.configure(docformat="google", show_source=False)
    modules = ["lightning_quant", *(f"lightning_quant.{name}" for name in MODULES)]
    pdoc.pdoc(*modules, r"!lightning_quant\.\w+\.", "lightning_quant.report.limits", output_directory=Path(sys.argv[1]))
