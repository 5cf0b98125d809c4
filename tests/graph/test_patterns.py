import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import CASES, with_statistics
from prepared_graphs import evaluated, noise, rows_of
from reference_models import mobilenet_v2, resnet18, timm_style_net
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import PlanError
from lightning_quant.export.convert import convert
from lightning_quant.export.prepare import prepare
from lightning_quant.graph import operations
from lightning_quant.graph.table import Selection
from lightning_quant.numerics.noise import signal_to_noise

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """A layer, a function behind it, and a convolution that reads the result."""

    def __init__(self, layer: nn.Module, behind: Callable[[Tensor], Tensor], channels: int = 6) -> None:
        super().__init__()
        self.layer, self.behind = layer, behind
        self.last = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.behind(self.layer(x)))


class LearnedClip(nn.Module):
    """An upper bound that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.zero, self.limit = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.zero, self.limit)


# --- activations

SPELLINGS = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.Hardtanh": nn.Hardtanh(-0.5, 0.6),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "F.relu6": F.relu6,
    "F.hardtanh": lambda x: F.hardtanh(x, -0.5, 0.6),
    "F.hardtanh by keyword": lambda x: F.hardtanh(x, max_val=0.6, min_val=-0.5),
    "F.hardtanh as it is": F.hardtanh,
    "torch.clamp": lambda x: torch.clamp(x, 0.0, 0.6),
    "torch.clamp by keyword": lambda x: torch.clamp(x, max=0.6, min=0),
    "torch.clip": lambda x: torch.clip(x, -0.2, 0.5),
    "x.clamp": lambda x: x.clamp(min=0),
    "x.clamp_": lambda x: x.clamp_(-0.1, 0.4),
    "x.clip": lambda x: x.clip(-0.1, 0.4),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_clipping_activation_is_fused_in_every_spelling(spelling: str) -> None:
    activation = SPELLINGS[spelling]
    model = Chain(nn.Conv2d(3, 6, 3), activation).eval()
    rows = list(rows_of(model, IMAGE).values())
    assert [row.action for row in rows] == ["int8", "fused", "int8"]
    assert rows[1].reason == "into layer"
    prepared = evaluated(model, IMAGE)
    with torch.no_grad():
        middle = activation(model.layer(IMAGE))
        assert signal_to_noise(model(IMAGE), convert(prepared)(IMAGE)) > 25
    (operator,) = [operator for operator in prepared.operators.values() if operator.key == "layer"]
    scale, zero_point = prepared.ranges.parameters(f":{operator.output}")
    # The clipping is done by the range of the output.
    assert (-zero_point * scale).item() == pytest.approx(min(middle.min().item(), 0), abs=scale.item())
    assert ((255 - zero_point) * scale).item() == pytest.approx(middle.max().item(), abs=scale.item())


BEHIND = {
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d),
    "strided": (lambda: nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d),
}


@pytest.mark.parametrize("layer", BEHIND)
@pytest.mark.parametrize("in_place", [False, True])
def test_batch_norm_and_activation_are_fused(layer: str, in_place: bool) -> None:
    build, norm = BEHIND[layer]
    model = nn.Sequential(build(), norm(6), nn.ReLU6(inplace=in_place), nn.Conv2d(6, 2, 1))
    model = with_statistics(model).eval()
    rows = rows_of(model, IMAGE)
    assert [(row.action, row.reason) for row in rows.values()] == [
        ("int8", ""),
        ("fused", "into 0"),
        ("fused", "into 0"),
        ("int8", ""),
    ]
    assert noise(model, IMAGE) > 25


@pytest.mark.parametrize("activation", [nn.ReLU(), F.relu, torch.relu, lambda x: x.relu(), nn.Hardtanh(0, 1)])
def test_linear_batch_norm_and_activation_are_fused(activation: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.bn, self.fc2 = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.activation(self.bn(self.fc1(x))))

    model, x = with_statistics(Net()).eval(), torch.randn(32, 6)
    assert [row.action for row in rows_of(model, x).values()] == ["int8", "fused", "fused", "int8"]
    assert noise(model, x) > 25


class Dropping(nn.Module):
    """Something that evaluation leaves out stands behind a convolution and behind its BatchNorm."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        def between(y: Tensor) -> Tensor:
            return F.dropout(y, 0.2, self.training) if self.between is None else self.between(y)

        return self.last(torch.relu(between(self.bn(between(self.conv(x))))))


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout2d(0.2), None], ids=["identity", "dropout", "function"])
def test_what_evaluation_leaves_out_does_not_part_batch_norm_and_activation(between: Any) -> None:
    model = with_statistics(Dropping(between)).eval()
    assert [row.action for row in rows_of(model, IMAGE).values()] == ["int8", "fused", "fused", "int8"]
    assert noise(model, IMAGE) > 25


def test_dropout_in_evaluation_too_is_not_left_out() -> None:
    class Uncertain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(F.dropout(self.conv(x), 0.2)))

    assert "fused" not in [row.action for row in rows_of(Uncertain().eval(), IMAGE).values()]


def test_hooks_on_an_identity_keep_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    model[1].register_forward_hook(lambda *_: None)

    assert rows_of(model, IMAGE)["2"].action != "fused"


ADDITIONS = {
    "a + b": lambda a, b: a + b,
    "torch.add": torch.add,
    "a.add(b)": lambda a, b: a.add(b),
    "a.add_(b)": lambda a, b: a.add_(b),
    "a += b": lambda a, b: a.__iadd__(b) if isinstance(a, Tensor) else a + b,
}


@pytest.mark.parametrize("spelling", ADDITIONS)
@pytest.mark.parametrize("activation", [F.relu, nn.ReLU(inplace=True), lambda x: x.relu_()])
def test_residual_addition_and_activation_are_one_operator(spelling: str, activation: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
            self.last = nn.Conv2d(6, 2, 1)
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            return self.last(self.activation(ADDITIONS[spelling](self.conv2(x), x)))

    model = Net().eval()
    prepared = evaluated(model, IMAGE)
    kinds = [operator.kind for operator in prepared.operators.values()]
    assert kinds == ["conv2d", "conv2d", "add", "conv2d"]
    assert [row.action for row in prepared.plan.rows] == ["int8", "int8", "int8", "fused", "int8"]
    assert noise(model, IMAGE) > 25


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (lambda x: torch.clamp(x, 0.2, 0.6), "leave out zero"),
        (lambda x: torch.clamp(x, max=-0.1), "leave out zero"),
        (LearnedClip(), "not constant"),
        (nn.Hardtanh(0.1, 3.0), "leave out zero"),
    ],
)
def test_a_clip_that_no_range_can_stand_for_is_kept(activation: Any, reason: str) -> None:
    model = Chain(nn.Conv2d(3, 6, 3), activation).eval()
    row = list(rows_of(model, IMAGE).values())[1]
    assert row.action == "float"
    assert reason in row.reason
    assert noise(model, IMAGE) > 25


def test_fusing_a_clip_without_zero_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair of the test above: the range of the output always holds zero and cannot clip at 0.2."""
    model = Chain(nn.Conv2d(3, 6, 3), lambda x: torch.clamp(x, 0.2, 0.6)).eval()
    monkeypatch.setattr(operations, "bounds", lambda *_: (0.0, 1.0))
    assert noise(model, IMAGE) < 25


@pytest.mark.parametrize(
    "activation",
    [nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.ELU(), nn.PReLU(), nn.Tanh(), nn.Softplus(), nn.Mish(), F.hardsigmoid],
)
def test_other_activations_stay_float_with_a_reason(activation: Any) -> None:
    model = Chain(nn.Conv2d(3, 6, 3), activation).eval()
    rows = list(rows_of(model, IMAGE).values())
    assert [row.action for row in rows] == ["int8", "float", "int8"]
    assert "no integer kernel" in rows[1].reason
    assert noise(model, IMAGE) > 25


# --- what must not be fused


def test_a_batch_norm_after_an_activation_stays_float_and_right() -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)))
    rows = rows_of(model.eval(), IMAGE)
    assert rows["2"].action == "float"
    assert "to fold into" in rows["2"].reason
    assert noise(model, IMAGE) > 25


def test_a_batch_norm_without_running_statistics_stays_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.Conv2d(6, 2, 1))
    rows = rows_of(model, IMAGE)
    assert rows["1"].action == "float"
    assert "running statistics" in rows["1"].reason
    assert noise(model, IMAGE) > 25


def test_a_batch_norm_over_another_dimension_stays_float() -> None:
    model = with_statistics(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(4), nn.Linear(7, 2))).eval()
    x = torch.randn(8, 4, 5)
    row = rows_of(model, x)["1"]
    assert row.action == "float"
    assert "another dimension" in row.reason
    assert noise(model, x) > 25


def test_a_batch_norm_with_hooks_stays_float() -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))).eval()
    model[1].register_forward_hook(lambda *_: None)
    assert rows_of(model, IMAGE)["1"].action == "float"
    assert noise(model, IMAGE) > 25


class TwoReaders(nn.Module):
    """A convolution whose result is read before and after its BatchNorm and activation."""

    def __init__(self, before_norm: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
        self.before_norm = before_norm

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x)
        normal = self.bn(raw)
        return self.last((raw if self.before_norm else normal) + F.relu(normal))


@pytest.mark.parametrize("before_norm", [False, True])
def test_a_result_with_two_readers_is_fused_with_neither(before_norm: bool) -> None:
    model = with_statistics(TwoReaders(before_norm)).eval()
    rows = rows_of(model, IMAGE)
    assert rows["conv"].action == "int8"
    assert rows["bn"].action == ("float" if before_norm else "fused")
    assert rows["relu"].action != "fused"
    assert noise(model, IMAGE) > 25


def test_a_batch_norm_shared_by_two_layers_is_right() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv2(F.relu(self.bn(self.conv1(x)))))

    model = with_statistics(Net()).eval()
    assert [row.action for row in rows_of(model, IMAGE).values()] == ["int8", "fused", "fused", "int8", "fused"]
    assert noise(model, IMAGE) > 25


def test_an_addition_with_a_factor_or_a_constant_is_no_integer_addition() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.register_buffer("offset", torch.randn(6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            total = torch.add(self.conv1(x), self.conv2(x), alpha=-0.5)
            return self.last((total + 1.5) * self.offset)

    model = Net().eval()
    assert {operator.kind for operator in evaluated(model, IMAGE).operators.values()} == {"conv2d"}
    rows = rows_of(model, IMAGE)
    assert all(row.action == "float" and row.reason for row in rows.values() if row.kind in ("add", "mul"))
    assert noise(model, IMAGE) > 25


# --- rows


def test_every_net_runs_in_integers_what_it_should() -> None:
    for case in CASES:
        model = case.build()
        args, kwargs = case.call(4)
        plan = prepare(model, args, kwargs).plan
        kinds = collections.Counter(operator.kind for graph in plan.graphs for operator in graph.operators)
        assert (case.name, dict(kinds)) == (case.name, case.kinds)


def test_a_row_says_int8_only_where_integers_are_computed() -> None:
    """An activation behind a float layer, or a product with a constant, is computed in float, whoever reads it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 6, 2)
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(3 * F.relu(self.up(self.down(x))))

    rows = rows_of(Net(), IMAGE)
    assert {name: row.action for name, row in rows.items()} == {
        "down": "int8",
        "up": "int8 weights",
        "relu": "float",
        "mul": "float",
        "last": "int8",
    }


def test_a_layer_that_the_call_never_reaches_has_a_row() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.auxiliary(self.used(x)) if self.training else self.used(x)

    row = rows_of(Net(), torch.randn(2, 4))["auxiliary"]
    assert (row.action, row.reason) == ("float", "the captured call never reaches it")


# --- groups that share a scale


def test_max_pool_and_reshapes_share_the_scale_of_what_they_read() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Linear(36, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.flatten(self.pool(F.relu(self.conv(x))), 1))

    model = Net().eval()
    prepared = evaluated(model, IMAGE)
    groups = collections.Counter(edge.group for edge in prepared.ranges.edges.values())
    assert groups["relu"] == 3
    keys = [identity for identity, edge in prepared.ranges.edges.items() if edge.group == "relu"]
    assert len({tuple(float(p) for p in prepared.ranges.parameters(key)) for key in keys}) == 1
    assert len([key for key in keys if key in prepared.ranges.observers]) == 1
    assert noise(model, IMAGE) > 25


def test_inputs_of_a_concatenation_keep_their_own_scales() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([F.relu(self.small(x)), F.relu(self.large(x))], 1))

    model = Net().eval()
    with torch.no_grad():
        model.large.weight *= 100
        model.last.weight[:, :4] *= 100
    prepared = evaluated(model, IMAGE)
    scales = [float(prepared.ranges.parameters(f":{key}")[0]) for key in prepared.operators[":cat"].inputs]
    assert scales[1] > 20 * scales[0]


def test_a_concatenation_of_one_tensor_is_that_tensor() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.first(x)], 1))

    prepared = prepare(Net().eval(), (IMAGE,))
    assert [operator.key for operator in prepared.plan.graphs[0].operators] == ["first", "last"]
    assert [row.name for row in prepared.plan.rows] == ["first", "last"]


# --- whole nets


@pytest.mark.parametrize(
    ("build", "channels", "size", "weighted"),
    [(resnet18, 3, 64, 21), (mobilenet_v2, 3, 64, 53), (timm_style_net, 1, 28, 7)],
    ids=["resnet18", "mobilenet_v2", "timm_style_net"],
)
def test_well_known_nets_are_one_graph_and_covered(
    build: Callable[[], nn.Module], channels: int, size: int, weighted: int
) -> None:
    plan = prepare(build().eval(), (torch.randn(2, channels, size, size),)).plan
    assert [graph.path for graph in plan.graphs] == [""]
    assert plan.coverage >= 0.95
    rows = [row for row in plan.rows if row.kind in ("Conv2d", "Linear")]
    assert len(rows) == weighted
    assert all(row.action == "int8" for row in rows)
    assert all(row.action == "fused" for row in plan.rows if row.kind in ("BatchNorm2d", "ReLU", "ReLU6"))
    additions = [operator for operator in plan.graphs[0].operators if operator.kind == "add"]
    assert len(additions) == {resnet18: 8, mobilenet_v2: 10, timm_style_net: 2}[build]


# --- include and exclude


def test_an_excluded_layer_computes_in_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    prepared = prepare(model, (IMAGE,), selection=Selection(exclude=("2",)), observer="min_max")
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    before = model[2].weight.detach().clone()
    converted = convert(prepared)
    kept = [m for m in converted.modules() if type(m) is nn.Conv2d and m.weight.shape == before.shape]
    assert len(kept) == 1
    assert torch.equal(kept[0].weight, before)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_raises_with_the_names(argument: str) -> None:
    patterns = {"include": ("0", "decoder.*")} if argument == "include" else {"exclude": ("decoder.*",)}
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(PlanError, match=rf"`{argument}`.*'decoder\.\*', which matches nothing.*0, 1, 2"):
        rows_of(model, torch.randn(2, 4), **patterns)


def test_nothing_left_to_quantize_raises_with_the_reasons() -> None:
    with pytest.raises(PlanError, match=r"there is nothing: 0 \(Linear\): excluded by \"Linear\""):
        rows_of(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), exclude=("Linear",))
    with pytest.raises(PlanError, match="no convolution or linear layer"):
        rows_of(nn.Sequential(nn.Flatten()), torch.randn(2, 4))


class PostNorm(nn.Module):
    """Two residual branches: the sum of the first is normalized, and added again if `pre`; so is the second's."""

    def __init__(self, *, pre: bool) -> None:
        super().__init__()
        self.pre = pre
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        total = x + self.second(x)
        normalized = self.norm(total)
        return self.last((total if self.pre else normalized) + self.third(normalized))


@pytest.mark.parametrize("pre", [False, True])
def test_residual_sums_in_front_of_a_layer_norm_stay_float(pre: bool) -> None:
    torch.manual_seed(0)
    model, x = PostNorm(pre=pre), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # One feature of the sum is far from the others, and LayerNorm makes it small again.
        model.second.bias[3] += 400
        model.norm.weight[3] = model.last.weight[3] = 1e-3
    rows = rows_of(model, x)
    assert (rows["add"].action, rows["add"].reason) == ("float", "nothing reads its result in integers")
    assert rows["add#1"].action == "float"
    assert all(rows[name].action == "int8" for name in ("first", "second", "third"))
    assert noise(model, x) > 25
    # A sum that a convolution or linear layer reads as well is quantized as before.
    assert rows_of(nn.Sequential(Summed()), x)["0.add"].action == "int8"


class Summed(nn.Module):
    """A residual sum that a linear layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(x + self.first(x))
