from __future__ import annotations

import json

import pytest
import torch

from .builders import MODULES, run, succeeds, tensors, write_adapter


def delta_norm(made, module):
    a, b = (made[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return float(torch.linalg.norm(2 * b @ a))


def test_inspect_groups_modules_by_kind(math):
    printed = succeeds("inspect", "math")
    assert "base model   org/base" in printed
    assert "modules      4, rank 2, scaling 2" in printed
    assert "beside LoRA  nothing" in printed
    rows = [line.split() for line in printed.splitlines() if "_proj" in line]
    made = tensors(seed=1)
    expected = [delta_norm(made, name) for name in MODULES if "q_proj" in name]
    assert rows[0][:8] == ["q_proj", "2", "6", "x", "5", "2", "2", "float32"]
    assert float(rows[0][8]) == pytest.approx(sum(n * n for n in expected) ** 0.5, rel=1e-3)
    assert len(rows) == 2


def test_inspect_json_lists_each_module(math):
    made = json.loads(succeeds("inspect", "math", "--json"))
    assert [module["module"] for module in made["modules"]] == list(MODULES)
    assert made["modules"][0]["norm"] == pytest.approx(delta_norm(tensors(seed=1), MODULES[0]), rel=1e-5)
    assert (made["base_model"], made["format"], made["stored_bytes"]) == ("org/base", "peft", 352)


def test_inspect_shows_ranges(tmp_path):
    made = tensors(MODULES[:2]) | tensors(MODULES[2:], rank=4)
    write_adapter(tmp_path / "mixed", made, rank_pattern={"layers.1.q_proj": 4, "layers.1.v_proj": 4})
    assert "modules      4, rank 2 to 4, scaling 1 to 2" in succeeds("inspect", "mixed")


def test_inspect_names_what_there_is_besides_lora(tmp_path):
    write_adapter(tmp_path / "more", {**tensors(), "base_model.model.classifier.weight": torch.ones(2, 2)})
    result = run("inspect", "more")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "classifier.weight" in result.stderr


def test_inspect_names_a_tensor_that_is_not_finite(tmp_path):
    made = tensors()
    made["base_model.model.layers.0.q_proj.lora_A.weight"][0, 0] = float("nan")
    write_adapter(tmp_path / "broken", made)
    result = run("inspect", "broken")
    assert result.exit_code == 2
    assert "layers.0.q_proj.lora_A.weight' holds 1 NaN" in result.stderr


def test_inspect_of_nothing_names_the_path(tmp_path):
    result = run("inspect", "./nothing")
    assert result.exit_code == 2
    assert f"there is no {tmp_path / 'nothing'}" in result.stderr


def test_inspect_prints_no_control_characters(tmp_path):
    write_adapter(tmp_path / "evil", base_model_name_or_path="org/base\x1b[2J")
    assert "\x1b" not in succeeds("inspect", "evil")
