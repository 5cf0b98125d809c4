from lightning_quant.report.memory import Memory


def test_a_report_says_what_a_process_takes() -> None:
    memory = Memory(12.34)
    assert "takes 12.3 MiB" in memory.text()
    assert memory.scalars() == memory.to_dict() == {"peak_memory_mb": 12.34}
