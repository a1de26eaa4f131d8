"""Fused experts as a model stores them."""

import pytest
import torch

from mergekit_lowrank import CheckpointError, merge
from mergekit_lowrank.formats import FusedExperts, ModelDirectory, PeftFormat

from .builders import P, config, state_dict, write_adapter, write_model

PATH, KEY = "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.down_proj"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of three experts (5, 4) of rank 2."""
    return normal(6, 4, seed=seed), normal(5, 6, seed=seed + 1)


def deltas(seed: int) -> torch.Tensor:
    """(E, out, in), as peft's ``ParamWrapper.get_delta_weight`` makes it."""
    a, b = factors(seed)
    return 2.0 * torch.einsum("ore,eri->eoi", b.reshape(5, 2, 3), a.reshape(3, 2, 4))


def adapter(root, seed: int = 1):
    tensors = dict(zip((f"{P}{PATH}.lora_A.weight", f"{P}{PATH}.lora_B.weight"), factors(seed), strict=True))
    return write_adapter(root / f"in{seed}", tensors, config(target_parameters=["mlp.experts.down_proj"]))


def fused(path, base):
    checkpoint = PeftFormat().open(path, label="math")
    return FusedExperts.of(checkpoint, ModelDirectory(base), torch.float32)


def test_they_are_one_module_with_a_row_for_each(tmp_path):
    base = write_model(tmp_path / "base", {KEY: normal(3, 5, 4)})
    checkpoint = fused(adapter(tmp_path), base)
    (header,) = checkpoint.modules.values()
    assert (header.name, header.d_out, header.d_in, header.is_dense, header.kind) == (KEY, 3, 20, True, "vector")
    update = checkpoint.read(KEY)
    assert torch.allclose(update.rows(slice(None)), deltas(1).flatten(1), atol=1e-6)
    assert torch.equal(update.rows(slice(1, 2)), update.rows(slice(None))[1:2])


def test_a_base_that_stores_them_the_other_way_round_gets_them_so(tmp_path):
    base = write_model(tmp_path / "base", {KEY: normal(3, 4, 5)})
    found = fused(adapter(tmp_path), base).read(KEY).rows(slice(None))
    assert torch.allclose(found, deltas(1).transpose(1, 2).flatten(1), atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_two_adapters_are_added_to_a_model(tmp_path, transposed):
    weights = normal(3, 4, 5) if transposed else normal(3, 5, 4)
    base = write_model(tmp_path / "base", {KEY: weights, "model.norm.weight": torch.ones(4)})
    models = [{"model": str(adapter(tmp_path, seed)), "parameters": {"weight": w}} for seed, w in ((1, 0.5), (5, -1.0))]
    recipe = {"merge_method": "task_arithmetic", "models": models, "base_model": str(base), "output": {"kind": "model"}}
    merge(recipe, tmp_path / "out")
    delta = 0.5 * deltas(1) - deltas(5)
    found = ModelDirectory(tmp_path / "out").read_rows(KEY, slice(None)).reshape(weights.shape)
    assert torch.allclose(found, weights + (delta.transpose(1, 2) if transposed else delta), atol=1e-5)


def test_two_parameters_of_one_shape_are_not_told_apart(tmp_path):
    base = write_model(tmp_path / "base", {KEY: normal(3, 5, 4), f"{PATH}.up_proj": normal(3, 4, 5)})
    with pytest.raises(
        CheckpointError, match=r"these may be it: '.*down_proj', '.*up_proj'\. The adapter does not say"
    ):
        fused(adapter(tmp_path), base)


def test_a_base_without_the_parameter_is_refused(tmp_path):
    base = write_model(tmp_path / "base", {KEY: normal(4, 5, 4)})
    with pytest.raises(CheckpointError, match=r"the 3 experts of '.*experts' change a parameter of 5 x 4.*be it: none"):
        fused(adapter(tmp_path), base)


def test_an_adapter_without_experts_is_as_it_was(tmp_path):
    base = write_model(tmp_path / "base", {KEY: normal(3, 5, 4)})
    checkpoint = PeftFormat().open(write_adapter(tmp_path / "plain", state_dict(), config()), label="plain")
    assert FusedExperts.of(checkpoint, ModelDirectory(base), torch.float32) is checkpoint
