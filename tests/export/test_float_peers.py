from typing import Any

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


def test_peers_in_other_runtimes_cost_no_more_than_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    export = float_peers.export_float

    def refuse_openvino(model: Any, folder: Any, runtime: Any) -> Any:
        if runtime.NAME == "openvino":
            raise RuntimeError("no such operator")
        return export(model, folder, runtime)

    monkeypatch.setattr(float_peers, "export_float", refuse_openvino)
    model = prepare(ConvNet().eval(), (torch.randn(4, 1, 8, 8),), trains=False)
    with FloatPeers() as peers:
        assert peers.elsewhere(model, 1) == ({}, ())
        peers.of(model, 1)
        assert peers.elsewhere(model, 1) == ({}, ("float was not timed in openvino: no such operator",))
        monkeypatch.setattr(float_peers, "_PATIENCE_S", 0.0)
        others, (why,) = peers.elsewhere(model, 1)
        assert not others
        assert why.startswith("float was timed in onnxruntime and torch alone")


@pytest.mark.slow
@pytest.mark.parametrize(("own", "other"), [("onnxruntime", "openvino"), ("openvino", "onnxruntime")])
def test_float_in_the_other_runtime_answers_as_float(own: str, other: str) -> None:
    net, x = ConvNet().eval(), torch.randn(4, 1, 8, 8)
    model = prepare(net, (x,), runtime=own, trains=False)
    model.exported = {"x": {0: "batch"}}
    with FloatPeers() as peers:
        peers.of(model, 1)
        others, missing = peers.elsewhere(model, 1)
        assert not missing
        assert list(others) == [other]
        rough = 2.0**-7 if others[other].precision == "bf16" else 1e-4
        torch.testing.assert_close(others[other](x), net(x).detach(), rtol=10 * rough, atol=rough)
