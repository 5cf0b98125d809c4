"""Metrics of several processes are those of the whole data."""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_quant.calibrate.distributed import Group
from lightning_quant.measure.evaluate_shares import Share, merged, without_repetitions


def test_merging_weighs_means_and_survives_values_that_one_process_does_not_log() -> None:
    mean = [{"a": Share(1.0, 6, "mean")}, {"a": Share(4.0, 3, "mean"), "b": Share(7.0, 1, "mean")}]
    others = [{n: Share(v, 1, n) for n in ("max", "min", "sum", "same")} for v in (2.0, 5.0)]

    assert merged(mean) == {"a": 2.0, "b": 7.0}
    assert merged(others) == {"max": 5.0, "min": 2.0, "sum": 7.0, "same": 2.0}
    assert merged([{"a": Share(float("nan"), 0, "mean")}, {"a": Share(3.0, 2, "mean")}]) == {"a": 3.0}


def test_loaders_of_one_process_and_those_without_repetitions_stay_as_they_are() -> None:
    loaders = [DataLoader(TensorDataset(torch.arange(5)), batch_size=2)]
    assert without_repetitions(loaders, Group()) is loaders
    assert without_repetitions(loaders, Group(2))[0] is loaders[0]


def test_samples_that_a_sampler_repeats_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "gather", lambda self, value: [value, 2])
    data = TensorDataset(torch.arange(7))
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
        loader = DataLoader(data, batch_size=2, sampler=sampler)
        assert sum(len(batch) for (batch,) in loader) == 4
        seen += [int(x) for (batch,) in without_repetitions(loader, Group(2)) for x in batch]
    assert sorted(seen) == list(range(7))
