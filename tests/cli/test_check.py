from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lowrank.cli import main
from mergekit_lowrank.servers import SERVERS

from .builders import MODULES, run, succeeds, tensors, write_adapter, write_config, write_model

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def rslora(tmp_path):
    return write_adapter(tmp_path / "rslora", use_rslora=True, target_modules=TARGETS)


def test_check_of_a_target_that_loads_it_is_quiet(math):
    assert succeeds("check", "math", "--target", "vllm") == "math in vllm, by the rules of vLLM 0.33.0: ok\n"


def test_check_of_a_target_that_misapplies_it_exits_with_2(rslora):
    result = run("check", "rslora", "--target", "sglang")
    assert result.exit_code == 2
    assert result.stdout.splitlines()[0] == "rslora in sglang, by the rules of SGLang 0.5.23: 1 problem"
    assert "problem  SGLang computes lora_alpha / r, without rsLoRA and patterns, so 4 of 4 updates" in result.stdout
    assert "0.707 times as strong" in result.stdout
    assert "Write it anew: mergekit-lowrank merge --method linear rslora -o rslora-served/" in result.stdout


def advised(directory, target):
    """The command that the advice holds, as words."""
    (line,) = [line for line in run("check", directory, "--target", target).stdout.splitlines() if "lowrank " in line]
    return line.partition("mergekit-lowrank ")[2].removesuffix(".").partition(" puts")[0].split()


def test_the_advice_on_scaling_helps(rslora):
    succeeds(*advised("rslora", "sglang"))
    assert succeeds("check", "rslora-served", "--target", "sglang").endswith("ok\n")


def test_the_advice_on_ranks_helps(tmp_path):
    write_adapter(tmp_path / "wide", tensors(rank=520, d_out=530, d_in=530), r=520, lora_alpha=520)
    succeeds(*advised("wide", "vllm"))
    assert "ok" in succeeds("check", "wide-512", "--target", "vllm")


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_the_advice_on_vera_helps(tmp_path, target):
    own = {
        f"{module}.vera_lambda_{side}": torch.ones(size) for module in MODULES for side, size in (("b", 6), ("d", 2))
    }
    shared = {"base_model.vera_A": torch.ones(2, 5), "base_model.vera_B": torch.ones(6, 2)}
    made = {**shared, **{f"base_model.model.{key}": tensor for key, tensor in own.items()}}
    write_config(tmp_path / "vera", peft_type="VERA", target_modules=TARGETS)
    config = json.loads((tmp_path / "vera" / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (tmp_path / "vera" / "adapter_config.json").write_text(json.dumps(config))
    save_file(made, tmp_path / "vera" / "adapter_model.safetensors")
    assert "DoRA" not in run("check", "vera").stdout
    write_model(tmp_path / "BASE")
    succeeds(*advised("vera", target))
    assert succeeds("check", "vera-lora", "--target", target).endswith("ok\n")


def test_one_remedy_of_several_problems_is_printed_once(tmp_path):
    beside = {"layers.0.q_proj.lora_B.bias": torch.ones(6), "norm.weight": torch.ones(6)}
    made = {**tensors(), **{f"base_model.model.{key}": tensor for key, tensor in beside.items()}}
    write_adapter(tmp_path / "both", made, lora_bias=True, modules_to_save=["norm"])
    printed = run("check", "both", "--target", "llama.cpp").stdout
    assert printed.count("problem  ") == 3
    assert printed.count("Fold it into the base model") == 1


def test_a_gguf_file_is_written_here_and_not_read(tmp_path):
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "adapter.gguf").write_bytes(b"GGUF")
    for name in ("written", "written/adapter.gguf"):
        result = run("check", name, "--target", "llama.cpp")
        assert result.exit_code == 2
        assert "adapter.gguf' is a GGUF file, which is written here and not read" in result.stderr


def test_a_directory_that_is_nothing_is_told_so(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a checkpoint of a known format" in run("check", "empty", "--target", "llama.cpp").stderr


def test_on_a_terminal_problems_are_wrapped_under_themselves(rslora, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    main(["check", "rslora", "--target", "sglang"], standalone_mode=False)
    first, problem, *rest = terminal.getvalue().splitlines()
    assert max(map(len, (first, problem, *rest))) <= 100
    assert problem.startswith("  problem  SGLang")
    assert all(line.startswith(" " * 11) for line in rest)


def test_remarks_do_not_fail(tmp_path):
    write_adapter(tmp_path / "wide", tensors(rank=40, d_out=64, d_in=64), r=40)
    printed = succeeds("check", "wide", "--target", "vllm")
    assert "ok, 1 remark" in printed
    assert "Start it with --max-lora-rank 64." in printed


def test_problems_come_before_remarks(tmp_path):
    made = {**tensors(rank=40, d_out=64, d_in=64), "base_model.model.layers.0.q_proj.lora_B.bias": torch.ones(64)}
    write_adapter(tmp_path / "both", made, r=40, lora_bias=True)
    lines = run("check", "both", "--target", "vllm").stdout.splitlines()
    assert lines[0].endswith("1 problem, 1 remark")
    assert [line.split()[0] for line in lines if line.startswith(("  problem", "  remark"))] == ["problem", "remark"]


def test_check_of_all_servers_has_a_line_for_each(rslora):
    lines = succeeds("check", "rslora").splitlines()
    assert [line.split()[0] for line in lines] == ["server", *SERVERS]
    assert lines[1].endswith("ok")
    assert "1 problem: SGLang computes" in lines[2]
    assert lines[2].endswith(" …")
    assert max(map(len, lines)) < 100


def test_check_in_json(rslora):
    result = run("check", "rslora", "--target", "sglang", "--json")
    assert result.exit_code == 2
    made = json.loads(result.stdout)
    (server,) = made["servers"]
    assert (made["location"], server["server"], server["version"]) == ("rslora", "sglang", "SGLang 0.5.23")
    assert server["is_fatal"]
    assert [sorted(verdict) for verdict in server["verdicts"]] == [["advice", "is_fatal", "what"]]
    assert len(json.loads(succeeds("check", "rslora", "--json"))["servers"]) == len(SERVERS)


def test_an_unknown_server_is_a_usage_error(math):
    result = run("check", "math", "--target", "vlm")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'vlm' is none of vllm, sglang, llama.cpp, diffusers, comfyui. Did you mean vllm?" in result.stderr


def test_check_reads_no_tensor(tmp_path):
    made = tensors()
    made[f"base_model.model.{MODULES[0]}.lora_A.weight"][0, 0] = float("nan")
    write_adapter(tmp_path / "broken", made)
    assert "ok" in succeeds("check", "broken", "--target", "vllm")


def test_check_prints_no_control_characters(tmp_path):
    write_adapter(tmp_path / "evil", target_modules="a\x1b[2J")
    assert "\x1b" not in run("check", "evil", "--target", "sglang").stdout
