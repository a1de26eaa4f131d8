from __future__ import annotations

import json

import pytest
import torch

from mergekit_lowrank.servers import SERVERS

from .builders import MODULES, run, succeeds, tensors, write_adapter

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
    assert "Write it anew: mergekit-lowrank merge --method linear ADAPTER -o OUT" in result.stdout


def test_the_advice_helps(rslora):
    succeeds("merge", "--method", "linear", "rslora", "-o", "anew")
    assert "ok" in succeeds("check", "anew", "--target", "sglang")


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
