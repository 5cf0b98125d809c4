"""Memory that the float model takes in a runtime's own format, which that of an artifact is compared with."""

import shutil
from dataclasses import replace

from lightning_quant.artifact import golden
from lightning_quant.artifact.artifact import Artifact, model_files
from lightning_quant.artifact.manifest import GOLDEN
from lightning_quant.errors import ExportError, QuantizationError
from lightning_quant.export.model_file import export_float
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.measure.bench import peak_of
from lightning_quant.planned.planned_model import PlannedModel


def float_peak_of(model: PlannedModel, own: Artifact, threads: int) -> int:
    """Return the bytes that a process of its own takes at its peak for the float model, as `peak_of` an artifact.

    The file is in the artifact's own format, and the call is that of its golden batch.

    Args:
        model: what the artifact was exported from.
        own: private copy of the artifact, or one that nobody else writes to.
        threads: of the process.

    Raises:
        QuantizationError: the float model does not export, or does not run by itself.
    """
    with scratch_folder() as folder:
        try:
            path = export_float(model, folder, model.runtime)
        except QuantizationError:
            raise
        # Whatever an exporter raises of a model that was not prepared for it.
        except Exception as error:
            raise ExportError(f"Expected the float model to export, but {str(error) or repr(error)}") from error
        shutil.copyfile(own.golden_path, folder / golden.FILE)
        manifest = {key: value for key, value in own.manifest.items() if key != "engine"}
        manifest["files"] = {**model_files(path), GOLDEN: golden.FILE}
        return peak_of(replace(own, path=folder, manifest=manifest), threads)
