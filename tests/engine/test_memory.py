"""Sizes are shown as people write them."""

import pytest

from mergekit_lowrank.engine import default_memory_bytes, format_bytes


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_written(count, text) -> None:
    assert format_bytes(count) == text


def test_the_default_is_some_of_the_machines_memory() -> None:
    assert 1 << 26 < default_memory_bytes() < 1 << 46
