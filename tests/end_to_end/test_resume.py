"""Merges that were cut off go on where they stopped, and come out to the byte as if they had not been."""

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mergekit_lowrank import CheckpointError, DiskError, OutputError, Registry, StrategyError, merge
from mergekit_lowrank.engine import unfinished as engine_unfinished
from mergekit_lowrank.engine.journal import Journal, read_lines
from mergekit_lowrank.events import MergeStarted, ModuleMerged, SurveyRound
from mergekit_lowrank.formats import WORK_DIRECTORY, partial_path
from mergekit_lowrank.testing import write_tiny_adapter
from tests.end_to_end.unfinished import (
    MODULES,
    Follower,
    cut_off,
    files,
    fine_tunes_of,
    fold_of,
    followed,
    partial_of,
    recipe_of,
)

JOURNAL = f"{WORK_DIRECTORY}/journal.jsonl"
GO_ON = "The work so far is kept; run the same merge again to go on"
BUDGET = {"rank": {"budget": "5KB"}, "uniform_rank": False}

CASES: dict[str, Callable[[Path], dict]] = {
    "known ranks": lambda root: recipe_of(root, "ties", scale="auto"),
    "random masks": lambda root: recipe_of(root, "dare_ties", seed=3),
    "a rank of each module": lambda root: recipe_of(root, "drm", output={"rank": {"energy": 0.8}}),
    "a budget": lambda root: recipe_of(root, "task_arithmetic", output=BUDGET),
    "a survey": lambda root: recipe_of(root, "knots", parameters={"scope": "model"}),
    "a survey and a budget": lambda root: recipe_of(root, "ties", parameters={"scope": "model"}, output=BUDGET),
    "a fold": lambda root: fold_of(root, "ties"),
    "a fold in another type": lambda root: fold_of(root, "linear", out_dtype="bfloat16"),
    "fine-tunes": fine_tunes_of,
    "a sweep": lambda root: recipe_of(
        root, "ties", sweep={"parameters.density": [0.1, 0.5], "models[0].parameters.weight": [0.3, 2.0]}
    ),
    "a sweep in the joint space": lambda root: recipe_of(
        root, "knots", sweep={"models[0].parameters.weight": [0.3, 1.0, 2.0]}
    ),
    "a sweep of budgets": lambda root: recipe_of(
        root, "task_arithmetic", output=BUDGET, sweep={"output.rank.budget": ["5KB", "7KB"]}
    ),
    "a sweep of folds": lambda root: fold_of(root, "linear", sweep={"models[1].parameters.weight": [-1.0, 0.5]}),
}


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def recipe(tmp_path) -> dict:
    return recipe_of(tmp_path, "ties")


def expected_files(recipe: dict, out: Path, **options) -> tuple[dict[str, bytes], int]:
    """Those of a merge that nothing interrupts, and how many modules it merges."""
    follower = followed(recipe, out, **options)
    found = files(out)
    shutil.rmtree(out)
    return found, follower.merged


def receipts(out: Path) -> list[str]:
    """Modules that the journals tell of."""
    return [
        line["receipt"]["module"]
        for journal in partial_of(out).rglob("journal*.jsonl")
        for line in read_lines(journal)
        if "receipt" in line
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_merge_that_was_cut_off_comes_out_to_the_byte(tmp_path, out, case) -> None:
    recipe = CASES[case](tmp_path)
    expected, modules = expected_files(recipe, out)
    for after in (1, modules // 2 + 1, modules):
        cut_off(recipe, out, after)
        assert not out.exists()
        assert len(receipts(out)) >= after
        again = followed(recipe, out)
        assert "are there already; going on" in again.notices
        assert again.merged <= modules - after
        assert files(out) == expected
        assert not partial_of(out).exists()
        shutil.rmtree(out)


@pytest.mark.parametrize("case", ["known ranks", "a budget", "a fold", "a sweep"])
def test_a_merge_that_is_cut_off_again_and_again_comes_out_to_the_byte(tmp_path, out, case) -> None:
    recipe = CASES[case](tmp_path)
    expected, modules = expected_files(recipe, out)
    runs = 0
    while not out.exists():
        runs += 1
        try:
            merge(recipe, out, executor="serial", reporters=[Follower(2)])
        except KeyboardInterrupt:
            continue
    assert 1 < runs <= modules
    assert files(out) == expected


def test_artefacts_are_gone_on_with(tmp_path, out) -> None:
    emr = pytest.importorskip("mergekit_lowrank_emr")
    registry = Registry()
    registry.register(emr, "emr")
    recipe = recipe_of(tmp_path, "emr")
    expected, _ = expected_files(recipe, out, registry=registry)
    assert "artefacts.safetensors" in expected
    cut_off(recipe, out, 2, registry=registry)
    (partial_of(out) / WORK_DIRECTORY / "artefacts" / "000001.safetensors").unlink()
    again = followed(recipe, out, registry=registry)
    assert again.merged == len(MODULES) - 1
    assert files(out) == expected


@pytest.mark.parametrize(
    ("executor", "rank"),
    [
        ("threads", "max"),
        ("threads", {"energy": 0.8}),
        ("processes", {"energy": 0.8}),
        pytest.param("processes", "max", marks=pytest.mark.exhaustive),
    ],
)
def test_the_executor_may_change_meanwhile(tmp_path, out, executor, rank) -> None:
    recipe = recipe_of(tmp_path, "ties", output={"rank": rank})
    expected, _ = expected_files(recipe, out)
    cut_off(recipe, out, 2)
    again = followed(recipe, out, executor=executor, memory_bytes=1 << 30, workers=2)
    assert again.merged == len(MODULES) - 2
    assert files(out) == expected


def test_a_merge_of_many_threads_that_was_cut_off_comes_out_to_the_byte(recipe, out) -> None:
    expected, _ = expected_files(recipe, out)
    cut_off(recipe, out, 3, executor="threads", workers=4)
    assert followed(recipe, out, executor="threads", workers=4).merged <= len(MODULES) - 3
    assert files(out) == expected


def test_modules_that_wait_in_files_of_their_own_are_made_anew_where_they_are_not_needed_there(
    tmp_path, recipe, out, monkeypatch
) -> None:
    """An executor that shares no files spools them; the next run writes to their places."""
    from mergekit_lowrank.executors import SerialExecutor

    expected, _ = expected_files(recipe, out)
    with monkeypatch.context() as patch:
        patch.setattr(SerialExecutor, "shares_files", False)
        cut_off(recipe, out, 2)
    assert followed(recipe, out).merged == len(MODULES)
    assert files(out) == expected


class TestWhatIsKept:
    """Everything unfinished lies in one directory beside the output, which stays where it can be gone on with."""

    def test_it_lies_in_one_directory_beside_the_output(self, tmp_path, recipe, out) -> None:
        before = {path.name for path in tmp_path.iterdir()}
        cut_off(recipe, out, 2)
        assert {path.name for path in tmp_path.iterdir()} - before == {".out.partial"}

    @pytest.mark.parametrize("kind", [MergeStarted, SurveyRound])
    def test_an_interrupt_before_anything_is_finished_leaves_nothing(self, tmp_path, out, kind) -> None:
        recipe = recipe_of(tmp_path, "knots")
        cut_off(recipe, out, 1, kind=kind)
        assert not partial_of(out).exists()

    def test_an_interrupt_after_a_budget_is_spent_keeps_what_it_bought(self, tmp_path, out, monkeypatch) -> None:
        recipe = recipe_of(tmp_path, "task_arithmetic", output=BUDGET)
        expected, _ = expected_files(recipe, out)

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine_unfinished, "open_sink", interrupt)
            with pytest.raises(KeyboardInterrupt):
                merge(recipe, out)
        again = followed(recipe, out)
        assert (again.surveyed, again.merged) == (0, len(MODULES))
        assert files(out) == expected

    def test_an_interrupt_while_inputs_are_hashed_again_loses_nothing(self, tmp_path, recipe, out, monkeypatch) -> None:
        cut_off(recipe, out, 3)
        os.utime(tmp_path / "in1" / "adapter_model.safetensors", (1, 1))

        def interrupt(_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("mergekit_lowrank.runs.sha256_of", interrupt)
            with pytest.raises(KeyboardInterrupt):
                merge(recipe, out)
        assert followed(recipe, out).merged == len(MODULES) - 3

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
    def test_a_disk_that_fails_keeps_it_and_says_how_to_go_on(self, tmp_path, out, monkeypatch, number) -> None:
        recipe = recipe_of(tmp_path, "ties", output={"rank": {"energy": 0.9}})
        expected, _ = expected_files(recipe, out)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", failing_after(2, Path.write_bytes, number))
            with pytest.raises(DiskError, match=re.escape(f"{os.strerror(number)}. {GO_ON}")) as caught:
                merge(recipe, out, executor="serial")
        assert caught.value.__cause__.errno == number
        assert followed(recipe, out).merged == len(MODULES) - 2
        assert files(out) == expected

    def test_a_disk_that_fails_under_the_journal_keeps_it_too(self, recipe, out, monkeypatch) -> None:
        expected, _ = expected_files(recipe, out)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", failing_after(4, Path.open, errno.ENOSPC, mode="a"))
            with pytest.raises(DiskError, match=GO_ON):
                merge(recipe, out, executor="serial", hash_sources=False)
        assert followed(recipe, out).merged == len(MODULES) - 3  # the first line of all tells of the inputs' times
        assert files(out) == expected

    @pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
    def test_an_input_that_cannot_be_read_just_now_keeps_it(self, recipe, out, monkeypatch, number) -> None:
        expected, _ = expected_files(recipe, out)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", reads_failing_after(16, number))
            with pytest.raises(CheckpointError, match=f"cannot read tensor.*{GO_ON}"):
                merge(recipe, out, executor="serial", hash_sources=False)
        assert followed(recipe, out).merged < len(MODULES)
        assert files(out) == expected

    def test_a_fine_tune_that_cannot_be_read_just_now_keeps_it(self, tmp_path, out, monkeypatch) -> None:
        recipe = fine_tunes_of(tmp_path)
        expected, modules = expected_files(recipe, out)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", reads_failing_after(40, errno.EIO))
            with pytest.raises(CheckpointError, match=f"cannot read tensor.*{GO_ON}"):
                merge(recipe, out, executor="serial", hash_sources=False)
        assert 0 < followed(recipe, out).merged < modules
        assert files(out) == expected

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
    def test_a_lack_of_memory_keeps_it(self, recipe, out, monkeypatch, error) -> None:
        stop_in_the_third(monkeypatch, recipe, out, error)
        assert str(error).endswith(GO_ON)
        assert followed(recipe, out).merged == len(MODULES) - 2

    @pytest.mark.parametrize(
        "error", [CheckpointError("holds 1 NaN"), StrategyError("no"), OutputError("overflows"), ValueError("a bug")]
    )
    def test_an_error_that_would_come_again_deletes_it(self, recipe, out, monkeypatch, error) -> None:
        stop_in_the_third(monkeypatch, recipe, out, error)
        assert GO_ON not in str(error)
        assert not partial_of(out).exists()

    def test_it_is_kept_as_well_where_an_output_is_to_be_replaced(self, tmp_path, recipe, out) -> None:
        expected, _ = expected_files(recipe, out)
        merge(recipe_of(tmp_path, "linear"), out)
        before = files(out)
        cut_off(recipe, out, 2, overwrite=True)
        assert files(out) == before
        with pytest.raises(OutputError, match="exists already"):
            merge(recipe, out)
        assert len(receipts(out)) == 2
        assert followed(recipe, out, overwrite=True).merged == len(MODULES) - 2
        assert files(out) == expected

    def test_a_failure_of_the_last_flush_loses_nothing(self, recipe, out, monkeypatch) -> None:
        expected, _ = expected_files(recipe, out)
        with monkeypatch.context() as patch:
            patch.setattr("mergekit_lowrank.formats.directory._flush_directory", failing_after(0, None, errno.EIO))
            with pytest.raises(DiskError, match=GO_ON):
                merge(recipe, out)
        assert followed(recipe, out).merged == 0
        assert files(out) == expected

    def test_a_disk_that_fails_when_the_output_is_hashed_loses_nothing(self, recipe, out, monkeypatch) -> None:
        expected, _ = expected_files(recipe, out)
        with monkeypatch.context() as patch:
            patch.setattr("mergekit_lowrank.report.manifest.sha256_of", failing_after(0, None, errno.EIO))
            with pytest.raises(DiskError, match=GO_ON):
                merge(recipe, out, hash_sources=False)
        assert followed(recipe, out).merged == 0
        assert files(out) == expected

    def test_an_interrupt_between_the_variants_of_a_sweep_loses_nothing(self, tmp_path, out, monkeypatch) -> None:
        recipe = CASES["a sweep"](tmp_path)
        expected, _ = expected_files(recipe, out)
        from mergekit_lowrank import runs

        calls, real = [], runs.write_texts

        def interrupted(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(runs, "write_texts", interrupted)
            with pytest.raises(KeyboardInterrupt):
                merge(recipe, out)
        assert followed(recipe, out).merged == 0
        assert files(out) == expected


def failing_after(count: int, real, number: int, *, mode: str | None = None):
    """A method that fails from a call on, counted from 0; with a mode, only where its first argument is that."""
    calls = []

    def call(self, *arguments, **options):
        if mode is None or arguments[:1] == (mode,):
            calls.append(1)
            if len(calls) > count:
                raise OSError(number, os.strerror(number))
        return real(self, *arguments, **options)

    return call


def reads_failing_after(count: int, number: int):
    """Opening files of tensors to read them, on a disk that fails from a call on."""
    real, calls = Path.open, []

    def call(self, mode="r", *arguments, **options):
        if mode == "rb" and self.suffix == ".safetensors":
            calls.append(1)
            if len(calls) > count:
                raise OSError(number, os.strerror(number))
        return real(self, mode, *arguments, **options)

    return call


def stop_in_the_third(monkeypatch, recipe, out, error: BaseException) -> None:
    from mergekit_lowrank.engine import pipeline

    calls, real = [], pipeline.merge_module

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "merge_module", stopping)
        with pytest.raises(type(error)):
            merge(recipe, out, executor="serial")


class TestWhatIsGoneOnWith:
    """Only what is to the byte what the same merge would write."""

    def test_to_resume_nothing_is_a_normal_merge(self, recipe, out) -> None:
        expected, _ = expected_files(recipe, out, resume=False)
        follower = followed(recipe, out, resume=True)
        assert (follower.merged, follower.notices) == (len(MODULES), "")
        assert files(out) == expected

    def test_a_merge_that_is_not_to_resume_starts_anew(self, recipe, out) -> None:
        expected, _ = expected_files(recipe, out)
        cut_off(recipe, out, 3)
        again = followed(recipe, out, resume=False)
        assert again.merged == len(MODULES)
        assert "is not used: it is not to be resumed" in again.notices
        assert files(out) == expected

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"merge_method": "linear"}, "another recipe"),
            ({"parameters": {"density": 0.5}}, "another recipe"),
            ({"seed": 1}, "another recipe"),
            ({"out_dtype": "float16"}, "another recipe"),
            ({"output": {"rank": 2}}, "another recipe"),
        ],
    )
    def test_another_recipe_starts_over_and_says_so(self, recipe, out, change, said) -> None:
        changed = recipe | change
        expected, _ = expected_files(changed, out)
        cut_off(recipe, out, 3)
        again = followed(changed, out)
        assert said in again.notices
        assert again.merged == len(MODULES)
        assert files(out) == expected

    @pytest.mark.parametrize("what", ["version", "plugins", "torch", "devices"])
    def test_another_version_starts_over(self, recipe, out, monkeypatch, what) -> None:
        cut_off(recipe, out, 3)
        real = engine_unfinished.identity_of
        changes = {
            "version": {"mergekit_lowrank": "0.0"},
            "plugins": {"plugins": {"mine": "2.0"}},
            "torch": {"packages": {"torch": "1.0"}},
            "devices": {"devices": ["cuda"]},
        }
        monkeypatch.setattr("mergekit_lowrank.runs.identity_of", lambda *given: real(*given) | changes[what])
        again = followed(recipe, out)
        assert again.merged == len(MODULES)
        assert "it is of another merge (another " in again.notices

    def test_entries_of_another_version_need_not_be_understood(self, recipe, out) -> None:
        cut_off(recipe, out, 3)
        path = partial_path(out) / WORK_DIRECTORY / "journal.jsonl"
        identity, *entries = read_lines(path)
        path.unlink()
        journal = Journal(path, identity | {"mergekit_lowrank": "9.9"})
        for entry in entries:
            journal.append({"receipt": {"module": "m", "of": "another form"}} if "receipt" in entry else entry)
        again = followed(recipe, out)
        assert "another mergekit_lowrank" in again.notices
        assert again.merged == len(MODULES)

    def test_a_plugin_is_part_of_what_is_merged_with_by_its_version(self, recipe, out) -> None:
        emr = pytest.importorskip("mergekit_lowrank_emr")
        for version, merged in (("1.0", None), ("1.0", len(MODULES) - 3), ("1.1", len(MODULES))):
            registry = Registry()
            registry.register(emr, "emr", distribution="mergekit-lowrank-emr", version=version)
            if merged is not None:
                assert followed(recipe, out, registry=registry).merged == merged
                shutil.rmtree(out)
            cut_off(recipe, out, 3, registry=registry)

    def test_how_it_is_merged_may_change(self, recipe, out) -> None:
        recipe = recipe | {"execution": {"memory": "1GiB", "workers": 2}}
        expected, _ = expected_files(recipe, out)
        cut_off(recipe | {"execution": {"workers": 1}}, out, 3)
        assert followed(recipe, out, executor="threads").merged == len(MODULES) - 3
        assert files(out) == expected

    def test_the_same_recipe_from_elsewhere_goes_on(self, tmp_path, out, monkeypatch) -> None:
        recipe_of(tmp_path)
        text = "merge_method: linear\nmodels: [{model: in1}, {model: in2}]\n"
        (tmp_path / "recipe.yaml").write_text(text)
        cut_off(tmp_path / "recipe.yaml", out, 3)
        monkeypatch.chdir(tmp_path)
        assert followed("recipe.yaml", Path("out")).merged == len(MODULES) - 3

    def test_other_variants_start_over_and_leave_nothing_of_the_old_ones(self, tmp_path, out) -> None:
        densities = {"parameters.density": [0.1, 0.5]}
        recipe = recipe_of(tmp_path, "ties", sweep=densities)
        changed = recipe | {"sweep": {"parameters.density": [0.1, 0.9]}}
        expected, _ = expected_files(changed, out)
        cut_off(recipe, out, 4)
        again = followed(changed, out)
        assert "it is of other variants (density=0.5)" in again.notices
        assert again.merged == 2 * len(MODULES) - 2  # those of 0.1 are gone on with
        assert files(out) == expected

    @pytest.mark.parametrize("first", ["a sweep", "known ranks"])
    def test_a_sweep_and_a_single_merge_leave_nothing_to_each_other(self, tmp_path, out, first) -> None:
        cases = [CASES[name](tmp_path) for name in ("a sweep", "known ranks")]
        one, other = cases if first == "a sweep" else cases[::-1]
        expected, _ = expected_files(other, out)
        cut_off(one, out, 3)
        assert "is not used" in followed(other, out).notices
        assert files(out) == expected

    def test_an_adapter_in_memory_is_never_taken_for_the_same(self, tmp_path, out) -> None:
        from mergekit_lowrank import Adapter

        (tmp_path / "in").mkdir()
        path = Path(recipe_of(tmp_path / "in", count=1)["models"][0]["model"])
        config = json.loads((path / "adapter_config.json").read_text())
        adapter = Adapter(load_file(path / "adapter_model.safetensors"), config)
        recipe = {"merge_method": "linear", "models": [{"model": adapter}, {"model": str(path)}]}
        cut_off(recipe, out, 3)
        assert followed(recipe, out).merged == len(MODULES)


class TestInputs:
    """Inputs that change between two runs, or under one."""

    @pytest.fixture
    def tensors(self, tmp_path, recipe) -> Path:
        return tmp_path / "in2" / "adapter_model.safetensors"

    @staticmethod
    def change(path: Path, *, keeps_time: bool) -> None:
        stat, stored = path.stat(), load_file(path)
        save_file({name: tensor * 2 for name, tensor in stored.items()}, path)
        assert path.stat().st_size == stat.st_size
        if keeps_time:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    @staticmethod
    def hashes(out: Path) -> set[str]:
        lines = [line for path in partial_of(out).rglob("journal*.jsonl") for line in read_lines(path)]
        return {Path(line["file"]).parent.name for line in lines if "sha256" in line}

    def test_a_changed_input_starts_over(self, recipe, out, tensors) -> None:
        cut_off(recipe, out, 3)
        self.change(tensors, keeps_time=False)
        again = followed(recipe, out)
        assert f"the input {tensors} has changed" in again.notices
        assert again.merged == len(MODULES)
        expected = files(out)
        shutil.rmtree(out)
        assert expected_files(recipe, out)[0] == expected

    def test_an_input_that_was_only_touched_is_gone_on_with_where_its_hash_is_known(self, recipe, out, tensors) -> None:
        expected, _ = expected_files(recipe, out)
        cut_off(recipe, out, 3)
        assert self.hashes(out) == {"in1", "in2", "in3"}
        for time_ns in (10**18, 2 * 10**18):
            os.utime(tensors, ns=(time_ns, time_ns))
            cut_off(recipe, out, 1)
        assert followed(recipe, out).merged == len(MODULES) - 5
        assert files(out) == expected

    def test_an_input_that_was_touched_starts_over_where_its_hash_is_not_known(self, recipe, out, tensors) -> None:
        cut_off(recipe, out, 3, hash_sources=False)
        assert self.hashes(out) == set()
        os.utime(tensors, (1, 1))
        assert followed(recipe, out).merged == len(MODULES)

    def test_a_changed_configuration_starts_over(self, tmp_path, recipe, out) -> None:
        cut_off(recipe, out, 3)
        path = tmp_path / "in1" / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
        assert followed(recipe, out).merged == len(MODULES)

    def test_a_touched_base_starts_over(self, tmp_path, out) -> None:
        recipe = fold_of(tmp_path)
        cut_off(recipe, out, 3)
        os.utime(tmp_path / "base" / "model.safetensors", (1, 1))
        again = followed(recipe, out)
        assert "another base" in again.notices
        assert again.merged == len(MODULES)

    def test_a_change_that_shows_in_neither_size_nor_time_is_found_in_the_end(self, recipe, out, tensors) -> None:
        cut_off(recipe, out, 3)
        self.change(tensors, keeps_time=True)
        for _ in range(2):  # what the second run hashed must not count as known
            with pytest.raises(
                CheckpointError, match=f"{re.escape(str(tensors))}: changed while it was merged"
            ) as caught:
                merge(recipe, out, executor="serial")
            assert GO_ON not in str(caught.value)
            assert not partial_of(out).exists()
            cut_off(recipe, out, 2)
            self.change(tensors, keeps_time=True)

    def test_a_change_during_a_merge_is_found_in_the_end(self, recipe, out, tensors) -> None:
        change = self.change

        class Meddler(Follower):
            def handle(self, event) -> None:
                super().handle(event)
                if isinstance(event, ModuleMerged) and self.merged == 3:
                    change(tensors, keeps_time=False)

        with pytest.raises(CheckpointError, match="changed while it was merged"):
            merge(recipe, out, executor="serial", reporters=[Meddler()])
        assert not out.exists()
        assert not partial_of(out).exists()

    @pytest.mark.parametrize("how", ["unlinked", "truncated"])
    @pytest.mark.parametrize("after", [1, len(MODULES)])
    @pytest.mark.parametrize("kind", [recipe_of, fine_tunes_of])
    def test_an_input_that_disappears_is_a_typed_error_and_the_old_output_stays(
        self, tmp_path, out, how, after, kind
    ) -> None:
        recipe = kind(tmp_path)
        merge(recipe, out)
        before = files(out)
        path = next(Path(recipe["models"][1]["model"]).glob("*.safetensors"))

        class Thief(Follower):
            def handle(self, event) -> None:
                super().handle(event)
                if isinstance(event, ModuleMerged) and self.merged == after:
                    path.unlink() if how == "unlinked" else os.truncate(path, path.stat().st_size // 3)

        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            merge(recipe, out, executor="serial", overwrite=True, reporters=[Thief()])
        assert files(out) == before
        assert not partial_of(out).exists()

    def test_an_input_that_is_gone_before_the_first_module_is_a_typed_error(self, recipe, out, tensors) -> None:
        class Thief(Follower):
            def handle(self, event) -> None:
                if isinstance(event, MergeStarted):
                    tensors.unlink()

        with pytest.raises(CheckpointError, match=re.escape(str(tensors))):
            merge(recipe, out, executor="serial", reporters=[Thief()])


def overwrite_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {"overwritten": overwrite_middle, "truncated": truncate, "missing": Path.unlink}


class TestDamage:
    """What is not as the journal says is made again."""

    @pytest.mark.parametrize("damage", DAMAGE)
    @pytest.mark.parametrize("case", ["known ranks", "a rank of each module", "a fold", "fine-tunes", "a sweep"])
    def test_damaged_files_are_noticed_and_made_again(self, tmp_path, out, case, damage) -> None:
        recipe = CASES[case](tmp_path)
        expected, modules = expected_files(recipe, out)
        cut_off(recipe, out, modules)
        written = sorted(path for path in partial_of(out).rglob("*.safetensors") if path.stat().st_size)
        DAMAGE[damage](written[len(written) // 2])
        follower = followed(recipe, out)
        assert follower.merged > 0 or case == "a fold"  # of which it may be a tensor that is only copied
        assert files(out) == expected

    def test_only_the_damaged_module_is_made_again(self, recipe, out) -> None:
        expected, _ = expected_files(recipe, out)
        cut_off(recipe, out, 4)
        overwrite_middle(partial_of(out) / "adapter_model.safetensors")
        assert followed(recipe, out).merged in (len(MODULES) - 4 + 1, len(MODULES) - 4)
        assert files(out) == expected

    @pytest.mark.parametrize("case", ["known ranks", "a budget", "a sweep", "a fold"])
    @pytest.mark.parametrize("damage", [overwrite_middle, truncate, lambda path: os.truncate(path, 0), Path.unlink])
    def test_a_damaged_journal_counts_up_to_the_damage(self, tmp_path, out, case, damage) -> None:
        recipe = CASES[case](tmp_path)
        expected, modules = expected_files(recipe, out)
        cut_off(recipe, out, modules - 1)
        damage(next(iter(sorted(partial_of(out).rglob("journal.jsonl")))))
        assert followed(recipe, out).merged > 1
        assert files(out) == expected

    def test_half_a_line_of_the_journal_costs_one_module(self, recipe, out) -> None:
        expected, _ = expected_files(recipe, out, hash_sources=False)
        cut_off(recipe, out, 4, hash_sources=False)
        journal = partial_of(out) / JOURNAL
        os.truncate(journal, journal.stat().st_size - 5)
        assert followed(recipe, out, hash_sources=False).merged == len(MODULES) - 3
        assert files(out) == expected

    def test_a_disk_that_fails_while_the_work_is_checked_loses_nothing(self, recipe, out, monkeypatch) -> None:
        expected, _ = expected_files(recipe, out)
        cut_off(recipe, out, 3)
        for name in ("pread", "preadv"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing_after(0, None, errno.EIO))
                with pytest.raises(DiskError, match=GO_ON):
                    merge(recipe, out)
        assert followed(recipe, out).merged == len(MODULES) - 3
        assert files(out) == expected


def test_of_two_merges_into_one_output_the_second_is_refused(recipe, out) -> None:
    class Second(Follower):
        def handle(self, event) -> None:
            super().handle(event)
            if isinstance(event, ModuleMerged) and self.merged == 2:
                for options in ({}, {"resume": False}, {"shard": (0, 2)}, {"overwrite": True}):
                    with pytest.raises(OutputError, match="another merge is writing here") as caught:
                        merge(recipe, out, **options)
                    assert GO_ON not in str(caught.value)

    expected, _ = expected_files(recipe, out)
    second = Second()
    merge(recipe, out, executor="serial", reporters=[second])
    assert second.merged == len(MODULES)
    assert files(out) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, and a way to enlarge it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip() if made else 'there is no mount'}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


class TestAFullDisk:
    """On a real one."""

    @pytest.fixture
    def large(self, tmp_path) -> Callable[..., dict]:
        def make(**keys) -> dict:
            modules = {f"layers.{layer}.q": (64, 64) for layer in range(16)}
            paths = [write_tiny_adapter(tmp_path / f"in{s}", modules, rank=32, seed=s) for s in (1, 2)]
            return {"merge_method": "linear", "models": [{"model": str(path)} for path in paths], **keys}

        return make

    def test_it_is_noticed_beforehand_where_the_size_is_known(self, large, small_disk) -> None:
        merge(recipe_of(small_disk.parent / "small"), small_disk / "out")
        before = files(small_disk / "out")
        with pytest.raises(DiskError, match=r"the disk is full: [\d,]+ bytes are needed") as caught:
            merge(large(), small_disk / "out", overwrite=True)
        assert GO_ON not in str(caught.value)
        assert [path.name for path in small_disk.iterdir()] == ["out"]
        assert files(small_disk / "out") == before

    def test_what_fitted_is_gone_on_with_once_there_is_more_room(self, large, small_disk) -> None:
        recipe = large(output={"rank": {"energy": 0.95}})
        merge(recipe_of(small_disk.parent / "small"), small_disk / "out")
        before = files(small_disk / "out")
        with pytest.raises(DiskError, match=f"No space left on device.*{GO_ON}"):
            merge(recipe, small_disk / "out", overwrite=True, executor="serial")
        assert files(small_disk / "out") == before
        finished = len(receipts(small_disk / "out"))
        assert 0 < finished < 16
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        assert followed(recipe, small_disk / "out", overwrite=True).merged == 16 - finished
        found = files(small_disk / "out")
        shutil.rmtree(small_disk / "out")
        assert expected_files(recipe, small_disk / "out")[0] == found
