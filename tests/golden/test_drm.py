from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, StreamedUpdate, are_low_rank, densify
from mergekit_lowrank.spaces import DeltaSpace, JointParams, JointSpace, SpaceParams
from mergekit_lowrank.strategies import Drm, Ties
from mergekit_lowrank.testing import merge_modules, merge_updates
from tests.golden.cases import Golden, by_module, deviation, golden, header_of

LORA = golden("drm_lora_*", "drm_zero_task_T3")
FULL = golden("drm_full_T*")
MODELS = golden("drm_nonlinear_full_model_T3", "drm_full_model_nonzero_base_T3", "drm_qkv_and_auto_direction_T3")

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "expected"), (torch.float64, "expected_f64")], ids=["float32", "float64"]
)


def merged(reference: Golden, updates: Sequence[InputUpdate], direction: str | None = None) -> Tensor:
    p = reference.parameters
    strategy = Drm(Drm.Params(density=1 - p["singular_matrices_drop_rate"], disjoint_mean=p["enable_disjoint_mean"]))
    space = JointSpace(JointParams(direction=direction or p["direction"], **Drm.space_defaults))
    update = merge_updates(strategy, space, updates, reference.weights)
    assert isinstance(update, LowRankUpdate) == are_low_rank(updates)
    return densify(update)


def tolerance_of(reference: Golden, kind: str) -> float:
    return reference.tolerance if kind == "expected" else float(header_of(reference.case)["expected_f64_tolerance"])


@by_module(LORA)
def test_drm_gives_the_delta_of_the_reference(reference: Golden, module: str) -> None:
    delta = merged(reference, reference.updates(module))
    assert deviation(delta, reference.expected(f"delta.{module}")) <= reference.tolerance


@by_module([g for g in LORA if "expected_f64_tolerance" in header_of(g.case)])
def test_drm_in_float64_gives_the_delta_of_the_reference_to_nine_digits(reference: Golden, module: str) -> None:
    delta = merged(reference, reference.updates(module, torch.float64))
    tolerance = tolerance_of(reference, "expected_f64")
    assert tolerance <= 1e-9
    assert deviation(delta, reference.expected(f"delta.{module}", "expected_f64")) <= tolerance


@by_module([g for g in LORA if "zero_task" in g.case])
def test_drm_with_a_zero_task_agrees_with_the_suggested_result_in_float64(reference: Golden, module: str) -> None:
    assert not reference.variant["is_reference_output"]
    delta = merged(reference, reference.updates(module, torch.float64))
    # The suggested result was computed from deltas that had been multiplied out in float32.
    assert deviation(delta, reference.expected(f"delta.{module}")) <= 1e-7


@PRECISIONS
@by_module(FULL)
def test_drm_of_full_fine_tunes_gives_the_delta_of_the_reference(
    reference: Golden, module: str, dtype: torch.dtype, kind: str
) -> None:
    delta = merged(reference, reference.dense_updates(module, dtype))
    assert deviation(delta, reference.expected(f"delta.{module}", kind)) <= tolerance_of(reference, kind)


@by_module([g for g in LORA if "zero_task" not in g.case])
def test_drm_of_dense_deltas_of_adapters_gives_the_delta_of_the_reference(reference: Golden, module: str) -> None:
    # Rank-deficient: most directions of the Gram matrix are rounding.
    dense = [StreamedUpdate.of(densify(update)) for update in reference.updates(module, torch.float64)]
    assert deviation(merged(reference, dense), reference.expected(f"delta.{module}", "expected_f64")) <= 1e-8


def weight(reference: Golden, module: str, dtype: torch.dtype) -> Tensor:
    """A parameter of a merged model, linear or not."""
    p = reference.parameters
    base = reference.tensors[f"base.{module}"].to(dtype)
    if module not in p["linear_weight_parameter_names"]:
        return base + nonlinear(reference, module, dtype).view_as(base)
    updates = reference.dense_updates(module, dtype)
    if p.get("native_stacked_QKV") and "in_proj" in module:
        return base + torch.cat([merged(reference, third) for third in thirds(updates)])
    return base + merged(reference, updates, chosen_direction(reference, module))


def nonlinear(reference: Golden, module: str, dtype: torch.dtype) -> Tensor:
    """What DRM's stand-in makes of it, with the parameters of the variant."""
    p = reference.parameters
    assert Drm.stand_in is not None
    method, given = Drm.stand_in
    assert method == Ties.name
    dropped = p["non_linear_weight_magnitude_dropping_rate"]
    changes = {
        **({"density": 1 - dropped, "scope": "model"} if dropped else {}),
        **({} if p["enable_disjoint_mean"] else {"divisor": "inputs"}),
        **({} if p["enable_sign_resolution"] else {"elect": "none"}),
    }
    others = [name for name in reference.modules if name not in p["linear_weight_parameter_names"]]
    updates = {name: reference.dense_updates(name, dtype) for name in others}
    strategy = Ties(Ties.Params(**{**given, **changes}))
    return densify(merge_modules(strategy, DeltaSpace(SpaceParams()), updates, reference.weights)[module])


def thirds(updates: Sequence[StreamedUpdate]) -> list[list[StreamedUpdate]]:
    """The rows of queries, keys and values as updates of their own."""
    split = [torch.tensor_split(densify(update), 3) for update in updates]
    return [[StreamedUpdate.of(part) for part in parts] for parts in zip(*split, strict=True)]


def chosen_direction(reference: Golden, module: str) -> str | None:
    """What the reference chose of itself, where a variant let it."""
    choices = reference.variant.get("info", {}).get("direction_choices", [])
    chosen = dict(reversed(choice.split("-stack: ")) for choice in choices).get(module)
    return {"V": "vertical", "H": "horizontal", None: None}[chosen]


@PRECISIONS
@by_module(MODELS)
def test_drm_and_its_stand_in_give_the_model_of_the_reference(
    reference: Golden, module: str, dtype: torch.dtype, kind: str
) -> None:
    found = weight(reference, module, dtype)
    assert deviation(found, reference.expected(f"merged.{module}", kind)) <= tolerance_of(reference, kind)


def test_the_models_hold_norms_biases_and_embeddings_and_every_option_of_their_path() -> None:
    assert {name.rpartition(".")[0] for g in MODELS for name in g.modules} >= {"norm", "embed", "layers.fc1"}
    assert {g.parameters["enable_sign_resolution"] for g in MODELS} == {True, False}
    assert {g.parameters["enable_disjoint_mean"] for g in MODELS} == {True, False}
