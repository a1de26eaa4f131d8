from __future__ import annotations

import json
import pickle
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank import Adapter, ElementwiseStrategy, OutputError, hookimpl, merge
from mergekit_lowrank.api import finalize
from mergekit_lowrank.events import Notice, SurveyRound
from mergekit_lowrank.executors import SerialExecutor
from mergekit_lowrank.registry import Registry
from mergekit_lowrank.testing import write_tiny_adapter
from mergekit_lowrank.testing.memory import held
from mergekit_lowrank.transforms import resize
from mergekit_lowrank.verification import Verification
from tests.end_to_end.unfinished import Follower
from tests.formats.builders import P, config, state_dict, variants, write_adapter, write_model
from tests.verification.builders import (
    FIRST,
    KEY_B,
    MODULES,
    WEIGHTS,
    adapters,
    base_of,
    change_json,
    change_tensors,
    copy,
    folded,
    merged,
    recipe_of,
    registry,
    verified,
)

__all__ = ["copy", "folded", "merged", "registry"]

PAIRS = ("nuslerp", "slerp")
TYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("inputs"))


def assert_proven(found: Verification, modules: int | None = None) -> None:
    """No fault, and every module recomputed to the same bits, as it is on one machine."""
    assert found.faults == ()
    assert found.is_recomputed
    assert len(found.recomputed) == found.identical == found.modules
    assert found.modules == modules or modules is None


@pytest.mark.parametrize(
    ("method", "dtype"), [*zip(sorted(Registry().methods), cycle(TYPES)), *(("linear", dtype) for dtype in TYPES)]
)
def test_what_a_method_merges_is_proven(method, dtype, paths, tmp_path, registry) -> None:
    inputs = paths[:2] if method in PAIRS else paths
    merge(recipe_of(inputs, method, out_dtype=dtype), tmp_path / "out", registry=registry)
    assert_proven(verified(tmp_path / "out", registry), len(MODULES))


OUTPUTS = {
    "energy": {"rank": {"energy": 0.9}},
    "own_ranks": {"rank": {"energy": 0.9}, "uniform_rank": False},
    "error": {"rank": {"error": 0.3}, "balance": True},
    "snap": {"rank": 2, "snap": "vllm"},
    "budget": {"rank": {"budget": "2KB"}, "uniform_rank": False},
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_ranks_from_the_data_are_proven(output, paths, tmp_path, registry) -> None:
    merge(recipe_of(paths, output=output), tmp_path / "out", registry=registry)
    assert_proven(verified(tmp_path / "out", registry), len(MODULES))


@pytest.mark.parametrize("name", variants())
def test_every_kind_of_adapter_is_proven_with_what_lies_beside_its_factors(name, tmp_path, registry) -> None:
    tensors, settings = variants()[name]
    inputs = [write_adapter(tmp_path / f"in{n}", {k: t / n for k, t in tensors.items()}, settings) for n in (1, 2)]
    merge(recipe_of(inputs, extras="average"), tmp_path / "out", registry=registry)
    assert_proven(verified(tmp_path / "out", registry))


def test_differences_to_a_base_are_proven(tmp_path, registry) -> None:
    base = write_model(tmp_path / "base", {"head.weight": torch.ones(2, 3), "layers.0.q.weight": torch.ones(5, 3)})
    tensors = {**state_dict(), f"{P}head.weight": torch.randn(2, 3, generator=torch.Generator().manual_seed(1))}
    paths = [write_adapter(tmp_path / f"in{n}", tensors, config(modules_to_save=["head"])) for n in (1, 2)]
    merge(recipe_of(paths, extras="delta", base_model=str(base)), tmp_path / "out", registry=registry)
    assert_proven(verified(tmp_path / "out", registry), 4)


def test_one_bias_of_lora_b_among_many_modules_is_proven(tmp_path, registry) -> None:
    tensors = {**state_dict(), f"{P}layers.0.q.lora_B.bias": torch.ones(5)}
    missing = {f"{P}layers.{n}.lora_B.bias": torch.zeros(5) for n in ("0.v", "1.q")}
    path = write_adapter(tmp_path / "in", tensors | missing, config(lora_bias=True))
    merge(recipe_of([path], "linear"), tmp_path / "out", registry=registry)
    assert_proven(verified(tmp_path / "out", registry))


@pytest.mark.parametrize("base_type", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keys", [{}, {"out_dtype": "float16"}, {"output": {"kind": "model", "rank": 2}}])
def test_a_model_is_proven(keys, base_type, paths, tmp_path, registry) -> None:
    recipe = {"output": {"kind": "model"}, **keys, "base_model": str(base_of(tmp_path, base_type))}
    merge(recipe_of(paths[:2], **recipe), tmp_path / "out", registry=registry)
    assert_proven(verified(tmp_path / "out", registry), len(MODULES))


@pytest.mark.parametrize(("factor", "kinds"), [(1 + 1e-5, {"output"}), (1 + 1e-2, {"output", "recomputation"})])
def test_a_sum_that_another_machine_rounds_otherwise_is_within_the_tolerance(
    factor, kinds, paths, tmp_path, registry
) -> None:
    base = base_of(tmp_path)
    recipe = recipe_of(paths[:1], "task_arithmetic", base_model=str(base), output={"kind": "model"})
    merge(recipe, tmp_path / "out", registry=registry)
    own, key = load_file(paths[0] / WEIGHTS), f"{FIRST}.weight"
    update = own[KEY_B].double() @ own[KEY_B.replace("lora_B", "lora_A")].double() * 4 / 3
    exact = load_file(base / "model.safetensors")[key].double() + update * factor
    change_tensors(tmp_path / "out" / "model.safetensors", lambda own: own | {key: exact.bfloat16()})
    found = verified(tmp_path / "out", registry)
    assert {fault.kind for fault in found.faults} | {"output"} == kinds


def test_an_update_below_the_rounding_of_the_base_is_information(paths, tmp_path, registry) -> None:
    models = [{"model": str(paths[0]), "parameters": {"weight": 1e-7}}]
    recipe = {"merge_method": "task_arithmetic", "models": models, "output": {"kind": "model"}}
    merge({**recipe, "base_model": str(base_of(tmp_path))}, tmp_path / "out", registry=registry)
    found = verified(tmp_path / "out", registry)
    assert_proven(found)
    assert f"module '{FIRST}': its update is too small for the type of the base" in " ".join(found.information)


def test_inputs_that_cancel_and_inputs_that_are_one_are_proven(paths, tmp_path, registry) -> None:
    models = [{"model": str(paths[0]), "parameters": {"weight": weight}} for weight in (1, -1)]
    merge({"merge_method": "task_arithmetic", "models": models}, tmp_path / "zero", registry=registry)
    found = verified(tmp_path / "zero", registry)
    assert [own.kind for own in found.faults] == []
    assert_proven(found)
    merge(recipe_of([paths[0], paths[0]], "dare_linear"), tmp_path / "one", registry=registry)
    assert_proven(verified(tmp_path / "one", registry))


def test_what_another_machine_rounds_otherwise_is_within_the_tolerance(copy, merged, registry) -> None:
    output = copy(merged)

    def turn(tensors):
        rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
        a, b = f"base_model.model.{FIRST}.lora_A.weight", KEY_B
        return tensors | {
            a: (rotation.T @ tensors[a].double()).bfloat16(),
            b: (tensors[b].double() @ rotation).bfloat16(),
        }

    change_tensors(output / WEIGHTS, turn)
    found = verified(output, registry)
    assert {own.kind for own in found.faults} == {"output"}
    check = found.recomputed[0]
    assert (check.module, check.is_identical) == (FIRST, False)
    assert 1e-4 < check.error < check.tolerance


def test_without_hashes_of_the_inputs_that_is_said(paths, tmp_path, registry) -> None:
    merge(recipe_of(paths), tmp_path / "out", registry=registry, hash_sources=False)
    found = verified(tmp_path / "out", registry)
    assert_proven(found)
    assert found.source_files == 0
    assert "input 'in1' was merged with --no-hash: of its files the manifest has names and sizes only" in (
        found.information
    )


def test_a_resized_adapter_is_the_output_of_a_merge(paths, tmp_path, registry) -> None:
    resize(paths[0], tmp_path / "out", rank=2, registry=registry)
    assert_proven(verified(tmp_path / "out", registry), len(MODULES))


def test_an_input_in_memory_leaves_nothing_to_recompute(paths, tmp_path, registry) -> None:
    own = Adapter(load_file(paths[0] / WEIGHTS), json.loads((paths[0] / "adapter_config.json").read_text()))
    recipe = {"merge_method": "ties", "models": [{"model": own}, {"model": str(paths[1])}]}
    merge(recipe, tmp_path / "out", registry=registry)
    found = verified(tmp_path / "out", registry)
    assert (found.is_ok, found.is_recomputed, found.source_files) == (True, False, 2)
    assert "input 'adapter' was in memory: nothing is left of it to compare, or to merge again" in found.information
    with pytest.raises(
        OutputError, match=r"'adapter' is in memory, .*; save it to a directory .*, or merge without ver"
    ):
        merge(recipe, tmp_path / "again", registry=registry, verify=True)


def test_a_dialect_that_nothing_reads_is_checked_by_hashes_alone(tmp_path, registry) -> None:
    paths = [write_tiny_adapter(tmp_path / "in1", {"model.layers.0.self_attn.q_proj": (12, 12)}, seed=1)]
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    }
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    keys = {"base_model": str(tmp_path / "base"), "output": {"format": "gguf"}}
    merge(recipe_of(paths, **keys), tmp_path / "out", registry=registry)
    found = verified(tmp_path / "out", registry)
    assert (found.is_ok, found.modules, found.is_recomputed) == (True, 0, False)
    assert "gguf files are written here and not read: what was checked of them is their hashes alone" in (
        found.information
    )


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_the_dialects_of_plugins_are_proven(dialect, tmp_path) -> None:
    registry = Registry()
    registry.register(pytest.importorskip("mergekit_lowrank_diffusion"), "diffusion")
    modules = {f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{name}": (12, 10) for name in "qv"}
    paths = [write_tiny_adapter(tmp_path / f"in{seed}", modules, seed=seed) for seed in (1, 2)]
    merge(recipe_of(paths, output={"format": dialect}), tmp_path / "out", registry=registry)
    assert_proven(verified(tmp_path / "out", registry), 2)


class Noise(ElementwiseStrategy):
    """Merges to something else each time."""

    name = "noise"
    summary = "random numbers without a seed"

    def merge_block(self, block, weights, context):
        return torch.rand_like(block[0])


class Noisy:
    @hookimpl
    def strategies(self):
        return [Noise]


class TestMergeAndVerify:
    def test_a_merge_says_that_it_is_verified(self, paths, tmp_path, registry) -> None:
        follower = Follower()
        recipe = recipe_of(paths, sweep={"parameters.density": [0.4, 0.8]})
        merge(recipe, tmp_path / "out", registry=registry, verify=True, reporters=[follower])
        assert "verified: hashes " in follower.notices
        assert f"recomputed {2 * len(MODULES)} modules, {2 * len(MODULES)} of them to the same bits" in follower.notices
        stages = [event.stage for event in follower.events if isinstance(event, SurveyRound)]
        assert stages.count("verify") == 2 * len(MODULES)
        assert follower.merged == 2 * len(MODULES)
        assert_proven(verified(tmp_path / "out", registry))

    def test_what_does_not_verify_is_not_put_in_place(self, paths, tmp_path) -> None:
        registry = Registry()
        registry.register(Noisy(), "noisy")
        merge(recipe_of(paths, "noise"), tmp_path / "out", registry=registry)
        before = (tmp_path / "out" / WEIGHTS).read_bytes()
        with pytest.raises(OutputError) as caught:
            merge(recipe_of(paths, "noise"), tmp_path / "out", registry=registry, overwrite=True, verify=True)
        assert len(caught.value.problems) == len(MODULES)
        assert f"out does not verify, and is not put in place: {FIRST}: differs from its recomputation by" in (
            str(caught.value)
        )
        assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_parts_are_verified_when_they_are_put_together(self, paths, tmp_path, registry) -> None:
        for part in range(2):
            merge(recipe_of(paths), tmp_path / "out", registry=registry, shard=(part, 2))
        follower = Follower()
        finalize(tmp_path / "out", registry=registry, verify=True, reporters=[follower])
        assert any(isinstance(event, Notice) and "verified" in event.message for event in follower.events)
        assert_proven(verified(tmp_path / "out", registry))

    def test_a_part_alone_and_a_merge_into_memory_are_not_verified(self, paths, tmp_path, registry) -> None:
        with pytest.raises(OutputError, match="a part of an output cannot be verified; finalize the parts with verify"):
            merge(recipe_of(paths), tmp_path / "out", registry=registry, shard=(0, 2), verify=True)
        with pytest.raises(OutputError, match="what is verified are the files of an output directory"):
            merge(recipe_of(paths), registry=registry, verify=True)


class Elsewhere(SerialExecutor):
    """Work and results go through pickles, as between processes."""

    name, summary = "elsewhere", "runs copies"

    def run(self, work, jobs, *, memory_bytes):
        for result in super().run(pickle.loads(pickle.dumps(work)), jobs, memory_bytes=memory_bytes):
            yield pickle.loads(pickle.dumps(result))


class Executors:
    @hookimpl
    def executors(self):
        return [Elsewhere]


def test_other_executors_prove_the_same(merged, folded) -> None:
    registry = Registry()
    registry.register(Executors(), "elsewhere")
    for root in (merged, folded):
        found = verified(root / "out", registry)
        for options in ({"executor": "elsewhere"}, {"executor": "threads", "workers": 3}):
            again = verified(root / "out", registry, **options)
            assert sorted(map(str, again.recomputed)) == sorted(map(str, found.recomputed))
            assert_proven(again)


def test_a_verification_comes_back_from_json_and_shows_itself(copy, merged, registry) -> None:
    output = copy(merged)
    change_json(output / "adapter_config.json", lora_alpha=99)
    found = verified(output, registry)
    again = Verification.model_validate_json(found.to_json())
    assert again == found
    assert json.loads(found.to_json())["is_ok"] is False
    page = found._repr_html_()
    assert FIRST in page
    assert "scaling" in page
    assert "verified" in verified(merged / "out", registry)._repr_html_()


def test_memory_does_not_grow_with_the_number_of_modules(tmp_path, registry) -> None:
    def output_of(count):
        modules = {f"layers.{layer}.q": (4096, 1024) for layer in range(count)}
        root = tmp_path / str(count)
        paths = [write_tiny_adapter(root / f"in{seed}", modules, rank=64, seed=seed) for seed in (1, 2)]
        merge(recipe_of(paths, "linear", out_dtype="bfloat16"), root / "out", registry=registry)
        change_tensors(root / "out" / WEIGHTS, lambda own: {key: tensor * 1.01 for key, tensor in own.items()})
        return root / "out"

    few, many = output_of(2), output_of(10)
    verified(few, registry)
    peaks = [held(lambda output=output: verified(output, registry)).peak_bytes for output in (few, many)]
    assert peaks[1] < peaks[0] + 8e6  # the inputs of the large one alone are 26 MB
