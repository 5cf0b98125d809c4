"""What is stored beside graphs goes by names that overrides know."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.search.candidates import Candidates
from lightning_quant.search.choice import FLOAT, Choice
from lightning_quant.search.places import owner_of
from lightning_quant.search.relaxations import relaxations


class Equalized(nn.Module):
    """Scales its weight for each sample, as the convolutions of StyleGAN do."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.einsum("bi,boi->bo", x, self.weight * scale[:, None, :])


class Styled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.style, self.block, self.head = nn.Linear(32, 32), Equalized(32), nn.Linear(32, 4)
        self.own = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.block(torch.einsum("bi,boi->bo", x, self.own * x[:, None, :]), self.style(x))))


def test_weights_that_code_reads_can_be_kept_in_float_by_the_name_of_their_module() -> None:
    torch.manual_seed(0)
    calls = [Call((torch.randn(8, 32),)) for _ in range(3)]
    whole = prepare(Styled().eval(), calls[0].args, trains=False)
    calibrate(whole, steps_of(whole, calls[:2]))
    makes = Candidates(whole, calls[:2], Selection())
    assert set(makes.operators()) == {"style", "block", "head"}
    alone = makes.make(Choice((("block", FLOAT),)))
    assert whole.stored_layers().keys() == {"stored_parameters", "block.stored_parameters"}
    assert "block.stored_parameters" not in alone.stored_layers()
    assert alone.plan.num_quantized
    everything = makes.all_float()
    assert everything is not None
    assert "block.stored_parameters" not in makes.make(everything).stored_layers()
    ranked = relaxations(whole, calls[2:])
    (part,) = (part for part in ranked.parts if part.users == {"block"})
    assert part.error > 0
    assert ("block", FLOAT) in ranked.prices


def test_a_root_that_owns_weights_goes_by_its_type() -> None:
    root = Styled()
    assert owner_of(root, "stored_parameters") == "Styled"
    assert owner_of(root, "block.stored_parameters") == owner_of(root, "block") == "block"
