from lightning_quant.report.memory import Memory


def test_a_report_says_what_a_process_takes() -> None:
    memory = Memory(12.34)
    assert "takes 12.3 MiB" in memory.text()
    assert memory.scalars() == {"peak_memory_mb": 12.34}
    assert memory.to_dict() == {"peak_memory_mb": 12.34, "float_peak_memory_mb": None}
    beside = Memory(15.0, 20.0)
    assert "15.0 MiB for it at its peak, 0.750 of the 20.0 MiB for float" in beside.text()
    assert beside.scalars() == {"peak_memory_mb": 15.0, "peak_memory_ratio": 0.75}
