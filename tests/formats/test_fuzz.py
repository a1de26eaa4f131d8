"""Damaged inputs: whatever is in the files, only a ``MergeError`` leaves the room."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import pytest
import torch

from mergekit_lowrank.errors import MergeError
from mergekit_lowrank.formats import PeftFormat

from .builders import config, state_dict, write_adapter

TRIALS = 300


def mutated(content: bytes, chance: random.Random, within: int) -> bytes:
    """The bytes with a few flipped, cut out, repeated or cut off, within the first ``within``."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        position = chance.randrange(min(within, len(changed)) or 1)
        match chance.randrange(5):
            case 0:
                changed[position : position + 1] = bytes([chance.randrange(256)])
            case 1:
                changed[position : position + 1] = chance.choice([b"9", b"-", b"[", b'"', b"{", b"}", b"e", b"\xff"])
            case 2:
                del changed[position : position + chance.randint(1, 8)]
            case 3:
                changed[position:position] = changed[position : position + chance.randint(1, 40)]
            case 4 if chance.random() < 0.2:
                del changed[position:]
    return bytes(changed)


def survives(path) -> None:
    with suppress(MergeError):
        checkpoint = PeftFormat().open(path, label="fuzz")
        for module in checkpoint.modules:
            checkpoint.read(module)


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "a", state_dict(), config(rank_pattern={"q": 2}, alpha_pattern={"v": 3.5}))


def test_damaged_safetensors_raise_only_merge_errors(adapter):
    file, chance = adapter / "adapter_model.safetensors", random.Random(0)
    content = file.read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    for _ in range(TRIALS):
        file.write_bytes(mutated(content, chance, within=header_bytes))
        survives(adapter)


def test_damaged_configurations_raise_only_merge_errors(adapter):
    file, chance = adapter / "adapter_config.json", random.Random(1)
    content = file.read_bytes()
    for _ in range(TRIALS):
        file.write_bytes(mutated(content, chance, within=len(content)))
        survives(adapter)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_raise_only_merge_errors(adapter, zipped):
    (adapter / "adapter_model.safetensors").unlink()
    file, chance = adapter / "adapter_model.bin", random.Random(2)
    torch.save(state_dict(), file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    for _ in range(TRIALS // 3):
        file.write_bytes(mutated(content, chance, within=len(content)))
        survives(adapter)


def test_any_json_in_any_field_raises_only_merge_errors(adapter):
    chance = random.Random(3)
    values = [
        None,
        True,
        0,
        -1,
        2,
        1e308,
        1e999,
        "",
        "none",
        "(",
        [],
        [1],
        {},
        {"q": 2},
        {"q": None},
        {"(": 1},
        {"": 2},
    ]
    names = ["peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"]
    names += [
        "revision",
        "fan_in_fan_out",
        "use_dora",
        "modules_to_save",
        "raw",
        "model_config",
        "parse",
        "target_modules",
    ]
    for _ in range(TRIALS):
        settings = config(**{name: chance.choice(values) for name in chance.sample(names, 3)})
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        survives(adapter)
