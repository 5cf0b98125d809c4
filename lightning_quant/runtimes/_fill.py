"""A model that the user built, filled with the tensors of an artifact."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.arguments.reading import parse_json
from lightning_quant.errors import ArtifactError
from lightning_quant.layers import StoredLayer, class_for
from lightning_quant.layers.layer import ADDED, plain
from lightning_quant.layers.parameters import CHILD, StoredParameters, child_of
from lightning_quant.layers.placement import place, standing
from lightning_quant.layers.storage import SCHEMES
from lightning_quant.runtimes._flat import tensors_in
from lightning_quant.surgery.routing import device_of, resolve

# Prefix, in the file of tensors, of those that the exporter lifted out of the forward's code.
CONSTANT = "program."
# Key of the metadata: name of each stored layer to its scheme, and of each tensor's further names to its first.
STRUCTURE = "structure"


def fill(model: nn.Module, path: Path) -> nn.Module:
    """Replace a float model's layers by stored ones and set all its tensors; on error it is left as it was.

    Args:
        model: of the structure of the one that was quantized; returned.
        path: file of tensors.

    Raises:
        ArtifactError: the model has another structure, and the message names what differs; or the file is none of ours.
    """
    device = device_of(model)
    tensors = {name: tensor.to(device) for name, tensor in tensors_in(path).items()}
    schemes, aliases = _structure(path)
    try:
        tensors |= {name: tensors[first] for name, first in aliases.items()}
    except (LookupError, TypeError) as error:
        raise ArtifactError(f"Expected {path} to hold every tensor that it names, but not {error}.") from error
    if "" in schemes:
        raise ArtifactError(
            f"Expected `into` for an artifact of a module with layers inside, but this one is of a single layer, "
            f"{type(model).__name__}. Load it without `into`, and put it in the layer's place."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = sorted(name for name in schemes if _owner(name) not in modules)
    if missing:
        raise ArtifactError(
            f"Expected `into` to have the structure of the model that was quantized, but it has no {missing[0]!r}. "
            "Build it with the same code and configuration."
        )
    layers: dict[str, StoredLayer] = {}
    for name, scheme in schemes.items():
        layers[name] = _stored(modules[_owner(name)], name, scheme, tensors)
    for name, module in modules.items():
        for first in [n for n in layers if modules.get(_owner(n)) is module]:
            layers[name if _owner(first) == first else child_of(name)] = layers[first]
    before = {name: standing(model, name) for name in layers}
    place(model, layers)
    try:
        _set_tensors(model, tensors)
    except ArtifactError:
        place(model, before)
        raise
    return model.eval()


def _owner(name: str) -> str:
    """Return the name of the float module that a layer takes the place of, or whose weights it holds."""
    owner, _, attribute = name.rpartition(".")
    return owner if attribute == CHILD else name


def _structure(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file says of its layers, and of further names of its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        structure = parse_json(metadata.get(STRUCTURE, ""))
    except ArtifactError as error:
        raise ArtifactError(f"Expected {path} to say which layers it holds, but {error}") from error
    layers, aliases = (structure.get(key) if isinstance(structure, dict) else None for key in ("layers", "aliases"))
    if not isinstance(layers, dict) or not isinstance(aliases, dict):
        raise ArtifactError(f"Expected {path} to say which layers it holds, but it says {structure!r:.80}.")
    return layers, aliases


def _stored(float_layer: nn.Module, name: str, scheme: str, tensors: dict[str, Tensor]) -> StoredLayer:
    stored_class = class_for(float_layer) if _owner(name) == name else StoredParameters
    if stored_class is None or not isinstance(scheme, str) or scheme not in SCHEMES:
        raise ArtifactError(
            f"Expected {name!r} of `into` to be a layer for {scheme!r}, but got {type(float_layer).__name__}."
        )
    layer = plain(float_layer)
    stored = {}
    names = stored_class.weight_names(layer)
    if stored_class is StoredParameters:
        names = [n for n, _ in layer.named_parameters(recurse=False) if f"{name}.{n}" in tensors]
    for weight in names:
        key = f"{name}.{weight.replace('.', '_')}"
        if key not in tensors:
            raise ArtifactError(f"Expected the artifact to hold {key!r} for `into`, but it does not.")
        stored[weight] = (tensors[key], tensors.get(f"{key}_scale"))
        expected, shape = stored_class.rows(layer, weight).shape, _shape(*stored[weight])
        if expected != shape:
            raise ArtifactError(
                f"Expected {key!r} of the artifact to have the shape that `into` has, {tuple(expected)}, but got "
                f"{tuple(shape)}."
            )
    made = stored_class(layer, SCHEMES[scheme], stored)
    added = tensors.get(f"{name}.{ADDED}")
    if added is not None:
        if added.shape != stored[names[0]][0].shape[:1]:
            raise ArtifactError(f"Expected {name}.{ADDED} to have a value for each row, but got {tuple(added.shape)}.")
        made.register_buffer(ADDED, added)
    return made


def _shape(stored: Tensor, scale: Tensor | None) -> torch.Size:
    """Return the shape of a stored weight in float."""
    is_packed = scale is not None and scale.dim() == 2
    return torch.Size([stored.shape[0], 2 * stored.shape[1]]) if is_packed else stored.shape


def _set_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Set every parameter and buffer by name; parameters become new objects, so that others keep theirs."""
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in named.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            there = f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing of that name"
            raise ArtifactError(
                f"Expected the artifact to hold {name!r} of shape {tuple(tensor.shape)} for `into`, but it holds "
                f"{there}."
            )
    unused = sorted(name for name in set(tensors) - set(named) if not name.startswith(CONSTANT))
    if unused:
        raise ArtifactError(
            f"Expected `into` to have the structure of the model that was quantized, but it has no {unused[0]!r}. "
            "Build it with the same code and configuration."
        )
    made: dict[int, nn.Parameter] = {}
    for name in named:
        owner, _, attribute = name.rpartition(".")
        module = resolve(model, owner)
        if attribute in module._parameters:
            value = tensors[name]
            parameter = made.setdefault(id(value), nn.Parameter(value, requires_grad=False))
            # Recurrent layers keep a list of their weights, which follows attributes only.
            setattr(module, attribute, parameter)
        else:
            module._buffers[attribute] = tensors[name]
