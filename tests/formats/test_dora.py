"""DoRA against its base: W' = m · (W + sBA) / ‖W + sBA‖, and ΔW = W' − W."""

import pytest
import torch

from mergekit_lowrank import CheckpointError, RecipeError, merge, plan
from mergekit_lowrank.formats import ModelDirectory, PeftFormat
from mergekit_lowrank.lowrank import densify

from .builders import P, config, write_adapter, write_model

Q, EMBED = "model.layers.0.attn.q_proj", "model.embed_tokens"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W, TABLE = normal(6, 4, seed=1), normal(7, 4, seed=2)


@pytest.fixture
def base(tmp_path):
    tensors = {f"{Q}.weight": W, f"{EMBED}.weight": TABLE, "lm_head.weight": normal(7, 4, seed=3)}
    return write_model(tmp_path / "base", tensors, {"model_type": "llama", "tie_word_embeddings": False})


def factors(seed: int) -> dict[str, torch.Tensor]:
    return {
        f"{P}{Q}.lora_A.weight": normal(2, 4, seed=seed),
        f"{P}{Q}.lora_B.weight": normal(6, 2, seed=seed + 1),
        f"{P}{Q}.lora_magnitude_vector": normal(6, seed=seed + 2).abs() + 1,
    }


def dora(root, seed: int = 10, **changes: torch.Tensor):
    return write_adapter(root / f"dora{seed}", {**factors(seed), **changes}, config(use_dora=True))


def expected(seed: int) -> torch.Tensor:
    a, b, m = factors(seed).values()
    adapted = W + 2.0 * b @ a  # lora_alpha / r
    return m[:, None] * adapted / adapted.norm(dim=1, keepdim=True) - W


def against(path, base, dtype=torch.float64):
    return PeftFormat().open(path, label="dora").against(ModelDirectory(base), dtype)


def test_the_update_is_that_of_the_paper(tmp_path, base):
    checkpoint = against(dora(tmp_path), base)
    header = checkpoint.modules[Q]
    assert (header.is_dense, header.rank, header.scaling) == (True, 4, 1.0)
    update = checkpoint.read(Q)
    assert torch.allclose(update.rows(slice(None)), expected(10), rtol=1e-12)
    assert torch.equal(update.rows(slice(2, 4)), update.rows(slice(None))[2:4])


def test_a_magnitude_that_is_the_norm_and_zero_factors_change_nothing(tmp_path, base):
    changes = {f"{P}{Q}.lora_B.weight": torch.zeros(6, 2).double(), f"{P}{Q}.lora_magnitude_vector": W.norm(dim=1)}
    found = against(dora(tmp_path, **changes), base).read(Q).rows(slice(None))
    assert torch.allclose(found, torch.zeros(6, 4).double(), atol=1e-14)


def test_an_embedding_has_a_magnitude_for_each_dimension(tmp_path, base):
    a, b, m = normal(2, 7, seed=4), normal(4, 2, seed=5), normal(4, seed=6).abs()
    tensors = {
        f"{P}{EMBED}.lora_embedding_A": a,
        f"{P}{EMBED}.lora_embedding_B": b,
        f"{P}{EMBED}.lora_magnitude_vector": m,
    }
    adapted = TABLE + 2.0 * (b @ a).T
    path = write_adapter(tmp_path / "dora", tensors, config(use_dora=True))
    found = against(path, base).read(EMBED).rows(slice(1, 5))
    assert torch.allclose(found, (m * adapted / adapted.norm(dim=0) - TABLE)[1:5], rtol=1e-12)


def test_without_the_base_it_is_refused_with_advice(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        plan({"merge_method": "linear", "models": [{"model": str(dora(tmp_path))}]})
    message = str(caught.value)
    assert "'dora10': it is a DoRA adapter, which rescales the base's weights" in message
    assert "no base is given. Add 'base_model', the path of the model that it was tuned from, to the recipe." in message


def recipe_of(root, base, **keys):
    models = [{"model": str(dora(root, seed)), "parameters": {"weight": w}} for seed, w in ((10, 0.75), (20, 0.5))]
    return {"merge_method": "task_arithmetic", "models": models, "base_model": str(base), **keys}


def test_two_of_them_in_a_model_are_the_sum_of_the_dense_updates(tmp_path, base):
    merge(recipe_of(tmp_path, base, output={"kind": "model"}), tmp_path / "out")
    merged = ModelDirectory(tmp_path / "out")
    assert torch.allclose(merged.rows(Q, slice(None)), W + 0.75 * expected(10) + 0.5 * expected(20), rtol=1e-12)
    assert torch.equal(merged.rows(EMBED, slice(None)), TABLE)


def test_as_an_adapter_it_needs_a_rank(tmp_path, base):
    with pytest.raises(RecipeError, match=r"its update has full rank, as of DoRA.*say output\.rank: a number"):
        plan(recipe_of(tmp_path, base))


def test_as_an_adapter_it_is_the_best_of_its_rank_and_the_error_is_reported(tmp_path, base):
    merged = merge(recipe_of(tmp_path, base, output={"rank": 2}))
    whole = 0.75 * expected(10) + 0.5 * expected(20)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    found = densify(merged.open(label="merged").read(Q))
    assert torch.allclose(found, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-9, atol=1e-9)
    cut = (s[2:].square().sum() / s.square().sum()).sqrt().item()
    assert merged.report.totals.largest_cut_error == pytest.approx(cut, rel=1e-6)
    assert cut > 0.05


def test_another_base_is_refused(tmp_path):
    other = write_model(tmp_path / "other", {f"{Q}.weight": torch.ones(6, 5)})
    with pytest.raises(CheckpointError, match=r"of another shape than in the base: '.*q_proj' \(6 x 4, base 6 x 5\)"):
        against(dora(tmp_path), other)


def test_a_magnitude_of_another_size_is_refused(tmp_path, base):
    changes = {f"{P}{Q}.lora_magnitude_vector": torch.ones(5)}
    with pytest.raises(
        CheckpointError, match=r"magnitudes of another size than their module: '.*q_proj' \(5, expected 6"
    ):
        against(dora(tmp_path, **changes), base)


def test_a_row_of_zeros_is_refused_when_it_is_read(tmp_path):
    zeros = write_model(tmp_path / "zeros", {f"{Q}.weight": torch.zeros(6, 4)})
    changes = {f"{P}{Q}.lora_B.weight": torch.zeros(6, 2)}
    update = against(dora(tmp_path, **changes), zeros).read(Q)
    with pytest.raises(CheckpointError, match=r"module 'model.*q_proj': the DoRA update is not finite"):
        update.rows(slice(None))
