import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layer_models import bert
from models import CASES, BranchingNet, Case, DropPathNet, calibrated, with_statistics
from prepared_graphs import ready, recorded_edges
from reference_models import timm_style_net
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from lightning_quant.calls.calls import flatten_call
from lightning_quant.errors import UntraceableError
from lightning_quant.export.convert import convert
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.trace import trace
from lightning_quant.numerics.noise import signal_to_noise

TRACEABLE = [case for case in CASES if case.name not in ("branching", "views")]
IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OFFSET = torch.tensor(0.5)


# --- what a graph holds


@pytest.mark.parametrize("case", TRACEABLE, ids=lambda case: case.name)
def test_a_traced_graph_lists_the_tensors_of_the_call_as_inputs(case: Case) -> None:
    model = case.build()
    args, kwargs = case.call(2)
    signature = inspect.signature(type(model).forward.__get__(model))
    spec, tensors = flatten_call(signature, args, kwargs)
    traced = trace(model, spec, tensors)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    assert [node.meta["fake"].shape for node in placeholders] == [tensor.shape for tensor in tensors]
    assert [node.meta["fake"].dtype for node in placeholders] == [tensor.dtype for tensor in tensors]
    assert not traced.opaque
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    assert {str(node.target) for node in traced.graph.nodes if node.op == "call_module"} <= paths


def test_keys_tell_the_calls_of_one_module_apart() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu).eval()
    spec, tensors = flatten_call(inspect.signature(model.forward), (torch.randn(2, 4),), {})
    keys = [node.meta["key"] for node in trace(model, spec, tensors).graph.nodes if node.op == "call_module"]
    assert keys == ["0", "1", "2", "1#1"]


def test_tracing_leaves_module_and_random_numbers_alone() -> None:
    model = with_statistics(DropPathNet()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    prepare(model, (IMAGE,))
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(module.training for module in model.modules())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- islands


def test_an_untraceable_root_raises_when_traced_alone() -> None:
    model = BranchingNet().eval()
    spec, tensors = flatten_call(inspect.signature(model.forward), (IMAGE,), {})
    with pytest.raises(UntraceableError, match=r"BranchingNet\.forward cannot be traced"):
        trace(model, spec, tensors)


# --- train and eval


def test_drop_path_trains_on_the_edges_of_evaluation() -> None:
    model = with_statistics(DropPathNet()).eval()
    prepared = ready(model, IMAGE)
    in_evaluation = recorded_edges(prepared, IMAGE)
    model.train()
    in_training = recorded_edges(prepared, IMAGE)
    assert sorted(prepared.islands) == [""]
    assert in_training == in_evaluation
    assert len(in_evaluation) == len(set(in_evaluation)) >= 5


def test_a_block_with_drop_path_inside_a_net_is_quantized_in_training_too() -> None:
    model, x = timm_style_net().eval(), torch.randn(2, 1, 16, 16)
    prepared = ready(model, x)
    in_evaluation = recorded_edges(prepared, x)
    model.train()
    assert recorded_edges(prepared, x) == in_evaluation
    assert len(in_evaluation) > 8


def test_a_generated_module_trains_and_calibrates_on_the_edges_of_its_plan() -> None:
    # Every copy of a GraphModule runs code of its own.
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).eval()
    x = torch.randn(4, 6)
    prepared = ready(model, x)
    assert recorded_edges(prepared, x) == [":input", ":1"]
    model.train()
    assert recorded_edges(prepared, x) == [":input", ":1"]


def test_drop_path_drops_in_training_only() -> None:
    model = with_statistics(DropPathNet(drop_probability=0.999)).eval()
    prepared = ready(model, IMAGE)
    with torch.no_grad(), prepared.attached("frozen"):
        assert torch.equal(model(IMAGE), model(IMAGE))
        kept = model(IMAGE)
        model.train()
        model.bn1.eval()
        model.bn2.eval()
        dropped = model(IMAGE)
        torch.manual_seed(0)
        expected = model.fc(model.relu(model.bn1(model.conv1(IMAGE))).mean((2, 3)))
    assert signal_to_noise(expected, dropped) > 20
    assert signal_to_noise(expected, kept) < 20


def test_dropout_keeps_its_probability() -> None:
    model = nn.Sequential(nn.Linear(8, 200), nn.ReLU(), nn.Dropout(0.8), nn.Linear(200, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
        model[3].weight.fill_(1.0)
        model[3].bias.zero_()
    x = torch.randn(64, 8)
    prepared = ready(model, x)
    with torch.no_grad(), prepared.attached("frozen"):
        assert model(x).unique().numel() == 1
        model.train()
        kept = model(x) / 5 / 200
    assert kept.mean().item() == pytest.approx(0.2, abs=0.02)
    assert kept.unique().numel() > 10


def test_functional_dropout_follows_the_training_flag() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 100), nn.Linear(100, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.5, training=self.training))

    model, x = Net().eval(), torch.randn(16, 8)
    prepared = ready(model, x)
    with torch.no_grad(), prepared.attached("frozen"):
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


# --- in-place operations


# --- hooks and parametrizations


def test_a_pruning_mask_still_works_on_a_prepared_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    mask = model[0].weight_mask
    prepared = ready(model, IMAGE)
    rows = {row.name: row.action for row in prepared.plan.rows}
    assert rows["0"] == rows["2"] == "int8"
    model.train()
    with prepared.attached("fake_quantize", observing=True):
        model(IMAGE).square().sum().backward()
    assert torch.all((model[0].weight_orig.grad != 0) == (mask != 0))
    with torch.no_grad(), prepared.attached("frozen"):
        pruned = model(IMAGE)
        mask.zero_()
        without = model(IMAGE)
    assert not torch.allclose(pruned, without)
    # Nothing of the first layer's weight is left: every position of an image gets the same.
    assert torch.allclose(without, without[:, :, :1, :1].expand_as(without), atol=1e-5)


def test_converted_weights_are_the_pruned_ones() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    converted = convert(ready(model, IMAGE))
    weight = next(module.weight for module in converted.modules() if type(module).__name__ == "QuantizedLayer")
    assert torch.all(weight[model[0].weight_mask == 0] == 0)
    assert signal_to_noise(model(IMAGE), converted(IMAGE)) > 25


@pytest.mark.parametrize("kind", ["forward", "pre", "full_backward"])
def test_hooks_on_layers_and_blocks_still_run_once_per_call(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 6, 3), block, nn.Conv2d(6, 2, 3)).eval()
    ran: list[str] = []
    for name, module in (("layer", model[0]), ("block", block)):
        if kind == "forward":
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
        elif kind == "pre":
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        else:
            module.register_full_backward_hook(lambda *_, name=name: ran.append(name))
    prepared = ready(model, IMAGE)
    model.train()
    with prepared.attached("fake_quantize", observing=True):
        for _ in range(2):
            # The first call also traces; the second shows what a graph does.
            ran.clear()
            model(IMAGE.clone().requires_grad_()).sum().backward()
    assert sorted(ran) == ["block", "layer"]
    assert prepared.plan.coverage == 1.0
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_a_hook_that_changes_the_result_is_obeyed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)).eval()
    model[1].register_forward_hook(lambda module, args, output: output * 0.25)
    prepared = ready(model, IMAGE)
    with torch.no_grad():
        expected = model(IMAGE.clone())
        with prepared.attached("observe"):
            torch.testing.assert_close(model(IMAGE), expected, atol=0, rtol=0)
        with prepared.attached("frozen"):
            assert signal_to_noise(expected, model(IMAGE)) > 25


def test_an_overridden_call_counts_once() -> None:
    class Doubling(nn.Sequential):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    model = nn.Sequential(nn.Conv2d(3, 6, 3), Doubling(nn.ReLU(), nn.Conv2d(6, 6, 1)), nn.Conv2d(6, 2, 3)).eval()
    prepared = ready(model, IMAGE)
    with torch.no_grad():
        expected = model(IMAGE.clone())
        with prepared.attached("observe"):
            torch.testing.assert_close(model(IMAGE), expected, atol=0, rtol=0)
        assert signal_to_noise(expected, convert(prepared)(IMAGE)) > 25
    assert prepared.plan.coverage == 1.0


def test_a_parametrized_layer_keeps_its_parametrization() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 8))).eval()
    x = torch.randn(32, 8)
    prepared = ready(model, x)
    with torch.no_grad():
        model[2].parametrizations.weight.original0.mul_(2.0)
        expected = model(x)
        with prepared.attached("observe"):
            torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    names = {row.name: row for row in prepared.plan.rows}
    assert names["0"].action == "int8"
    assert names["2"].action == "int8" or names["2"].reason


# --- what else a forward does


class FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


def test_a_part_that_runs_without_gradients_gets_none() -> None:
    model = FrozenBackbone()
    prepared = ready(model.eval(), IMAGE)
    model.train()
    with prepared.attached("fake_quantize", observing=True):
        model(IMAGE).sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_checkpointed_blocks_compute_the_same() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    model = Net().eval()
    twin = copy.deepcopy(model)
    prepared = ready(model, IMAGE)
    twin(IMAGE).square().sum().backward()
    with prepared.attached("observe"):
        model(IMAGE).square().sum().backward()
    for mine, reference in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


# --- arguments


def test_default_and_keyword_arguments_are_bound() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: float = 1.0, *, bias: Tensor | None = None) -> Tensor:
            y = self.fc(x) * scale
            return y if bias is None else y + bias

    model, x = Net().eval(), torch.randn(5, 4)
    prepared = prepare(model, (x,))
    calls = [((x,), {}), ((), {"x": x}), ((x, 2.0), {}), ((x,), {"bias": torch.ones(3)}), ((x,), {"scale": -1.5})]
    with torch.no_grad():
        expected = [model(*args, **kwargs) for args, kwargs in calls]
        with prepared.attached("observe"):
            actual = [model(*args, **kwargs) for args, kwargs in calls]
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, atol=0, rtol=0)


def test_tensors_made_in_forward_are_constants_of_the_graph() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
            return self.conv((x - mean) * torch.full((1,), 4.0)) + OFFSET

    model = Net().eval()
    prepared = ready(model, IMAGE)
    with torch.no_grad():
        expected = model(IMAGE.clone())
        with prepared.attached("observe"):
            torch.testing.assert_close(model(IMAGE), expected, atol=0, rtol=0)
        assert signal_to_noise(expected, convert(prepared)(IMAGE)) > 25
    assert set(model.state_dict()) == {"conv.weight", "conv.bias"}
    assert "_tensor_constant0" not in vars(model)


def test_a_net_that_asks_for_rank_and_dtype_is_one_graph() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.dim() != 2 or x.ndim != 2 or not x.is_floating_point() or x.device.type not in ("cpu", "cuda"):
                raise ValueError(x.shape)
            left, right = self.fc(x).to(x.dtype).chunk(2, 0)
            return torch.cat([right, left])

    prepared = prepare(Net().eval(), (torch.randn(6, 4),))
    assert sorted(prepared.islands) == [""]
    model, prepared = prepared.root, ready(prepared.root, torch.randn(6, 4))
    x = torch.randn(10, 4)
    with torch.no_grad(), prepared.attached("off"):
        assert model(x).shape == (10, 3)


def test_every_net_gives_the_float_result_through_its_graphs() -> None:
    for case in CASES:
        model, prepared = calibrated(case)
        args, kwargs = case.call(3)
        with torch.no_grad():
            expected = model(*args, **kwargs)
            with prepared.attached("off"):
                actual = model(*args, **kwargs)
        assert type(actual) is type(expected)
        assert signal_to_noise(leaves(expected), leaves(actual)) == float("inf"), case.name


def test_a_shape_that_cannot_be_told_is_unknown() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[x.sum(1) > 0])

    spec, tensors = flatten_call(inspect.signature(Net().forward), (torch.randn(2, 4),), {})
    nodes = trace(Net(), spec, tensors).graph.nodes
    assert all(not isinstance(node.meta.get("fake"), Exception) for node in nodes)
    unknown = [node for node in nodes if "unknown" in node.meta]
    assert unknown
    assert not any("fake" in node.meta for node in unknown)


class Within(nn.Module):
    """Calls another module between two layers, and activations that it makes itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), inner, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.GELU()(self.inner(nn.ReLU()(self.first(x)))))


def test_what_cannot_be_traced_leaves_its_callers_in_the_graph() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.mean() > -1e9 else x

    prepared = prepare(Within(Within(Within(Branching()))).eval(), (torch.randn(3, 4),))

    assert sorted(prepared.islands) == ["", "inner.inner.inner.layer"]
    assert sum(row.action == "int8" for row in prepared.plan.rows) == 7
    assert [row.name for row in prepared.plan.rows if "fused" in row.action] == [
        "relu",
        "inner.relu",
        "inner.inner.relu",
    ]
    (row,) = [row for row in prepared.plan.rows if row.name == "inner.inner.inner"]
    assert "control flow" in row.reason


def leaves(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    items = vars(result).values() if hasattr(result, "__dataclass_fields__") else result
    items = items.values() if isinstance(items, dict) else items
    return [leaf for item in items for leaf in leaves(item)]


SLICES: dict[str, Any] = {
    "to a size": lambda table, h: table[:, : h.shape[1]],
    "from an offset": lambda table, h: table[:, 2 : 2 + h.shape[1]],
    "with a step": lambda table, h: table[:, : 2 * h.shape[1] : 2],
    "kept in a tuple": lambda table, h: table[(slice(None), slice(0, h.size(1)))],
    "behind an ellipsis": lambda table, h: table[..., : h.shape[1], :],
    "from the end": lambda table, h: table[:, -h.shape[1] :],
}


@pytest.mark.parametrize("cut", SLICES.values(), ids=SLICES)
def test_what_a_size_cuts_out_is_known(cut: Any) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
            self.register_buffer("table", torch.randn(1, 32, 8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y = cut(self.table, h)
            # Asks what it has cut out for its sizes, as masks of transformers do for the device.
            return self.second(torch.relu(h + y.to(device=h.device, dtype=h.dtype).reshape(1, -1, y.shape[-1])))

    prepared = prepare(Positions().eval(), (torch.randn(3, 5, 6),))

    assert prepared.plan.num_quantized == 2


def test_a_transformer_below_a_head_is_traced_with_its_mask() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = bert().bert, nn.Linear(bert().config.hidden_size, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask[..., None].float()
            return self.head((h * weight).sum(1) / weight.sum(1))

    model, mask = Pooled().eval(), (torch.arange(12)[None] < torch.tensor([12, 5])[:, None]).long()
    call = {"input_ids": torch.randint(20, (2, 12)), "attention_mask": mask}
    prepared = prepare(model, (), call, trains=False)

    # All but the pooler's, whose result nothing reads.
    layers = {n for n, module in model.named_modules() if isinstance(module, nn.Linear) and "pooler" not in n}
    assert len(layers) == 7
    assert layers <= {row.name for row in prepared.plan.rows if row.action == "int8"}
