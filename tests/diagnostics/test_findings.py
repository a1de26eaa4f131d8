"""Findings: each rule on inputs that break it and on inputs that just do not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mergekit_lowrank.diagnostics import Diagnosis, Finding
from mergekit_lowrank.diagnostics.findings import RULES
from mergekit_lowrank.diagnostics.wording import counted, named, others, places, short
from mergekit_lowrank.lowrank import LowRankUpdate

from .crafted import D_OUT, LEFT, RIGHT, SCALING, along, diagnosed, diagnosed_modules, update_of

ALL = {"output": {"rank": "sum"}}
"""Nothing is cut, so nothing is said of it."""


def rules(diagnosis: Diagnosis) -> list[str]:
    return [finding.rule for finding in diagnosis.findings]


def finding(diagnosis: Diagnosis, rule: str) -> Finding:
    (found,) = (own for own in diagnosis.findings if own.rule == rule)
    return found


def mixed(cosine: float) -> LowRankUpdate:
    """Of the norm of ``along(0)``, with this cosine to it, in its own column space but for that."""
    sine = math.sqrt(1 - cosine * cosine)
    return update_of(LEFT[:, :2] * cosine + LEFT[:, 6:8] * sine, (4, 1), RIGHT[:, :2])


def test_inputs_that_have_nothing_in_common_give_no_finding_and_no_promise() -> None:
    found = diagnosed({"a": along(0), "b": along(2, (3, 2))}, **ALL)
    (own,) = found.findings
    assert (own.rule, own.severity) == ("nothing_found", "info")
    assert own.message == "no rule found anything (largest cosine 0.00, largest overlap 0.00)"
    assert "no promise" in own.advice


def test_an_untrained_input_is_named_first() -> None:
    zero = LowRankUpdate(torch.zeros(D_OUT, 2, dtype=torch.float64), along(0).a, SCALING)
    found = diagnosed({"a": along(0), "zero": zero, "b": along(2)}, **ALL)
    own = found.findings[0]
    assert (own.rule, own.severity, own.inputs) == ("zero_input", "warning", ("adapter#2",))
    assert own.message == "adapter#2 is zero in every module that it has: it changes nothing"


def test_modules_of_an_input_that_are_zero_are_named() -> None:
    zero = LowRankUpdate(torch.zeros(D_OUT, 2, dtype=torch.float64), along(0).a, SCALING)
    modules = {f"layers.{layer}.q": {"a": along(0), "b": zero if layer > 1 else along(2)} for layer in range(4)}
    own = finding(diagnosed_modules(modules, **ALL), "zero_modules")
    assert own.message == "adapter#2 is zero in 2 modules (layers 2-3, q), of the 4 modules it has"
    assert own.modules == ("layers.2.q", "layers.3.q")


@pytest.mark.parametrize(("factor", "told"), [(1.0, "same update ("), (5.0, "same update, at 0.2 times the norm (")])
def test_duplicates_are_named_at_any_scale(factor: float, told: str) -> None:
    own = finding(diagnosed({"a": along(0), "b": along(0).scaled(factor)}, **ALL), "duplicate_inputs")
    assert told in own.message
    assert own.numbers["cosine"] == pytest.approx(1)


def test_an_input_rounded_to_bfloat16_is_a_duplicate_and_a_related_one_is_not() -> None:
    rounded = LowRankUpdate(along(0).b.bfloat16().double(), along(0).a.bfloat16().double(), SCALING)
    assert "duplicate_inputs" in rules(diagnosed({"a": along(0), "b": rounded}, **ALL))
    assert "duplicate_inputs" not in rules(diagnosed({"a": along(0), "b": mixed(0.99)}, **ALL))


@pytest.mark.parametrize(("cosine", "is_opposed"), [(-0.9, True), (-0.21, True), (-0.19, False), (0.9, False)])
def test_updates_against_each_other_are_a_warning(cosine: float, is_opposed: bool) -> None:
    found = diagnosed({"a": along(0), "b": mixed(cosine)}, **ALL)
    assert ("opposed_inputs" in rules(found)) == is_opposed
    if is_opposed:
        own = finding(found, "opposed_inputs")
        assert f"(cosine {cosine:.2f} over all): their sum cancels" in own.message


def test_a_negative_weight_turns_an_update_round() -> None:
    assert "opposed_inputs" in rules(diagnosed({"a": along(0), "b": along(0)}, weights={"b": -1.0}, **ALL))
    assert "opposed_inputs" not in rules(diagnosed({"a": along(0), "b": mixed(-0.9)}, weights={"b": -1.0}, **ALL))


def test_a_weight_that_changes_its_sign_over_the_layers_opposes_in_some_of_them() -> None:
    modules = {f"layers.{layer}.q": {"a": along(0), "b": along(0)} for layer in range(4)}
    found = diagnosed_modules(modules, weights={"b": [-1.0, 0.2]}, **ALL)  # type: ignore[dict-item]
    own = finding(found, "opposed_inputs")
    assert own.modules == ("layers.0.q", "layers.1.q", "layers.2.q")
    assert own.numbers["cosine"] == pytest.approx((-1 - 0.6 - 0.2 + 0.2) / math.sqrt(4 * 1.44))


@pytest.mark.parametrize(("factor", "severity"), [(40.0, "warning"), (5.0, "notice"), (2.0, None)])
def test_a_dominating_norm_is_weighed(factor: float, severity: str | None) -> None:
    updates = {"a": along(0), "b": along(2), "c": along(4).scaled(factor)}
    found = [own for own in diagnosed(updates, **ALL).findings if own.rule == "dominating_norm"]
    assert [own.severity for own in found] == ([severity] if severity else [])
    for own in found:
        assert own.inputs == ("adapter#3",)
        assert f"has {factor:g} × the norm of the others" in own.message
        assert own.numbers["levelling_factor"] == pytest.approx(1 / factor)
        assert f"a weight of {1 / factor:.3g} gives it the norm of the others" in own.advice


def test_an_input_that_vanishes_is_told_unless_the_other_dominates() -> None:
    small = along(4).scaled(1 / 20)
    own = finding(diagnosed({"a": along(0), "b": along(2), "c": small}, **ALL), "vanishing_norm")
    assert own.message.startswith("adapter#3, times its weight, has 1/20 of the norm of the others")
    assert own.numbers["levelling_factor"] == pytest.approx(20)
    assert own.advice == "a weight of 20 gives it the norm of the others"
    assert rules(diagnosed({"a": along(0), "c": small}, **ALL)) == ["dominating_norm"]


def test_a_weight_counts_in_the_norm() -> None:
    updates = {"a": along(0), "b": along(2), "c": along(4).scaled(40)}
    assert "dominating_norm" not in rules(diagnosed(updates, weights={"c": 1 / 40}, **ALL))


def test_beside_one_that_dominates_the_others_do_not_vanish() -> None:
    found = rules(diagnosed({"a": along(0), "b": along(2), "big": along(4).scaled(100)}, **ALL))
    assert "dominating_norm" in found
    assert "vanishing_norm" not in found


def test_weights_that_differ_are_levelled_by_a_factor() -> None:
    modules = {f"layers.{n}.q": {"a": along(0), "b": along(2), "c": along(4)} for n in range(3)}
    found = diagnosed_modules(modules, weights={"a": [-30.0, 0.0]}, **ALL)  # type: ignore[dict-item]
    own = finding(found, "dominating_norm")
    assert f"its weights times {short(own.numbers['levelling_factor'])} give it the norm of the others" in own.advice


def test_where_one_side_is_nearly_zero_no_weight_is_advised() -> None:
    own = finding(diagnosed({"a": along(0), "b": along(2).scaled(1e-6)}, **ALL), "dominating_norm")
    assert "one side is nearly zero" in own.advice
    assert "a weight of" not in own.advice


@pytest.mark.parametrize(("weights", "severity"), [({"a": 0.0}, "notice"), ({"a": 0.0, "b": 0.0}, "warning")])
def test_an_input_of_weight_zero_is_told(weights: dict[str, float], severity: str) -> None:
    found = diagnosed({"a": along(0), "b": along(2)}, weights=weights, **ALL)
    own = [own for own in found.findings if own.rule == "zero_weight"]
    assert [item.severity for item in own] == [severity] * len(weights)
    assert ("the merge is zero" in own[0].message) == (severity == "warning")


def test_pairs_of_weight_zero_are_no_duplicates_and_do_not_conflict() -> None:
    found = rules(diagnosed({"a": along(0), "b": along(0), "c": along(2)}, weights={"b": 0.0}, **ALL))
    assert not {"duplicate_inputs", "opposed_inputs", "sign_conflict"} & {*found}


def test_a_small_update_does_not_cancel_a_large_one() -> None:
    found = rules(diagnosed({"a": along(0), "b": along(0).scaled(-1e-3)}, **ALL))
    assert not {"opposed_inputs", "sign_conflict"} & {*found}


def test_a_duplicate_of_a_part_is_named_with_its_modules() -> None:
    modules = {f"layers.{n}.q": {"a": along(2 * n), **({"b": along(0)} if n == 0 else {})} for n in range(3)}
    own = finding(diagnosed_modules(modules, **ALL), "duplicate_inputs")
    assert "are the same update in 1 module (layer 0, q), all that both have (cosine 1.0000)" in own.message
    assert own.numbers["norm_ratio"] == pytest.approx(1)


def test_duplicates_share_their_spaces_without_being_told() -> None:
    assert rules(diagnosed({"a": along(0), "b": along(0)}, **ALL)).count("shared_columns") == 0


def test_shared_spaces_are_told_with_their_layers_and_for_each_side() -> None:
    shares = update_of(LEFT[:, :2], (4, 1), RIGHT[:, 6:8])
    modules = {
        f"layers.{layer}.q": {"a": along(0), "b": shares if layer >= 2 else along(2), "c": along(4)}
        for layer in range(5)
    }
    found = diagnosed_modules(modules, **ALL)
    own = finding(found, "shared_columns")
    assert own.message.startswith(
        "the column spaces of adapter#1 and adapter#2 overlap 1.00 in 3 modules (layers 2-4, q)"
    )
    assert own.modules == tuple(f"layers.{layer}.q" for layer in (2, 3, 4))
    assert (own.severity, own.inputs) == ("notice", ("adapter#1", "adapter#2"))
    assert "joint" in own.advice
    both = diagnosed({"a": along(0), "b": update_of(LEFT[:, :2], (1, 4), RIGHT[:, :2])}, **ALL)
    assert {"shared_columns", "shared_rows"} <= {*rules(both)}


def test_shared_rows_are_told_and_nothing_is_advised() -> None:
    """Adapters of one seed share them."""
    found = diagnosed({"a": along(0), "b": update_of(LEFT[:, 6:8], (4, 1), RIGHT[:, :2])}, **ALL)
    own = finding(found, "shared_rows")
    assert own.severity == "info"
    assert own.message.startswith("the row spaces of adapter#1 and adapter#2 overlap 1.00")
    assert "the same random A" in own.advice
    assert "shared_columns" not in rules(found)


def test_a_method_in_joint_coordinates_needs_no_advice_about_shared_spaces() -> None:
    shares = update_of(LEFT[:, :2], (4, 1), RIGHT[:, 6:8])
    own = finding(diagnosed({"a": along(0), "b": shares}, space="joint", **ALL), "shared_columns")
    assert (own.severity, own.advice) == ("info", "what they share is merged as such already")


def test_an_overlap_that_chance_gives_is_none() -> None:
    """Both inputs fill their small space: 10 of 12 directions overlap 0.83 whatever they are."""
    generator = torch.Generator().manual_seed(0)
    updates = {
        label: LowRankUpdate(
            torch.randn(40, 10, generator=generator, dtype=torch.float64),
            torch.randn(10, 12, generator=generator, dtype=torch.float64),
            SCALING,
        )
        for label in ("a", "b")
    }
    found = diagnosed(updates, **ALL)
    assert found.pairs.row_overlaps[0][1] > 0.8  # type: ignore[operator]
    assert not {"shared_columns", "shared_rows"} & {*rules(found)}


def test_signs_against_each_other_are_told_above_those_of_unrelated_updates() -> None:
    agreeing = diagnosed({"a": along(0), "b": mixed(0.3)}, **ALL)
    assert "sign_conflict" not in rules(agreeing)
    against = finding(diagnosed({"a": along(0), "b": mixed(-0.9)}, **ALL), "sign_conflict")
    assert "of their entries, where unrelated updates have 50 %" in against.message
    assert against.numbers["share"] > 0.6
    assert against.numbers["standard_error"] == 0


def test_weak_directions_that_are_turned_are_told_with_their_cosines() -> None:
    other = update_of(LEFT[:, 6:8], (5, 5), RIGHT[:, :2])
    weak = update_of(LEFT[:, :2], (50, 0.5), RIGHT[:, :2])
    own = finding(diagnosed({"a": weak, "b": other}, **ALL), "turned_tail")
    assert own.inputs == ("adapter#1",)
    assert own.numbers["tail"] == pytest.approx((1 + 0.5 / math.hypot(0.5, 5)) / 2)
    assert "in what task_arithmetic makes of it" in own.message
    assert "robustmerge" in own.advice


def test_different_modules_are_told() -> None:
    modules = {"layers.0.q": {"a": along(0), "b": along(2)}, "layers.1.q": {"a": along(0)}}
    own = finding(diagnosed_modules(modules, **ALL), "coverage")
    assert own.message == "inputs do not have the same modules: of 2, adapter#2 1"
    assert own.modules == ("layers.1.q",)
    assert "missing" in own.advice


@pytest.mark.parametrize(("values", "severity"), [((4, 4), "warning"), ((1.5, 1), "notice"), ((0.4, 0.4), None)])
def test_a_cut_that_loses_energy_is_told_before(values: tuple[float, float], severity: str | None) -> None:
    found = diagnosed({"a": along(0, (4, 4)), "b": along(2, values)}, output={"rank": 2})
    own = [own for own in found.findings if own.rule == "rank_cut"]
    assert [each.severity for each in own] == ([severity] if severity else [])
    if values == (4, 4):
        assert own[0].message.startswith(
            "rank 2 keeps 50 % of the energy of the weighted sum, whose effective rank is 4"
        )


def test_a_merge_that_cuts_nothing_loses_nothing() -> None:
    assert "rank_cut" not in rules(diagnosed({"a": along(0), "b": along(2)}, method="robustmerge"))


def test_warnings_come_before_notices_and_those_before_the_rest() -> None:
    updates = {"a": along(0), "b": along(0), "c": along(2).scaled(5)}
    found = [own.severity for own in diagnosed(updates, **ALL).findings]
    assert found == sorted(found, key=["warning", "notice", "info"].index)
    assert len(set(found)) > 1


def test_every_rule_is_described_in_the_reference() -> None:
    """By the names that this file finds; a rule without a test would be missing here."""
    page = Path(__file__).parents[2].joinpath("docs/reference/findings.md").read_text(encoding="utf-8")
    source = Path(RULES[0].__code__.co_filename).read_text(encoding="utf-8")
    names = {line.split('"')[1] for line in source.splitlines() if line.strip().startswith('rule="')}
    tested = Path(__file__).read_text(encoding="utf-8") + Path(__file__).with_name("test_diagnose.py").read_text()
    assert len(names) >= len(RULES)
    for name in names:
        assert f"`{name}`" in page
        assert f'"{name}"' in tested


def test_places_are_named_as_layers() -> None:
    modules = [f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1, 2, 5) for kind in ("q_proj", "v_proj")]
    assert places(modules) == "layers 0-2, 5, self_attn.q_proj, self_attn.v_proj"
    assert places(["lm_head"]) == "lm_head"
    assert counted(modules, 8) == "all 8 modules"
    assert counted(["lm_head"], 8) == "1 module (lm_head)"
    assert counted(["lm_head"], 1) == "the only module"


def test_many_names_are_cut_short() -> None:
    assert named(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert [others(count) for count in (0, 1, 2)] == ["", ", and so for 1 other pair", ", and so for 2 other pairs"]
