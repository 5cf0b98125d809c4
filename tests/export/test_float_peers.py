import pytest
import torch
from lightning_models import ConvNet

from lightning_quant.export import float_peers
from lightning_quant.export.float_peers import FloatPeers
from lightning_quant.export.prepare import prepare


def test_the_peer_of_a_runtime_is_written_once_and_answers_as_float(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    export = float_peers.export_float
    monkeypatch.setattr(float_peers, "export_float", lambda *a: written.append(a) or export(*a))
    net, x = ConvNet().eval(), torch.randn(4, 1, 8, 8)
    with FloatPeers() as peers:
        for recipe in ("int8", "int8_accurate"):
            model = prepare(net, (x,), recipe=recipe, trains=False)
            peer = peers.of(model, 1)
            assert peer is not None
            torch.testing.assert_close(peer(x), net(x).detach())
        assert len(written) == 1
        assert peers.of(prepare(net, (x,), runtime="torch", trains=False), 1) is None
    assert not written[0][1].exists()
