"""Modules under the names that they had before."""

import subprocess
import sys


def test_modules_are_found_by_the_names_that_they_had_before() -> None:
    script = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from lightning_quant.prepare import prepare
    from lightning_quant import manifest
    import lightning_quant.pipeline as pipeline
    from lightning_quant.artifact import add_report
    from lightning_quant.cli import main
assert "lightning_quant.prepare is lightning_quant.export.prepare now." in {str(w.message) for w in said}
import lightning_quant.artifact.manifest, lightning_quant.doors.pipeline, lightning_quant.export.prepare as new
assert manifest is lightning_quant.artifact.manifest and pipeline is lightning_quant.doors.pipeline
assert new.prepare is prepare and new.__spec__.name == new.__name__ == "lightning_quant.export.prepare"
try:
    import lightning_quant.no_such_module
except ModuleNotFoundError:
    print("none")
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.stdout == "none\n", found.stderr
