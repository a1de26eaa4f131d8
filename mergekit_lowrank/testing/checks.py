"""What several contracts ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from mergekit_lowrank.lowrank import DenseUpdate, InputUpdate, LowRankUpdate, StreamedUpdate, Update, densify
from mergekit_lowrank.spaces import Coordinates, ModuleShape

__all__ = [
    "CASES",
    "GROWING",
    "MEMORY_SLACK_BYTES",
    "NAME",
    "assert_close",
    "assert_documented",
    "assert_parameters_are_described",
    "assert_sound",
    "devices",
    "from_threads",
    "settings",
    "shape_of",
    "snapshot",
    "streamed",
    "views",
]

NAME = re.compile(r"[a-z][a-z0-9_]*")

CASES: Mapping[str, tuple[int, int, tuple[int, ...]]] = {
    "odd sizes": (7, 9, (2, 2, 2)),
    "mixed ranks": (7, 9, (1, 4, 2)),
    "rank one": (5, 3, (1, 1)),
    "one input": (7, 9, (2,)),
    "joint rank above a side": (4, 11, (3, 3)),
    "joint rank above both sides": (5, 4, (4, 4, 4)),
    "rank above both sides": (3, 2, (6, 5)),
    "one by one": (1, 1, (1, 2)),
}
"""(d_out, d_in, ranks) of modules that have gone wrong somewhere before."""

GROWING = (
    ModuleShape(64, 48, (4, 8)),
    ModuleShape(128, 48, (4, 8)),
    ModuleShape(128, 96, (4, 8)),
    ModuleShape(128, 96, (4, 16)),
)
"""Each needs at least the memory of the one before it."""

MEMORY_SLACK_BYTES = 1 << 20
"""What a measured peak may exceed its estimate by: Python's objects and the small tensors that no estimate counts."""

THREADS = 4


def assert_close(found: Tensor, expected: Tensor, tolerance: float, message: str) -> None:
    """Equal to ``tolerance``, relative to the largest expected entry."""
    size = max(float(expected.abs().max()), torch.finfo(expected.dtype).tiny)
    worst = float((found - expected).abs().max())
    assert worst <= tolerance * size, f"{message}: entries differ by up to {worst:.3g}, the largest is {size:.3g}"


def assert_sound(update: Update, like: InputUpdate) -> None:
    """An update of the shape, type and device of ``like``, finite."""
    assert isinstance(update, LowRankUpdate | DenseUpdate), f"merge returned {update!r}; expected an update"
    tensors = [update.delta] if isinstance(update, DenseUpdate) else [update.b, update.a]
    assert update.shape == like.shape, f"merge returned shape {update.shape}; expected {like.shape}"
    if isinstance(update, LowRankUpdate):
        inner = (update.b.shape[1], update.a.shape[0])
        assert inner[0] == inner[1], f"b has {inner[0]} columns and a has {inner[1]} rows; expected as many"
    for tensor in tensors:
        assert tensor.dtype == like.dtype, f"merge returned {tensor.dtype}; expected the inputs' {like.dtype}"
        assert tensor.device == like.device, f"merge returned a tensor on {tensor.device}, not {like.device}"
    assert bool(densify(update).isfinite().all()), "merge returned values that are not finite"


def assert_documented(extension: Any, kind: type) -> None:
    """A name that recipes can use, a summary in one line, a docstring of its own."""
    assert NAME.fullmatch(extension.name), f"the name {extension.name!r} is not in lower_case_with_underscores"
    summary = extension.summary
    assert summary.strip(), f"'{extension.name}' has an empty summary"
    assert "\n" not in summary, f"the summary of '{extension.name}' has several lines"
    assert (vars(kind).get("__doc__") or "").strip(), f"{kind.__name__} has no docstring of its own"


def assert_parameters_are_described(params: type[BaseModel]) -> None:
    """Defaults and descriptions for all, a JSON schema, strict about names, frozen."""
    schema = json.loads(json.dumps(params.model_json_schema()))
    assert not schema.get("required"), f"{params.__name__}: no default for {', '.join(schema.get('required', ()))}"
    for name, described in schema.get("properties", {}).items():
        assert described.get("description", "").strip(), f"{params.__name__}: '{name}' has no description"
    made = params()
    assert params.model_validate_json(made.model_dump_json()) == made, (
        f"{params.__name__}: its own defaults are refused"
    )
    with pytest.raises(ValidationError, match="no_such_parameter"):
        params(no_such_parameter=1)
    for name in schema.get("properties", {}):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(made, name, getattr(made, name))


def settings(params: type[BaseModel]) -> Iterator[dict[str, Any]]:
    """No parameter, and then each choice and each bound of each parameter alone, as far as they are accepted."""
    yield {}
    for name, schema in params.model_json_schema().get("properties", {}).items():
        for value in _extremes(schema):
            try:
                params(**{name: value})
            except ValidationError:  # it may depend on another parameter
                continue
            yield {name: value}


def _extremes(schema: Mapping[str, Any]) -> Iterator[Any]:
    for option in schema.get("anyOf", ()):
        yield from _extremes(option)
    yield from schema.get("enum", ())
    if schema.get("type") == "boolean":
        yield from (False, True)
    yield from (schema[bound] for bound in ("minimum", "maximum") if bound in schema)


def devices(metafunc: pytest.Metafunc) -> list[Any]:
    """The CPU, and CUDA where there is one, marked ``cuda``."""
    if not torch.cuda.is_available():
        return ["cpu"]
    metafunc.config.addinivalue_line("markers", "cuda: needs a CUDA device")
    return ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def snapshot(coordinates: Coordinates) -> list[Tensor]:
    """Copies of everything that a strategy must not modify."""
    factors = [t for update in coordinates.updates if isinstance(update, LowRankUpdate) for t in (update.b, update.a)]
    return [tensor.clone() for tensor in (*factors, *(block for part in coordinates.parts for block in part.blocks()))]


def views(updates: Sequence[LowRankUpdate]) -> list[LowRankUpdate]:
    """The same updates with factors that are not contiguous."""
    return [LowRankUpdate(u.b.T.contiguous().T, u.a.T.contiguous().T, u.scaling) for u in updates]


def streamed(updates: Sequence[LowRankUpdate]) -> list[InputUpdate]:
    """The same updates as dense inputs."""
    return [StreamedUpdate.of(densify(update)) for update in updates]


def shape_of(updates: Sequence[InputUpdate]) -> ModuleShape:
    """The sizes of a module."""
    ranks = [u.rank if isinstance(u, LowRankUpdate) else min(u.shape) for u in updates]
    return ModuleShape(*updates[0].shape, tuple(ranks), sum(isinstance(u, StreamedUpdate) for u in updates))


def from_threads(work: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """The results of ``work``, done by several threads at once, one torch thread each as in a merge."""
    with ThreadPoolExecutor(THREADS, initializer=lambda: torch.set_num_threads(1)) as pool:
        return list(pool.map(lambda step: step(), work))
