from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lowrank import Registry, merge
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.pages import Heatmap
from mergekit_lowrank.report.comparison import compare_merges
from mergekit_lowrank.report.comparison_page import comparison_figures, comparison_page
from mergekit_lowrank.testing import write_tiny_adapter
from tests.cli.builders import tensors, write_adapter

MODULES = {f"layers.{layer}.{kind}": (6, 5) for layer in range(2) for kind in ("q_proj", "v_proj")}
REGISTRY = Registry()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Adapters, and merges of them: ``one``, ``half`` and ``ties``."""
    root = tmp_path_factory.mktemp("compared")
    for seed, name in enumerate(("math", "code")):
        write_tiny_adapter(root / name, MODULES, rank=2, seed=seed)
    merged(root / "one")
    merged(root / "half", weight=0.5)
    merged(root / "ties", merge_method="ties")
    return root


def merged(output, *names, weight=1.0, **keys):
    """A merge of adapters beside its output, in float32."""
    models = [
        {"model": str(output.parent / name), "parameters": {"weight": weight}} for name in names or ("math", "code")
    ]
    recipe = {"merge_method": "linear", "models": models, "out_dtype": "float32", **keys}
    recipe.setdefault("output", {"rank": "sum"})
    if recipe["merge_method"] == "linear" and "sweep" not in keys:
        recipe["parameters"] = {"normalize": False}
    merge(recipe, output, registry=REGISTRY)
    return output


def compared(a, b):
    return compare_merges(a, b, registry=REGISTRY)


def test_a_merge_and_itself_are_equal(place):
    found = compared(place / "one", place / "one")
    assert (found.distance, found.cosine) == (0.0, pytest.approx(1.0, abs=1e-12))
    assert (found.recipe, found.remarks) == ((), ())
    assert all(own.distance == 0 and own.a == own.b for own in found.modules)


def test_a_merge_of_half_the_weight_is_half_as_large(place):
    found = compared(place / "one", place / "half")
    assert found.distance == pytest.approx(0.5, abs=1e-6)
    assert found.cosine == pytest.approx(1.0, abs=1e-6)
    assert [own.distance for own in found.modules] == pytest.approx([0.5] * 4, abs=1e-6)
    assert [own.b.merged_norm / own.a.merged_norm for own in found.modules] == pytest.approx([0.5] * 4, abs=1e-6)
    assert compared(place / "half", place / "one").distance == pytest.approx(1.0, abs=1e-6)


def delta(directory, module):
    stored = load_file(directory / "adapter_model.safetensors")
    b, a = (stored[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
    return b @ a


def test_distance_and_cosine_are_those_of_the_dense_updates(place):
    found = compared(place / "one", place / "ties")
    pairs = {own.module: [delta(place / name, own.module) for name in ("one", "ties")] for own in found.modules}
    for own in found.modules:
        a, b = pairs[own.module]
        assert own.distance == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
        assert own.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-6)
    whole = [torch.stack(side) for side in zip(*pairs.values(), strict=True)]
    assert found.distance == pytest.approx(float((whole[0] - whole[1]).norm() / whole[0].norm()), rel=1e-6)


def test_nearly_equal_updates_do_not_cancel(place, tmp_path):
    shutil.copytree(place / "one", tmp_path / "near")
    file = tmp_path / "near" / "adapter_model.safetensors"
    stored = load_file(file)
    change = 2.0**-20
    save_file({key: t * (1 + change) if "lora_B" in key else t for key, t in stored.items()}, file)
    assert compared(place / "one", tmp_path / "near").distance == pytest.approx(change, rel=0.1)


def test_recipes_are_compared_key_by_key_defaults_included(place):
    found = {own.key: (own.a, own.b) for own in compared(place / "one", place / "ties").recipe}
    assert found["merge_method"] == ("linear", "ties")
    assert found["parameters.normalize"] == ("false", None)
    weights = {own.key: (own.a, own.b) for own in compared(place / "one", place / "half").recipe}
    assert weights == {f"models[{label}].parameters.weight": ("1.0", "0.5") for label in ("math", "code")}


def test_the_same_model_from_another_directory_is_no_difference(place):
    deeper = place / "deep" / "one"
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(place / name), "parameters": {"weight": 1.0}} for name in ("math", "code")],
        "parameters": {"normalize": False},
        "out_dtype": "float32",
        "output": {"rank": "sum"},
    }
    merge(recipe, deeper, registry=REGISTRY)
    assert "../math" in (place / "one" / "recipe.yaml").read_text()
    assert "../../math" in (deeper / "recipe.yaml").read_text()
    assert compared(place / "one", deeper).recipe == ()


def test_inputs_are_told_apart_by_their_files(place, tmp_path):
    write_tiny_adapter(tmp_path / "math", MODULES, rank=2, seed=9)
    shutil.copytree(place / "code", tmp_path / "code")
    found = compared(place / "one", merged(tmp_path / "other"))
    assert {own.label: own.is_same for own in found.inputs} == {"math": False, "code": True}
    assert found.remarks == ("Of the same name but not the same files: 'math'.",)


def test_an_input_of_one_merge_only_is_shown(place):
    found = compared(place / "one", merged(place / "alone", "math"))
    assert {own.label: (own.a_norm is None, own.b_norm is None) for own in found.inputs} == {
        "math": (False, False),
        "code": (False, True),
    }


def test_inputs_that_were_not_hashed_are_not_known(place):
    recipe = {"merge_method": "linear", "models": [{"model": str(place / "math")}], "out_dtype": "float32"}
    merge(recipe, place / "unhashed", registry=REGISTRY, hash_sources=False)
    assert [own.is_same for own in compared(place / "unhashed", place / "one").inputs] == [None, None]


def test_modules_of_one_merge_only_are_said(place, tmp_path):
    for name in ("math", "code"):
        write_tiny_adapter(
            tmp_path / name, {**dict.fromkeys([*MODULES][:2], (6, 5)), "layers.0.o_proj": (6, 5)}, rank=2
        )
    found = compared(place / "one", merged(tmp_path / "fewer"))
    assert "2 modules are in A only: 'layers.1.q_proj', 'layers.1.v_proj'." in found.remarks
    assert "1 module is in B only: 'layers.0.o_proj'." in found.remarks
    lone = {own.module: own for own in found.modules}["layers.0.o_proj"]
    assert (lone.a, lone.distance, lone.cosine) == (None, None, None)
    assert found.distance is not None


def test_other_bases_and_shapes_are_said(place, tmp_path):
    for name in ("math", "code"):
        write_tiny_adapter(tmp_path / name, {**MODULES, "layers.0.q_proj": (8, 5)}, rank=2, base_model="org/larger")
    found = compared(place / "one", merged(tmp_path / "larger"))
    bases = next(remark for remark in found.remarks if remark.startswith("The base models differ"))
    assert "B names org/larger" in bases
    assert "1 module is of another shape in B, so not of one base: 'layers.0.q_proj'." in found.remarks
    assert {own.module: own.distance is None for own in found.modules}["layers.0.q_proj"]


def test_a_zero_update_has_no_relative_distance(place):
    zero = merged(place / "zero", weight=0.0)
    found = compared(zero, place / "one")
    assert (found.distance, found.cosine) == (None, None)
    assert compared(place / "one", zero).distance == pytest.approx(1.0)


def changed_report(place, tmp_path, **changes):
    copy = tmp_path / "copy"
    shutil.copytree(place / "one", copy)
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps({**report, **changes}))
    return copy


def test_a_whole_model_is_compared_by_its_report(place, tmp_path):
    found = compared(place / "one", changed_report(place, tmp_path, kind="model"))
    assert found.remarks == ("B is a whole model, whose update is not stored, so there are no distances.",)
    assert (found.distance, found.modules[0].distance) == (None, None)
    assert found.modules[0].a == found.modules[0].b


def test_an_adapter_that_nothing_reads_is_compared_by_its_report(place, tmp_path):
    copy = changed_report(place, tmp_path, format="gguf")
    (copy / "adapter_config.json").unlink()
    (copy / "adapter_model.safetensors").rename(copy / "adapter.gguf")
    found = compared(place / "one", copy)
    assert found.remarks == ("Nothing that is installed reads B (gguf), so there are no distances.",)


def test_tensors_beside_factors_are_not_compared_and_said(tmp_path):
    for seed, name in enumerate(("math", "code")):
        beside = {**tensors(seed=seed), "base_model.model.norm.weight": torch.full((6,), float(seed))}
        write_adapter(tmp_path / name, beside, modules_to_save=["norm"])
    found = compared(merged(tmp_path / "one", extras="average"), merged(tmp_path / "two", extras="average", weight=2.0))
    said = "{} holds 'norm.weight' beside its updates; such tensors are not compared."
    assert found.remarks == (said.format("A"), said.format("B"))
    assert found.distance == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("version", [1, 99, None])
def test_a_report_of_another_version_is_refused(place, tmp_path, version):
    copy = changed_report(place, tmp_path, schema_version=version)
    with pytest.raises(CheckpointError, match=f"has schema version {version}, and this version"):
        compared(place / "one", copy)


def test_a_sweep_names_its_variants(tmp_path):
    for seed, name in enumerate(("math", "code")):
        write_tiny_adapter(tmp_path / name, MODULES, rank=2, seed=seed)
    merged(tmp_path / "swept", sweep={"merge_method": ["linear", "ties"]})
    names = sorted(path.name for path in (tmp_path / "swept").iterdir() if path.is_dir())
    with pytest.raises(CheckpointError, match=f"holds a sweep. Name one of its variants: {', '.join(names)}"):
        compared(tmp_path / "swept", tmp_path / "swept" / names[0])
    assert compared(*(tmp_path / "swept" / name for name in names)).distance


def test_figures_leave_out_what_does_not_differ(place):
    same = comparison_figures(compared(place / "one", place / "one"))
    assert not [figure for figure in same if isinstance(figure, Heatmap) and figure.key != "cosine"]
    other = {figure.key: figure for figure in comparison_figures(compared(place / "one", place / "half"))}
    assert [*other][:2] == ["distance", "norm"]
    assert other["norm"].rows == ("q_proj", "v_proj")
    assert [value for row in other["norm"].values for value in row] == pytest.approx([-50.0] * 4, abs=1e-3)
    assert [series.name for series in other["spectra-q-proj"].series] == ["A", "B"]
    top = [series.values[0] for series in other["spectra-q-proj"].series]
    assert top[1] == pytest.approx(top[0] / 2, rel=1e-4)


def test_the_page_says_what_differs_and_what_does_not(place):
    page = comparison_page(compared(place / "one", place / "half"))
    assert "50 %" in page
    assert "models[math].parameters.weight" in page
    assert "No difference in: Cosine of the updates" in page
    equal = comparison_page(compared(place / "one", place / "one"))
    assert "Both recipes say the same." in equal
    assert "4 of 4" in equal


def test_names_from_files_are_escaped_on_the_page(place, tmp_path):
    evil = tmp_path / "<b>evil"
    shutil.copytree(place / "one", evil)
    page = comparison_page(compared(evil, place / "ties"))
    assert "<b>evil" not in page
    assert "&lt;b&gt;evil" in page


def test_a_notebook_shows_facts_and_differences(place):
    shown = compared(place / "one", place / "half")._repr_html_()
    assert shown.count("<table>") == 2
    assert "models[math].parameters.weight" in shown
    assert compared(place / "one", place / "one")._repr_html_().count("<table>") == 1


def test_a_comparison_goes_through_json(place):
    found = compared(place / "one", place / "ties")
    assert type(found).model_validate_json(found.to_json()) == found
    assert math.isfinite(json.loads(found.to_json())["distance"])
