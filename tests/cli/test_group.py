"""Exit statuses, help, and what is loaded: some of it through a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import click
import pytest
import torch

from mergekit_lowrank import __version__
from mergekit_lowrank.cli import main
from mergekit_lowrank.errors import DiskError, RecipeError

from .builders import run, succeeds

HEAVY = {"torch", "transformers", "huggingface_hub", "tqdm"}
COMMANDS = ("completion", "finalize", "init", "inspect", "merge", "plan", "plugins", "schema", "strategies")

SLOW = """
import os, time
from mergekit_lowrank.cli import main
from mergekit_lowrank.progress import ProgressBar
from mergekit_lowrank.events import ModuleMerged

def slow(self, event):
    if isinstance(event, ModuleMerged):
        os.write(1, b"merged\\n")  # in one piece, whatever other threads write
        time.sleep(60)

ProgressBar.handle = slow
main(prog_name="mergekit-lowrank")
"""


def process(*arguments, **options):
    command = [sys.executable, "-m", "mergekit_lowrank.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def raising(monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr("mergekit_lowrank.cli.plugins.run_plugins", fail)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help_with_an_example(command, option):
    printed = succeeds(command, option)
    assert f"Example:\n    mergekit-lowrank {command}" in printed
    for shared in ("--quiet", "--debug", "-h, --help"):
        assert shared in printed


def test_the_group_lists_its_commands_untruncated():
    printed = succeeds("--help")
    assert all(f"\n  {command} " in printed for command in COMMANDS)
    assert "..." not in printed.partition("Commands:")[2]


def test_version():
    assert __version__ in succeeds("--version")


def test_no_command_shows_help_as_an_error():
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Commands:" in result.stderr


def test_an_unknown_command_is_a_usage_error():
    result = run("marge")
    assert result.exit_code == 2
    assert "error: No such command 'marge'" in result.stderr


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RecipeError("the recipe is odd"), "error: the recipe is odd\n"),
        (OSError(28, "No space left on device", "/disk/out"), "error: /disk/out: No space left on device\n"),
        (OSError("no device"), "error: no device\n"),
        (DiskError("out: the disk is full; run it again"), "error: out: the disk is full; run it again\n"),
        (MemoryError(), "error: out of memory (no more could be had). Let the merge hold less with --memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: out of memory (CUDA out of memory). "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory (DefaultCPUAllocator"),
        (click.UsageError("not so"), "error: not so\n"),
    ],
)
def test_faults_of_input_recipe_or_disk_give_2_and_no_traceback(monkeypatch, error, text):
    raising(monkeypatch, error)
    result = run("plugins")
    assert (result.exit_code, result.stdout) == (2, "")
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_any_other_error_is_called_a_bug_and_gives_1(monkeypatch):
    raising(monkeypatch, KeyError("lost"))
    result = run("plugins")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: this is a bug in mergekit-lowrank: KeyError: 'lost'\nPlease report it")


@pytest.mark.parametrize("arguments", [("--debug", "plugins"), ("plugins", "--debug")])
@pytest.mark.parametrize("error", [KeyError("lost"), RecipeError("the recipe is odd")])
def test_debug_shows_the_traceback_as_well(monkeypatch, arguments, error):
    raising(monkeypatch, error)
    result = run(*arguments)
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert "\nerror: " in result.stderr


def test_an_interrupt_gives_130(monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    result = run("plugins")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted: nothing was written"


def test_the_group_can_be_called_from_python():
    assert main(["schema"], standalone_mode=False) is None
    with pytest.raises(click.UsageError):
        main(["marge"], standalone_mode=False)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("merge", "--help"), ("--version",), ("merge",), ("plan", "--frob"), ("schema",)]
)
def test_help_usage_errors_and_the_schema_load_nothing_heavy(arguments):
    code = "import sys\nfrom mergekit_lowrank.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    loaded = set(finished.stdout.splitlines()[-1].split())
    assert "mergekit_lowrank.cli.commands" in loaded
    assert not loaded & HEAVY


def test_a_merge_ends_with_0_and_off_a_terminal_without_progress(recipe):
    finished = process("merge", recipe, "out")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith("Merged 2 adapters")


def test_a_recipe_that_is_not_there_ends_with_2_and_without_a_traceback(tmp_path):
    finished = process("merge", "nothing.yaml", "out")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "error: nothing.yaml: there is no such file\n"


@pytest.mark.parametrize(
    ("executor", "number", "status", "word"),
    [("serial", signal.SIGTERM, 143, "terminated"), ("threads", signal.SIGINT, 130, "interrupted")],
)
def test_a_merge_that_is_stopped_goes_on_when_it_is_run_again(recipe, tmp_path, executor, number, status, word):
    succeeds("merge", recipe, "whole")
    command = [sys.executable, "-c", SLOW, "merge", str(recipe), "out", "--executor", executor]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "merged\n"
    running.send_signal(number)
    _, complaint = running.communicate(timeout=60)
    assert running.returncode == status
    assert complaint.strip() == f"{word}: the work so far is kept; run the same command again to go on"
    assert not (tmp_path / "out").exists()
    succeeds("merge", recipe, "out", "--executor", executor)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"math", "code", "recipe.yaml", "out", "whole"}


def test_output_that_nobody_reads_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mergekit_lowrank.cli", "schema"]
    finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110 - a device
def test_a_full_disk_under_stdout_gives_2():
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        command = [sys.executable, "-m", "mergekit_lowrank.cli", "schema"]
        finished = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.strip() == "error: [Errno 28] No space left on device"


def test_letters_that_a_terminal_lacks_do_not_stop_it():
    finished = process("strategies", "ties", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert finished.returncode == 0
    assert "density" in finished.stdout
