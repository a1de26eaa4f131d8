from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from .builders import MODULES, run, succeeds, tensors, write_adapter, write_model


@pytest.fixture
def tuned(tmp_path):
    """A fine-tune of ``base`` that changed two matrices."""
    base, made = write_model(tmp_path / "base"), write_model(tmp_path / "tuned")
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for module in MODULES[:2]:
        weights[f"{module}.weight"] += torch.randn(6, 5, generator=generator)
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


def test_convert_says_what_came_back(math, tmp_path):
    printed = succeeds("convert", "math", "again", "--format", "peft")
    assert printed.splitlines() == [
        "Converted math (peft) to peft: 4 modules, 352 B",
        "  files    adapter_config.json, adapter_model.safetensors",
        "  tensors  all 8 came back bit for bit",
        "  scaling  came back exactly",
    ]
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("math", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_convert_as_json(math):
    made = json.loads(succeeds("convert", "math", "again", "--format", "peft", "--json"))
    assert (made["modules"], made["tensors"], made["is_read_back"], made["not_kept"]) == (4, 8, True, [])


def test_a_quiet_conversion_says_nothing(math, tmp_path):
    assert succeeds("convert", "math", "again", "--format", "peft", "--quiet") == ""
    assert (tmp_path / "again").is_dir()


def test_convert_to_an_unknown_format_names_those_there_are(math, tmp_path):
    result = run("convert", "math", "out", "--format", "pft")
    assert result.exit_code == 2
    assert "unknown format to write 'pft'; did you mean 'peft'?" in result.stderr
    assert not (tmp_path / "out").exists()


def test_convert_replaces_only_what_it_may(math):
    succeeds("convert", "math", "again", "--format", "peft")
    result = run("convert", "math", "again", "--format", "peft")
    assert result.exit_code == 2
    assert "again: exists already" in result.stderr
    succeeds("convert", "math", "again", "--format", "peft", "--overwrite")


def test_resize_prints_ranks_and_errors(math):
    lines = succeeds("resize", "math", "small", "--rank", "1").splitlines()
    assert lines[0] == "Resized math to rank 1: 4 modules, float32, 176 B"
    assert lines[2].split() == ["modules", "count", "rank", "energy", "kept", "error"]
    assert [line.split()[:3] for line in lines[3:5]] == [["q_proj", "2", "1"], ["v_proj", "2", "1"]]


def test_resize_as_json_has_every_module(math):
    made = json.loads(succeeds("resize", "math", "small", "--rank", "energy:0.9", "--json"))
    assert [module["module"] for module in made["modules"]] == list(MODULES)
    assert all(module["kept_energy"] >= 0.9 for module in made["modules"])
    assert made["largest_error"] == max(module["cut_error"] for module in made["modules"])


def test_resize_gives_modules_their_own_ranks_where_asked(tmp_path):
    made = tensors(rank=4)
    made[f"base_model.model.{MODULES[0]}.lora_B.weight"][:, 1:] = 0
    write_adapter(tmp_path / "wide", made, r=4)
    printed = succeeds("resize", "wide", "small", "--rank", "error:0.01", "--own-ranks")
    assert "Resized wide to ranks 1 to 4" in printed


def test_a_bad_rank_is_named_with_examples(math, tmp_path):
    result = run("resize", "math", "small", "--rank", "half")
    assert result.exit_code == 2
    assert "rank 'half': expected a whole number of at least 1, energy:E with 0 < E <= 1" in result.stderr
    assert not (tmp_path / "small").exists()


def test_a_resize_says_which_modules_are_padded(math, tmp_path):
    made = tensors(rank=4)
    made[f"base_model.model.{MODULES[0]}.lora_B.weight"][:, 1:] = 0
    write_adapter(tmp_path / "wide", made, r=4)
    told = "rank: of the update; 1 module is padded with zeros to rank 4"
    assert told in succeeds("resize", "wide", "small", "--rank", "error:0.01").splitlines()
    assert "rank: of the update; 4 modules are padded with zeros to rank 3" in succeeds(
        "resize", "math", "3", "--rank", "3"
    )
    assert "padded" not in succeeds("resize", "wide", "own", "--rank", "error:0.01", "--own-ranks")


def test_a_resize_that_needs_a_base_asks_for_the_option(tmp_path):
    magnitudes = {f"base_model.model.{module}.lora_magnitude_vector": torch.ones(6) for module in MODULES}
    write_adapter(tmp_path / "dora", {**tensors(), **magnitudes}, use_dora=True)
    result = run("resize", "dora", "small", "--rank", "1")
    assert result.exit_code == 2
    assert "'dora': it is a DoRA adapter" in result.stderr
    assert "Give the base model: --base DIR" in result.stderr
    assert "recipe" not in result.stderr


def test_a_quiet_resize_prints_warnings_only(math):
    assert succeeds("resize", "math", "small", "--rank", "1", "--quiet") == ""


def test_extract_prints_ranks_and_errors(tuned, tmp_path):
    lines = succeeds("extract", "tuned", "out", "--base", "base", "--rank", "2").splitlines()
    assert lines[0].startswith("Extracted rank 2 from tuned: ")
    assert {line.split()[0] for line in lines[3:5]} == {"q_proj", "v_proj"}
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_extract_needs_a_base(tuned):
    result = run("extract", "tuned", "out", "--rank", "2")
    assert result.exit_code == 2
    assert "--base" in result.stderr


def test_extract_names_a_changed_norm_and_takes_a_policy(tuned):
    weights = load_file(tuned / "model.safetensors")
    save_file({**weights, "norm.weight": torch.zeros(20)}, tuned / "model.safetensors", metadata={"format": "pt"})
    result = run("extract", "tuned", "out", "--base", "base", "--rank", "2")
    assert result.exit_code == 2
    assert "'tuned' changed a tensor that no factors hold: 'norm.weight'" in result.stderr
    assert "--extras, in Python extras: average or delta (saved whole), or base_model (left out" in result.stderr
    assert "recipe" not in result.stderr
    succeeds("extract", "tuned", "out", "--base", "base", "--rank", "2", "--extras", "base_model")
    succeeds("extract", "tuned", "again", "--base", "base", "--rank", "2", "--extras", "{from: base_model}")


def test_extract_names_a_place_by_its_command(tuned):
    result = run("extract", "tuned", "out", "--base", "./nothing", "--rank", "2")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: extract: './nothing': there is no ")


def test_an_unknown_policy_of_extract_is_named_with_those_there_are(tuned):
    result = run("extract", "tuned", "out", "--base", "base", "--rank", "2", "--extras", "drop")
    assert result.exit_code == 2
    assert (
        "extras 'drop': expected error (they are named), average or delta (saved whole), or base_model" in result.stderr
    )


def test_what_nothing_reads_is_said_not_to_be_read_back(tmp_path):
    write_adapter(tmp_path / "math", tensors(("model.layers.0.mlp.up_proj",)))
    (tmp_path / "base").mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 5}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    printed = succeeds("convert", "math", "out", "--format", "gguf", "--base", "base")
    assert printed.splitlines() == [
        "Converted math (peft) to gguf: 1 module",
        "  files      adapter.gguf",
        "  read back  no: nothing that is installed reads gguf, so nothing was compared",
    ]


def test_extract_leaves_what_is_there_unless_it_may_replace_it(tuned):
    arguments = ("extract", "tuned", "out", "--base", "base", "--rank", "2")
    succeeds(*arguments)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "out: exists already" in result.stderr
    succeeds(*arguments, "--overwrite", "--memory", "512MiB", "--json")
