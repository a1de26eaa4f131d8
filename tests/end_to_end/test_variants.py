"""Adapters of PEFT's other kinds, trained by peft, merge into LoRAs that peft loads and that compute the same."""

import warnings

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

from mergekit_lowrank import CheckpointError, merge
from tests.end_to_end.makers import dense_logits, logits, relative_error, tiny_bert

LINEARS = ["query", "value", "intermediate.dense", "output.dense"]
SQUARES = ["query", "value"]
CONFIGS = {
    "vera": lambda: VeraConfig(r=8, target_modules=LINEARS, d_initial=1.0),
    "loha": lambda: LoHaConfig(r=2, alpha=3, target_modules=LINEARS, rank_pattern={"query": 3}),
    "lokr": lambda: LoKrConfig(r=2, alpha=3, target_modules=LINEARS, decompose_both=True),
    "lokr whole": lambda: LoKrConfig(r=64, alpha=64, target_modules=SQUARES),
    "adalora": lambda: AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8, lora_alpha=16, target_modules=LINEARS
    ),
}
WEIGHTS = (0.7, -0.4)


def trained(config, seed: int, base) -> PeftModel:
    """The base's adapter after a few steps towards random hidden states."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config).train()
    ids, target = torch.randint(60, (2, 12)), torch.randn(2, 12, 32)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(8):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(input_ids=ids).last_hidden_state, target).backward()
        optimizer.step()
        if isinstance(config, AdaLoraConfig):
            model.base_model.update_and_allocate(step)
    return model.eval()


def saved(model: PeftModel, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes modules that AdaLoRA pruned away for damaged ones
        model.save_pretrained(path)
    return path


def loaded(path, base) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes AdaLoRA's masks for patterns of module names
        return PeftModel.from_pretrained(base, path).eval()


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    layers = model.base_model.model.named_modules()
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers if hasattr(layer, "merge")}


def recipe(paths, weights, **more) -> dict:
    models = [{"model": str(path), "parameters": {"weight": w}} for path, w in zip(paths, weights, strict=True)]
    return {"merge_method": "task_arithmetic", "models": models, "output": {"rank": "sum"}, **more}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, str]:
    """What a recipe with VeRA adapters says more: where the shapes of the base's weights are."""
    path = tmp_path_factory.mktemp("base")
    tiny_bert().save_pretrained(path)
    return {"base_model": str(path)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_adapter_alone_is_a_lora_with_the_same_logits(tmp_path, base, kind) -> None:
    path = saved(trained(CONFIGS[kind](), 1, tiny_bert()), tmp_path / "adapter")
    merge(recipe([path], [1.0], **(base if kind == "vera" else {})), tmp_path / "out")
    expected = logits(loaded(path, tiny_bert()))
    merged = loaded(tmp_path / "out", tiny_bert())
    assert merged.peft_config["default"].peft_type == "LORA"
    assert relative_error(logits(merged), expected) < 1e-5
    assert relative_error(logits(tiny_bert()), expected) > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_two_adapters_give_the_logits_of_the_weighted_sum(tmp_path, base, kind) -> None:
    paths = [saved(trained(CONFIGS[kind](), seed, tiny_bert()), tmp_path / f"adapter{seed}") for seed in (1, 2)]
    merge(recipe(paths, WEIGHTS, **(base if kind == "vera" else {})), tmp_path / "out")
    both = [deltas(loaded(path, tiny_bert())) for path in paths]
    assert both[0].keys() == both[1].keys() != set()
    expected = dense_logits(
        {name: sum(w * own[name] for w, own in zip(WEIGHTS, both, strict=True)) for name in both[0]}, tiny_bert()
    )
    assert relative_error(logits(loaded(tmp_path / "out", tiny_bert())), expected) < 1e-5


def test_all_kinds_merge_with_each_other(tmp_path, base) -> None:
    kinds = ("vera", "loha", "lokr", "adalora")
    paths = []
    for kind in kinds:
        config = CONFIGS[kind]()
        config.target_modules = {"query"}
        paths.append(saved(trained(config, 1, tiny_bert()), tmp_path / kind))
    merge(recipe(paths, [0.25] * 4, **base), tmp_path / "out")
    each = [deltas(loaded(path, tiny_bert())) for path in paths]
    expected = dense_logits({name: sum(0.25 * own[name] for own in each) for name in each[0]}, tiny_bert())
    assert relative_error(logits(loaded(tmp_path / "out", tiny_bert())), expected) < 1e-5


def test_vera_without_its_base_is_refused_with_the_reason(tmp_path) -> None:
    path = saved(trained(CONFIGS["vera"](), 1, tiny_bert()), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"does not say how wide each of its modules is.*base_model"):
        merge(recipe([path], [1.0]), tmp_path / "out")


class Convolutions(nn.Module):
    """An image network without a text model's inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, init_weights=False), ["first", "head"]),
        (LoKrConfig(r=64, alpha=64, init_weights=False), ["first", "second", "head"]),
    ],
    ids=["loha cores", "lokr whole"],
)
def test_convolutions_whose_kernels_are_stored_come_back_as_such(tmp_path, config, targets) -> None:
    config.target_modules = set(targets)
    torch.manual_seed(1)
    path = saved(get_peft_model(Convolutions(), config), tmp_path / "adapter")
    merge(recipe([path], [1.0]), tmp_path / "out")
    images = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        expected, found = (loaded(place, Convolutions())(images) for place in (path, tmp_path / "out"))
        assert relative_error(found, expected) < 1e-5
        assert relative_error(Convolutions()(images), expected) > 1e-3


def test_vera_without_its_projections_is_refused_before_anything_is_merged(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = VeraConfig(r=8, target_modules=SQUARES, save_projection=False)
    path = saved(trained(config, 1, tiny_bert()), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"'save_projection' is False: A and B are not stored.*save_as_lora"):
        merge(recipe([path], [1.0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
