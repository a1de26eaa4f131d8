"""PEFT's other kinds, against peft itself."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import LINEAR, Checkpoint, Convolution, ModelDirectory, TensorSource, TensorSpec
from mergekit_lowrank.formats.tensors import TensorMapping, open_tensors
from mergekit_lowrank.formats.variants import UNSUPPORTED, VARIANTS
from mergekit_lowrank.lowrank import LowRankUpdate, densify
from tests.formats.builders import write_model


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 20)
        self.v = nn.Linear(12, 20)
        self.narrow = nn.Linear(9, 20)
        self.short = nn.Linear(12, 7)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.tall = nn.Conv2d(8, 6, (3, 1))
        self.point = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(20, 3)


ALL = ["q", "v", "narrow", "short", "conv1", "conv2", "tall", "point"]
LINEARS = ["q", "v", "narrow", "short"]
PLANAR = [*LINEARS, "conv2", "tall", "point"]

LOHA: dict[str, Any] = {"target_modules": ALL, "r": 2, "alpha": 3, "init_weights": False}
LOKR: dict[str, Any] = {"target_modules": ALL, "r": 1, "alpha": 3, "init_weights": False}
ADALORA: dict[str, Any] = {
    "target_modules": PLANAR,
    "init_r": 4,
    "target_r": 2,
    "total_step": 10,
    "lora_alpha": 5,
    "init_lora_weights": False,
}
VERA: dict[str, Any] = {"target_modules": ["q", "v", "short"], "r": 3, "init_weights": False}

CONFIGS = {
    "loha": LoHaConfig(**LOHA),
    "loha cores": LoHaConfig(**LOHA, use_effective_conv2d=True),
    "loha wider than the modules": LoHaConfig(**{**LOHA, "r": 5}, use_effective_conv2d=True),
    "loha patterns": LoHaConfig(
        **LOHA, rank_pattern={"q": 1, "narro.": 3, "narrow": 4}, alpha_pattern={"v": 8, "q": 0.5}
    ),
    "loha dropouts": LoHaConfig(**LOHA, rank_dropout=0.5, module_dropout=0.5),
    "lokr": LoKrConfig(**LOKR),
    "lokr cores": LoKrConfig(**LOKR, use_effective_conv2d=True),
    "lokr both": LoKrConfig(**LOKR, decompose_both=True, decompose_factor=4),
    "lokr both, cores": LoKrConfig(**LOKR, decompose_both=True, use_effective_conv2d=True),
    "lokr whole": LoKrConfig(**{**LOKR, "r": 50}),
    "lokr factor": LoKrConfig(**{**LOKR, "r": 2}, decompose_factor=2),
    "lokr patterns": LoKrConfig(**LOKR, rank_pattern={"q": 2}, alpha_pattern={"conv.": 8}, rank_dropout_scale=True),
    "adalora": AdaLoraConfig(**ADALORA),
    "adalora, settings of lora": AdaLoraConfig(**ADALORA, r=8, use_rslora=True, alpha_pattern={"q": 64}),
    "vera": VeraConfig(**VERA),
}


@pytest.fixture(autouse=True)
def _kronecker_products_of_any_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.13 fails on those that peft makes of convolutions: numpy's are used for the comparison."""
    monkeypatch.setattr(torch, "kron", lambda a, b: torch.from_numpy(np.kron(a.detach().numpy(), b.detach().numpy())))


def tuned(config: PeftConfig, model: nn.Module | None = None) -> PeftModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, on settings that it leaves aside
        tuned = get_peft_model(model or Tiny(), config)
    for name, tensor in tuned.named_parameters():
        if "vera_lambda" in name:
            nn.init.normal_(tensor)
    return tuned


def stored(model: PeftModel) -> dict[str, Tensor]:
    return {key: tensor.detach() for key, tensor in get_peft_model_state_dict(model).items()}


def raw(config: PeftConfig) -> dict[str, Any]:
    """As ``save_pretrained`` writes it."""
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return json.loads(json.dumps(fields))


def opened(fields: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Checkpoint:
    source = TensorMapping(tensors, where="in memory")
    return VARIANTS[str(fields["peft_type"])](fields, source, label="a", location="in memory", files=())


def checkpoint_of(model: PeftModel) -> Checkpoint:
    return opened(raw(model.peft_config["default"]), stored(model))


class Headers(TensorSource):
    """Tensors that cannot be read."""

    files = ()

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs

    def read(self, key: str) -> Tensor:
        raise AssertionError(key)


def opened_headers(fields: Mapping[str, object], specs: Mapping[str, TensorSpec]) -> Checkpoint:
    return VARIANTS[str(fields["peft_type"])](fields, Headers(specs), label="a", location="x", files=())


def update_of(checkpoint: Checkpoint, module: str) -> LowRankUpdate:
    update = checkpoint.read(module)
    assert isinstance(update, LowRankUpdate)
    return update


def delta_of(model: PeftModel, module: str) -> Tensor:
    """peft's own, as a matrix (out, in · k)."""
    delta: Tensor = model.base_model.model.get_submodule(module).get_delta_weight("default").detach()
    return delta.flatten(1)


def assert_same(update: LowRankUpdate, delta: Tensor) -> None:
    error = torch.linalg.vector_norm(densify(update) - delta) / torch.linalg.vector_norm(delta)
    assert error < 1e-6


def adapter(config: str = "loha") -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = tuned(CONFIGS[config])
    return raw(model.peft_config["default"]), stored(model)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_updates_are_what_peft_adds_to_the_weights(config: PeftConfig) -> None:
    model = tuned(config)
    checkpoint = checkpoint_of(model)
    assert set(checkpoint.modules) == set(config.target_modules)
    for module in checkpoint.modules:
        assert_same(update_of(checkpoint, module), delta_of(model, module))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_headers_say_what_reading_gives(config: PeftConfig) -> None:
    checkpoint = checkpoint_of(tuned(config))
    for module, header in checkpoint.modules.items():
        update = update_of(checkpoint, module)
        assert (header.d_out, header.d_in, header.rank) == (*update.shape, update.rank)
        assert (header.name, header.dtype, header.scaling) == (module, update.dtype, update.scaling)
        factors_bytes = 4 * (update.b.numel() + update.a.numel())
        assert factors_bytes < header.stored_bytes


@pytest.mark.parametrize(
    ("config", "module", "rank"),
    [
        ("loha", "q", 4),
        ("loha wider than the modules", "q", 12),
        ("loha wider than the modules", "conv2", 6),
        ("loha patterns", "narrow", 9),
        ("lokr", "q", 3),  # 4 x 3 whole, and 5 x 4 of rank 1
        ("lokr both", "q", 1),
        ("lokr whole", "q", 12),
        ("lokr whole", "conv2", 6),
        ("adalora", "q", 4),
        ("vera", "q", 3),
    ],
)
def test_ranks_follow_from_shapes(config: str, module: str, rank: int) -> None:
    assert checkpoint_of(tuned(CONFIGS[config])).modules[module].rank == rank


def test_kernels_are_known_where_they_are_stored() -> None:
    def layouts(config: str) -> dict[str, object]:
        return {name: header.layout for name, header in checkpoint_of(tuned(CONFIGS[config])).modules.items()}

    kernel = {"conv1": Convolution(4, (3,)), "conv2": Convolution(4, (3, 3))}
    assert layouts("loha cores").items() >= {**kernel, "q": LINEAR, "point": LINEAR}.items()
    assert (
        layouts("lokr whole").items()
        >= {
            **kernel,
            "tall": Convolution(8, (3, 1)),
            "point": Convolution(8, (1, 1)),
        }.items()
    )
    assert set(layouts("loha").values()) == {LINEAR}


@pytest.mark.parametrize("config", ["loha", "loha cores", "lokr", "lokr cores", "lokr whole", "adalora", "vera"])
def test_the_base_says_which_modules_are_convolutions(config: str, tmp_path: Path) -> None:
    model = tuned(CONFIGS[config])
    write_model(tmp_path, Tiny().state_dict())
    checkpoint = checkpoint_of(model).against(ModelDirectory(tmp_path), torch.float32)
    for module, header in checkpoint.modules.items():
        weight = model.base_model.model.get_submodule(module).get_base_layer().weight
        convolution = Convolution(weight.shape[1], tuple(weight.shape[2:]))
        assert header.layout == (convolution if weight.ndim > 2 else LINEAR)
        assert_same(update_of(checkpoint, module), delta_of(model, module))


def test_the_base_says_how_wide_the_modules_of_vera_are(tmp_path: Path) -> None:
    model = tuned(VeraConfig(**{**VERA, "target_modules": LINEARS}))
    alone = checkpoint_of(model)
    assert alone.modules["narrow"].d_in == 12
    assert alone.needs_base is not None
    assert "does not say how wide each of its modules is" in alone.needs_base
    write_model(tmp_path, Tiny().state_dict())
    checkpoint = alone.against(ModelDirectory(tmp_path), torch.float32)
    assert checkpoint.needs_base is None
    assert {name: header.d_in for name, header in checkpoint.modules.items()} == {
        "q": 12,
        "v": 12,
        "narrow": 9,
        "short": 12,
    }
    for module in checkpoint.modules:
        assert_same(update_of(checkpoint, module), delta_of(model, module))


def test_one_module_of_vera_is_as_wide_as_the_projection() -> None:
    model = tuned(VeraConfig(**{**VERA, "target_modules": ["narrow"]}))
    checkpoint = checkpoint_of(model)
    assert checkpoint.needs_base is None
    assert_same(update_of(checkpoint, "narrow"), delta_of(model, "narrow"))


def test_weights_that_the_base_stores_transposed_are_turned(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = Conv1D(9, 12)
            self.c_proj = Conv1D(12, 5)

    base = nn.ModuleDict({"attn": Attention()})
    model = tuned(VeraConfig(**{**VERA, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}), base)
    path = write_model(tmp_path, stored_weights(base), {"model_type": "gpt2"})
    checkpoint = checkpoint_of(model).against(ModelDirectory(path), torch.float32)
    assert checkpoint.fan_in_fan_out
    for module in ("attn.c_attn", "attn.c_proj"):
        assert_same(update_of(checkpoint, module), delta_of(model, module).T)


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    return {key.replace(".base_layer", ""): tensor for key, tensor in model.state_dict().items() if "vera" not in key}


def test_another_base_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tuned(LoHaConfig(**{**LOHA, "target_modules": ["q"]})))
    write_model(tmp_path, {"q.weight": torch.zeros(20, 13)})
    with pytest.raises(CheckpointError, match=r"of another shape than in the base: 'q' \(20 x 12, base \[20, 13\]\)"):
        checkpoint.against(ModelDirectory(tmp_path), torch.float32)


def test_pruned_ranks_of_adalora_are_scaled_as_peft_does_after_loading(tmp_path: Path) -> None:
    config = AdaLoraConfig(**{**ADALORA, "target_modules": LINEARS})
    config.rank_pattern = {
        "q.lora_E": [True, False, True, True],
        "v.lora_E": [True] * 4,
        "narrow.lora_E": [False, False, False, True],
        "short.lora_E": [False] * 4,
    }
    model = tuned(config)
    with pytest.warns(UserWarning, match="have invalid shape"):
        tensors = stored(model)
    fields = raw(model.peft_config["default"])
    checkpoint = opened(fields, tensors)
    assert {name: header.rank for name, header in checkpoint.modules.items()} == {
        "q": 3,
        "v": 4,
        "narrow": 1,
        "short": 1,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes AdaLoRA's masks for patterns of module names
        reloaded = PeftModel.from_pretrained(Tiny(), tmp_path)
    for module in ("q", "v", "narrow"):
        assert_same(update_of(checkpoint, module), delta_of(reloaded, module))
    assert not densify(update_of(checkpoint, "short")).any()
    assert not delta_of(reloaded, "short").any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", ["loha", "lokr", "lokr whole", "vera", "adalora"])
def test_sixteen_bit_tensors_are_multiplied_without_rounding(config: str, dtype: torch.dtype) -> None:
    fields, tensors = adapter(config)
    narrow = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    checkpoint = opened(fields, narrow)
    exact = opened(fields, {key: tensor.double() for key, tensor in narrow.items()})
    for module, header in checkpoint.modules.items():
        assert header.dtype == torch.float32
        update, expected = update_of(checkpoint, module), update_of(exact, module)
        assert expected.dtype == torch.float64
        assert torch.equal(update.b.double(), expected.b)
        assert torch.equal(update.a.double(), expected.a)


def test_opening_reads_no_tensor() -> None:
    for name in CONFIGS:
        fields, tensors = adapter(name)
        assert opened_headers(fields, TensorMapping(tensors, where="in memory").specs).modules


def test_a_checkpoint_goes_to_another_process(tmp_path: Path) -> None:
    fields, tensors = adapter("lokr both, cores")
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path)
    checkpoint = VARIANTS["LOKR"](fields, open_tensors(path), label="a", location="x", files=(path,))
    there = pickle.loads(pickle.dumps(checkpoint))
    assert there.modules == checkpoint.modules
    assert there.identity == checkpoint.identity
    assert torch.equal(densify(there.read("q")), densify(checkpoint.read("q")))


def test_what_the_configuration_says_of_the_base_is_kept() -> None:
    fields, tensors = adapter()
    checkpoint = opened(
        {**fields, "base_model_name_or_path": "org/base", "revision": "v1", "task_type": "CAUSAL_LM"}, tensors
    )
    assert (checkpoint.base_model, checkpoint.revision, checkpoint.task_type) == ("org/base", "v1", "CAUSAL_LM")
    assert checkpoint.config["alpha"] == 3
    assert checkpoint.needs_base is None


def test_saved_modules_lie_beside_the_factors() -> None:
    model = tuned(LoHaConfig(**LOHA, modules_to_save=["head"]))
    checkpoint = checkpoint_of(model)
    assert {name: extra.saved_under for name, extra in checkpoint.extras.items()} == {
        "head.weight": "head",
        "head.bias": "head",
    }
    saved = model.base_model.model.head.modules_to_save["default"]
    assert torch.equal(checkpoint.read_extra("head.weight", slice(1, 3)), saved.weight.detach()[1:])
    assert torch.equal(checkpoint.read_extra("head.bias", slice(0, 1)), saved.bias.detach()[None])


@pytest.mark.parametrize(
    "config",
    [VeraConfig(**VERA, bias="vera_only"), AdaLoraConfig(**{**ADALORA, "target_modules": LINEARS}, bias="all")],
)
def test_trained_biases_lie_beside_the_factors(config: PeftConfig) -> None:
    model = tuned(config)
    checkpoint = checkpoint_of(model)
    assert {"q.bias", "v.bias", "short.bias"} <= set(checkpoint.extras)
    bias = model.base_model.model.q.base_layer.bias.detach()
    assert torch.equal(checkpoint.read_extra("q.bias", slice(0, 1)), bias[None])
    assert checkpoint.extras["q.bias"].saved_under is None


SIZES = st.integers(1, 5)


@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from([(), (2,), (3, 1), (2, 3)]), st.integers(0, 5))
def test_every_form_has_the_shape_that_its_header_says(
    m1: int, n1: int, m2: int, n2: int, kernel: tuple[int, ...], which: int
) -> None:
    rank = 2
    left, right = (
        ({"w1": (m1, n1)}, {"w1_a": (m1, rank), "w1_b": (rank, n1)})[which % 2],
        (
            {"w2": (m2, n2, *kernel)},
            {"w2_a": (m2, rank), "w2_b": (rank, n2)},
            {"t2": (rank, rank, *(kernel or (1,))), "w2_a": (rank, m2), "w2_b": (rank, n2)},
        )[which // 2],
    )
    tensors = {f"base_model.model.x.lokr_{part}": torch.ones(shape) for part, shape in {**left, **right}.items()}
    checkpoint = opened({"peft_type": "LOKR", "r": rank, "alpha": 1}, tensors)
    header, update = checkpoint.modules["x"], update_of(checkpoint, "x")
    assert (header.d_out, header.d_in, header.rank) == (*update.shape, update.rank)
    assert header.rank <= min(header.d_out, header.d_in)


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_field_that_is_unknown_is_an_error(kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"unknown field 'quantum' is set to True\. Remove it"):
        opened({"peft_type": kind, "r": 2, "alpha": 1, "init_r": 2, "lora_alpha": 1, "quantum": True}, {})


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ("loha", {"r": "8"}, "'r' is '8': expected a valid integer"),
        ("loha", {"r": None}, "'r' is missing. Every configuration of this kind has it"),
        ("loha", {"r": 0}, "'r' is 0: expected greater than 0"),
        ("lokr", {"alpha": float("nan")}, "'alpha' is nan: expected a finite number"),
        ("lokr", {"rank_pattern": {"(": 2}}, r"'rank_pattern.\(' is '\(': the key is not a valid regular expression"),
        ("loha", {"rank_patern": {"q": 2}}, "unknown field 'rank_patern' .*did you mean 'rank_pattern'"),
        ("loha", {"r": 3}, r"contradicts the ranks of the tensors: module 'q' \(configuration 3, tensors 2\)"),
        ("lokr", {"r": 3}, "contradicts the ranks of the tensors: .* and 5 more"),
        ("vera", {"r": 2}, "contradicts the ranks of the tensors"),
        ("vera", {"save_projection": False}, "A and B are not stored, .*peft.save_as_lora"),
        ("vera", {"bias": "lora_only"}, "'bias' is 'lora_only': expected 'none', 'all' or 'vera_only'"),
        ("adalora", {"init_r": 3}, "contradicts the ranks of the tensors"),
        ("adalora", {"rank_pattern": {"q.lora_E": [True]}}, r"module 'q' \(configuration 1, tensors 4\)"),
        ("adalora", {"rank_pattern": {"q": 3}}, "'rank_pattern.q' is 3: expected a valid list"),
        ("adalora", {"lora_alpha": 0}, "'lora_alpha' is 0: expected greater than 0"),
        ("adalora", {"layer_replication": [[0, 4]]}, "'layer_replication' .* is not handled: it changes which layers"),
        ("adalora", {"trainable_token_indices": [1]}, "'trainable_token_indices' .* is not handled"),
        ("adalora", {"use_dora": True}, "'use_dora' is set to True, which is not handled: peft does not combine"),
    ],
)
def test_a_damaged_configuration_is_refused(config: str, change: dict[str, object], message: str) -> None:
    fields, tensors = adapter(config)
    with pytest.raises(CheckpointError, match=f"adapter 'a': (adapter_config.json: |.*){message}"):
        opened({**fields, **change}, tensors)


def without(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(ending)}


@pytest.mark.parametrize(
    ("config", "ending", "message"),
    [
        ("loha", "q.hada_w2_a", r"modules with missing tensors: 'q' \(only hada_w1_a, hada_w1_b, hada_w2_b\)"),
        ("lokr", "q.lokr_w1", r"modules with missing tensors: 'q' \(only lokr_w2_a, lokr_w2_b\)"),
        ("adalora", "lora_E", r"modules with missing tensors: 'conv2' \(only lora_A, lora_B\), .* and 4 more"),
        ("vera", "vera_A", "tensors that all modules share are missing: 'base_model.vera_A'"),
        ("vera", "q.vera_lambda_d", r"modules with missing tensors: 'q' \(only vera_lambda_b\)"),
        ("loha", "", "the adapter is empty; expected keys such as 'base_model.model.<module>.hada_w1_a'"),
    ],
)
def test_missing_tensors_are_named(config: str, ending: str, message: str) -> None:
    fields, tensors = adapter(config)
    with pytest.raises(CheckpointError, match=message):
        opened(fields, without(dict(sorted(tensors.items())), ending))


@pytest.mark.parametrize(
    ("config", "key", "shape", "message"),
    [
        ("loha", "q.hada_w1_b", (2, 13), r"tensors that do not fit together: 'q' .*Expected hada_w1_a \[out, r\]"),
        ("loha", "q.hada_w1_b", (24,), "tensors that do not fit together"),
        ("loha", "q.hada_w1_b", (2, 12, 1), "tensors that do not fit together"),
        ("loha", "q.hada_w1_a", (0, 2), "tensors that do not fit together"),
        ("loha cores", "conv2.hada_t1", (2, 2, 3, 2), r"hada_t1 \[r, r, \*\]"),
        ("lokr", "q.lokr_w1", (4, 3, 1), "tensors that do not fit together"),
        ("lokr", "q.lokr_w2_a", (5, 2), "tensors that do not fit together"),
        ("adalora", "q.lora_E", (4,), "tensors that do not fit together"),
        ("vera", "q.vera_lambda_b", (21,), "vera_B .*out at most tallest"),
        ("vera", "q.vera_lambda_d", (2,), "tensors that do not fit together"),
    ],
)
def test_shapes_that_contradict_each_other_are_named(
    config: str, key: str, shape: tuple[int, ...], message: str
) -> None:
    fields, tensors = adapter(config)
    with pytest.raises(CheckpointError, match=message):
        opened(fields, {**tensors, f"base_model.model.{key}": torch.zeros(shape)})


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.q.lora_A.weight",
        "base_model.model.q.hada_w1_a.default",
        "q.hada_w1_a",
        "base_model.model.head.original_module.weight",
        "base_model.model.embed.token_adapter.trainable_tokens_delta",
    ],
)
def test_a_tensor_that_nothing_handles_is_named(key: str) -> None:
    fields, tensors = adapter()
    with pytest.raises(CheckpointError, match=f"tensors that nothing here handles: '{key}'"):
        opened(fields, {**tensors, key: torch.zeros(2, 2)})


def test_a_parameter_that_is_there_twice_is_named() -> None:
    fields, tensors = adapter()
    twice = {f"base_model.model.head.{name}": torch.zeros(2) for name in ("weight", "modules_to_save.weight")}
    with pytest.raises(CheckpointError, match=r"there twice: '.*head\.weight' and '.*head\.modules_to_save\.weight'"):
        opened(fields, {**tensors, **twice})


def test_integers_are_no_factors() -> None:
    fields, tensors = adapter()
    key = "base_model.model.q.hada_w1_a"
    with pytest.raises(CheckpointError, match=rf"factors of a type that is not handled: '{key}' \(int8\)"):
        opened(fields, {**tensors, key: tensors[key].to(torch.int8)})


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("loha", "base_model.model.q.hada_w2_b"),
        ("lokr", "base_model.model.q.lokr_w1"),
        ("adalora", "base_model.model.q.lora_E"),
        ("vera", "base_model.vera_B"),
    ],
)
def test_a_value_that_is_not_finite_is_an_error_that_names_the_tensor(config: str, key: str) -> None:
    fields, tensors = adapter(config)
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[0] = float("nan")
    checkpoint = opened(fields, tensors)
    with pytest.raises(CheckpointError, match=f"tensor '{key}' holds 1 NaN or infinite values"):
        checkpoint.read("q")


@cache
def specs_of(config: str) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    fields, tensors = adapter(config)
    return fields, dict(TensorMapping(tensors, where="in memory").specs)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, -1, 2**70, 10**400]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.booleans(), max_size=3),
    st.dictionaries(st.sampled_from(["q", "(", "q.lora_E", ""]), st.integers(-1, 3), max_size=2),
)
FIELDS = ("r", "alpha", "lora_alpha", "init_r", "rank_pattern", "alpha_pattern", "bias", "modules_to_save", "x")
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 2**40]), max_size=4)


@given(st.data(), st.sampled_from(sorted(CONFIGS)))
def test_damage_gives_headers_or_a_typed_error(data: st.DataObject, config: str) -> None:
    stored_fields, tensors = specs_of(config)
    fields = {**stored_fields, **data.draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))}
    specs = dict(tensors)
    for key in data.draw(st.lists(st.sampled_from(sorted(specs)), max_size=2, unique=True)):
        shape = tuple(data.draw(SHAPES))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
        name = data.draw(st.sampled_from([key, key.rpartition(".")[0], f"{key}.x", "", "base_model.model."]))
        del specs[key]
        specs[name] = TensorSpec(dtype, shape)
    with suppress(CheckpointError):
        opened_headers(fields, specs)


def test_every_kind_of_peft_is_read_or_refused_with_a_reason() -> None:
    assert {*VARIANTS, *UNSUPPORTED, "LORA"} == {kind.value for kind in PeftType}
    assert not VARIANTS.keys() & UNSUPPORTED.keys()
    page = (Path(__file__).parents[2] / "docs/reference/variants.md").read_text(encoding="utf-8")
    assert not [kind for kind in UNSUPPORTED if f"`{kind}`" not in page]


def test_kinds_with_advice_to_save_them_as_a_lora_can_be() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer

    for kind, reason in UNSUPPORTED.items():
        if "save_as_lora" in reason:
            layer = PEFT_TYPE_TO_TUNER_MAPPING[kind].tuner_layer_cls
            own = [sub.supports_lora_conversion for sub in (layer, *layer.__subclasses__())]
            assert any(method is not BaseTunerLayer.supports_lora_conversion for method in own), kind
