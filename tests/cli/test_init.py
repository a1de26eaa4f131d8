from __future__ import annotations

import re

import pytest
import torch
from ruamel.yaml import YAML

from .builders import MODULES, run, succeeds, tensors, write_adapter


def written(tmp_path, *arguments):
    text = succeeds("init", *arguments)
    (tmp_path / "made.yaml").write_text(text, encoding="utf-8")
    return text


def test_the_recipe_plans_and_merges(tmp_path, math, code):
    written(tmp_path, "math", "code")
    succeeds("plan", "made.yaml", "--strict")
    succeeds("merge", "made.yaml", "out")


def test_the_recipe_says_what_was_found(tmp_path, math, code):
    write_adapter(code, tensors(MODULES[:3], rank=3, seed=2), r=3)
    text = written(tmp_path, "math", "code")
    assert "# A merge of 2 adapters of org/base." in text
    assert re.search(r"^#   math +2 +2 +float32 +4$", text, re.MULTILINE)
    assert re.search(r"^#   code +3 +1.33333 +float32 +3$", text, re.MULTILINE)
    assert "# Note: 'code' lacks 1 of 4 modules (layers.1.v_proj)." in text


def test_the_recipe_starts_from_robustmerge_with_its_scale_chosen(tmp_path, math, code):
    assert YAML(typ="safe").load(written(tmp_path, "math", "code")) == {
        "merge_method": "robustmerge",
        "models": [
            {"model": "math", "parameters": {"weight": 1.0}},
            {"model": "code", "parameters": {"weight": 1.0}},
        ],
        "scale": "auto",
    }


@pytest.mark.parametrize("method", ["robustmerge", "drm", "ties", "linear", "knots", "core_ties", "task_arithmetic"])
def test_what_is_commented_out_may_be_uncommented(tmp_path, math, code, method):
    text = written(tmp_path, "math", "code", "--method", method)
    uncommented = re.sub(r"^#(?! |$)(.*)", r"\1", text, flags=re.MULTILINE)
    uncommented = re.sub(r"^#(  \w+: .*)", r"\1", uncommented, flags=re.MULTILINE)
    (tmp_path / "full.yaml").write_text(uncommented, encoding="utf-8")
    assert {"parameters", "space", "output", "missing", "rules", "seed", "execution", "sweep"} <= YAML(typ="safe").load(
        uncommented
    ).keys()
    planned = succeeds("plan", "full.yaml", "--json")
    assert planned == succeeds("plan", "made.yaml", "--json")


def test_the_rank_shown_is_the_methods_own(tmp_path, math, code):
    text = written(tmp_path, "math", "code", "--method", "linear")
    shown = "#output: {kind: adapter, rank: max, uniform_rank: true, snap: null, balance: false, format: peft,"
    assert shown in text


def test_the_execution_shown_is_the_default(tmp_path, math, code):
    text = written(tmp_path, "math", "code")
    shown = "#execution: {memory: null, vram: null, device: auto, executor: threads, workers: null}"
    assert shown in text.splitlines()


def test_nothing_in_an_adapter_can_end_a_comment(tmp_path, math):
    write_adapter(tmp_path / "evil", tensors(), base_model_name_or_path="org/base\nseed: 7\x1b[2J\u2028seed: 8")
    text = written(tmp_path, "evil")
    assert "seed" not in YAML(typ="safe").load(text)
    assert "\x1b" not in text


@pytest.mark.parametrize("name", ["with space", "true", "1.5", "- dash", "ä: b", "#hash", "a'b\"c"])
def test_odd_names_survive(tmp_path, name):
    write_adapter(tmp_path / name)
    written(tmp_path, "--", name)
    succeeds("plan", "made.yaml")


def test_adapters_that_do_not_fit_are_refused(tmp_path, math, code):
    write_adapter(code, tensors(d_out=9))
    result = run("init", "math", "code")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "same base model" in result.stderr


def test_an_unknown_method_is_refused(math):
    result = run("init", "math", "--method", "linaer")
    assert result.exit_code == 2
    assert "did you mean 'linear'?" in result.stderr


def test_init_needs_a_model():
    result = run("init")
    assert result.exit_code == 2
    assert "Missing argument 'MODEL...'" in result.stderr


def test_what_lies_beside_factors_has_a_policy_in_it(tmp_path, math, code):
    text = written(tmp_path, "math", "code")
    assert "#extras: error" in text
    saved = {**tensors(MODULES[:3], rank=3, seed=2), "base_model.model.lm_head.weight": torch.ones(4, 3)}
    write_adapter(code, saved, r=3, modules_to_save=["lm_head"])
    assert YAML(typ="safe").load(written(tmp_path, "math", "code"))["extras"] == "average"
    succeeds("merge", "made.yaml", "out")
