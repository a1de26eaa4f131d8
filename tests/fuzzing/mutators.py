"""Mutations: of bytes, of JSON, of safetensors headers and of the tensors themselves, chosen by a seeded generator."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.fuzzing.contents import Content, Json, Pickled, Tensors, encoded, header_and_data, safetensors_bytes
from tests.fuzzing.hostile import hostile_pickle

__all__ = ["OUTSIDE", "mutated", "mutated_bytes"]

OUTSIDE = "outside.safetensors"
"""A valid file beside the directory of a case, which no reader may open."""

_RAW = {
    "@list": "[" * 20_000 + "]" * 20_000,
    "@object": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@digits": "9" * 5_000,
    "@exponent": "-1e99999",
    "@text": '"' + "x" * 100_000 + '"',
    "@broken": '"\\ud800',
}
"""What ``json.dumps`` does not write, by the text that stands for it."""

_NAMES = (
    f"../{OUTSIDE}",
    "../../etc/passwd",
    "/etc/passwd",
    "..\\x.safetensors",
    ".",
    "..",
    "a\0b",
    "adapter_config.json",
)
_TEXTS = (
    "",
    " ",
    "none",
    "(",
    "(?i)q",
    "q|v",
    ".*",
    "\ud800",
    "é",
    "\u017f",
    "\u2028",
    "x" * 300,
    "../x",
    "true",
    "LORA",
    "-1",
)
_NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**400), 1 << 62, 65536)
_REALS = (0.0, -0.0, 0.5, 1e308, 5e-324, math.nan, math.inf, -math.inf)
_OTHERS = (None, True, False, [], {}, [[]], [None], {"": 0}, {"q_proj": 2}, {"(": 1}, [0, 1], [2**63, 2**63], [-1, 8])
_KEYS = (
    *("r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "bias"),
    *(
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "init_lora_weights",
        "raw",
    ),
    *(
        "model_config",
        "parse",
        "weight_map",
        "quantization_config",
        "tie_word_embeddings",
        "architectures",
        "peft_type",
    ),
    *("dtype", "shape", "data_offsets", "__metadata__", "chat_template", "added_tokens", "", "x" * 300, "\ud800"),
)
_DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
_SUFFIXES = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_A.bias", "lora_magnitude_vector", "lora_embedding_A"),
    *("lora_embedding_B", "token_adapter.trainable_tokens_delta", "weight", "bias", "modules_to_save.weight", "lora_E"),
    *("hada_w1_a", "hada_t1", "lokr_w1", "lokr_w2", "lokr_t2", "vera_lambda_b", "vera_A", "lora_down.weight", "alpha"),
    *("lora_mid.weight", "dora_scale", "lora_A.default.weight", "original_module.weight", "base_layer.weight", ""),
)


def mutated(content: Content, chance: Random) -> bytes:
    """The bytes of a file, changed in its structure, in its bytes, or in both."""
    if isinstance(content, bytes) or chance.random() < 0.15:
        return mutated_bytes(encoded(content), chance)
    if isinstance(content, Json):
        data = _json_bytes(content.value, chance)
    elif isinstance(content, Tensors):
        data = _safetensors(content, chance)
    else:
        data = _pickle(content, chance)
    return mutated_bytes(data, chance) if chance.random() < 0.1 else data


def mutated_bytes(data: bytes, chance: Random) -> bytes:
    """The bytes with a few flipped, inserted, cut out, repeated or cut off; mostly at the start, where headers are."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        within = min(len(changed), 400) if chance.random() < 0.5 else len(changed)
        position = chance.randrange(within or 1)
        match chance.randrange(7):
            case 0:
                changed[position : position + 1] = bytes([chance.randrange(256)])
            case 1:
                changed[position : position + 1] = chance.choice(
                    [b"9", b"-", b"[", b'"', b"{", b"}", b"e", b"\xff", b"\n"]
                )
            case 2:
                del changed[position : position + chance.randint(1, 8)]
            case 3:
                changed[position:position] = changed[position : position + chance.randint(1, 40)]
            case 4:
                changed[position:position] = chance.randbytes(chance.randint(1, 12))
            case 5 if changed:
                changed[position % len(changed)] ^= 1 << chance.randrange(8)
            case 6 if chance.random() < 0.3:
                del changed[position:]
    return bytes(changed)


def _json_bytes(value: Any, chance: Random) -> bytes:
    changed = _mutated_json(value, chance)
    text = json.dumps(changed)
    if isinstance(changed, dict) and chance.random() < 0.1:  # a key twice
        key, other = json.dumps(chance.choice([*changed, *_KEYS])), json.dumps(_any_value(chance))
        text = f"{{{key}: {other}, {text[1:]}" if len(changed) else f"{{{key}: 1, {key}: {other}}}"
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode(chance.choice(["utf-8-sig", "utf-16", "utf-32"]) if chance.random() < 0.03 else "utf-8")


def _mutated_json(value: Any, chance: Random) -> Any:
    """A document with one to three of its values changed, dropped, added, renamed, wrapped or put elsewhere."""
    root = [copy.deepcopy(value)]
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(list(_places(root)))
        match chance.randrange(7):
            case 0 | 1:
                holder[key] = _any_value(chance)
            case 2 if holder is not root:
                del holder[key]
            case 3 if isinstance(holder, dict):
                holder[chance.choice(_KEYS)] = _any_value(chance)
            case 4 if isinstance(holder, dict):
                holder[chance.choice([*_KEYS, str(key) + "x", str(key)[1:]])] = holder.pop(key)
            case 5:
                holder[key] = chance.choice([[holder[key]], {"a": holder[key]}, [holder[key], holder[key]]])
            case 6:
                other, place = chance.choice(list(_places(root)))
                holder[key] = copy.deepcopy(other[place])
    return root[0]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Everything that a document holds, as a container and a key of it."""
    keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
    for key in keys:
        yield holder, key
        yield from _places(holder[key])


def _any_value(chance: Random) -> Any:
    kinds = (_NUMBERS, _REALS, _TEXTS, _NAMES, _OTHERS, tuple(_RAW))
    return copy.deepcopy(chance.choice(chance.choices(kinds, weights=(4, 2, 4, 3, 4, 0.3))[0]))


def _safetensors(content: Tensors, chance: Random) -> bytes:
    if chance.random() < 0.6:
        content = Tensors(_mutated_tensors(content.tensors, chance), content.metadata)
        if not content.metadata or chance.random() < 0.8:
            return encoded(content)
    header, data = header_and_data(content)
    text = _json_bytes(header, chance)
    text += b" " * (-len(text) % 8)
    made = safetensors_bytes(text, chance.choice([data, data, data, data[:-1], data + b"\0", b"", data * 2]))
    if chance.random() < 0.05:
        size = chance.choice([0, 1, 7, len(text) - 1, len(text) + 1, 100_000_001, 2**63 - 8, 2**64 - 1])
        return size.to_bytes(8, "little") + made[8:]
    return made


def _pickle(content: Pickled, chance: Random) -> bytes:
    if chance.random() < 0.25:
        return hostile_pickle(content, chance)
    tensors = _mutated_tensors(content.tensors, chance)
    made = encoded(Pickled(tensors, content.is_zipped))
    return mutated_bytes(made, chance) if chance.random() < 0.3 else made


def _mutated_tensors(given: Mapping[str, Tensor], chance: Random) -> dict[str, Tensor]:
    """Tensors of which one to three are dropped, renamed, doubled, or of other shapes, types or values."""
    tensors = dict(given)
    for _ in range(chance.randint(1, 3)):
        if not tensors:
            break
        name = chance.choice(list(tensors))
        match chance.randrange(8):
            case 0:
                del tensors[name]
            case 1:
                other = _other_name(name, tensors, chance)
                tensors[other] = tensors.pop(name)
            case 2:
                tensors[_other_name(name, tensors, chance)] = tensors[name]
            case 3 | 4:
                tensors[name] = _reshaped(tensors[name], chance)
            case 5:
                tensors[name] = _retyped(tensors[name], chance)
            case 6:
                tensors[name] = _revalued(tensors[name], chance)
            case 7:
                tensors = dict(sorted(tensors.items(), key=lambda _: chance.random()))
    return tensors


def _other_name(name: str, names: Mapping[str, Any], chance: Random) -> str:
    stem, _, leaf = name.partition(".lora") if ".lora" in name else name.rpartition(".")
    return chance.choice(
        [
            f"{stem}.{chance.choice(_SUFFIXES)}",
            f"{chance.choice(list(names)).rpartition('.')[0]}.{leaf}",
            name.removeprefix("base_model.model."),
            f"base_model.model.{name}",
            name.replace(".0.", ".1."),
            name.replace("weight", "default.weight"),
            name + "\ud800",
            "",
            ".",
            "x" * 500,
        ]
    )


def _reshaped(tensor: Tensor, chance: Random) -> Tensor:
    wider = [chance.choice([0, 1, 2, 3, 5, size, size + 1]) for size in tensor.shape]
    return chance.choice(
        [
            lambda: tensor.reshape(-1),
            lambda: tensor.unsqueeze(chance.choice([0, -1])),
            lambda: tensor.transpose(0, -1) if tensor.ndim else tensor,
            lambda: tensor.new_ones(wider),
            lambda: tensor.new_ones(()),
            lambda: tensor.new_ones([1] * chance.choice([1, 3, 4, 5, 9])),
            lambda: tensor[:0] if tensor.ndim else tensor,
        ]
    )()


def _retyped(tensor: Tensor, chance: Random) -> Tensor:
    return (tensor.real if tensor.is_complex() else tensor).to(chance.choice(_DTYPES))


def _revalued(tensor: Tensor, chance: Random) -> Tensor:
    """With one value, or all of them, put in its place; what the type cannot hold becomes infinite."""
    values = torch.full(tensor.shape, chance.choice([0.0, -1.0, math.nan, math.inf, 3e38, 1e-45]))
    if chance.random() < 0.5 and tensor.is_floating_point():
        keep = torch.arange(values.numel()).reshape(values.shape) != chance.randrange(values.numel() or 1)
        values = torch.where(keep, tensor.float(), values)
    return values.to(tensor.dtype)
