"""Adapters that peft trained, in every variant of LoRA: merged, they load there and give the logits they should."""

import warnings
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergekit_lowrank import CheckpointError, merge

from .lora_variants import VARIANTS, Variant, loaded, logits, summed, trained
from .makers import relative_error

WEIGHTS = [0.6, 0.4]
LOW_RANK = [name for name, variant in VARIANTS.items() if not variant.is_dense]
FOLDED = [name for name in VARIANTS if name not in ("convolutions", "experts")]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of each variant, made when they are first asked for."""
    root, made = tmp_path_factory.mktemp("variants"), {}

    def get(name: str):
        if name not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what peft says of embeddings and tied weights as it saves
                made[name] = [trained(VARIANTS[name], root / name / str(seed), seed) for seed in (1, 2)]
        return made[name]

    return get


def recipe_of(variant: Variant, paths, weights, **changes):
    recipe = {
        "merge_method": "task_arithmetic",
        "models": [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths, weights, strict=True)],
        "output": {"rank": "sum"},
        **changes,
    }
    return recipe | ({"extras": variant.extras} if variant.extras else {})


@pytest.fixture
def peft_may_warn():
    """Of what peft warns on loading, whatever wrote the adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tied|tie_word|target_parameters|fan_in_fan_out|save_embedding).*")
        yield


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.usefixtures("peft_may_warn")
def test_merged_alone_it_gives_the_same_logits(adapters, tmp_path, name) -> None:
    variant, paths = VARIANTS[name], adapters(name)
    merge(recipe_of(variant, paths[:1], [1.0]), tmp_path / "out")
    expected = loaded(variant, paths[0])
    assert relative_error(loaded(variant, tmp_path / "out"), expected) < 1e-5
    assert relative_error(logits(variant.model()), expected) > 1e-3


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.usefixtures("peft_may_warn")
def test_two_of_them_give_the_logits_of_the_sum(adapters, tmp_path, name) -> None:
    variant, paths = VARIANTS[name], adapters(name)
    merge(recipe_of(variant, paths, WEIGHTS), tmp_path / "out")
    expected = summed(variant, paths, WEIGHTS)
    assert relative_error(loaded(variant, tmp_path / "out"), expected) < 1e-5


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.usefixtures("peft_may_warn")
def test_folded_into_the_base_it_gives_the_same_logits(adapters, tmp_path, name) -> None:
    variant, paths = VARIANTS[name], adapters(name)
    variant.model().save_pretrained(tmp_path / "base")
    changes = {"base_model": str(tmp_path / "base"), "output": {"kind": "model"}}
    if "embedding" in name:  # peft saves the base's embedding beside its factors, unchanged
        variant = replace(variant, extras={"from": "base_model"})
    for weights in ([1.0], WEIGHTS):
        merge(recipe_of(variant, paths[: len(weights)], weights, **changes), tmp_path / f"out{len(weights)}")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{len(weights)}", dtype=torch.float32)
        expected = summed(variant, paths[: len(weights)], weights)
        assert relative_error(logits(model), expected) < 1e-5


def test_experts_that_the_base_stores_apart_are_refused(adapters, tmp_path) -> None:
    variant = VARIANTS["experts"]
    variant.model().save_pretrained(tmp_path / "base")
    changes = {"base_model": str(tmp_path / "base"), "output": {"kind": "model"}}
    with pytest.raises(CheckpointError, match=r"the 3 experts of '.*' change a parameter of 48 x 16"):
        merge(recipe_of(variant, adapters("experts"), WEIGHTS, **changes), tmp_path / "out")
