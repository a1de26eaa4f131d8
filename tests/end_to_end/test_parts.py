"""A merge made in parts, on one machine or on many: the same bytes, and nothing that only looks finished."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mergekit_lowrank import Adapter, Executor, OutputError, Registry, finalize, hookimpl, merge
from mergekit_lowrank.cli import main
from mergekit_lowrank.executors import ProcessExecutor
from mergekit_lowrank.hookspecs import ENTRY_POINT_GROUP
from mergekit_lowrank.testing import write_tiny_adapter
from tests.distributions import write_metadata
from tests.docs.pages import blocks

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    f"layers.{layer}.{name}": shape
    for layer in range(4)
    for name, shape in {"q": (12, 10), "v": (12, 10), "up": (24, 10), "down": (10, 24)}.items()
}
TIMES = ("report.html", "timings.json")  # the only files that no two merges agree on


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in TIMES
    }


def adapters(root: Path, count: int = 3) -> list[dict[str, str]]:
    paths = [write_tiny_adapter(root / f"in{seed}", MODULES, rank=4, seed=seed) for seed in range(count)]
    return [{"model": str(path)} for path in paths]


def write_model(path: Path, seed: int, *, layers: int = 2) -> Path:
    """Whole weights in three files. The output layer is the embedding, stored in the first of them and in the last."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (9, 8), "model.norm.weight": (8,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": (8, 8) for name in ("self_attn.q_proj", "mlp.up_proj")}
        shapes |= {f"model.layers.{layer}.input_layernorm.weight": (8,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    names = [*tensors]
    shards = [names[:2], names[2:-1], names[-1:]]
    path.mkdir()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in shard}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def fold_of_adapters(root: Path) -> dict[str, object]:
    base = write_model(root / "base", 7)
    modules = {f"model.layers.{layer}.self_attn.q_proj": (8, 8) for layer in range(2)}
    paths = [write_tiny_adapter(root / f"in{seed}", modules, rank=2, seed=seed) for seed in range(2)]
    models = [{"model": str(path)} for path in paths]
    return {"merge_method": "ties", "models": models, "base_model": str(base), "output": {"kind": "model"}}


def fine_tunes(root: Path) -> dict[str, object]:
    paths = [write_model(root / name, seed) for seed, name in enumerate(("base", "one", "two"))]
    models = [{"model": str(path)} for path in paths[1:]]
    return {"merge_method": "linear", "models": models, "base_model": str(paths[0]), "output": {"kind": "model"}}


def of_adapters(**keys: object):
    return lambda root: {"merge_method": "linear", **keys, "models": adapters(root)}


RECIPES = {
    "known ranks": of_adapters(),
    "ranks from the data": of_adapters(merge_method="robustmerge", output={"rank": {"energy": 0.9}}),
    "a budget": of_adapters(output={"rank": {"budget": "20kB"}, "uniform_rank": False}),
    "thresholds of the model": of_adapters(merge_method="ties", parameters={"scope": "model", "density": 0.3}),
    "random numbers": of_adapters(merge_method="dare_ties", seed=3),
    "a sweep": of_adapters(sweep={"parameters.weight": [1.0, 0.5], "output.rank": ["sum", "max"]}),
    "adapters in a model": fold_of_adapters,
    "adapters in a model of other files": lambda root: {
        **fold_of_adapters(root),
        "output": {"kind": "model", "shard_size": "600B"},
    },
    "fine-tunes": fine_tunes,
    "a sweep of models": lambda root: {
        **fine_tunes(root),
        "sweep": [{"name": "b", "scale": 1}, {"name": "a", "scale": 2}],
    },
}


@pytest.mark.parametrize("case", RECIPES)
def test_parts_in_any_order_make_the_bytes_of_a_merge_in_one_piece(tmp_path: Path, case: str) -> None:
    recipe = RECIPES[case](tmp_path)
    merge(recipe, tmp_path / "whole")
    for index in (2, 0, 3, 1):
        merge(recipe, tmp_path / "out", shard=(index, 4))
        assert not (tmp_path / "out").exists()
    finalize(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_parts_may_be_made_at_once(tmp_path: Path) -> None:
    recipe = of_adapters(merge_method="ties")(tmp_path)
    merge(recipe, tmp_path / "whole")
    makers = [
        threading.Thread(target=merge, args=(recipe, tmp_path / "out"), kwargs={"shard": (n, 3), "executor": "serial"})
        for n in range(3)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    finalize(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_parts_are_put_together_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of the recipe start from where it was, and stand in the output as in a merge in one piece."""
    adapters(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: linear\nmodels: [{model: in0}, {model: ./in1}]\nbase_model: in2\n"
    )
    monkeypatch.chdir(tmp_path)
    merge("recipe.yaml", "whole")
    merge("recipe.yaml", "out", shard=(0, 2))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    merge("../recipe.yaml", "../out", shard=(1, 2))
    finalize("../out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_parts_are_equal_in_bytes(tmp_path: Path) -> None:
    recipe = of_adapters()(tmp_path)
    reports = [merge(recipe, tmp_path / "out", shard=(index, 4)) for index in range(4)]
    sizes = [sum(sum(MODULES[module["module"]]) for module in report.modules) for report in reports]
    assert sum(sizes) == sum(map(sum, MODULES.values()))
    assert max(sizes) - min(sizes) <= max(map(sum, MODULES.values()))


def test_there_may_be_more_parts_than_modules(tmp_path: Path) -> None:
    recipe = fold_of_adapters(tmp_path)
    for index in range(9):
        merge(recipe, tmp_path / "out", shard=(index, 9))
    finalize(tmp_path / "out")
    merge(recipe, tmp_path / "whole")
    assert load_file(tmp_path / "out" / "model-00002-of-00003.safetensors").keys()
    assert files(tmp_path / "out").keys() == files(tmp_path / "whole").keys()


def test_sources_are_not_hashed_if_the_parts_say_so(tmp_path: Path) -> None:
    recipe = of_adapters()(tmp_path)
    merge(recipe, tmp_path / "whole", hash_sources=False)
    for index in range(2):
        merge(recipe, tmp_path / "out", shard=(index, 2), hash_sources=False)
    finalize(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_whole_merge_does_not_replace_parts_unless_told(tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": adapters(tmp_path)}
    merge(recipe, tmp_path / "out", shard=(0, 2))
    with pytest.raises(OutputError, match=r"holds parts of a merge .* Put them together with finalize, or merge with"):
        merge(recipe, tmp_path / "out")
    merge(recipe, tmp_path / "out", shard=(1, 2))
    finalize(tmp_path / "out")
    merge(recipe, tmp_path / "other", shard=(0, 2))
    merge(recipe, tmp_path / "other", resume=False)
    assert files(tmp_path / "other") == files(tmp_path / "out")


def test_a_part_replaces_no_output_before_all_are_there(tmp_path: Path) -> None:
    recipe = of_adapters()(tmp_path)
    merge(recipe, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        merge({**recipe, "scale": 2}, tmp_path / "out", shard=(0, 1))
    merge({**recipe, "scale": 2}, tmp_path / "out", shard=(0, 1), overwrite=True)
    assert files(tmp_path / "out") == before
    with pytest.raises(OutputError, match="exists already"):
        finalize(tmp_path / "out")
    finalize(tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") != before


def test_an_input_in_memory_is_refused(tmp_path: Path) -> None:
    path = write_tiny_adapter(tmp_path / "in", MODULES)
    config = json.loads((path / "adapter_config.json").read_text())
    adapter = Adapter(load_file(path / "adapter_model.safetensors"), config)
    recipe = {"merge_method": "linear", "models": [{"model": adapter}, {"model": str(path)}]}
    with pytest.raises(OutputError, match=r"'adapter' is in memory, .*save it to a directory"):
        merge(recipe, tmp_path / "out", shard=(0, 2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]


def test_a_shard_needs_an_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="part of an output directory"):
        merge(of_adapters()(tmp_path), shard=(0, 2))


class TestWhatCannotBePutTogether:
    @pytest.fixture
    def recipe(self, tmp_path: Path) -> dict[str, object]:
        return of_adapters(merge_method="ties")(tmp_path)

    def refused(self, output: Path, match: str) -> None:
        """Nothing is made, nothing is lost."""
        with pytest.raises(OutputError, match=match):
            finalize(output)
        assert not output.exists()

    def test_no_parts(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "out", "has no parts")
        (tmp_path / ".out.partial").mkdir()
        self.refused(tmp_path / "out", "holds no parts")

    def test_missing_parts(self, tmp_path: Path, recipe) -> None:
        merge(recipe, tmp_path / "out", shard=(1, 4))
        merge(recipe, tmp_path / "out", shard=(3, 4))
        self.refused(
            tmp_path / "out", r"part 0 is missing \(and 1 more .*Run merge --shard 0/4, merge --shard 2/4, then"
        )
        for index in (0, 2):
            merge(recipe, tmp_path / "out", shard=(index, 4))
        finalize(tmp_path / "out")

    def test_a_part_that_was_cut_off(self, tmp_path: Path, recipe) -> None:
        for index in range(2):
            merge(recipe, tmp_path / "out", shard=(index, 2))
        journal = tmp_path / ".out.partial" / ".work" / "journal-1-of-2.jsonl"
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(lines[:-1]) + lines[-1][:20])
        self.refused(tmp_path / "out", r"is not merged yet\. Run merge --shard 1/2, then")
        merge(recipe, tmp_path / "out", shard=(1, 2))
        finalize(tmp_path / "out")

    @pytest.mark.parametrize("harm", ["damaged", "cut", "deleted"])
    def test_a_module_that_is_not_what_was_written(self, tmp_path: Path, recipe, harm: str) -> None:
        merge(recipe, tmp_path / "whole")
        for index in range(2):
            merge(recipe, tmp_path / "out", shard=(index, 2))
        (*_, file) = sorted((tmp_path / ".out.partial").rglob("modules/*.safetensors"))
        data = file.read_bytes()
        if harm == "deleted":
            file.unlink()
        else:
            file.write_bytes(data[:-4] + bytes(4) if harm == "damaged" else data[:-4])
        with pytest.raises(OutputError, match=r"is not what was written\. Run merge --shard") as error:
            finalize(tmp_path / "out")
        (index,) = re.findall(r"--shard (\d)/2", str(error.value))
        merge(recipe, tmp_path / "out", shard=(int(index), 2))
        finalize(tmp_path / "out")
        assert files(tmp_path / "out") == files(tmp_path / "whole")

    def test_a_damaged_file_of_a_model(self, tmp_path: Path) -> None:
        recipe = fold_of_adapters(tmp_path)
        merge(recipe, tmp_path / "whole")
        for index in range(3):
            merge(recipe, tmp_path / "out", shard=(index, 3))
        with (tmp_path / ".out.partial" / "model-00002-of-00003.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(bytes(4))
        with pytest.raises(OutputError, match=r"is not what was written\. Run merge --shard") as error:
            finalize(tmp_path / "out")
        (index,) = re.findall(r"--shard (\d)/3", str(error.value))
        merge(recipe, tmp_path / "out", shard=(int(index), 3))
        finalize(tmp_path / "out")
        assert files(tmp_path / "out") == files(tmp_path / "whole")

    @pytest.mark.parametrize("size_bytes", [-5, 3])
    def test_a_file_of_a_model_of_another_size_stays_as_it_is(self, tmp_path: Path, size_bytes: int) -> None:
        recipe = fold_of_adapters(tmp_path)
        for index in range(3):
            merge(recipe, tmp_path / "out", shard=(index, 3))
        path = tmp_path / ".out.partial" / "model-00002-of-00003.safetensors"
        os.truncate(path, path.stat().st_size + size_bytes)
        before = path.read_bytes()
        with pytest.raises(OutputError, match=r"model-00002-of-00003.safetensors: is missing, or not of the size"):
            finalize(tmp_path / "out")
        assert path.read_bytes() == before

    def test_parts_of_another_version(self, tmp_path: Path, recipe, monkeypatch: pytest.MonkeyPatch) -> None:
        for index in range(2):
            merge(recipe, tmp_path / "out", shard=(index, 2))
        monkeypatch.setattr("mergekit_lowrank.engine.parts.__version__", "9.9")
        with pytest.raises(OutputError, match=r"its parts were made by version .*, and this is 9.9"):
            finalize(tmp_path / "out")
        assert (tmp_path / ".out.partial").is_dir()

    def test_a_part_of_another_merge(self, tmp_path: Path, recipe) -> None:
        merge(recipe, tmp_path / "out", shard=(0, 2))
        merge({**recipe, "scale": 2}, tmp_path / "out", shard=(1, 2))
        self.refused(
            tmp_path / "out", r"part 0 is of another merge than part 1: they differ in recipe\. Run merge --shard 0/2"
        )
        merge({**recipe, "scale": 2}, tmp_path / "out", shard=(0, 2))
        finalize(tmp_path / "out")
        merge({**recipe, "scale": 2}, tmp_path / "whole")
        assert (tmp_path / "out" / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()

    def test_an_input_that_has_changed(self, tmp_path: Path, recipe) -> None:
        merge(recipe, tmp_path / "out", shard=(0, 2), hash_sources=False)
        write_tiny_adapter(tmp_path / "in1", MODULES, rank=4, seed=99)
        merge(recipe, tmp_path / "out", shard=(1, 2), hash_sources=False)
        self.refused(tmp_path / "out", r"the input .*in1.* has changed since part 0 was made\. Run merge --shard 0/2")


def test_what_other_merges_left_there_is_not_in_the_output(tmp_path: Path) -> None:
    """Other numbers of parts, other files, other variants."""
    recipe = fold_of_adapters(tmp_path)
    merge({**recipe, "output": {"kind": "model", "shard_size": "300B"}}, tmp_path / "out", shard=(0, 2))
    merge({**recipe, "sweep": [{"name": "x", "scale": 1}]}, tmp_path / "out", shard=(0, 1))
    merge(recipe, tmp_path / "out", shard=(2, 3))
    for index in range(2):
        merge(recipe, tmp_path / "out", shard=(index, 2))
    finalize(tmp_path / "out")
    merge(recipe, tmp_path / "whole")
    assert files(tmp_path / "out").keys() == files(tmp_path / "whole").keys()
    assert load_file(tmp_path / "out" / "model-00002-of-00003.safetensors").keys()


def test_the_command_line_makes_parts_and_puts_them_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters(tmp_path)
    (tmp_path / "recipe.yaml").write_text("merge_method: ties\nmodels: [{model: in0}, {model: in1}]\n")
    monkeypatch.chdir(tmp_path)
    for index in range(2):
        made = CliRunner().invoke(main, ["merge", "recipe.yaml", "out", "--shard", f"{index}/2"])
        assert made.exit_code == 0, made.stderr
    assert CliRunner().invoke(main, ["finalize", "out"]).exit_code == 0
    assert CliRunner().invoke(main, ["merge", "recipe.yaml", "whole"]).exit_code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    again = CliRunner().invoke(main, ["finalize", "out"])
    assert (again.exit_code, "has no parts" in again.stderr) == (2, True)


class Kept(Executor):
    """Processes that outlive a merge: they take seconds to start."""

    name = "kept"
    summary = "for tests"
    processes: ProcessExecutor

    def run(self, work, jobs, *, memory_bytes):
        return self.processes.run(work, jobs, memory_bytes=memory_bytes)


@pytest.fixture(scope="module")
def kept() -> Iterator[Registry]:
    """The built-ins, with ``kept`` among the executors."""

    class Plugin:
        @hookimpl
        def executors(self):
            return [Kept]

    registry = Registry()
    registry.register(Plugin(), "kept")
    Kept.processes = ProcessExecutor(2)
    yield registry
    Kept.processes.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", RECIPES)
def test_processes_make_the_bytes_of_one_thread(tmp_path: Path, kept: Registry, case: str) -> None:
    recipe = RECIPES[case](tmp_path)
    merge(recipe, tmp_path / "serial", executor="serial")
    merge(recipe, tmp_path / "kept", registry=kept, executor="kept")
    assert files(tmp_path / "kept") == files(tmp_path / "serial")


@pytest.mark.slow
def test_processes_give_an_adapter_in_memory(tmp_path: Path, kept: Registry) -> None:
    recipe = of_adapters()(tmp_path)
    serial, made = merge(recipe, executor="serial"), merge(recipe, registry=kept, executor="kept")
    assert serial.state_dict.keys() == made.state_dict.keys()
    assert all(torch.equal(serial.state_dict[name], made.state_dict[name]) for name in serial.state_dict)


@pytest.mark.slow
def test_processes_may_make_a_part(tmp_path: Path, kept: Registry) -> None:
    recipe = fine_tunes(tmp_path)
    merge(recipe, tmp_path / "whole")
    merge(recipe, tmp_path / "out", registry=kept, executor="kept", shard=(0, 2))
    merge(recipe, tmp_path / "out", registry=kept, executor="serial", shard=(1, 2))
    finalize(tmp_path / "out", registry=kept)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


DYING = '''
import os, signal
from pathlib import Path

from mergekit_lowrank import ElementwiseStrategy, hookimpl


class Dying(ElementwiseStrategy):
    """The mean. The worker that begins a module of the last layer is killed, unless that has happened before."""

    name = "dying"
    summary = "the mean"

    def merge_block(self, block, weights, context):
        if context.module.startswith("layers.3"):
            try:
                Path(os.environ["DIED"]).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return block.mean(dim=0)


@hookimpl
def strategies():
    return [Dying]
'''


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_command_and_the_next_one_goes_on(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    write_metadata(tmp_path, "dying", "1.0", {ENTRY_POINT_GROUP: {"dying": "dying"}})
    models = [model["model"] for model in adapters(tmp_path)]

    def run(output: str, executor: str, died: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mergekit_lowrank.cli", "merge", "--method", "dying", *models, "-o", output]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "DIED": died}
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        return subprocess.run([*command, "--executor", executor, "--workers", "2"], check=False, **options)

    killed = run("out", "processes", "died")
    assert killed.returncode == 2, killed.stderr
    assert re.search(r"killed by signal 9.*The work so far is kept; run the same", killed.stderr)
    assert (tmp_path / ".out.partial").is_dir()
    assert not (tmp_path / "out").exists()
    again = run("out", "processes", "died")
    assert again.returncode == 0, again.stderr
    assert "are there already; going on" in again.stderr
    assert run("serial", "serial", "died").returncode == 0
    assert files(tmp_path / "out") == files(tmp_path / "serial")


@pytest.mark.slow
def test_the_script_for_slurm_in_the_docs_makes_the_parts(tmp_path: Path) -> None:
    (script,) = (block for block in blocks(ROOT / "docs/how-to/many-machines.md") if block.argument("file"))
    adapters(tmp_path)
    (tmp_path / "recipe.yaml").write_text("merge_method: ties\nmodels: [{model: in0}, {model: in1}]\n")
    environment = {**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    for index in range(2):
        task = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": "2"}
        subprocess.run(["/bin/bash", "-c", script.text], cwd=tmp_path, env=environment | task, check=True)
    finalize(tmp_path / "out")
    merge(tmp_path / "recipe.yaml", tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
