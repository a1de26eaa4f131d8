"""Damaged inputs: whatever is in the files, only a ``MergeError`` leaves a reader; a few cases of ``tests.fuzzing``."""

from __future__ import annotations

import pytest

from tests.fuzzing.running import Fuzzer

CASES = 60
SLOW_SECONDS = 60.0  # of a machine that does much else

NAMES = ["lora", "variants", "pickles", "llava", "sharded", "models", "cards", "tokenizers", "recipes", "weight files"]
NAMES += ["diffusion"]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"), seed=1, limit_seconds=SLOW_SECONDS)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_inputs_raise_only_merge_errors(fuzzer, name):
    assert [case for case in fuzzer.cases(name, range(CASES)) if case.failure] == []


def test_all_targets_are_run(fuzzer):
    assert sorted(fuzzer.targets) == sorted(NAMES)
