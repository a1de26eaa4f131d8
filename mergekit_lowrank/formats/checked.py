"""What is read from files, checked: JSON objects, and tensors whose values are finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError

__all__ = ["finite", "read_object"]


def read_object(path: Path, *, where: str) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it is missing, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {path} is not readable as JSON: {error}. Download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: {path} holds a {type(found).__name__}; expected a JSON object.")
    return found


def finite(tensor: Tensor, key: str, *, where: str) -> Tensor:
    """The tensor itself, whose floating-point values are all finite.

    Raises:
        CheckpointError: some are not; the tensor is named.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return tensor
    values = tensor.float() if tensor.itemsize == 1 else tensor  # types of 8 bits have no such operations
    low, high = torch.aminmax(values)  # NaN propagates; no mask as large as the tensor
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int((~values.isfinite()).sum())
        raise CheckpointError(
            f"{where}: tensor '{key}' holds {count} NaN or infinite values. A merge would spread them: train or save "
            "the adapter again."
        )
    return tensor
