"""``--log-json``: every line is JSON, and the last one tells how the command ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from mergekit_lowrank.cli.logs import JsonLog, open_log
from mergekit_lowrank.events import ModuleMerged

from .builders import MODULES, run, succeeds, tree


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_the_log_of_a_merge_holds_every_event(recipe, tmp_path):
    succeeds("merge", recipe, "out", "--log-json", "log.jsonl")
    started, *merged, finished, ended = lines_of((tmp_path / "log.jsonl").read_text())
    assert (started["event"], started["modules"], started["method"]) == ("MergeStarted", 4, "ties")
    assert started["inputs"] == ["math", "code"]
    assert started["recipe"]["models"][0]["model"] == "math"
    assert sorted(line["module"] for line in merged) == sorted(MODULES)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    entries = {entry["module"]: entry for entry in report["modules"]}
    for line in merged:
        entry = entries[line["module"]]
        assert {name: entry[name] for name in line["measures"]} == line["measures"]
        assert line["measures"]["merged_norm"] > 0
    assert finished["totals"]["merged_norm"] == report["totals"]["merged_norm"]
    assert finished["warnings"] == report["warnings"]
    assert ended["event"] == "CommandEnded"
    assert (ended["exit_status"], "message" in ended) == (0, False)


def test_every_line_has_its_time_in_utc(recipe, tmp_path):
    succeeds("merge", recipe, "out", "--log-json", "log.jsonl")
    times = [datetime.fromisoformat(line["time"]) for line in lines_of((tmp_path / "log.jsonl").read_text())]
    assert times == sorted(times)
    assert {time.utcoffset() for time in times} == {timedelta(0)}


def test_a_log_is_gone_on_with_at_its_end(recipe, tmp_path):
    for output in ("a", "b"):
        succeeds("merge", recipe, output, "--quiet", "--log-json", "log.jsonl")
    ends = [line for line in lines_of((tmp_path / "log.jsonl").read_text()) if line["event"] == "CommandEnded"]
    assert len(ends) == 2


def test_on_stderr_there_is_nothing_but_json(recipe, code):
    config = json.loads((code / "adapter_config.json").read_text())
    (code / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    for options in ((), ("--quiet",), ("--overwrite",)):
        result = run("merge", recipe, f"out{len(options)}", *options, "--log-json", "-")
        told = lines_of(result.stderr)
        assert told[-1]["exit_status"] == result.exit_code
        assert any("org/other" in line.get("message", "") for line in told) == (result.exit_code == 2)


def test_a_failure_is_the_last_line_with_its_message_and_status(recipe, tmp_path, math):
    (math / "adapter_model.safetensors").write_bytes(b"broken")
    before = tree(math)
    result = run("merge", recipe, "out", "--log-json", "log.jsonl")
    *_, last = lines_of((tmp_path / "log.jsonl").read_text())
    assert (last["event"], last["exit_status"], result.exit_code) == ("CommandEnded", 2, 2)
    assert last["message"] == result.stderr.rstrip("\n")
    assert tree(math) == before


def test_a_failure_under_way_is_an_event_as_well(recipe, math):
    path = math / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\xc0\x7f")
    result = run("merge", recipe, "out", "--log-json", "-", "--executor", "serial", "--debug")
    *_, failed, last = lines_of(result.stderr)
    assert failed["event"] == "MergeFailed"
    assert last["message"] == f"error: {failed['message']}"
    assert last["traceback"].startswith("Traceback (most recent call last):")


def test_a_file_that_cannot_be_written_is_an_error_before_work_begins(recipe, tmp_path):
    before = tree(tmp_path)
    for target, why in (("no/such/log", "No such file or directory"), (".", "Is a directory")):
        result = run("merge", recipe, "out", "--log-json", target)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{target} cannot be written: {why}" in result.stderr
    assert tree(tmp_path) == before


def test_a_usage_error_is_logged_too(recipe, tmp_path):
    result = run("merge", recipe, "out", "--workers", "0", "--log-json", "log.jsonl")
    (line,) = lines_of((tmp_path / "log.jsonl").read_text())
    assert (line["exit_status"], result.exit_code) == (2, 2)
    assert "--workers" in line["message"]


def test_finalize_logs_what_it_made(recipe, tmp_path):
    for part in ("0/2", "1/2"):
        succeeds("merge", recipe, "out", "--shard", part, "--log-json", f"{part[0]}.jsonl")
    succeeds("finalize", "out", "--log-json", "log.jsonl")
    parts = [lines_of((tmp_path / f"{part}.jsonl").read_text()) for part in (0, 1)]
    assert [own[0]["modules"] for own in parts] == [2, 2]
    finished, ended = lines_of((tmp_path / "log.jsonl").read_text())
    assert (finished["event"], finished["location"], finished["totals"]["modules"]) == ("MergeFinished", "out", 4)
    assert ended["exit_status"] == 0


def test_the_modules_of_a_sweep_carry_their_variant(recipe, tmp_path):
    recipe.write_text(recipe.read_text() + "sweep: {scale: [1, 0.5]}\n")
    succeeds("merge", recipe, "out", "--log-json", "log.jsonl")
    started, *merged, finished, _ = lines_of((tmp_path / "log.jsonl").read_text())
    variants = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert started["modules"] == len(merged) == 8
    assert sorted({line["variant"] for line in merged}) == sorted(finished["totals"]) == variants


def test_lines_come_as_things_happen_and_an_interrupt_is_the_last(recipe):
    slow = (
        "import time\n"
        "from mergekit_lowrank.cli import main\n"
        "from mergekit_lowrank.cli.logs import JsonLog\n"
        "write = JsonLog.handle\n"
        "JsonLog.handle = lambda self, event: write(self, event) or 'method' in vars(event) and time.sleep(60)\n"
        "main(prog_name='mergekit-lowrank')\n"
    )
    command = [sys.executable, "-c", slow, "merge", str(recipe), "out", "--log-json", "-"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        first = json.loads(process.stderr.readline())
        os.kill(process.pid, signal.SIGINT)
        rest = lines_of(process.stderr.read())
    assert first["event"] == "MergeStarted"
    assert (rest[-1]["exit_status"], process.returncode) == (130, 130)
    assert rest[-1]["message"].startswith("interrupted: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")  # noqa: PTH110
def test_a_log_that_fails_does_not_fail_the_merge(recipe, tmp_path):
    succeeds("merge", recipe, "out", "--log-json", "/dev/full")
    (warning,) = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert warning.startswith("reporter 'log-json' failed and was left out: OSError")


def test_numbers_that_json_lacks_are_null(tmp_path):
    log = open_log(str(tmp_path / "log"))
    log.handle(ModuleMerged("m", 1, float("inf"), {"scale": float("nan")}))
    log.end(0, "", "")
    assert isinstance(log, JsonLog)
    line, _ = lines_of((tmp_path / "log").read_text())
    assert (line["wall_seconds"], line["measures"]) == (None, {"scale": None})
