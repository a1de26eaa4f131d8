from __future__ import annotations

import json
import math as mathematics

import pytest
import torch

from .builders import MODULES, run, succeeds, tensors, write_adapter, write_model


def delta(made, module):
    a, b = (made[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return (2 * b @ a).double()


def delta_norm(made, module):
    return float(torch.linalg.norm(delta(made, module)))


def with_more(directory, more, **settings):
    return write_adapter(directory, {**tensors(), **{f"base_model.model.{k}": t for k, t in more.items()}}, **settings)


def embedding_factors(module, vocab=7, dim=5, rank=2):
    generator = torch.Generator().manual_seed(3)
    return {
        f"{module}.lora_embedding_A": torch.randn(rank, vocab, generator=generator),
        f"{module}.lora_embedding_B": torch.randn(dim, rank, generator=generator),
    }


def test_inspect_groups_modules_by_kind(math):
    printed = succeeds("inspect", "math")
    assert "base model   org/base" in printed
    assert "modules      4 matrices" in printed
    assert "rank         2\n" in printed
    assert "scaling      2 (alpha / r, alpha 4)" in printed
    assert "beside LoRA  nothing" in printed
    assert "in a merge   4 modules are merged as factors, without the base model" in printed
    rows = [line.split() for line in printed.splitlines() if "_proj" in line]
    made = tensors(seed=1)
    expected = [delta_norm(made, name) for name in MODULES if "q_proj" in name]
    assert rows[0][:9] == ["q_proj", "matrix", "2", "6", "x", "5", "2", "2", "float32"]
    assert float(rows[0][9]) == pytest.approx(sum(n * n for n in expected) ** 0.5, rel=1e-3)
    assert len(rows) == 2


def test_inspect_json_lists_each_module(math):
    made = json.loads(succeeds("inspect", "math", "--json"))
    assert [module["module"] for module in made["modules"]] == list(MODULES)
    assert made["modules"][0]["norm"] == pytest.approx(delta_norm(tensors(seed=1), MODULES[0]), rel=1e-5)
    assert (made["base_model"], made["format"], made["stored_bytes"]) == ("org/base", "peft", 352)
    assert (made["scaling_rule"], made["needs_base"], made["extras"]) == ("alpha / r, alpha 4", None, [])


def test_stable_and_effective_ranks_are_those_of_the_singular_values(math):
    made = json.loads(succeeds("inspect", "math", "--json"))["modules"][0]
    values = torch.linalg.svdvals(delta(tensors(seed=1), MODULES[0]))[:2]
    shares = values / values.sum()
    assert made["stable_rank"] == pytest.approx(float((values / values[0]).square().sum()), rel=1e-6)
    assert made["effective_rank"] == pytest.approx(mathematics.exp(-float((shares * shares.log()).sum())), rel=1e-6)


def test_two_equal_directions_have_rank_two_by_every_measure(tmp_path):
    made = tensors(MODULES[:1])
    made[f"base_model.model.{MODULES[0]}.lora_A.weight"] = torch.eye(2, 5)
    made[f"base_model.model.{MODULES[0]}.lora_B.weight"] = torch.eye(6, 2)
    write_adapter(tmp_path / "even", made)
    (module,) = json.loads(succeeds("inspect", "even", "--json"))["modules"]
    assert (module["stable_rank"], module["effective_rank"]) == (pytest.approx(2), pytest.approx(2))


def test_a_zero_update_has_rank_zero(tmp_path):
    made = {key: torch.zeros_like(tensor) if "lora_B" in key else tensor for key, tensor in tensors().items()}
    write_adapter(tmp_path / "zero", made)
    modules = json.loads(succeeds("inspect", "zero", "--json"))["modules"]
    assert {(m["norm"], m["stable_rank"], m["effective_rank"]) for m in modules} == {(0.0, 0.0, 0.0)}


def test_inspect_shows_ranges_and_the_rule_of_the_scaling(tmp_path):
    made = tensors(MODULES[:2]) | tensors(MODULES[2:], rank=4)
    write_adapter(tmp_path / "mixed", made, rank_pattern={"layers.1.q_proj": 4, "layers.1.v_proj": 4})
    printed = succeeds("inspect", "mixed")
    assert "rank         2 to 4" in printed
    assert "scaling      1 to 2 (alpha / r, alpha 4, rank_pattern with 2 keys)" in printed


def test_one_of_anything_is_counted_in_the_singular(tmp_path):
    write_adapter(tmp_path / "one", tensors(MODULES[:1]), rank_pattern={"layers.0.q_proj": 2})
    printed = succeeds("inspect", "one")
    assert "rank_pattern with 1 key)" in printed
    assert "in a merge   1 module is merged as factors, without the base model" in printed


def test_inspect_of_an_adapter_without_factors_lists_the_rest(tmp_path):
    write_adapter(tmp_path / "head", {"base_model.model.lm_head.weight": torch.ones(7, 5)}, modules_to_save=["lm_head"])
    printed = succeeds("inspect", "head")
    assert "kind         LoRA" in printed
    assert "beside LoRA  1 saved module: 140 B" in printed
    assert "rank" not in printed


def test_inspect_says_rslora(tmp_path):
    write_adapter(tmp_path / "stable", use_rslora=True)
    printed = succeeds("inspect", "stable")
    assert "kind         rsLoRA\n" in printed
    assert "scaling      2.82843 (alpha / sqrt(r) (rsLoRA), alpha 4)" in printed


MAGNITUDES = {f"model.{module}.lora_magnitude_vector": torch.ones(6) for module in MODULES}
MASKED = {"model.q.lora_A": torch.ones(2, 5), "model.q.lora_B": torch.ones(6, 2), "model.q.lora_E": torch.ones(2, 1)}
KEPT = {"q.lora_E": [True, True, False]}
HADAMARD = {
    **{f"model.q.hada_w{number}_a": torch.ones(6, 2) for number in (1, 2)},
    **{f"model.q.hada_w{number}_b": torch.ones(2, 5) for number in (1, 2)},
}
VECTORS = {
    "model.q.vera_lambda_b": torch.ones(6),
    "model.q.vera_lambda_d": torch.ones(2),
    "vera_A": torch.ones(2, 5),
    "vera_B": torch.ones(6, 2),
}


@pytest.mark.parametrize(
    ("made", "settings", "kind"),
    [
        ({}, {}, "LoRA"),
        (MAGNITUDES, {"use_dora": True}, "DoRA"),
        (MAGNITUDES, {"use_dora": True, "use_rslora": True}, "DoRA, scaled as rsLoRA"),
        (HADAMARD, {"peft_type": "LOHA", "alpha": 4, "lora_alpha": None}, "LoHa (r 2, read as a LoRA of rank 4)"),
        (VECTORS, {"peft_type": "VERA", "lora_alpha": None}, "VeRA (r 2, read as a LoRA of rank 2)"),
        (
            MASKED,
            {"peft_type": "ADALORA", "init_r": 3, "r": 8, "rank_pattern": KEPT},
            "AdaLoRA (r 3, read as a LoRA of rank 2)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inspect_says_what_kind_of_adapter_it_is(tmp_path, made, settings, kind):
    factors = {} if "peft_type" in settings else tensors()
    write_adapter(tmp_path / "own", {**factors, **{f"base_model.{key}": t for key, t in made.items()}}, **settings)
    assert f"  kind         {kind}\n" in succeeds("inspect", "own")
    assert json.loads(succeeds("inspect", "own", "--json"))["kind"] == kind


def test_no_fact_is_wider_than_a_hundred_columns(tmp_path):
    magnitudes = {f"{module}.lora_magnitude_vector": torch.ones(6) for module in MODULES}
    more = {**magnitudes, "lm_head.weight": torch.ones(7, 5)}
    with_more(tmp_path / "dora", more, use_dora=True, modules_to_save=["lm_head"])
    facts = succeeds("inspect", "dora").partition("\n\n")[0].splitlines()
    assert max(map(len, facts)) <= 100
    told = [line for line in facts if "in a merge" in line or line.startswith(" " * 15)]
    assert "low-rank. It is computed exactly from the base model 1 saved module: refused unless" in " ".join(
        " ".join(told).replace("in a merge", "").split()
    )


def test_inspect_tells_embeddings_and_convolutions_from_matrices(tmp_path):
    convolution = {"conv.lora_A.weight": torch.ones(2, 3, 3, 3), "conv.lora_B.weight": torch.ones(4, 2, 1, 1)}
    with_more(tmp_path / "mixed", {**embedding_factors("embed_tokens"), **convolution})
    assert "4 matrices" in succeeds("inspect", "mixed")
    made = json.loads(succeeds("inspect", "mixed", "--json"))["modules"]
    assert {m["module"]: (m["kind"], m["d_out"], m["d_in"]) for m in made if m["module"] not in MODULES} == {
        "embed_tokens": ("embedding", 7, 5),
        "conv": ("convolution", 4, 27),
    }


def test_inspect_lists_what_there_is_beside_lora(tmp_path):
    more = {"lm_head.weight": torch.ones(7, 5), "layers.0.q_proj.base_layer.bias": torch.ones(6)}
    with_more(tmp_path / "more", more, modules_to_save=["lm_head"], bias="lora_only")
    printed = succeeds("inspect", "more")
    assert "beside LoRA  1 bias, 1 saved module: 164 B" in printed
    told = "1 bias, 1 saved module: refused unless the recipe says what becomes of them, with extras: average, delta, "
    assert told + "{from: MODEL} or {from: base_model}" in " ".join(printed.split())
    assert [line.split() for line in printed.splitlines() if line.startswith("lm_head")] == [
        ["lm_head.weight", "saved", "module", "1", "7", "x", "5", "float32", "140", "B"]
    ]
    made = json.loads(succeeds("inspect", "more", "--json"))["extras"]
    assert [(extra["name"], extra["kind"], extra["stored_bytes"]) for extra in made] == [
        ("layers.0.q_proj.bias", "bias", 24),
        ("lm_head.weight", "saved module", 140),
    ]


def test_inspect_lists_token_rows(tmp_path):
    more = {"embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 5)}
    with_more(tmp_path / "tokens", more, trainable_token_indices={"embed_tokens": [3, 6]})
    (extra,) = json.loads(succeeds("inspect", "tokens", "--json"))["extras"]
    assert (extra["kind"], extra["tokens"], extra["shape"]) == ("block of token rows", [3, 6], [2, 5])


def test_inspect_counts_biases_of_lora_b_as_vectors(tmp_path):
    with_more(tmp_path / "biased", {f"{m}.lora_B.bias": torch.ones(6) for m in MODULES}, lora_bias=True)
    printed = succeeds("inspect", "biased")
    assert "modules      4 matrices, 4 vectors" in printed
    assert "4 modules without factors (biases of lora_B) are merged entry by entry" in printed
    vectors = [line.split() for line in printed.splitlines() if " vector " in line]
    assert [row[-2:] for row in vectors] == [["-", "-"], ["-", "-"]]


def test_inspect_of_dora_says_that_it_needs_its_base_and_measures_nothing(tmp_path):
    with_more(tmp_path / "dora", {f"{m}.lora_magnitude_vector": torch.ones(6) for m in MODULES}, use_dora=True)
    printed = succeeds("inspect", "dora")
    assert "4 modules; the recipe needs base_model: it is a DoRA adapter" in printed
    assert "norm" not in printed
    made = json.loads(succeeds("inspect", "dora", "--json"))
    assert "DoRA" in made["needs_base"]
    assert (made["norm"], made["modules"][0]["norm"]) == (None, None)


def test_inspect_of_a_whole_model_reads_its_headers(tmp_path):
    model = write_model(tmp_path / "tuned")
    (model / "model.safetensors").write_bytes(
        b"".join([(model / "model.safetensors").read_bytes()[:-4], b"\0\0\xc0\x7f"])
    )
    printed = succeeds("inspect", "tuned")
    assert "format       model\n" in printed
    assert "kind         a whole model: a base, or what was tuned from one\n" in printed
    assert "modules      4 matrices, 1 vector\n" in printed
    assert "5 differences to its base are merged; the recipe needs base_model" in printed
    assert "scaling " not in printed.partition("modules  ")[0]
    assert "norm: of the update" not in printed
    assert json.loads(succeeds("inspect", "tuned", "--json"))["scaling_rule"] is None


def test_inspect_of_llava_lists_the_side_file(tmp_path):
    write_adapter(tmp_path / "llava")
    torch.save({"model.mm_projector.weight": torch.ones(4, 3)}, tmp_path / "llava" / "non_lora_trainables.bin")
    assert "beside LoRA  1 side tensor: 48 B" in succeeds("inspect", "llava")


def test_inspect_names_a_tensor_that_nothing_handles(tmp_path):
    write_adapter(tmp_path / "more", {**tensors(), "base_model.model.q.lora_C.weight": torch.ones(2, 2)})
    result = run("inspect", "more")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "q.lora_C.weight" in result.stderr


def test_inspect_names_a_tensor_that_is_not_finite(tmp_path):
    made = tensors()
    made["base_model.model.layers.0.q_proj.lora_A.weight"][0, 0] = float("nan")
    write_adapter(tmp_path / "broken", made)
    result = run("inspect", "broken")
    assert result.exit_code == 2
    assert "layers.0.q_proj.lora_A.weight' holds 1 NaN" in result.stderr


def test_inspect_of_nothing_names_the_path(tmp_path):
    result = run("inspect", "./nothing")
    assert result.exit_code == 2
    assert f"there is no {tmp_path / 'nothing'}" in result.stderr


def test_inspect_prints_no_control_characters(tmp_path):
    write_adapter(tmp_path / "evil", base_model_name_or_path="org/base\x1b[2J")
    assert "\x1b" not in succeeds("inspect", "evil")


def test_inspect_defines_its_ranks_in_the_help():
    printed = " ".join(succeeds("inspect", "--help").split())
    assert "Stable rank is the squared norm over the squared largest singular value" in printed
    assert "effective rank is e to the entropy of the singular values" in printed
