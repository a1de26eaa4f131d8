"""``inspect`` from Python, and what notebooks show."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank import Adapter, CheckpointError, RecipeError, Registry, merge, plan
from mergekit_lowrank.api import verify
from mergekit_lowrank.diagnostics import diagnose
from mergekit_lowrank.inspection import AdapterInfo, inspect
from mergekit_lowrank.testing import write_tiny_adapter
from tests.cli.builders import succeeds

MODULES = {f"model.layers.{layer}.{name}": (6, 5) for layer in range(2) for name in ("q_proj", "v_proj")}
VOID = {"br", "hr"}
EVIL = '<script>alert("&")</script>'


class Checker(HTMLParser):
    """Every tag is closed in its place; what text says and which tags there are is kept."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        assert not any(name == "style" and "color" in (value or "") for name, value in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def checked(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Two adapters, and what comes of them."""
    path = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("math", "code")):
        write_tiny_adapter(path / name, MODULES, seed=seed)
    return path


@pytest.fixture(scope="module")
def recipe(directory):
    return {"merge_method": "linear", "models": [{"model": str(directory / name)} for name in ("math", "code")]}


def test_inspect_is_what_the_command_prints_as_json(directory):
    info = inspect(directory / "math")
    assert isinstance(info, AdapterInfo)
    assert json.loads(json.dumps(info.to_dict())) == json.loads(succeeds("inspect", directory / "math", "--json"))


def test_an_adapter_in_memory_is_inspected_like_its_directory(directory):
    config = json.loads((directory / "math" / "adapter_config.json").read_text())
    tensors = load_file(directory / "math" / "adapter_model.safetensors")
    held, stored = inspect(Adapter(tensors, config)), inspect(directory / "math")
    assert held == dataclasses.replace(stored, location="in memory", files=())


def test_a_merged_adapter_is_inspected_without_a_file(recipe):
    merged = merge(recipe)
    assert inspect(merged).norm == pytest.approx(merged.report.totals.merged_norm, rel=1e-6)


def test_an_info_is_frozen(directory):
    with pytest.raises(dataclasses.FrozenInstanceError):
        inspect(directory / "math").norm = 1.0


def test_inspect_takes_a_registry(directory):
    registry = Registry()
    registry.formats = {}
    with pytest.raises(CheckpointError, match="not a checkpoint of a known format"):
        inspect(directory / "math", registry=registry)


def test_inspect_of_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match="there is no"):
        inspect(str(tmp_path / "nothing"))


def test_a_notebook_shows_an_adapter_as_facts_with_its_modules_folded(directory):
    shown = checked(inspect(directory / "math")._repr_html_())
    assert {"table", "details", "summary", "caption"} <= {*shown.tags}
    assert "4 modules" in shown.text
    assert "4 matrices" in shown.text
    assert set(MODULES) <= {*shown.text}


def test_a_notebook_shows_what_is_beside_lora(directory):
    extra = {"base_model.model.lm_head.weight": torch.ones(7, 5)}
    tensors = load_file(directory / "math" / "adapter_model.safetensors")
    config = json.loads((directory / "math" / "adapter_config.json").read_text())
    made = Adapter({**tensors, **extra}, {**config, "modules_to_save": ["lm_head"]})
    shown = checked(inspect(made)._repr_html_())
    assert "1 tensor beside LoRA" in shown.text
    assert "7 × 5" in shown.text


def test_a_notebook_shows_a_plan(recipe):
    shown = checked(plan(recipe)._repr_html_())
    assert "Plan of a merge with linear" in shown.text
    assert set(MODULES) <= {*shown.text}
    assert "2 inputs" in shown.text


def test_a_notebook_shows_ranks_that_are_not_planned(recipe):
    shown = checked(plan({**recipe, "output": {"rank": {"energy": 0.9}}})._repr_html_())
    assert "depends on the data" in shown.text
    assert "from the data" in shown.text


def test_a_notebook_shows_a_report(recipe):
    report = merge(recipe).report
    shown = checked(report._repr_html_())
    assert "Merge with linear" in shown.text
    assert (
        f"{report.totals.merged_norm:.3g}; of the inputs {report.totals.mean_input_norm:.3g} in the mean" in shown.text
    )
    assert set(MODULES) <= {*shown.text}


def test_a_notebook_shows_a_diagnosis_and_a_verification(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    for made in (diagnose(recipe), verify(tmp_path / "out")):
        assert "table" in checked(made._repr_html_()).tags


def test_names_out_of_files_are_escaped(directory):
    tensors = load_file(directory / "math" / "adapter_model.safetensors")
    config = json.loads((directory / "math" / "adapter_config.json").read_text())
    evil = {key.replace("layers", EVIL): tensor for key, tensor in tensors.items()}
    adapter = Adapter(evil, {**config, "base_model_name_or_path": EVIL})
    recipe = {"merge_method": "linear", "models": [{"model": adapter}]}
    for made in (inspect(adapter), plan(recipe), merge(recipe).report):
        shown = checked(made._repr_html_())
        assert "script" not in shown.tags
        assert any(EVIL in text for text in shown.text)
