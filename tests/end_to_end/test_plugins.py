"""Installed plugins that misbehave, from the command line: named, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lowrank.cli import main
from mergekit_lowrank.testing import write_tiny_adapter
from tests.distributions import MEDIAN, Environment

MODULES = {"layers.0.q_proj": (6, 5), "layers.1.down_proj": (5, 8)}
RETURN = "return block.median(dim=0).values"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    for seed in range(2):
        write_tiny_adapter(tmp_path / str(seed), MODULES, seed=seed)
    monkeypatch.chdir(tmp_path)
    return Environment(tmp_path, monkeypatch)


def merged(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["merge", "--method", "median", "0", "1", "-o", "out", *arguments])
    return result.exit_code, result.stderr


def test_an_installed_plugin_merges(environment: Environment, tmp_path: Path) -> None:
    environment.install("median-merge", MEDIAN)
    assert merged() == (0, "")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        (
            f"if 'down_proj' in context.module:\n            raise ValueError('no idea')\n        {RETURN}",
            ["strategy 'median' of plugin 'median-merge' failed on module 'layers.1.down_proj'", "ValueError: no idea"],
        ),
        (
            "return block.sum()",
            [
                "strategy 'median' of plugin 'median-merge' on module 'layers.",
                "a merged block has the shape (); expected (",
            ],
        ),
        (
            "return block[0] / 0",
            ["strategy 'median' of plugin 'median-merge' on module 'layers.", "returned values that are not finite"],
        ),
    ],
    ids=["raises", "returns a wrong shape", "returns infinities"],
)
def test_a_plugin_that_fails_is_named_and_nothing_is_written(
    environment: Environment, tmp_path: Path, body: str, messages: list[str]
) -> None:
    environment.install("median-merge", MEDIAN.replace(RETURN, body))
    before = sorted(path.name for path in tmp_path.iterdir())
    status, said = merged()
    assert status == 2
    for message in messages:
        assert message in said
    after = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    assert after == before


def test_a_method_of_a_plugin_that_failed_to_load_says_so(environment: Environment) -> None:
    environment.install("median-merge", f"import no_such_module\n{MEDIAN}")
    status, said = merged()
    assert status == 2
    assert "unknown merge_method 'median'" in said
    assert "plugins that failed to load: 'median-merge'; see `mergekit-lowrank plugins`" in said
