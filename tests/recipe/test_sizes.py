from __future__ import annotations

import pytest

from mergekit_lowrank.errors import RecipeError
from mergekit_lowrank.recipe import parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("1024", 1024), ("2GiB", 2 << 30), ("2 GB", 2 * 10**9), ("512mib", 512 << 20), ("1.5KiB", 1536), ("7B", 7)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "much", "-1GB", "1XB", "0", "0.0GiB", "1e9", "GiB", "9" * 400, "1.5.2MB", "\u0663MB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not an amount of memory; expected a number with a unit"):
        parse_bytes(text)
