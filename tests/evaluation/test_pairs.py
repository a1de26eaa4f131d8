"""The study of pairs in ``tests/benchmarks/accuracy``: its statistics, and that its page says what was measured."""

from __future__ import annotations

import importlib
import math
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from mergekit_lowrank.testing import write_tiny_adapter
from tests.docs.pages import ROOT

DIRECTORY = ROOT / "tests" / "benchmarks" / "accuracy"
PAGE = ROOT / "docs" / "explanation" / "do-diagnostics-predict.md"
FIGURE = DIRECTORY / "pairs.svg"
MODULES = ("pairs", "study", "evaluate", "minilm_tasks")


@pytest.fixture(scope="module")
def pairs():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DIRECTORY)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield importlib.import_module("pairs")
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def records(pairs):
    return pairs.read(pairs.RESULTS)


def rank_correlation(pairs, x, y, counts=None):
    counts = np.ones(len(x)) if counts is None else np.array(counts)
    return pairs.spearman(np.array(x), np.array(y), counts[None])[0]


def test_ranks_of_ties_are_their_mean(pairs):
    assert rank_correlation(pairs, [1.0, 2.0, 2.0, 3.0], [10.0, 20.0, 20.0, 1000.0]) == pytest.approx(1)
    assert rank_correlation(pairs, [1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )


def test_a_point_that_is_drawn_twice_counts_twice(pairs):
    x, y, counts = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 5.0, 3.0], [2, 0, 1, 3]
    repeated = [np.repeat(values, counts) for values in (x, y)]
    assert rank_correlation(pairs, x, y, counts) == pytest.approx(rank_correlation(pairs, *repeated))


def test_what_does_not_vary_correlates_with_nothing(pairs):
    assert math.isnan(rank_correlation(pairs, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


def points(pairs, *, noise, seed=0):
    rng = np.random.default_rng(seed)
    names = [f"a{k}" for k in range(9)]
    every = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]
    x = rng.normal(size=len(every))
    y = x + noise * rng.normal(size=len(every))
    return [pairs.Point(*values) for values in zip(every, x, y, strict=True)]


def test_a_clear_correlation_has_intervals_above_zero(pairs):
    found = pairs.correlation(points(pairs, noise=0.2), resamples=200)
    assert found.count == 36
    assert found.by_point[0] > 0.7
    assert found.by_point[0] < found.spearman < found.by_point[1]
    assert found.by_adapter[0] > 0


def test_noise_has_an_interval_around_zero(pairs):
    found = pairs.correlation(points(pairs, noise=1e6), resamples=200)
    assert found.by_point[0] < 0 < found.by_point[1]


def test_drawing_adapters_leaves_out_pairs_of_the_others(pairs):
    every = points(pairs, noise=1)
    (counts,) = pairs.counts_by_adapter(every, np.random.default_rng(0), 1)
    drawn = {name for point, count in zip(every, counts, strict=True) if count for name in point.adapters}
    assert len(drawn) < 9
    assert all((count > 0) == (set(point.adapters) <= drawn) for point, count in zip(every, counts, strict=True))


def test_the_predictors_of_a_pair_are_all_numbers(pairs, tmp_path):
    models = [
        write_tiny_adapter(tmp_path / name, {"layers.0.q_proj": (8, 8)}, seed=seed) for seed, name in enumerate("ab")
    ]
    recipe = {"merge_method": "linear", "models": [{"model": str(path)} for path in models]}
    of_pair, of_member = pairs.predictors(pairs.diagnose(recipe))
    assert all(isinstance(value, float) for value in of_pair.values())
    assert all(len(values) == 2 for values in of_member.values())
    assert sum(of_member["share of the energy"]) == pytest.approx(1)


def test_pairs_of_one_task_are_left_out(pairs):
    experts = [pairs.Expert(name, DIRECTORY, task) for name, task in (("a", "x"), ("b", "y"), ("c", "y"))]
    assert [(one.name, other.name) for one, other in pairs.pairs_of(experts)] == [("a", "b"), ("a", "c")]


def test_records_are_read_as_they_were_written(pairs, records, tmp_path):
    pairs.write(records[:3], {}, tmp_path / "pairs.json")
    assert pairs.read(tmp_path / "pairs.json") == records[:3]
    assert pairs.read(tmp_path / "none.json") == []


def test_the_page_holds_the_tables_of_what_was_measured(pairs, records):
    page = PAGE.read_text(encoding="utf-8")
    tables = (DIRECTORY / "pairs.md").read_text(encoding="utf-8").split("\n\n")
    assert len(tables) == 4
    assert all(table.strip() in page for table in tables)
    assert tables[0] == "\n".join(pairs.table_of_losses(records))
    *_, cosine = pairs.table(records, ["cosine"], pairs.points_of_pairs)
    assert cosine in tables[1]


def test_the_figure_has_a_point_for_each_pair_and_predictor(pairs, records):
    linear = [record for record in records if record.setting == "linear"]
    drawn = ElementTree.fromstring(FIGURE.read_text(encoding="utf-8"))
    circles = [element for element in drawn.iter() if element.tag.endswith("circle")]
    assert len(circles) == len(linear) * len(linear[0].of_pair)
    assert FIGURE.stat().st_size < 200_000
