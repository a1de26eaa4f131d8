from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import PeftConfig
from mergekit_lowrank.formats.checked import read_object

from .builders import config


def parse(**changes: object) -> PeftConfig:
    return PeftConfig.parse(config(**changes), where="adapter 'math': adapter_config.json")


def error_of(**changes: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(**changes)
    return str(caught.value)


def test_every_field_of_the_installed_peft_is_known():
    known = {*PeftConfig.ignored, *PeftConfig.refused, *PeftConfig.model_fields, "init_lora_weights"}
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known


def test_the_default_configuration_of_peft_is_accepted():
    assert PeftConfig.parse({**LoraConfig().to_dict(), "peft_type": "LORA"}, where="x").r == 8


def test_scaling_is_alpha_over_rank():
    assert parse(r=4, lora_alpha=6).scaling_of("q", rank=4) == 1.5


def test_scaling_is_alpha_over_root_rank_with_rslora():
    assert parse(r=4, lora_alpha=6, use_rslora=True).scaling_of("q", rank=4) == 3.0


def test_the_first_pattern_that_matches_wins():
    settings = parse(rank_pattern={"q": 3, r"layers\.0\.q": 4}, alpha_pattern={r"^layers\.0\.q": 9.0, "q": 6})
    assert settings.rank_of("layers.0.q") == 3
    assert settings.scaling_of("layers.0.q", rank=3) == 3.0
    assert settings.scaling_of("layers.1.q", rank=3) == 2.0
    assert settings.rank_of("layers.1.v") == 2
    assert settings.rank_of("layers.1.xq") == 2


names = st.from_regex(r"[a-c]{1,2}(\.[a-c01]){0,3}", fullmatch=True)


@given(st.dictionaries(names | st.sampled_from([r"^a\.b", r".*b", "a|b", r"a\.\d"]), st.integers(1, 64)), names)
def test_patterns_match_as_in_peft(patterns, module):
    expected = patterns.get(get_pattern_key(patterns.keys(), module), 7)
    assert parse(r=7, rank_pattern=patterns).rank_of(module) == expected
    assert parse(lora_alpha=7, alpha_pattern=patterns).scaling_of(module, rank=3) == expected / 3


@pytest.mark.parametrize("name", sorted(PeftConfig.refused))
def test_a_field_that_changes_the_update_is_refused_by_name(name):
    message = error_of(**{name: True})
    assert message.startswith(f"adapter 'math': adapter_config.json: '{name}' is set to True, which is not handled: ")
    assert message.endswith(".")


@pytest.mark.parametrize(
    "name", sorted({*PeftConfig.refused, *PeftConfig.ignored, "something_new", "init_lora_weights"})
)
@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_a_field_that_is_not_set_is_accepted(name, value):
    parse(**{name: value})


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changes_the_base_is_refused(value):
    message = error_of(init_lora_weights=value)
    assert f"'init_lora_weights' is '{value}', which changes the base weights" in message
    assert "path_initial_model_for_weight_conversion" in message


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_a_plain_initialisation_is_accepted(value):
    parse(init_lora_weights=value)


@pytest.mark.parametrize("value", ["fancy", 3, ["eva"]])
def test_an_unknown_initialisation_is_refused(value):
    assert f"'init_lora_weights' is {value!r}, which is unknown" in error_of(init_lora_weights=value)


@pytest.mark.parametrize("value", ["none", "all", "lora_only", None])
def test_trained_biases_are_accepted(value):
    assert parse(bias=value).bias == (value or "none")


def test_rows_of_an_embedding_are_found_by_the_end_of_its_name():
    settings = parse(trainable_token_indices={"embed": [3, 1], "x.head": [2]})
    assert settings.tokens_of("model.embed") == (3, 1)
    assert settings.tokens_of("x.head") == (2,)
    assert settings.tokens_of("head") is None
    assert settings.tokens_of("no_embed") is None
    assert parse(trainable_token_indices=[4]).tokens_of("anything") == (4,)
    assert parse().tokens_of("embed") is None


def test_what_is_saved_whole_is_found_by_the_name_of_a_module_around_it():
    settings = parse(modules_to_save=["head", "a.norm"])
    assert settings.saved_under("model.head") == "head"
    assert settings.saved_under("model.head.dense") == "head"
    assert settings.saved_under("model.a.norm") == "a.norm"
    assert settings.saved_under("model.norm") is None
    assert settings.saved_under("ahead") is None


def test_fused_parameters_are_found_by_the_module_that_holds_them():
    settings = parse(target_parameters=["mlp.experts.up", "mlp.experts.down"])
    names = ("layers.0.mlp.experts.up", "layers.0.mlp.experts.down")
    assert settings.parameters_of("layers.0.mlp.experts") == names
    assert settings.parameters_of("layers.0.mlp.experts.base_layer") == names
    assert settings.parameters_of("layers.0.mlp") == ()


def test_an_unknown_field_is_named_with_its_nearest_neighbour():
    assert "unknown field 'use_rs_lora' is set to True; did you mean 'use_rslora'?" in error_of(use_rs_lora=True)
    assert "unknown field 'zzz' is set to 0. Remove it" in error_of(zzz=0)


def test_another_kind_of_adapter_is_refused():
    assert "'peft_type' is 'IA3'; expected LORA, ADALORA, LOHA, LOKR or VERA." in error_of(peft_type="IA3")


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha"])
def test_a_missing_field_is_named(name):
    assert f"'{name}' is missing." in error_of(**{name: None})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("r", 0, "'r' is 0: expected greater than 0."),
        ("r", -3, "'r' is -3: expected greater than 0."),
        ("r", True, "'r' is True: expected a valid integer."),
        ("r", 4.0, "'r' is 4.0: expected a valid integer."),
        ("r", "8", "'r' is '8': expected a valid integer."),
        ("lora_alpha", "16", "'lora_alpha' is '16': expected a valid number."),
        ("lora_alpha", math.nan, "'lora_alpha' is nan: expected a finite number."),
        ("lora_alpha", math.inf, "'lora_alpha' is inf: expected a finite number."),
        pytest.param("lora_alpha", 10**400, "expected a valid number.", id="huge"),
        ("use_rslora", "true", "'use_rslora' is 'true': expected a valid boolean."),
        ("fan_in_fan_out", 1, "'fan_in_fan_out' is 1: expected a valid boolean."),
        ("rank_pattern", {"q": 0}, "'rank_pattern.q' is 0: expected greater than 0."),
        ("rank_pattern", ["q"], "'rank_pattern' is ['q']: expected a valid dictionary."),
        ("rank_pattern", {"(": 3}, "'rank_pattern.(' is '(': the key is not a valid regular expression"),
        ("alpha_pattern", {"q": math.inf}, "'alpha_pattern.q' is inf: expected a finite number."),
        ("bias", "some", "'bias' is 'some': expected 'none', 'all' or 'lora_only'."),
        ("use_dora", "yes", "'use_dora' is 'yes': expected a valid boolean."),
        ("modules_to_save", [3], "'modules_to_save.0' is 3: expected a valid string."),
        ("base_model_name_or_path", 3, "'base_model_name_or_path' is 3: expected a valid string."),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named(name, value, expected):
    assert expected in error_of(**{name: value})


def test_all_problems_are_reported_together():
    with pytest.raises(CheckpointError) as caught:
        parse(r=0, use_qalora=True, bias="some", init_lora_weights="pissa", zzz=1)
    assert len(caught.value.problems) == 5


def test_the_input_mapping_is_kept_as_it_was():
    raw = config(task_type="CAUSAL_LM", revision="abc")
    before = dict(raw)
    parsed = PeftConfig.parse(raw, where="x")
    assert raw == before == parsed.raw
    assert (parsed.task_type, parsed.revision, parsed.base_model_name_or_path) == ("CAUSAL_LM", "abc", None)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b'{"r": ' + b"9" * 5000 + b"}"])
def test_a_configuration_that_is_not_json_is_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter 'x': .*adapter_config.json is not readable as JSON"):
        read_object(tmp_path / "adapter_config.json", where="adapter 'x'")


def test_a_configuration_that_is_not_an_object_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list; expected a JSON object"):
        read_object(tmp_path / "adapter_config.json", where="adapter 'x'")


class TestPatternsThatMayTakeForEver:
    @pytest.mark.parametrize("key", ["(x+)+y", "((a*b)|c)*", "(q{2,})*", "(a(b+c))+"])
    def test_they_are_refused(self, key) -> None:
        with pytest.raises(CheckpointError, match="repeats what repeats"):
            PeftConfig.parse(config(rank_pattern={key: 2}), where="here")

    @pytest.mark.parametrize("key", [r".*\.(q|v)_proj", r"layers\.(0|1)+\.q", r"\(a+\)+", "[(a+)]+", "(a+)?b"])
    def test_plain_ones_are_not(self, key) -> None:
        assert PeftConfig.parse(config(rank_pattern={key: 2}), where="here").rank_pattern == {key: 2}
