"""Model files changed at random, as somebody who makes artifacts can change them with all hashes right."""

import contextlib
import copy
import functools
import gzip
import hashlib
import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_quant.artifact.manifest import GOLDEN, MANIFEST, content_digest, dump

_NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 7, 2**31, 2**40, 2**63 - 1, 2**63, -(2**63), 10**300, 0.5, -0.0, 1e308, "", "x", "cpu",
    "meta", "cuda:0", "__import__('os').system('true')", "../../../../etc/passwd", "/etc/passwd", "a\0b", "\ud7ff",
    [], [[]], [0], [1, 2], [-1, 2**62], {}, {"value": "input"}, {"value": "no"}, {"float": "nan"}, {"float": "x"},
    {"torch": "float32"}, {"torch": "load"}, {"torch": "_inductor"}, {"torch": "quint8"}, {"a": 1, "b": 2},
)  # fmt: skip
_CALLS = (
    "aten.from_file.default", "aten.set_.source_Tensor", "aten.fill_.Scalar", "aten.add.out", "aten.resize_.default",
    "aten.empty.memory_format", "aten._print.default", "aten.as_strided.default", "aten.index.Tensor",
    "aten.cat.default", "aten.view.default", "aten.reshape.default", "aten.expand.default", "aten.gather.default",
    "aten.embedding.default", "aten.linear.default", "aten.conv2d.default", "aten.max_pool2d.default",
    "aten.zeros.default", "aten.einsum.default", "aten.dequantize.self",
    "aten._make_per_channel_quantized_tensor.default", "quantized.linear.default", "quantized.linear_prepack.default",
    "quantized.conv2d_prepack.default", "quantized.conv2d.new", "quantized.cat.default", "quantized.add.default",
    "lightning_quant.linear_dynamic.default", "lightning_quant.linear_weight_only.default",
    "lightning_quant.recurrent.default", "operator.mul", "operator.getitem", "operator.attrgetter", "math.ceil",
    "torch.sym_max", "torch.load", "os.system", "builtins.eval", "aten.__class__", "aten", "", ".", "a.b.c.d",
)  # fmt: skip


_SIZES: tuple[list[int], ...] = ([], [0], [2**40], [2**32, 2**32], [-1], [1] * 70)
_PLACES = ("other.bin", "../other.bin", "/etc/passwd", "../../../../etc/passwd", "model.onnx", "", "a\0b")


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """Return a file's content with bytes flipped, cut off, repeated or put in, or something else altogether."""
    kind = chance.randrange(7)
    place = chance.randrange(len(content) + 1)
    if kind == 0:
        changed = bytearray(content)
        for _ in range(chance.choice((1, 4, 64))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + content[chance.randrange(len(content) + 1) :]
    if kind == 3:
        return content[:place] + chance.randbytes(chance.choice((1, 8, 4096))) + content[place:]
    if kind == 4:
        return content[:place] + b"\xff" * 8 + content[place + 8 :]
    if kind == 5:
        return content + content
    return chance.choice(foreign_files())


@functools.cache
def foreign_files() -> tuple[bytes, ...]:
    """Return files that are something else altogether, small ones that unpack to much among them."""
    return (
        b"",
        b"\0" * 64,
        pickle.dumps(print),
        b"\x7fELF" + b"\0" * 256,
        b"#!/bin/sh\ntouch x\n",
        b"PK\3\4" * 64,
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        gzip.compress(b"{}"),
        gzip.compress(b"[" * 10**6),
        gzip.compress(b"[" + b"[]," * 2**24),
        # Four gigabytes, in parts that follow each other.
        gzip.compress(b" " * 2**24) * 2**8,
    )


def change_tree(tree: Any, chance: random.Random) -> None:
    """Change one value somewhere in nested lists and dicts."""
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = chance.choice(keys)
        inside = place[key]
        if isinstance(inside, dict | list) and inside and chance.random() < 0.9:
            place = inside
            continue
        kind = chance.randrange(4)
        if kind == 0 and isinstance(place, dict | list):
            del place[key]
        elif kind == 1 and isinstance(place, list):
            place.append(copy.deepcopy(inside))
        else:
            # A value of its own: another change may go into it.
            place[key] = copy.deepcopy(chance.choice(_NASTY))
        return


def change_program(content: bytes, chance: random.Random) -> bytes:
    """Return a program with steps of other calls, other arguments, another order."""
    program = json.loads(gzip.decompress(content))
    steps = program["steps"]
    for _ in range(chance.choice((1, 1, 3))):
        kind = chance.randrange(5)
        step = chance.choice(steps)
        if kind == 0:
            step["call"] = chance.choice((*_CALLS, *(other["call"] for other in steps)))
        elif kind == 1:
            steps.insert(chance.randrange(len(steps) + 1), _new_step(program, chance))
        elif kind == 2:
            steps.append(steps.pop(chance.randrange(len(steps))))
        elif kind == 3:
            step["kwargs"][chance.choice(("dtype", "device", "out", "x=1, y", "self"))] = chance.choice(_NASTY)
        else:
            change_tree(program, chance)
        if not steps:
            break
    return gzip.compress(json.dumps(program).encode(), mtime=0)


def _new_step(program: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    names = [step["name"] for step in program["steps"] if isinstance(step, dict) and "name" in step]
    values = [{"value": name} for name in names] + [{"value": info["name"]} for info in program["inputs"]]
    args = [chance.choice((*_NASTY, *values)) for _ in range(chance.randrange(5))]
    return {"name": f"step.new{chance.randrange(3)}", "call": chance.choice(_CALLS), "args": args, "kwargs": {}}


def change_tensors(content: bytes, chance: random.Random) -> bytes:
    """Return a safetensors file with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = chance.choice(list(header))
    kind = chance.randrange(5)
    if kind == 0:
        header[name] = chance.choice(_NASTY)
    elif kind == 1 and "dtype" in header[name]:
        header[name]["dtype"] = chance.choice(("F64", "I8", "BOOL", "F8_E4M3", "F4", "C64", "U64", "x"))
    elif kind == 2 and "shape" in header[name]:
        header[name]["shape"] = chance.choice(_SIZES)
    elif kind == 3:
        header[f"{name}x"] = header.pop(name)
    else:
        change_tree(header, chance)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def change_onnx(content: bytes, chance: random.Random) -> bytes:
    """Return an ONNX file with other operators, attributes, sizes, and data elsewhere."""
    import onnx

    model = onnx.load_from_string(content)
    graph = model.graph
    for _ in range(chance.choice((1, 1, 3))):
        node, stored = chance.choice(graph.node), chance.choice(graph.initializer)
        kind = chance.randrange(8)
        if kind == 0:
            node.op_type = chance.choice(("If", "Loop", "Scan", "EPContext", "ConstantOfShape", "Resize", "x", ""))
        elif kind == 1 and node.attribute:
            chance.choice(node.attribute).i = chance.choice((-1, 0, 2**31, 2**62))
        elif kind == 2 and node.input:
            node.input[chance.randrange(len(node.input))] = chance.choice([other.name for other in graph.initializer])
        elif kind == 3:
            stored.dims[:] = chance.choice(_SIZES)
        elif kind == 4:
            stored.ClearField("raw_data")
            stored.data_location = onnx.TensorProto.EXTERNAL
            stored.external_data.add(key="location", value=chance.choice(_PLACES))
            stored.external_data.add(key="length", value=chance.choice(("4", "-1", str(2**40))))
        elif kind == 5:
            stored.data_type = chance.randrange(25)
        elif kind == 6:
            node.domain = chance.choice(("com.microsoft", "ai.onnx.ml", "x"))
        else:
            del graph.node[chance.randrange(len(graph.node))]
    return model.SerializeToString()


def change_openvino(content: bytes, chance: random.Random) -> bytes:
    """Return an OpenVINO model with other attributes, layers and entities."""
    text = content.decode()
    for _ in range(chance.choice((1, 1, 3))):
        quotes = [index for index, character in enumerate(text) if character == '"']
        begin = 2 * chance.randrange(len(quotes) // 2)
        value = chance.choice(("-1", "0", str(2**40), str(2**63), "x", "", "f32", "i4", "Loop", "1,2", *_PLACES))
        text = text[: quotes[begin] + 1] + value + text[quotes[begin + 1] :]
    if chance.random() < 0.1:
        entity = '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        text = entity + text.partition("?>")[2].replace('name="', 'name="&x;', 1)
    return text.encode()


_CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".gz": change_program,
    ".safetensors": change_tensors,
    ".onnx": change_onnx,
    ".xml": change_openvino,
}


def forge_folder(folder: Path, chance: random.Random) -> None:
    """Change an artifact's manifest or golden batch, and make all hashes right again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    batch = folder / manifest["files"][GOLDEN]
    kind = chance.randrange(6)
    if kind == 0:
        (folder / MANIFEST).write_bytes(change_bytes((folder / MANIFEST).read_bytes(), chance))
        return
    if kind == 1:
        batch.write_bytes((change_tensors if chance.random() < 0.8 else change_bytes)(batch.read_bytes(), chance))
    else:
        parts = [
            manifest,
            *(manifest[name] for name in ("signature", "report", "plan", "files", "signature", "report")),
        ]
        part = chance.choice(parts)
        for _ in range(chance.choice((1, 1, 3))):
            if part:
                change_tree(part, chance)
    # What is left of the form takes them.
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, OSError):
        _seal(folder, manifest, batch)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _seal(folder: Path, manifest: dict[str, Any], batch: Path) -> None:
    content = batch.read_bytes()
    with contextlib.suppress(struct.error, ValueError, KeyError, TypeError, AttributeError):
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"] = {"content": content_digest(manifest)}
        text = json.dumps(header).encode()
        batch.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    for name in manifest["files"].values():
        if (folder / name).is_file():
            manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    manifest["manifest_sha256"] = dump(manifest)[1]["manifest_sha256"]


def forge(folder: Path, files: dict[str, str], chance: random.Random) -> None:
    """Change one of a model's files."""
    path = folder / chance.choice(sorted(files.values()))
    content = path.read_bytes()
    change = _CHANGES.get(path.suffix, change_bytes)
    if not content or chance.random() < 0.3:
        change = change_bytes
    path.write_bytes(change(content, chance) if content else b"x")
