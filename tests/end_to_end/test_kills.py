"""SIGKILL at random moments, and SIGTERM to the command line, in real processes."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergekit_lowrank import InterruptedMergeError, merge
from mergekit_lowrank.engine.journal import read_lines
from mergekit_lowrank.events import ModuleMerged
from mergekit_lowrank.formats import WORK_DIRECTORY
from mergekit_lowrank.testing import write_tiny_adapter
from tests.crashes.killing import Killer
from tests.end_to_end.unfinished import Follower, files, followed, partial_of

pytestmark = pytest.mark.slow

MODULES = {f"layers.{layer}.q": (192, 160) for layer in range(24)}


def recipe_of(root: Path, **keys) -> dict:
    paths = [write_tiny_adapter(root / f"in{seed}", MODULES, rank=8, seed=seed) for seed in (1, 2)]
    return {"merge_method": "ties", "models": [{"model": str(path)} for path in paths], **keys}


@pytest.mark.parametrize("rank", [8, pytest.param({"energy": 0.5}, marks=pytest.mark.exhaustive)])
def test_whatever_the_moment_of_a_kill_the_bytes_are_the_same(tmp_path, rank) -> None:
    (tmp_path / "merges").mkdir()
    killer = Killer(recipe_of(tmp_path, output={"rank": rank}), tmp_path / "merges")
    kills = list(killer.kills(6))
    assert [kill.is_same for kill in kills] == [True] * 6


def test_the_death_of_a_worker_is_an_error_and_its_merge_is_gone_on_with(tmp_path) -> None:
    class Murderer(Follower):
        def handle(self, event) -> None:
            super().handle(event)
            if isinstance(event, ModuleMerged) and self.merged == 2:
                for process in multiprocessing.active_children():
                    process.kill()

    recipe, out = recipe_of(tmp_path), tmp_path / "out"
    expected = followed(recipe, out) and files(out)
    shutil.rmtree(out)
    with pytest.raises(InterruptedMergeError, match="The work so far is kept; run the same merge again to go on"):
        merge(recipe, out, executor="processes", workers=2, reporters=[Murderer()])
    assert 0 < followed(recipe, out).merged <= len(MODULES) - 2
    assert files(out) == expected


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_told_to_end_keeps_its_work_and_goes_on(tmp_path, number, status) -> None:
    paths = [recipe["model"] for recipe in recipe_of(tmp_path)["models"]]
    command = [sys.executable, "-m", "mergekit_lowrank.cli", "merge", "--method", "ties", *paths, "--quiet"]
    command += ["--executor", "serial", "-o"]
    out, journal = tmp_path / "out", partial_of(tmp_path / "out") / WORK_DIRECTORY / "journal.jsonl"
    merging = subprocess.Popen([*command, out], stderr=subprocess.PIPE, text=True)
    while merging.poll() is None and not any("receipt" in line for line in read_lines(journal)):
        time.sleep(0.002)
    os.kill(merging.pid, number)
    said = merging.communicate()[1]
    assert merging.returncode == status, said
    assert "the work so far is kept; run the same command again to go on" in said
    assert not out.exists()
    finished = sum("receipt" in line for line in read_lines(journal))
    assert 0 < finished < len(MODULES)
    again = subprocess.run([*command, out], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    subprocess.run([*command, tmp_path / "alone"], check=True)
    assert files(out)["adapter_model.safetensors"] == files(tmp_path / "alone")["adapter_model.safetensors"]
