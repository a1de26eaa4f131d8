"""Every built-in method in every space that it supports, ready to run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.registry import Registry
from mergekit_lowrank.testing.driver import Subject, subjects

__all__ = ["Subject", "assert_close", "each"]


def each(choose: Callable[[Subject], bool] = lambda _: True) -> pytest.MarkDecorator:
    registry = Registry()
    chosen = [subject for subject in subjects(registry, registry.methods.values()) if choose(subject)]
    assert chosen
    return pytest.mark.parametrize(
        "subject", chosen, ids=[f"{subject.preset.name}-{subject.space_kind.name}" for subject in chosen]
    )


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Equal to rounding, relative to the largest entry."""
    size = max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)
