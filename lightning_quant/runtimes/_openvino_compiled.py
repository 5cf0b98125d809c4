"""How OpenVINO compiles a file: so that it computes what was simulated, or as it does by itself."""

from pathlib import Path
from typing import Any

# Otherwise OpenVINO computes in bfloat16 where it can, and rounds what layers with compressed weights read to int8.
AS_SIMULATED = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
# Kernels that it makes for attention as a whole answer otherwise from the second call on (23 dB after 35), and are
# counted as one layer; without them attention takes up to 6 % longer.
CPU_ONLY = {"SNIPPETS_MODE": "DISABLE"}


def compiled(
    path: Path, *, threads: int | None = None, device: str = "CPU", counts: bool = False, by_default: bool = False
) -> Any:
    """Compile a model for lowest latency.

    Args:
        path: of the model.
        threads: of a call; OpenVINO's default when None.
        device: where it runs.
        counts: whether operators can be timed.
        by_default: whether OpenVINO chooses kernels and the precision of float layers.
    """
    import openvino

    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if not by_default:
        config |= AS_SIMULATED | (CPU_ONLY if device == "CPU" else {})
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    if counts:
        config["PERF_COUNT"] = True
    return openvino.Core().compile_model(path, device, config)
