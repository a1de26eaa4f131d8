"""The recipes of the migration page give peft's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekit_lowrank import Adapter, merge
from mergekit_lowrank.strategies import sparsify, stages
from tests.docs.pages import ROOT, Block, blocks
from tests.docs.test_yaml import read

TABLE = [block for block in blocks(ROOT / "docs/how-to/migrate.md") if block.argument("equals peft")]
WEIGHTS = (0.7, 0.4)
TYPES = [
    f"{kind}{suffix}" for kind in ("ties", "magnitude_prune", "dare_linear", "dare_ties") for suffix in ("", "_svd")
]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 10), nn.Linear(10, 9)


@pytest.fixture(scope="module")
def model() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(Tiny(), config, adapter_name="math")
    model.add_adapter(
        "code", LoraConfig(r=4, lora_alpha=4, target_modules=config.target_modules, init_lora_weights=False)
    )
    return model


def state(model: Any, name: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, adapter_name=name))


def delta(tensors: dict[str, Tensor], config: dict[str, Any], module: str) -> Tensor:
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return (b @ a) * (config["lora_alpha"] / config["r"])


def draws(shape: torch.Size) -> Tensor:
    """The random numbers of a test: the same for every matrix of a shape."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def _same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both draw the same: peft from torch.bernoulli, this package before ``drop_and_rescale``."""
    monkeypatch.setattr(torch, "bernoulli", lambda p: (draws(p.shape) < p).to(p))

    def drop(values: Tensor, probabilities: Tensor, uniform: Tensor, *, rescale: bool) -> Tensor:
        assert uniform.shape == values.shape
        return stages.drop_and_rescale(values, probabilities, draws(values.shape[1:]), rescale=rescale)

    monkeypatch.setattr(sparsify, "drop_and_rescale", drop)


@pytest.mark.usefixtures("_same_draws")
@pytest.mark.parametrize("block", TABLE, ids=[block.marker for block in TABLE])
def test_the_recipe_gives_what_peft_gives(block: Block, model: Any) -> None:
    kind = str(block.argument("equals peft"))
    names = ["math", "code"]
    model.add_weighted_adapter(names, list(WEIGHTS), kind, combination_type=kind, density=0.5)
    entries = [
        {"model": Adapter(state(model, name), model.peft_config[name]), "parameters": {"weight": weight}}
        for name, weight in zip(names, WEIGHTS, strict=True)
    ]
    merged = merge({**read(block.text), "models": entries})
    theirs, config = state(model, kind), model.peft_config[kind].to_dict()
    for module in ("q_proj", "v_proj"):
        expected = delta(theirs, config, module)
        found = delta(dict(merged.state_dict), dict(merged.config), module)  # type: ignore[call-overload]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_combination_type_of_peft_that_is_mapped_is_compared() -> None:
    assert [block.argument("equals peft") for block in TABLE] == ["cat", "svd", "linear", *TYPES]
