"""The golden vectors of ``data/``: inputs and outputs of the reference implementations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lowrank.lowrank import InputUpdate, LowRankUpdate, StreamedUpdate, densify

DATA = Path(__file__).parent / "data"


@cache
def tensors_of(case: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{case}.safetensors")


@cache
def header_of(case: str) -> dict[str, Any]:
    header: dict[str, Any] = json.loads((DATA / f"{case}.json").read_text(encoding="utf-8"))
    return header


@dataclass(frozen=True)
class Golden:
    """One variant of one case."""

    case: str
    variant: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.case}-{self.variant['id']}"

    @property
    def parameters(self) -> dict[str, Any]:
        return self.variant["parameters"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.case)

    @property
    def tolerance(self) -> float:
        return float(self.variant["tolerance"])

    @property
    def modules(self) -> list[str]:
        names = (key.split(".", 2) for key in self.tensors)
        return sorted({name[2] for name in names if name[0] in {"lora_A", "delta", "full"}})

    @property
    def inputs(self) -> int:
        return len({key.split(".")[1] for key in self.tensors if key.split(".")[0] in {"lora_A", "delta", "full"}})

    @property
    def weights(self) -> list[float]:
        return self.variant["weights"] or [1.0] * self.inputs

    def updates(self, module: str, dtype: torch.dtype = torch.float32) -> list[LowRankUpdate]:
        """The inputs of a module; a dense one exactly as itself times the identity."""
        return [self._update(module, t, dtype) for t in range(self.inputs)]

    def _update(self, module: str, t: int, dtype: torch.dtype) -> LowRankUpdate:
        if f"lora_A.{t}.{module}" in self.tensors:
            a, b = (self.tensors[f"lora_{factor}.{t}.{module}"].to(dtype) for factor in "AB")
            return LowRankUpdate(b, a, header_of(self.case)["scalings"][t])
        delta = self._delta(module, t, dtype)
        matrix = delta.reshape(delta.shape[0], -1)
        return LowRankUpdate(matrix, torch.eye(matrix.shape[1], dtype=dtype))

    def dense_updates(self, module: str, dtype: torch.dtype = torch.float32) -> list[StreamedUpdate]:
        """The inputs of a module as full fine-tunes; a vector as one row."""
        return [StreamedUpdate.of(torch.atleast_2d(self._delta(module, t, dtype))) for t in range(self.inputs)]

    def _delta(self, module: str, t: int, dtype: torch.dtype) -> Tensor:
        if f"lora_A.{t}.{module}" in self.tensors:
            return densify(self._update(module, t, dtype))
        if f"delta.{t}.{module}" in self.tensors:
            return self.tensors[f"delta.{t}.{module}"].to(dtype)
        return self.tensors[f"full.{t}.{module}"].to(dtype) - self.tensors[f"base.{module}"].to(dtype)

    def given(self, module: str, *, dense: bool) -> Sequence[InputUpdate]:
        """The inputs of a module, either way."""
        return self.dense_updates(module) if dense else self.updates(module)

    def all_given(self, *, dense: bool) -> dict[str, Sequence[InputUpdate]]:
        return {module: self.given(module, dense=dense) for module in self.modules}

    def expected(self, output: str, kind: str = "expected") -> Tensor:
        return self.tensors[f"{kind}.{self.variant['id']}.{output}"]

    def has(self, output: str, kind: str = "expected") -> bool:
        return f"{kind}.{self.variant['id']}.{output}" in self.tensors


def golden(*patterns: str, where: Callable[[dict[str, Any]], bool] = lambda _: True) -> list[Golden]:
    """The variants of the cases that match, those whose parameters ``where`` accepts."""
    found = []
    for pattern in patterns:
        paths = sorted(DATA.glob(f"{pattern}.json"))
        assert paths, f"no golden case matches {pattern}"
        variants = [Golden(path.stem, variant) for path in paths for variant in header_of(path.stem)["variants"]]
        found += [variant for variant in variants if where(variant.parameters)]
    assert found, f"no variant of {patterns} has such parameters"
    return found


either_way = pytest.mark.parametrize("dense", [False, True], ids=["factors", "dense"])
"""Inputs as low-rank updates, and as full fine-tunes."""


def by_module(variants: Sequence[Golden]) -> pytest.MarkDecorator:
    """Case × variant × module."""
    cases = [pytest.param(g, m, id=f"{g.id}-{m}") for g in variants for m in g.modules]
    return pytest.mark.parametrize(("reference", "module"), cases)


def deviation(found: Tensor, expected: Tensor) -> float:
    """max |x − expected| / max |expected|, in float64."""
    assert found.shape == expected.shape
    assert bool(found.isfinite().all())
    wanted = expected.double()
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
