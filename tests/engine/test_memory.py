"""Sizes are read and written as people do."""

import pytest

from mergekit_lowrank import RecipeError
from mergekit_lowrank.engine import default_memory_bytes, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("1024", 1024), ("2GiB", 2 << 30), ("2 GB", 2 * 10**9), ("512mib", 512 << 20), ("1.5KiB", 1536), ("7B", 7)],
)
def test_sizes_are_read(text, count) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GB", "1XB", "0", "0.0GiB", "1e9", "GiB"])
def test_what_is_no_size_is_refused(text) -> None:
    with pytest.raises(RecipeError, match="is not an amount of memory; expected a number with a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_written(count, text) -> None:
    assert format_bytes(count) == text


def test_the_default_is_some_of_the_machines_memory() -> None:
    assert 1 << 26 < default_memory_bytes() < 1 << 46
