from __future__ import annotations

import json
import re

import pytest
import torch

from mergekit_lowrank.diagnostics import Finding, diagnose
from mergekit_lowrank.diagnostics.page import diagnosis_figures, diagnosis_page
from mergekit_lowrank.lowrank import independent_conflict
from mergekit_lowrank.pages.colours import limits_of
from mergekit_lowrank.report.schemas import json_schema

from .crafted import along, diagnosed, diagnosed_modules, write_adapters

SCALED = 100.0


@pytest.fixture(scope="module")
def crafted():
    """Two inputs that are one in layer 0 and orthogonal in layer 1; a third, larger, is in layer 1 only."""
    large = along(8, (4 * SCALED, SCALED))
    return diagnosed_modules(
        {
            "model.layers.0.mlp.up_proj": {"math": along(0), "code": along(0)},
            "model.layers.1.mlp.up_proj": {"math": along(2), "code": along(4), "large": large},
        }
    )


@pytest.fixture(scope="module")
def figures(crafted):
    return {figure.key: figure for figure in diagnosis_figures(crafted)}


def row(figure, name):
    return figure.values[figure.rows.index(name)]


def test_modules_stand_by_layer_and_type(figures):
    figure = figures["modules-row-overlaps"]
    assert (figure.rows, figure.columns) == (("mlp.up_proj",), ("0", "1"))
    assert row(figure, "mlp.up_proj") == pytest.approx((1.0, 0.0), abs=1e-5)
    assert row(figures["modules-cosines"], "mlp.up_proj") == pytest.approx((1.0, 0.0), abs=1e-5)


def test_pairs_stand_beside_each_other(figures, crafted):
    figure = figures["pairs-cosines"]
    assert figure.rows == figure.columns == crafted.labels
    assert figure.values == crafted.pairs.cosines
    angles = figures["pairs-row-angles"].values
    assert angles[0][2] == pytest.approx(90.0, abs=1e-3)  # degrees


def test_shares_are_those_of_each_layer(figures, crafted):
    figure = figures["inputs-share-layer"]
    assert figure.columns == ("0", "1")
    shares = {label: row(figure, label) for label in crafted.labels}
    math, code, large = (shares[label] for label in crafted.labels)
    assert (math[0], code[0], large[0]) == (pytest.approx(50.0), pytest.approx(50.0), None)
    assert large[1] == pytest.approx(100 * SCALED**2 / (SCALED**2 + 2), rel=1e-6)
    assert [row(figures["inputs-share-type"], label)[0] for label in crafted.labels] == pytest.approx(
        [100 * own / (2 * 2 + SCALED**2) for own in (2.0, 2.0, SCALED**2)], rel=1e-6
    )


def test_means_over_modules_are_weighted_with_their_energy(figures, crafted):
    layers = row(figures["inputs-stable-rank-layer"], crafted.labels[0])
    assert layers == pytest.approx((17 / 16, 17 / 16), rel=1e-6)
    (by_type,) = row(figures["inputs-head-type"], crafted.labels[0])
    assert by_type == pytest.approx(crafted.inputs[0].robustness_head, rel=1e-9)


def test_small_differences_look_small(figures):
    assert figures["overview-shares"].whole == 100.0
    low, high = limits_of(figures["modules-cosines"])
    assert -low == high >= 0.1


def test_sign_conflict_is_told_beside_that_of_independent_inputs(figures, crafted):
    chance = 100 * independent_conflict([own.weighted_norm for own in crafted.inputs])
    low, high = limits_of(figures["modules-sign-conflict"])
    assert low <= max(0.0, chance - 5) < chance + 5 <= high
    assert f"would have {chance:.3g} %" in figures["modules-sign-conflict"].description
    assert f"independent inputs: {chance:.3g} %" in diagnosis_page(crafted)


def test_what_all_figures_of_a_part_share_is_said_once(crafted):
    page = diagnosis_page(crafted)
    assert page.lower().count("each row is a module type") == 1
    assert page.lower().count("weighted with the squared norm") == 1


def test_the_findings_come_first_with_their_numbers(crafted):
    page = diagnosis_page(crafted)
    first = crafted.findings[0]
    assert page.index(first.rule) < page.index('<dl class="numbers')
    assert page.count("card finding") == len(crafted.findings)
    for name in first.numbers:
        assert name.replace("_", " ") in page


def test_severity_is_said_in_words(crafted):
    findings = tuple(
        Finding(rule=severity, severity=severity, message="found") for severity in ("info", "notice", "warning")
    )
    page = diagnosis_page(crafted.model_copy(update={"findings": findings}))
    assert re.findall(r"<p><strong>(\w+):</strong> Found\.", page) == ["Info", "Notice", "Warning"]


def test_names_are_escaped(crafted):
    evil = Finding(rule="r", severity="info", message="<script>x</script>", modules=("<i>",), advice="<b>")
    page = diagnosis_page(crafted.model_copy(update={"findings": (evil,), "warnings": ("<u>",)}))
    assert not re.search(r"<script>x|<i>|<b>|<u>", page)


def test_what_diagnose_prints_is_of_its_schema(crafted):
    validators = pytest.importorskip("jsonschema")
    validators.validate(json.loads(crafted.to_json()), json_schema(type(crafted)))


def test_one_input_has_no_pairs():
    found = diagnosed({"math": along(0)})
    keys = [figure.key for figure in diagnosis_figures(found)]
    assert not [key for key in keys if key.startswith("pairs-")]
    assert "There is one input, so there are no pairs." in diagnosis_page(found)


def test_zero_inputs_have_a_page():
    zero = along(0).scaled(0.0)
    found = diagnosed({"math": zero, "code": zero}, dtype=torch.float32)
    page = diagnosis_page(found)
    assert "<title>Diagnosis of" in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_every_figure_has_a_key_of_its_own(tmp_path):
    models = [{"model": path} for path in write_adapters(tmp_path, layers=2)]
    figures = diagnosis_figures(diagnose({"merge_method": "ties", "models": models}, executor="serial"))
    keys = [figure.key for figure in figures]
    assert len({*keys}) == len(keys) > 15
    assert all(figure.description.endswith(".") for figure in figures)
