"""The figures of a merge, on numbers computed by hand."""

from __future__ import annotations

import pytest
import torch

from mergekit_lowrank.pages import Bars, Figure, Heatmap, Lines
from mergekit_lowrank.pages.colours import limits_of
from mergekit_lowrank.report.figures import chance_of_conflict, figures_of, mean_cosines, mean_sign_conflict
from mergekit_lowrank.report.results import Report

from .reports import large_report, plain_report, record, report_of, summary_of


def figure(report: Report, key: str) -> Figure:
    return {own.key: own for own in figures_of(report)}[key]


def heatmap(report: Report, key: str) -> Heatmap:
    own = figure(report, key)
    assert isinstance(own, Heatmap)
    return own


def test_every_figure_says_how_to_read_it_under_a_key_of_its_own() -> None:
    figures = figures_of(plain_report())
    keys = [own.key for own in figures]
    assert len(keys) == len(set(keys)) > 12
    assert all(own.title and own.description.endswith(".") for own in figures)


def test_modules_are_laid_out_by_type_and_layer() -> None:
    records = [record("layers.0.q", merged_norm=1.0), record("layers.1.q", merged_norm=2.0), record("head")]
    own = heatmap(report_of(records), "modules-merged-norm")
    assert (own.rows, own.columns) == (("q", "head"), ("-", "0", "1"))
    assert own.values == ((None, 1.0, 2.0), (1.25, None, None))


def test_shares_are_in_percent() -> None:
    own = plain_report()
    assert heatmap(own, "modules-lost-energy").values[0][0] == 25.0
    assert heatmap(own, "modules-relative-error").values[0][0] == 25.0
    assert heatmap(own, "modules-sign-conflict").values[0][0] == 25.0


def test_the_overlap_is_the_mean_over_pairs() -> None:
    cosines = [[1.0, 0.5, None], [0.5, 1.0, -0.1], [None, -0.1, 1.0]]
    own = report_of([record("layers.0.q", "abc", cosines=cosines)], "abc")
    assert heatmap(own, "modules-cosine").values == ((pytest.approx(0.2),),)


def test_figures_without_a_number_are_left_out() -> None:
    own = report_of([record("q", ["math"], cosines=[[1.0]], relative_error=None, rank_for_99=None)], ["math"])
    keys = {figure.key for figure in figures_of(own)}
    assert not keys & {"modules-cosine", "modules-relative-error", "modules-rank-for-99", "inputs-cosines"}


def test_an_estimate_says_so() -> None:
    sampled = report_of([record("layers.0.q", sign_conflict_error=0.004), record("layers.1.q")])
    assert "standard error of at most 0.4 %" in figure(sampled, "modules-sign-conflict").description
    assert "standard error" not in figure(plain_report(), "modules-sign-conflict").description
    estimated = report_of([record("layers.0.q", relative_error_is_estimate=True)])
    assert "estimated" in figure(estimated, "modules-relative-error").description
    assert "estimated" not in figure(plain_report(), "modules-relative-error").description


def test_cosines_are_weighted_by_the_norms_of_the_modules() -> None:
    large = record("layers.0.q", input_norms=[3.0, 2.0], cosines=[[1.0, 0.5], [0.5, 1.0]])
    small = record("layers.1.q", input_norms=[1.0, 2.0], cosines=[[1.0, -0.5], [-0.5, 1.0]])
    assert mean_cosines(report_of([large, small]))[0] == (1.0, pytest.approx((6 * 0.5 - 2 * 0.5) / 8))


def test_inputs_that_never_meet_have_no_cosine() -> None:
    records = [record("layers.0.q", ["math"], cosines=[[1.0]]), record("layers.1.q", ["code"], cosines=[[1.0]])]
    assert mean_cosines(report_of(records)) == ((1.0, None), (None, 1.0))


def test_sign_conflict_is_weighted_by_energy() -> None:
    large = record("layers.0.q", input_norms=[3.0, 0.0], sign_conflict=0.1)
    small = record("layers.1.q", input_norms=[1.0, 0.0], sign_conflict=0.5)
    zero = record("layers.2.q", input_norms=[0.0, 0.0], sign_conflict=None)
    assert mean_sign_conflict(report_of([large, small, zero])) == pytest.approx((9 * 0.1 + 0.5) / 10)
    assert mean_sign_conflict(report_of([zero])) is None


def test_conflict_by_chance_is_that_of_normal_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(3, 200_000, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [4.0]])
    against = (entries.abs() * (entries * entries.sum(dim=0) < 0)).sum() / entries.abs().sum()
    inputs = [summary_of(label, norm) for label, norm in zip("abc", (1.0, 2.0, 4.0), strict=True)]
    assert chance_of_conflict(report_of([], inputs=inputs)) == pytest.approx(float(against), abs=2e-3)
    assert chance_of_conflict(report_of([], inputs=inputs[:1])) is None
    assert chance_of_conflict(report_of([], inputs=[summary_of("a", 0.0), summary_of("b", 0.0)])) is None


def test_shares_of_a_layer_are_those_of_its_inputs() -> None:
    both = record("layers.0.q", input_norms=[3.0, 4.0])
    alone = record("layers.1.q", ["code"], input_norms=[2.0], cosines=[[1.0]], input_spectra=[[2.0]])
    own = heatmap(report_of([both, alone]), "inputs-share-by-layer")
    assert own.rows == ("math", "code")
    assert own.values == ((pytest.approx(36.0), None), (pytest.approx(64.0), 100.0))


def test_spectra_are_root_mean_squares_over_the_modules_of_a_type() -> None:
    first = record("layers.0.q", ["math"], spectrum=[4.0, 3.0], input_spectra=[[3.0]], cosines=[[1.0]])
    second = record("layers.1.q", ["math"], spectrum=[2.0], input_spectra=[[1.0]], cosines=[[1.0]])
    own = figure(report_of([first, second], ["math"]), "spectra-q")
    assert isinstance(own, Lines)
    before, after = own.series
    assert before.values == (pytest.approx(5**0.5),)
    assert after.values == (pytest.approx(10**0.5), pytest.approx(4.5**0.5))
    assert (own.title, after.is_emphasised) == ("q", True)


def test_rounding_is_no_part_of_a_spectrum_and_dense_inputs_have_none() -> None:
    own = figure(report_of([record("layers.0.q", spectrum=[1.0, 1e-9], input_spectra=[[], [2.0]])]), "spectra-q")
    assert isinstance(own, Lines)
    assert [(series.name, series.values) for series in own.series] == [
        ("code", (2.0,)),
        ("merged, before the cut", (1.0,)),
    ]


def test_zero_updates_have_no_spectrum() -> None:
    own = report_of([record("layers.0.q", spectrum=[0.0], input_spectra=[[0.0], []])])
    assert not [figure for figure in figures_of(own) if figure.key.startswith("spectra")]


def test_spectra_are_of_the_types_with_most_energy() -> None:
    own = large_report(1, [f"part{index}" for index in range(20)], 1)
    assert len([figure for figure in figures_of(own) if figure.key.startswith("spectra")]) == 12


def test_the_slowest_modules_come_first() -> None:
    records = [record(f"layers.{index}.q", wall_seconds=index / 10) for index in range(20)]
    own = figure(report_of(records), "costs-slowest")
    assert isinstance(own, Bars)
    assert own.labels[:2] == ("layers.19.q", "layers.18.q")
    assert own.values[0] == pytest.approx(1900.0)
    assert len(own.labels) == 8


def test_noise_does_not_fill_the_colours() -> None:
    own = plain_report()
    cosines = [[1.0, 0.02], [0.02, 1.0]]
    quiet = report_of([record("layers.0.q", cosines=cosines), record("layers.1.q")], inputs=own.inputs)
    assert limits_of(heatmap(quiet, "modules-cosine")) == pytest.approx((-0.125, 0.125))
    assert limits_of(heatmap(report_of([record("q", cosines=cosines)]), "modules-cosine")) == (-0.1, 0.1)
    chance = 100 * (chance_of_conflict(own) or 0.0)
    near = report_of([record("q", sign_conflict=chance / 100)], inputs=own.inputs)
    assert limits_of(heatmap(near, "modules-sign-conflict")) == pytest.approx((chance - 5, chance + 5))
    assert limits_of(heatmap(own, "modules-sign-conflict")) == pytest.approx((chance - 5, 25.0))


def test_shares_are_drawn_against_the_whole() -> None:
    own = figure(plain_report(), "inputs-share")
    assert isinstance(own, Bars)
    assert own.whole == 100.0
