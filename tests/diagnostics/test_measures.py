"""Every measure of inputs with known answers, and of random ones against whole matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.diagnostics import ModuleDiagnosis
from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.testing import random_update

from .crafted import D_IN, D_OUT, LEFT, RIGHT, SCALING, along, measured, update_of

DIGITS = 1e-5
RIGHT_ANGLE = math.pi / 2
DTYPES = (torch.float64, torch.float32)
KNOWN = {
    "first": along(0),
    "orthogonal": along(2, (3, 2)),
    "twin": along(0),
    "negated": along(0).scaled(-1),
    "large": along(0).scaled(100),
}
TILT = (0.3, 1.1)
"""Angles between the spaces of ``tilted()`` and those of the first, on either side."""


def close(value: object) -> object:
    return pytest.approx(value, abs=DIGITS, rel=DIGITS)


def rows(table: tuple[tuple[float | None, ...], ...]) -> list[list[float | None]]:
    return [list(row) for row in table]


def entropy_rank(*values: float) -> float:
    shares = [value / sum(values) for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def known(request: pytest.FixtureRequest) -> ModuleDiagnosis:
    return measured(KNOWN, dtype=request.param)


def test_norms_shares_and_ranks_of_known_inputs(known: ModuleDiagnosis) -> None:
    norms = [math.sqrt(17), math.sqrt(13), math.sqrt(17), math.sqrt(17), 100 * math.sqrt(17)]
    assert list(known.norms) == close(norms)
    total = sum(own * own for own in norms)
    assert list(known.shares) == close([own * own / total for own in norms])
    assert known.ranks == (2,) * 5
    assert list(known.stable_ranks) == close([17 / 16, 13 / 9, 17 / 16, 17 / 16, 17 / 16])
    first, other = entropy_rank(4, 1), entropy_rank(3, 2)
    assert list(known.effective_ranks) == close([first, other, first, first, first])
    assert list(known.gaps) == close([4, 1.5, 4, 4, 4])


def test_pairs_of_known_inputs(known: ModuleDiagnosis) -> None:
    same = [1, 0, 1, 1, 1]
    expected = [same, [0, 1, 0, 0, 0], same, same, same]
    signs = [[1, 0, 1, -1, 1], [0, 1, 0, 0, 0], [1, 0, 1, -1, 1], [-1, 0, -1, 1, -1], [1, 0, 1, -1, 1]]
    for found, wanted in (
        (known.cosines, signs),
        (known.row_overlaps, expected),
        (known.column_overlaps, expected),
        (known.row_alignments, expected),
        (known.column_alignments, expected),
        (known.smallest_row_angles, [[RIGHT_ANGLE * (1 - own) for own in row] for row in expected]),
        (known.smallest_column_angles, [[RIGHT_ANGLE * (1 - own) for own in row] for row in expected]),
    ):
        for row, wanted_row in zip(rows(found), wanted, strict=True):
            assert row == close(wanted_row)
    pairs = [expected[s][t] for s in range(5) for t in range(5) if s != t]
    assert known.core_overlap == close((sum(pairs) / 20, sum(pairs) / 20))


def test_signs_of_known_inputs(known: ModuleDiagnosis) -> None:
    first, orthogonal = densify(KNOWN["first"]), densify(KNOWN["orthogonal"])
    opposed = float((first.sign() != orthogonal.sign()).double().mean())
    signs = [0, opposed, 0, 1, 0]
    against = [opposed, 0, opposed, 1 - opposed, opposed]
    for row, wanted in zip(
        rows(known.sign_conflicts), [signs, against, signs, [1, 1 - opposed, 1, 0, 1], signs], strict=True
    ):
        assert row == close(wanted)
    mass = 103 * first.abs() + orthogonal.abs()
    wins = (101 * first + orthogonal).abs()
    assert known.sign_conflict == close(float(((mass - wins) / 2).sum() / mass.sum()))
    assert (known.sign_conflict_error, known.sign_conflicts_error, known.signs_are_sampled) == (0, 0, False)


def test_the_sum_of_known_inputs(known: ModuleDiagnosis) -> None:
    values = [404, 101, 3, 2]
    assert known.merged_norm == close(math.hypot(*values))
    assert known.sum_effective_rank == close(entropy_rank(*values))
    assert known.sum_kept_energy == close((404**2 + 101**2) / sum(value * value for value in values))
    assert (known.output_rank, known.is_cut) == (2, True)


def test_known_directions_are_kept_or_reversed(known: ModuleDiagnosis) -> None:
    """The sum of all is 101 times the first, and the orthogonal one."""
    assert list(known.robustness_head) == close([1, 1, 1, -1, 1])
    assert list(known.robustness_tail) == close([1, 1, 1, -1, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_angles_of_tilted_spaces(dtype: torch.dtype) -> None:
    """The first direction of either side is tilted out of the spaces of the first input, the second is shared."""
    cosines, sines = [math.cos(own) for own in TILT], [math.sin(own) for own in TILT]
    left = torch.stack([LEFT[:, 0] * cosines[0] + LEFT[:, 4] * sines[0], LEFT[:, 5]], dim=1)
    right = torch.stack([RIGHT[:, 0] * cosines[1] + RIGHT[:, 4] * sines[1], RIGHT[:, 5]], dim=1)
    found = measured({"first": along(0), "tilted": update_of(left, (4, 1), right)}, dtype=dtype)
    assert found.smallest_column_angles[0][1] == close(TILT[0])
    assert found.smallest_row_angles[0][1] == close(TILT[1])
    assert found.column_overlaps[0][1] == close(cosines[0] ** 2 / 2)
    assert found.row_overlaps[0][1] == close(cosines[1] ** 2 / 2)
    assert found.cosines[0][1] == close(16 * cosines[0] * cosines[1] / 17)
    assert found.column_alignments[0][1] == close(4 * cosines[0] / math.sqrt(17))
    assert found.row_alignments[1][0] == close(4 * cosines[1] / math.sqrt(17))


@pytest.mark.parametrize("angle", [1e-9, 1e-6, 1e-3])
def test_a_small_angle_is_not_lost(angle: float) -> None:
    left = torch.stack([LEFT[:, 0] * math.cos(angle) + LEFT[:, 4] * math.sin(angle), LEFT[:, 5]], dim=1)
    found = measured({"first": along(0), "tilted": update_of(left, (4, 1), RIGHT[:, :2])})
    assert found.smallest_column_angles[0][1] == pytest.approx(angle, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weak_direction_is_turned_more_than_a_strong_one(dtype: torch.dtype) -> None:
    """Both rows of the other input are those of the first, its columns are apart: v_i goes to σ_i u_i + 2 u'_i."""
    first, other = along(0, (4, 1)), update_of(LEFT[:, 6:8], (2, 2), RIGHT[:, :2])
    found = measured({"first": first, "other": other}, dtype=dtype)
    assert found.robustness_head[0] == close((1 + 4 / math.hypot(4, 2)) / 2)
    assert found.robustness_tail[0] == close((1 + 1 / math.hypot(1, 2)) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_random_inputs_measure_as_whole_matrices_do(dtype: torch.dtype, method: str) -> None:
    """``ties`` in delta gives a dense merged update."""
    updates = {"a": random_update(D_OUT, D_IN, 2, 1), "b": random_update(D_OUT, D_IN, 3, 2), "c": along(0)}
    updates = {label: LowRankUpdate(u.b.double(), u.a.double(), SCALING) for label, u in updates.items()}
    weights = {"a": 0.5, "b": -1.0, "c": 2.0}
    found = measured(updates, dtype=dtype, method=method, weights=weights)
    deltas = [densify(u) for u in updates.values()]
    bases = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    ranks = [2, 3, 2]
    assert list(found.norms) == close([float(delta.norm()) for delta in deltas])
    for s in range(3):
        assert found.effective_ranks[s] == close(entropy_rank(*bases[s].S[: ranks[s]].tolist()))
        for t in range(s):
            wanted = float((deltas[s] * deltas[t]).sum() / deltas[s].norm() / deltas[t].norm())
            assert found.cosines[s][t] == close(wanted)
            for overlaps, angles, sides in (
                (found.column_overlaps, found.smallest_column_angles, [own.U for own in bases]),
                (found.row_overlaps, found.smallest_row_angles, [own.Vh.T for own in bases]),
            ):
                cosines = torch.linalg.svdvals(sides[s][:, : ranks[s]].T @ sides[t][:, : ranks[t]])
                assert overlaps[s][t] == close(float(cosines.square().mean()))
                assert angles[s][t] == close(math.acos(float(cosines[0])))
    total = sum(w * delta for w, delta in zip(weights.values(), deltas, strict=True))
    assert isinstance(total, Tensor)
    assert found.sum_effective_rank == close(entropy_rank(*torch.linalg.svdvals(total)[:7].tolist()))


def test_an_update_against_itself_cancels_and_nothing_has_a_direction() -> None:
    found = measured({"first": along(0), "negated": along(0).scaled(-1)})
    assert found.robustness_head == found.robustness_tail == (None, None)
    assert (found.sum_effective_rank, found.sum_kept_energy) == (None, None)
    assert found.merged_norm == pytest.approx(0, abs=1e-6)
    assert found.sign_conflict == pytest.approx(0.5)
    turned_back = measured({"first": along(0), "negated": along(0).scaled(-1)}, weights={"negated": -1.0})
    assert list(turned_back.robustness_head) == close([1, 1])
    assert turned_back.sign_conflict == pytest.approx(0)


def test_a_zero_input_leaves_its_measures_out_and_those_of_others_alone() -> None:
    zero = LowRankUpdate(torch.zeros(D_OUT, 2, dtype=torch.float64), along(0).a, SCALING)
    found = measured({"first": along(0), "zero": zero, "other": along(2)})
    assert found.norms[1] == 0
    assert found.ranks == (2, 0, 2)
    for vector in (found.stable_ranks, found.effective_ranks, found.gaps, found.robustness_head, found.robustness_tail):
        assert [value is None for value in vector] == [False, True, False]
    for table in (found.cosines, found.row_overlaps, found.smallest_row_angles, found.column_alignments):
        assert [[value is None for value in row] for row in table] == [
            [False, True, False],
            [True, True, True],
            [False, True, False],
        ]
    assert found.core_overlap == close((0, 0))
    assert list(found.robustness_head[::2]) == close([1, 1])


def test_inputs_that_are_all_zero_have_no_shares() -> None:
    zero = LowRankUpdate(torch.zeros(D_OUT, 2, dtype=torch.float64), along(0).a, SCALING)
    found = measured({"a": zero, "b": zero})
    assert found.shares == (None, None)
    assert (found.core_overlap, found.sign_conflict, found.sum_effective_rank, found.sum_kept_energy) == (None,) * 4


def test_an_input_of_rank_one_has_no_tail() -> None:
    one = update_of(LEFT[:, :1], (3,), RIGHT[:, :1])
    found = measured({"one": one, "other": along(2)})
    assert found.robustness_tail[0] is None
    assert list(found.robustness_head) == close([1, 1])
    assert found.gaps[0] == close(1)


def test_one_input_alone_has_no_pairs() -> None:
    found = measured({"first": along(0)})
    assert found.cosines == ((1.0,),)
    assert found.core_overlap is None
    assert found.sign_conflict == 0
