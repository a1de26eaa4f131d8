from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lowrank import CheckpointError, RecipeError, extract, resize
from mergekit_lowrank.testing import write_tiny_adapter

from .builders import MODULES, write_adapter

SHAPES = {
    "model.embed_tokens.weight": (7, 5),
    "model.layers.0.q_proj.weight": (6, 5),
    "model.layers.1.q_proj.weight": (6, 5),
    "model.layers.0.norm.weight": (5,),
}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def delta(directory: Path, module: str) -> Tensor:
    """What an adapter adds to the weight of a linear module, in float64."""
    tensors = tensors_of(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return config["lora_alpha"] / config["r"] * (b @ a)


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def write_model(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    return write_model(tmp_path / "base", {k: torch.randn(s, generator=generator) for k, s in SHAPES.items()})


def tuned(base: Path, *, changed: tuple[str, ...] = tuple(SHAPES)) -> Path:
    """The base with some parameters changed."""
    generator = torch.Generator().manual_seed(1)
    weights = load_file(base / "model.safetensors")
    changes = {key: 0.1 * torch.randn(weight.shape, generator=generator) for key, weight in weights.items()}
    return write_model(
        base.with_name("tuned"), {k: w + changes[k] if k in changed else w.clone() for k, w in weights.items()}
    )


def difference(base: Path, key: str) -> Tensor:
    old, new = (load_file(path / "model.safetensors")[key].double() for path in (base, base.with_name("tuned")))
    return new - old


def test_a_resized_adapter_is_the_best_approximation(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math", rank=4, lora_alpha=6)
    report = resize(source, tmp_path / "small", rank=2)
    assert report.rank == 2
    for module in MODULES:
        wanted = best(delta(source, module), 2)
        torch.testing.assert_close(delta(tmp_path / "small", module), wanted, rtol=1e-5, atol=1e-5)


def test_the_error_of_each_module_is_reported(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math", rank=4)
    report = resize(source, tmp_path / "small", rank=2)
    for module in report.modules:
        values = torch.linalg.svdvals(delta(source, module["module"]))
        expected = float(values[2:].norm() / values.norm())
        assert module["cut_error"] == pytest.approx(expected, rel=1e-4)


def test_a_rank_above_the_adapters_own_changes_nothing(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math", rank=2)
    resize(source, tmp_path / "large", rank=5)
    for module in MODULES:
        torch.testing.assert_close(delta(tmp_path / "large", module), delta(source, module), rtol=1e-5, atol=1e-5)
        assert tensors_of(tmp_path / "large")[f"base_model.model.{module}.lora_A.weight"].shape[0] == 5


@pytest.mark.parametrize("rank", ["energy:0.8", {"energy": 0.8}])
def test_a_share_of_the_energy_gives_each_module_its_rank(tmp_path: Path, rank: str | dict[str, float]) -> None:
    source = write_adapter(tmp_path / "math", rank=4)
    report = resize(source, tmp_path / "small", rank=rank, uniform_rank=False)
    for module in report.modules:
        energies = torch.linalg.svdvals(delta(source, module["module"])).square()
        kept = energies.cumsum(0) / energies.sum()
        assert module["rank"] == int((kept < 0.8).sum()) + 1
        assert module["written_rank"] == module["rank"]


def test_an_error_bound_is_kept(tmp_path: Path) -> None:
    report = resize(write_adapter(tmp_path / "math", rank=4), tmp_path / "small", rank="error:0.5")
    assert 0 < max(module["cut_error"] for module in report.modules) <= 0.5


def test_a_budget_is_kept_with_ranks_that_differ(tmp_path: Path) -> None:
    report = resize(write_adapter(tmp_path / "math", rank=4), tmp_path / "small", rank="budget:300B")
    assert report.totals.bytes_written <= 300
    assert len({module["rank"] for module in report.modules}) > 1


WRONG_RANKS = (
    *("many", "energy:", "energy:most", "enrgy:0.9", "", "4:4", "1.5", "max", "sum"),
    *("0", "-3", "energy:2", "energy:nan", "error:1", "budget:0", "budget:80XB"),
    *(0, {"energy": 1.5}, {"enrgy": 0.9}, {"energy": 0.9, "error": 0.1}),
)


@pytest.mark.parametrize("rank", WRONG_RANKS, ids=str)
def test_a_rank_that_is_none_is_refused_with_what_one_is(tmp_path: Path, rank: int | str | dict[str, object]) -> None:
    with pytest.raises(RecipeError) as caught:
        resize(write_adapter(tmp_path / "math"), tmp_path / "small", rank=rank)
    assert str(caught.value) == (
        f"rank {rank!r}: expected a whole number of at least 1, energy:E with 0 < E <= 1, error:E with 0 < E < 1, or "
        "budget:SIZE, as in 32, energy:0.99, error:0.05 or budget:80MB"
    )


def test_saved_modules_go_with_a_resized_adapter(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math", rank=4)
    head = torch.randn(7, 5)
    save_file({**tensors_of(source), "base_model.model.lm_head.weight": head}, source / "adapter_model.safetensors")
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["lm_head"]}))
    resize(source, tmp_path / "small", rank=1)
    assert torch.equal(tensors_of(tmp_path / "small")["base_model.model.lm_head.weight"], head)
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]


def test_an_extracted_adapter_is_the_best_approximation_of_the_difference(tmp_path: Path, base: Path) -> None:
    source = tuned(base, changed=("model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"))
    report = extract(source, tmp_path / "out", base=base, rank=2)
    for layer in range(2):
        module = f"model.layers.{layer}.q_proj"
        wanted = best(difference(base, f"{module}.weight"), 2)
        torch.testing.assert_close(delta(tmp_path / "out", module), wanted, rtol=1e-4, atol=1e-5)
        values = torch.linalg.svdvals(difference(base, f"{module}.weight"))
        (record,) = [record for record in report.modules if record["module"] == module]
        assert record["cut_error"] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)


def test_a_changed_norm_is_named_unless_something_is_said_of_it(tmp_path: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'tuned' changed a tensor .*: 'model\.layers\.0\.norm\.weight'"):
        extract(tuned(base), tmp_path / "out", base=base, rank=2)
    assert not (tmp_path / "out").exists()


def test_of_many_changed_vectors_the_first_are_named(tmp_path: Path) -> None:
    shapes = {**SHAPES, **{f"model.layers.{layer}.norm.weight": (5,) for layer in range(5)}}
    base = write_model(tmp_path / "base", {key: torch.zeros(shape) for key, shape in shapes.items()})
    source = write_model(tmp_path / "tuned", {key: torch.ones(shape) for key, shape in shapes.items()})
    with pytest.raises(CheckpointError, match=r"'tuned' changed 5 tensors .*2\.norm\.weight' and 2 more\. Say"):
        extract(source, tmp_path / "out", base=base, rank=2, extras="error")


@pytest.mark.parametrize("policy", ["drop", "", {"from": "tuned"}, {}], ids=str)
def test_a_policy_that_is_none_is_refused_with_those_there_are(
    tmp_path: Path, base: Path, policy: str | dict[str, str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        extract(tuned(base), tmp_path / "out", base=base, rank=2, extras=policy)
    assert str(caught.value) == (
        f"extras {policy!r}: expected error (they are named), average or delta (saved whole), or base_model (left out: "
        "those of the base stay)"
    )


@pytest.mark.parametrize("policy", ["base_model", {"from": "base_model"}], ids=str)
def test_a_changed_norm_can_be_left_to_the_base(tmp_path: Path, base: Path, policy: str | dict[str, str]) -> None:
    extract(tuned(base), tmp_path / "out", base=base, rank=2, extras=policy)
    assert all("norm" not in key for key in tensors_of(tmp_path / "out"))


@pytest.mark.parametrize("policy", ["average", "delta"])
def test_a_changed_norm_can_be_saved_whole(tmp_path: Path, base: Path, policy: str) -> None:
    source = tuned(base)
    extract(source, tmp_path / "out", base=base, rank=2, extras=policy)
    (key,) = [key for key in tensors_of(tmp_path / "out") if "norm" in key]
    stored = load_file(source / "model.safetensors")["model.layers.0.norm.weight"]
    torch.testing.assert_close(tensors_of(tmp_path / "out")[key], stored)
    assert (
        "model.layers.0.norm" in json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    )


def test_an_extracted_embedding_is_stored_as_peft_stores_one(tmp_path: Path, base: Path) -> None:
    source = tuned(base, changed=("model.embed_tokens.weight",))
    extract(source, tmp_path / "out", base=base, rank=5)
    tensors = tensors_of(tmp_path / "out")
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{side}"] for side in "AB")
    torch.testing.assert_close((b @ a).T.double(), difference(base, "model.embed_tokens.weight"), rtol=1e-4, atol=1e-5)


def test_a_dora_adapter_is_resized_through_its_base(tmp_path: Path, base: Path) -> None:
    module, weight = "model.layers.0.q_proj", load_file(base / "model.safetensors")["model.layers.0.q_proj.weight"]
    source = write_tiny_adapter(tmp_path / "dora", {module: (6, 5)}, rank=2, lora_alpha=1)
    magnitude = weight.norm(dim=1) * 1.2
    tensors = {**tensors_of(source), f"base_model.model.{module}.lora_magnitude_vector": magnitude}
    save_file(tensors, source / "adapter_model.safetensors")
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    resize(source, tmp_path / "plain", rank=5, base=base)
    moved = weight.double() + delta(source, module)
    wanted = magnitude.double().unsqueeze(1) * moved / moved.norm(dim=1, keepdim=True) - weight.double()
    torch.testing.assert_close(delta(tmp_path / "plain", module), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"DoRA.*Give the base model: --base DIR, in Python base=DIR"):
        resize(source, tmp_path / "other", rank=5)
