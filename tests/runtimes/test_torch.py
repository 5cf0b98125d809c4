"""Artifacts of the runtime `torch`: they run without the user's code, and fill the user's models."""

import copy
import functools
import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_models import TokenClassifier, bert, gpt2, llama, t5, tokens
from lightning_models import decibels, equal_tensors, tensors_of
from safetensors import safe_open
from torch import Tensor, nn
from unchanged import State

from lightning_quant import load, runtimes, verify
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.errors import ArtifactError, QuantizationError
from lightning_quant.export.export import export
from lightning_quant.graph.table import Selection
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.planned.layerwise import Layerwise, quantize_layers

Call = dict[str, Any]


def save(
    model: nn.Module, call: Call, folder: Path, *, recipe: Any = "int8_dynamic", runtime: str = "torch", **options: Any
) -> tuple[Layerwise, Artifact]:
    """Quantize a model and write the artifact, without measuring it."""
    dynamic = options.pop("dynamic_shapes", None)
    quantized = quantize_layers(model.eval(), kwargs=call, recipe=recipe, runtime=runtime, **options)
    return quantized, export(quantized, folder, dynamic_shapes=dynamic)


def fresh(model: nn.Module) -> Any:
    """Return a model of that structure with other weights."""
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.normal_()
    return duplicate


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(32, 4)
        self.register_buffer("offset", torch.randn(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"scores": self.head(self.features(image + self.offset).flatten(1))}


def bert_call(batch: int = 2, length: int = 7) -> Call:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def t5_call(batch: int = 2, length: int = 7, decoder: int = 5) -> Call:
    return {"input_ids": tokens(batch, length), "decoder_input_ids": tokens(batch, decoder, seed=1)}


# Name to the model and a call of the given batch and sequence length.
MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Call]]] = {
    "gpt2": (gpt2, lambda batch=2, length=7: {"input_ids": tokens(batch, length)}),
    "llama": (llama, lambda batch=2, length=7: {"input_ids": tokens(batch, length)}),
    "bert": (bert, bert_call),
    "t5": (t5, t5_call),
    "lstm": (lambda: TokenClassifier(tied=True, layers=2), lambda batch=2, length=7: {"tokens": tokens(batch, length)}),
    "cnn": (CNN, lambda batch=2, length=7: {"image": torch.randn(batch, 3, 8, 8)}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Layerwise, Artifact]]:
    """Return float model, quantized model and artifact by name, made once each."""
    made: dict[str, tuple[Any, Layerwise, Artifact]] = {}

    def get(name: str) -> tuple[Any, Layerwise, Artifact]:
        if name not in made:
            torch.manual_seed(0)
            model = MODELS[name][0]().eval()
            made[name] = (model, *save(model, MODELS[name][1](), tmp_path_factory.mktemp(name)))
        return made[name]

    return get


@functools.cache
def loaded_once(path: Path) -> Any:
    """Reading a program of transformers takes a second."""
    return load(path)


def leaves(output: Any) -> list[Tensor]:
    """Return what the user reads of an output: scores of every kind of model here."""
    if isinstance(output, Tensor):
        return [output]
    return [output["scores"]] if "scores" in output else [output.logits]


# --- load without the user's code


_IN_A_FRESH_PROCESS = """
import pickle, sys, torch
import lightning_quant
torch.set_num_threads(1)
for name in ("transformers", "layer_models", "lightning_models"):
    sys.modules[name] = None
calls = torch.load(sys.argv[1], weights_only=True)
def refuse(*args, **kwargs): raise AssertionError("unpickled")
torch.load = pickle.load = pickle.loads = refuse
def first(value):
    return value if isinstance(value, torch.Tensor) else value["scores"] if "scores" in value else value.logits
results = {}
for name, (path, call) in calls.items():
    results[name] = first(lightning_quant.load(path)(**call)).detach()
torch.save(results, sys.argv[2])
"""


def test_same_outputs_in_a_fresh_process(saved: Any, tmp_path: Path) -> None:
    given, expected = {}, {}
    for name, (_, make_call) in MODELS.items():
        _, quantized, artifact = saved(name)
        call = make_call()
        given[name] = (str(artifact.path), call)
        with torch.no_grad():
            expected[name] = leaves(quantized.quantized()(**call))[0]
    torch.save(given, tmp_path / "calls.pt")
    command = [sys.executable, "-W", "ignore", "-c", _IN_A_FRESH_PROCESS, "calls.pt", "results.pt"]
    env = {**os.environ, "PYTHONPATH": str(Path(artifacts.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(results[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_other_batches_and_lengths(name: str, saved: Any) -> None:
    model, quantized, artifact = saved(name)
    loaded, make_call = loaded_once(artifact.path), MODELS[name][1]
    for batch, length in ((1, 7), (5, 7), (3, 12), (1, 4)):
        call = make_call(batch, length)
        with torch.no_grad():
            expected, floating = leaves(quantized.quantized()(**call)), leaves(model(**call))
            actual = leaves(loaded(**call))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert 25 < decibels(floating[0], actual[0]) < 90


def test_encoder_and_decoder_lengths_are_independent(saved: Any) -> None:
    _, quantized, artifact = saved("t5")
    loaded, model = loaded_once(artifact.path), quantized.quantized()
    for lengths in ((4, 9), (11, 1), (6, 6)):
        call = t5_call(3, *lengths)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**call).logits, model(**call).logits, rtol=1e-4, atol=1e-5)


def test_outputs_are_read_like_the_models(saved: Any) -> None:
    artifact = saved("bert")[2]
    output = loaded_once(artifact.path)(**bert_call())
    assert output.logits.shape == output["logits"].shape == (2, 3)
    with pytest.raises(AttributeError):
        _ = output.no_such
    assert list(load(saved("cnn")[2].path)(image=torch.randn(2, 3, 8, 8))) == ["scores"]


# --- calls that do not fit


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_sequence_that_is_too_long(name: str, saved: Any) -> None:
    artifact = saved(name)[2]
    with pytest.raises(QuantizationError, match="such as sequences that it has positions for"):
        loaded_once(artifact.path)(**MODELS[name][1](2, 40))


def test_token_that_does_not_exist(saved: Any) -> None:
    call = {"input_ids": torch.full((2, 7), 96)}
    with pytest.raises(QuantizationError, match="Expected inputs that the model can take"):
        loaded_once(saved("gpt2")[2].path)(**call)


def test_other_constants_and_arguments(saved: Any) -> None:
    loaded = loaded_once(saved("gpt2")[2].path)
    ids = tokens()
    with pytest.raises(
        QuantizationError, match="constants of the captured call, use_cache=None, but got use_cache=False"
    ):
        loaded(input_ids=ids, use_cache=False)
    with pytest.raises(QuantizationError, match="Expected tensors"):
        loaded(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(QuantizationError, match="Expected tensors"):
        loaded(tokens=ids)
    with pytest.raises(QuantizationError, match="Expected a call that fits"):
        load(saved("cnn")[2].path)(ids, ids)
    with pytest.raises(QuantizationError, match=r"`input_ids` to have shape"):
        loaded(input_ids=ids[0])


def test_call_with_a_cache_is_refused_and_generate_needs_the_filled_model(saved: Any) -> None:
    _, quantized, artifact = saved("gpt2")
    with torch.no_grad():
        cache = quantized.quantized()(input_ids=tokens()).past_key_values
    with pytest.raises(QuantizationError, match=r"`past_key_values` .* with `use_cache=False`, or pass keys"):
        loaded_once(artifact.path)(input_ids=tokens()[:, :1], past_key_values=cache)


# --- into the user's model


@pytest.mark.parametrize("name", MODELS)
def test_filled_model_is_the_quantized_one_bit_for_bit(name: str, saved: Any) -> None:
    model, quantized, artifact = saved(name)
    call, into = MODELS[name][1](3, 9), fresh(model)
    into.train()
    filled = load(artifact.path, into=into)
    assert filled is into
    assert type(filled) is type(model)
    assert not any(module.training for module in filled.modules())
    reference = quantized.quantized()
    assert equal_tensors(dict(filled.state_dict()), dict(reference.state_dict()))
    assert [type(m) for m in filled.modules()] == [type(m) for m in reference.modules()]
    with torch.no_grad():
        assert torch.equal(leaves(filled(**call))[0], leaves(reference(**call))[0])


def test_ties_survive_in_the_filled_model(saved: Any) -> None:
    model, _, artifact = saved("gpt2")
    filled: Any = load(artifact.path, into=fresh(model))
    assert filled.lm_head.stored("weight")[0] is filled.transformer.wte.stored("weight")[0]
    model, _, artifact = saved("lstm")
    filled = load(artifact.path, into=fresh(model))
    assert filled.head.stored("weight")[0] is filled.embedding.stored("weight")[0]


def test_float_tie_survives_in_the_filled_model(tmp_path: Path) -> None:
    model = TokenClassifier(tied=True)
    quantized, artifact = save(model, {"tokens": tokens()}, tmp_path, selection=Selection(exclude=("embedding",)))
    filled: Any = load(artifact.path, into=fresh(model))
    assert filled.head.weight is filled.embedding.weight
    with torch.no_grad():
        assert torch.equal(filled(tokens()), quantized.quantized()(tokens()))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layer_that_stays_float_gets_the_artifacts_weights(kind: str, tmp_path: Path) -> None:
    """PyTorch's recurrent layers keep a list of their weights beside the weights themselves."""
    model = TokenClassifier(kind=kind)
    quantized, artifact = save(model, {"tokens": tokens()}, tmp_path, selection=Selection(exclude=(kind,)))
    with torch.no_grad():
        expected = quantized.quantized()(tokens(3))
        assert torch.equal(load(artifact.path, into=fresh(model))(tokens(3)), expected)
        torch.testing.assert_close(load(artifact.path)(tokens(3)), expected)
    with safe_open(artifact.model_path, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith("program.")]  # noqa: SIM118


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate(name: str, saved: Any) -> None:
    model, quantized, artifact = saved(name)
    filled: Any = load(artifact.path, into=fresh(model))
    for length in (1, 6):
        prompt = tokens(2, length)
        mask = torch.ones_like(prompt)
        mask[0, : length // 2] = 0
        settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
        actual = filled.generate(prompt, **settings)
        assert actual.shape == (2, length + 8)
        assert torch.equal(actual, quantized.quantized().generate(prompt, **settings))
        assert torch.equal(actual, filled.generate(prompt, use_cache=False, **settings))


def test_generate_with_encoder_and_decoder(saved: Any) -> None:
    model, quantized, artifact = saved("t5")
    filled: Any = load(artifact.path, into=fresh(model))
    for length in (3, 8):
        settings = {"max_new_tokens": 6, "do_sample": False}
        expected = quantized.quantized().generate(tokens(2, length), **settings)
        assert torch.equal(filled.generate(tokens(2, length), **settings), expected)
        assert expected.shape == (2, 7)
    beams = filled.generate(tokens(2, 5), num_beams=2, max_new_tokens=4)
    assert torch.equal(beams, quantized.quantized().generate(tokens(2, 5), num_beams=2, max_new_tokens=4))


def other_structures() -> dict[str, nn.Module]:
    wide = TokenClassifier(tied=True, layers=2)
    wide.embedding = nn.Embedding(97, 32)
    wide.head = nn.Linear(32, 97, bias=False)
    narrow = TokenClassifier(tied=True, layers=2)
    narrow.rnn = nn.LSTM(32, 16, 2, batch_first=True)
    more = TokenClassifier(tied=True, layers=2)
    more.norm = nn.LayerNorm(32)
    other_kind = TokenClassifier(tied=True, layers=2)
    other_kind.rnn = nn.Conv1d(32, 32, 3)
    return {
        "fewer layers": TokenClassifier(tied=True, layers=1),
        "more layers": TokenClassifier(tied=True, layers=3),
        "another width": narrow,
        "another vocabulary": wide,
        "another kind": other_kind,
        "another kind of recurrence": TokenClassifier(tied=True, kind="GRU", layers=2),
        "a module more": more,
        "another model": CNN(),
        "nothing": nn.Sequential(),
    }


@pytest.mark.parametrize("name", other_structures())
def test_model_of_another_structure_is_refused_and_left_as_it_was(name: str, saved: Any) -> None:
    model = other_structures()[name].train()
    state = State(model)
    with pytest.raises(ArtifactError, match=r"(Expected .*`into`.*)|(for `into`)"):
        load(saved("lstm")[2].path, into=model)
    state.assert_unchanged()


def test_model_without_a_float_module_of_the_artifact_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    _, artifact = save(model, {"input": torch.randn(3, 32)}, tmp_path)
    into = nn.Sequential(nn.Linear(32, 32))
    state = State(into)
    with pytest.raises(ArtifactError, match=r"no '1\.bias'"):
        load(artifact.path, into=into)
    state.assert_unchanged()


def test_linear_layer_of_other_input_features_is_refused(tmp_path: Path) -> None:
    """Its bias and what is stored of its weight would fit."""
    for recipe in ("int8_weight_only", "int4_weight_only"):
        model = nn.Sequential(nn.Linear(64, 8))
        _, artifact = save(model, {"input": torch.randn(3, 64)}, tmp_path / recipe, recipe=recipe)
        with pytest.raises(ArtifactError, match=r"'0\.weight' .* \(8, 32\), but got \(8, 64\)"):
            load(artifact.path, into=nn.Sequential(nn.Linear(32, 8)))


def test_filling_shares_nothing_with_other_models(saved: Any) -> None:
    model, _, artifact = saved("lstm")
    first, second = load(artifact.path, into=fresh(model)), load(artifact.path, into=fresh(model))
    with torch.no_grad():
        expected = second(tokens()).clone()
        for parameter in first.parameters():
            parameter.zero_()
        first.embedding.stored("weight")[0].zero_()  # type: ignore[operator, union-attr]
        assert torch.equal(second(tokens()), expected)


# --- what lies on disk


@pytest.mark.parametrize("name", MODELS)
def test_weights_lie_on_disk_once(name: str, saved: Any) -> None:
    model, quantized, artifact = saved(name)
    files = [path for path in artifact.path.rglob("*") if path.is_file()]
    model_files = [artifact.path / file for file in artifact.model_files.values()]
    assert artifact.size_bytes == sum(path.stat().st_size for path in model_files)
    assert {path.suffix for path in files} <= {".safetensors", ".gz", ".json", ".md"}
    # Every value once, in a byte or, where it is no weight of a layer, in four.
    reference = quantized.quantized()
    tensors = {id(t): t for t in (*reference.parameters(), *reference.buffers())}
    expected = sum(t.numel() * t.element_size() for t in tensors.values())
    with safe_open(artifact.model_path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    held = sum(t.numel() * t.element_size() for key, t in stored.items() if not key.startswith("program."))
    assert held == expected
    lifted = sum(t.numel() * t.element_size() for key, t in stored.items() if key.startswith("program."))
    assert lifted < 2048
    floating = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert sum(t.numel() for t in stored.values() if t.dtype == torch.int8) == floating


def test_size_of_four_bits(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    _, artifact = save(model, {"input": torch.randn(8, 256)}, tmp_path, recipe="int4_weight_only")
    # Half a byte for each value, four bytes for 32 of them, and corrected biases.
    expected = 2 * 256 * 256 * (0.5 + 4 / 32) + 2 * 256 * 4
    assert artifact.model_path.stat().st_size == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_program_tells_nothing_of_the_machine(name: str, saved: Any) -> None:
    artifact = saved(name)[2]
    packed = (artifact.path / artifact.model_files["program.json.gz"]).read_bytes()
    text = gzip.decompress(packed).decode()
    assert json.loads(text)["steps"]
    for trace in ("site-packages", str(Path.home()), str(artifact.path), os.getcwd(), ".py", "stack_trace"):
        assert trace not in text
    # No time and no file name in gzip's header: the same model gives the same bytes.
    assert packed[3:8] == b"\0\0\0\0\0"


def test_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model, image = CNN(), torch.randn(2, 3, 8, 8)
    first, second = (save(model, {"image": image}, tmp_path / folder)[1] for folder in ("a", "b"))
    for name in first.model_files.values():
        assert (second.path / name).read_bytes() == (first.path / name).read_bytes()


def test_nothing_is_unpickled(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    for name in ("gpt2", "lstm", "cnn"):
        model, _, artifact = saved(name)
        load(artifact.path)(**MODELS[name][1]())
        load(artifact.path, into=fresh(model))
        assert verify(artifact.path).identical


@pytest.mark.parametrize("name", MODELS)
def test_verify(name: str, saved: Any) -> None:
    result = verify(saved(name)[2].path)
    assert not result.failures
    assert result.identical
    assert result.quantization_db > 25


def test_damaged_program(saved: Any, tmp_path: Path) -> None:
    runtime = runtimes.get("torch")

    artifact = saved("cnn")[2]
    files = {role: Path(name).name for role, name in artifact.model_files.items()}
    source = artifact.model_path.parent
    text = gzip.decompress((source / files["program.json.gz"]).read_bytes())
    changed = json.loads(text)
    changed["format"] = 999
    without_operator = text.replace(b"lightning_quant.linear_dynamic", b"lightning_quant.no_such_operator")
    assert without_operator != text
    for number, content in enumerate(
        (
            b"not gzip",
            gzip.compress(text[:-100]),
            gzip.compress(b"{}"),
            gzip.compress(b"[]"),
            gzip.compress(json.dumps(changed).encode()),
            gzip.compress(without_operator),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / files["model"]).write_bytes((source / files["model"]).read_bytes())
        (folder / files["program.json.gz"]).write_bytes(content)
        with pytest.raises(ArtifactError, match=r"to be a program (for PyTorch|of steps)"):
            runtime.load(folder, files, artifact.signature)


def test_counted_operators(saved: Any) -> None:
    runtime = runtimes.get("torch")

    counts = runtime.count_operators(saved("lstm")[2].model_path.parent / "model.safetensors")
    assert counts["lightning_quant.recurrent.default"] == 1
    assert counts["lightning_quant.linear_dynamic.default"] == 1


# --- models that do not export


def test_model_that_does_not_export(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y * sum(value > 0 for value in y.flatten().tolist())

    artifact = save(Counts(), {"x": torch.randn(2, 8)}, tmp_path / "artifact")[1]

    assert "PyTorch's exporter to take the module, but it says: " in artifact.manifest["into_only"]
    with pytest.raises(ArtifactError, match=r"has no program of its own. Type `load\("):
        load(artifact.path)
    into = Counts().eval()
    assert isinstance(load(artifact.path, into=into), Counts)


def test_threads(saved: Any) -> None:
    before = torch.get_num_threads()
    loaded = load(saved("cnn")[2].path, threads=2)
    loaded(image=torch.randn(1, 3, 8, 8))
    assert torch.get_num_threads() == before
    with pytest.raises(QuantizationError, match=r"out of .*'threads'.*, but got 'no_such_option'"):
        load(saved("cnn")[2].path, no_such_option=1)


def test_tensors_are_as_the_user_left_them(saved: Any) -> None:
    model, _, artifact = saved("cnn")
    before = tensors_of(model)
    image = torch.randn(2, 3, 8, 8)
    copied = image.clone()
    load(artifact.path)(image=image)
    assert torch.equal(image, copied)
    assert equal_tensors(tensors_of(model), before)
    assert not any(isinstance(module, StoredLayer) for module in model.modules())
