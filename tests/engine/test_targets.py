"""The server and the dialect that an adapter is written for."""

import json

import pytest
import torch

from mergekit_lowrank import CheckpointError, OutputError, RecipeError, Registry, hookimpl, merge, plan
from mergekit_lowrank.engine import adapter_config, dialect_of
from mergekit_lowrank.formats import Writer
from mergekit_lowrank.recipe import Recipe
from tests.formats.builders import P, config, state_dict, write_adapter

from .makers import MODULES, adapters, recipe_of


def saving(root):
    extra = {f"{P}head.weight": torch.ones(4, 3)}
    return write_adapter(root / "saving", {**state_dict(), **extra}, config(modules_to_save=["head"]))


@pytest.mark.parametrize(
    ("output", "dialect"),
    [
        ({}, "peft"),
        ({"format": "gguf"}, "gguf"),
        ({"target": "vllm"}, "peft"),
        ({"target": "llama.cpp"}, "gguf"),
        ({"target": "llama.cpp", "format": "peft"}, "peft"),
    ],
)
def test_the_dialect_is_as_given_or_what_the_server_loads(output, dialect):
    recipe = Recipe.model_validate({"merge_method": "linear", "models": [{"model": "x"}], "output": output})
    assert dialect_of(recipe) == dialect


def test_what_the_server_would_refuse_is_refused_by_the_plan(tmp_path):
    recipe = recipe_of([str(saving(tmp_path))], extras="average", output={"target": "vllm"})
    with pytest.raises(OutputError, match=r"for vllm: .*modules_to_save.*head"):
        plan(recipe)


def test_left_out_nothing_is_in_its_way(tmp_path):
    recipe = recipe_of([str(saving(tmp_path))], extras={"from": "base_model"}, output={"target": "vllm"})
    assert plan(recipe).uniform_rank == 8  # the next that vLLM accepts
    merge(recipe, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["modules_to_save"]) == (8, 8, None)


def test_snap_wins_over_the_ranks_of_the_target(tmp_path):
    recipe = recipe_of(adapters(tmp_path, rank=3), output={"target": "vllm", "snap": [5, 8]})
    assert plan(recipe).accepted_ranks == (5, 8)


@pytest.mark.parametrize("call", [plan, merge])
def test_a_dialect_that_nobody_writes_is_named_with_those_there_are(tmp_path, call):
    with pytest.raises(RecipeError, match=r"output\.format: .*'gguff'.*gguf.*peft"):
        call(recipe_of(adapters(tmp_path), output={"format": "gguff"}))


class Listing(Writer):
    """A dialect that holds nothing but names, and none of output layers."""

    name, summary = "listing", "names of modules"

    def check(self, checkpoint):
        if "head" in checkpoint.modules:
            raise CheckpointError(f"'{checkpoint.label}': module 'head' has no place in a listing")

    def write(self, checkpoint, directory):
        scalings = {header.scaling for header in checkpoint.modules.values()}
        (directory / "listing.json").write_text(json.dumps([*checkpoint.modules, *scalings]))


class Plugin:
    @hookimpl
    def writers(self):
        return [Listing]


@pytest.fixture
def registry():
    found = Registry()
    found.register(Plugin(), "listings")
    return found


def test_a_plugin_s_writer_gets_the_merged_adapter_and_peft_s_files_go(tmp_path, registry):
    recipe = recipe_of(adapters(tmp_path), output={"format": "listing"})
    merge(recipe, tmp_path / "out", registry=registry)
    assert json.loads((tmp_path / "out" / "listing.json").read_text()) == [*sorted(MODULES), 1.0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"adapter_model.safetensors", "adapter_config.json"} & names
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {own["name"] for own in manifest["outputs"]} == names - {"manifest.json", "report.html", "timings.json"}


def test_what_a_writer_has_no_place_for_is_refused_before_the_merge(tmp_path, registry):
    paths = [str(write_adapter(tmp_path / "in", state_dict(["head"]), config()))]
    with pytest.raises(CheckpointError, match="module 'head' has no place in a listing"):
        plan(recipe_of(paths, output={"format": "listing"}), registry=registry)


def test_a_merge_into_memory_is_peft_s(tmp_path, registry):
    with pytest.raises(OutputError, match="gives PEFT's tensors, and this recipe asks for listing; name an output"):
        merge(recipe_of(adapters(tmp_path), output={"format": "listing"}), registry=registry)


def test_the_configuration_is_known_from_the_plan(tmp_path):
    made = plan(recipe_of(adapters(tmp_path, rank=3)))
    ranks = {module.name: 3 for module in made.modules}
    found = adapter_config(made, ranks)
    assert (found["r"], found["lora_alpha"], found["rank_pattern"]) == (3, 3, {})
    assert found["target_modules"] == sorted(ranks)
