"""What a merge leaves in its output directory, and that a failed one leaves nothing."""

import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lowrank import (
    CheckpointError,
    DiskError,
    MergeError,
    OutputError,
    Registry,
    StrategyError,
    hookimpl,
    merge,
)
from mergekit_lowrank.events import MergeFinished, MergeStarted, ModuleMerged, Reporter, SurveyRound
from mergekit_lowrank.recipe import load_recipe
from mergekit_lowrank.report import closing_lines
from mergekit_lowrank.strategies import ElementwiseStrategy
from mergekit_lowrank.testing import write_tiny_adapter
from tests.end_to_end.makers import MODULES, adapters, stored_config


def recipe_of(paths, method="linear", **keys):
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **keys}


def assert_nothing_left(root, *known) -> None:
    assert sorted(path.name for path in root.iterdir()) == sorted(known)


def test_the_directory_holds_what_is_promised(tmp_path) -> None:
    merge(recipe_of(adapters(tmp_path)), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "recipe.yaml",
        "report.html",
        "report.json",
        "timings.json",
    ]


def test_times_stand_in_files_of_their_own_and_all_others_are_the_same_each_time(tmp_path) -> None:
    recipe = recipe_of(adapters(tmp_path))
    written = []
    for _ in range(2):
        report = merge(recipe, tmp_path / "out", overwrite=True)
        written.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    times = json.loads(written[1].pop("timings.json"))
    assert times["wall_seconds"] == report.totals.wall_seconds
    assert times["modules"] == {module["module"]: module["wall_seconds"] for module in report.modules}
    written[0].pop("timings.json")
    for files in written:
        files.pop("report.html")  # shows them
    assert written[0] == written[1]
    assert b"seconds" not in written[0]["report.json"]


def test_the_configuration_follows_the_one_convention(tmp_path) -> None:
    merge(recipe_of(adapters(tmp_path, use_rslora=True)), tmp_path / "out")
    config = stored_config(tmp_path / "out")
    assert config["lora_alpha"] == config["r"] == 3
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    assert config["target_modules"] == sorted(MODULES)
    assert config["base_model_name_or_path"] == "tiny/base"


def test_the_manifest_holds_true_hashes(tmp_path) -> None:
    paths = adapters(tmp_path)
    merge(recipe_of(paths, seed=7), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["seed"] == 7
    for source, path in zip(manifest["sources"], paths, strict=True):
        for file in source["files"]:
            assert file["sha256"] == hashlib.sha256((path / file["name"]).read_bytes()).hexdigest()
    for file in manifest["outputs"]:
        assert file["sha256"] == hashlib.sha256((tmp_path / "out" / file["name"]).read_bytes()).hexdigest()


def test_sources_are_not_hashed_when_told(tmp_path) -> None:
    merge(recipe_of(adapters(tmp_path)), tmp_path / "out", hash_sources=False)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {file["sha256"] for source in manifest["sources"] for file in source["files"]} == {None}
    assert all(file["sha256"] for file in manifest["outputs"])


def test_the_written_recipe_parses_and_gives_the_same_tensors(tmp_path) -> None:
    merge(recipe_of(adapters(tmp_path), "ties", parameters={"density": 0.4}), tmp_path / "out")
    again = load_recipe(tmp_path / "out" / "recipe.yaml")
    merge(again, tmp_path / "again")
    tensors = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again")]
    assert tensors[0] == tensors[1]


def test_the_model_card_names_sources_method_and_base(tmp_path) -> None:
    merge(recipe_of(adapters(tmp_path), "robustmerge"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("base_model: tiny/base", "library_name: peft", "`expert1`", "arXiv:2502.17159", "merge_method"):
        assert text in card


def test_the_report_says_what_a_hand_calculation_gives(tmp_path) -> None:
    path = write_tiny_adapter(tmp_path / "one", {"layers.0.q": (2, 2)}, rank=1, lora_alpha=2)
    tensors = {
        "base_model.model.layers.0.q.lora_A.weight": torch.tensor([[3.0, 4.0]]),
        "base_model.model.layers.0.q.lora_B.weight": torch.tensor([[1.0], [0.0]]),
    }
    save_file(tensors, path / "adapter_model.safetensors")
    other = write_tiny_adapter(tmp_path / "two", {"layers.0.q": (2, 2)}, rank=1, lora_alpha=1)
    tensors["base_model.model.layers.0.q.lora_A.weight"] = torch.tensor([[4.0, -3.0]])
    tensors["base_model.model.layers.0.q.lora_B.weight"] = torch.tensor([[0.0], [1.0]])
    save_file(tensors, other / "adapter_model.safetensors")
    # ΔW = diag directions: 2·(3, 4) in the first row and (4, −3) in the second: singular values 10 and 5.
    report = merge(recipe_of([path, other], "task_arithmetic"), tmp_path / "out")
    (module,) = report.modules
    assert module["input_norms"] == pytest.approx((10, 5))
    assert module["energy"] == pytest.approx(125)
    assert module["kept_energy"] == pytest.approx(100 / 125)
    assert module["rank_for_99"] == 2
    assert module["merged_norm"] == pytest.approx(10)
    assert module["relative_error"] == pytest.approx(5 / 125**0.5)
    assert module["retention"] == pytest.approx(100 / 125)
    assert report.totals.kept_energy == pytest.approx(0.8)


def test_the_closing_lines_say_norms_energy_and_how_to_load(tmp_path) -> None:
    report = merge(recipe_of(adapters(tmp_path), "task_arithmetic"), tmp_path / "out")
    text = "\n".join(closing_lines(report, "out"))
    for part in (
        "8 modules, rank 3",
        "expert2",
        "energy kept",
        "99 % in every module needs rank",
        "PeftModel",
        "vllm serve",
    ):
        assert part in text


ATTENTION = tuple(f"model.layers.0.self_attn.{side}_proj" for side in "qkv")


class TestHowToLoad:
    """The servers in the closing lines."""

    def loading(self, tmp_path, *, rank=3, size=16, saved=None, side=None, output=None) -> list[list[str]]:
        """(who, how) of a merge of an adapter of a language model, with a module or LLaVA's side file beside it."""
        path = write_tiny_adapter(tmp_path / "a", dict.fromkeys(ATTENTION, (size, size)), rank=rank, lora_alpha=rank)
        if saved:
            tensors = load_file(path / "adapter_model.safetensors")
            tensors[f"base_model.model.{saved}.weight"] = torch.ones(2, size)
            save_file(tensors, path / "adapter_model.safetensors")
            config = {**stored_config(path), "modules_to_save": [saved]}
            (path / "adapter_config.json").write_text(json.dumps(config))
        if side:
            torch.save({side: torch.ones(2, 2)}, path / "non_lora_trainables.bin")
            (path / "config.json").write_text("{}")
        keys = {"extras": "average"} if saved or side else {}
        report = merge(recipe_of([path], output=output or {}, **keys), tmp_path / "merged")
        lines = [line.split(maxsplit=1) for line in closing_lines(report, "merged")]
        return [line for line in lines if "merged" in line[1].replace("merged:", "")]

    def test_peft_and_vllm_load_an_adapter(self, tmp_path) -> None:
        peft, vllm = self.loading(tmp_path)
        assert peft == ["peft", "PeftModel.from_pretrained(base_model, 'merged')"]
        assert vllm[0] == "vLLM"
        assert vllm[1].startswith("vllm serve tiny/base --enable-lora --max-lora-rank 8 --lora-modules merged=merged")

    def test_what_a_server_would_refuse_it_is_not_said_to_load(self, tmp_path) -> None:
        assert [name for name, _ in self.loading(tmp_path, saved="lm_head")] == ["peft"]

    def test_no_server_reads_llavas_side_file(self, tmp_path) -> None:
        side = "base_model.model.model.mm_projector.0.weight"
        assert [name for name, _ in self.loading(tmp_path, side=side)] == ["peft"]

    def test_what_a_server_would_take_beside_the_factors_it_is_said_to_load(self, tmp_path) -> None:
        assert [name for name, _ in self.loading(tmp_path, saved="score")] == ["peft", "vLLM"]

    def test_no_rank_is_given_that_a_server_has_not(self, tmp_path) -> None:
        assert [name for name, _ in self.loading(tmp_path, rank=520, size=530)] == ["peft"]

    def test_ranks_that_differ_are_served_at_the_largest(self, tmp_path) -> None:
        output = {"rank": {"budget": "2.5kB"}, "uniform_rank": False}
        _, (name, command) = self.loading(tmp_path, rank=9, output=output)
        assert name == "vLLM"
        config = stored_config(tmp_path / "merged")
        ranks = {config["r"], *config["rank_pattern"].values()}
        assert len(ranks) > 1
        assert max(ranks) <= 8
        assert "--max-lora-rank 8 " in command

    def test_the_target_has_its_own_line(self, tmp_path) -> None:
        _, sglang = self.loading(tmp_path, output={"target": "sglang"})
        command = "python -m sglang.launch_server --model-path tiny/base --enable-lora --max-lora-rank 3"
        assert sglang == ["SGLang", f"{command} --lora-paths merged=merged"]

    @pytest.mark.parametrize(
        ("format_name", "server", "line"),
        [
            ("gguf", "llama.cpp", "  llama.cpp    llama-server -m BASE.gguf --lora out/adapter.gguf"),
            ("diffusers", "diffusers", "  diffusers    pipeline.load_lora_weights('out')"),
            ("kohya", "comfyui", "  ComfyUI      copy out/*.safetensors to models/loras"),
            ("other", None, "  other        out"),
        ],
    )
    def test_another_dialect_has_the_line_of_its_server(self, tmp_path, format_name, server, line) -> None:
        report = merge(recipe_of(adapters(tmp_path)), tmp_path / "out")
        written = report.model_copy(update={"format": format_name, "server": server})
        assert [*closing_lines(written, "out")][-1] == line


def test_a_large_merged_norm_is_pointed_out(tmp_path) -> None:
    (path,) = adapters(tmp_path, 1)
    report = merge(recipe_of([path] * 3, "task_arithmetic"), tmp_path / "out")
    assert "the merged norm is 3.0 times the mean input norm" in "\n".join(closing_lines(report, None))
    scaled = merge(recipe_of([path] * 3, "task_arithmetic", scale="auto"), tmp_path / "auto")
    assert "the merged norm is" not in "\n".join(closing_lines(scaled, None))


def test_auto_scale_of_copies_has_the_retention_it_aims_at(tmp_path) -> None:
    (path,) = adapters(tmp_path, 1)
    report = merge(recipe_of([path] * 3, "task_arithmetic", scale="auto"), tmp_path / "out")
    for module in report.modules:
        assert module["retention"] == pytest.approx(3**-0.4, rel=1e-5)


def test_opposed_inputs_keep_their_scale_and_are_warned_about(tmp_path) -> None:
    (path,) = adapters(tmp_path, 1)
    tensors = load_file(path / "adapter_model.safetensors")
    opposed = write_tiny_adapter(tmp_path / "opposed", MODULES, rank=3, lora_alpha=0.6)
    negated = {name: -0.999 * t if "lora_B" in name else t for name, t in tensors.items()}
    save_file(negated, opposed / "adapter_model.safetensors")
    report = merge(recipe_of([path, opposed], "task_arithmetic", scale="auto"), tmp_path / "out")
    assert {module["scale"] for module in report.modules} == {1.0}
    assert "outside [0.1, 10]" in report.warnings[-1]
    with pytest.raises(MergeError, match="warnings are errors under --strict"):
        merge(recipe_of([path, opposed], "task_arithmetic", scale="auto"), tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


class TestFailures:
    def test_an_existing_output_is_kept_unless_overwritten(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        merge(recipe_of(paths), tmp_path / "out")
        before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        with pytest.raises(OutputError, match="exists already"):
            merge(recipe_of(paths, "drm"), tmp_path / "out")
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
        merge(recipe_of(paths, "drm"), tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before
        assert_nothing_left(tmp_path, "out", *(path.name for path in paths))

    def test_a_directory_that_is_no_adapter_is_never_replaced(self, tmp_path) -> None:
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "thesis.txt").write_text("years of work")
        with pytest.raises(OutputError, match=r"holds 'thesis\.txt', which no merge writes"):
            merge(recipe_of(adapters(tmp_path)), tmp_path / "precious", overwrite=True)
        assert (tmp_path / "precious" / "thesis.txt").exists()

    @pytest.mark.parametrize("inside", ["", "merged"])
    def test_an_output_inside_an_input_is_refused(self, tmp_path, inside) -> None:
        paths = adapters(tmp_path)
        with pytest.raises(OutputError, match="lies in the input 'expert1'"):
            merge(recipe_of(paths), paths[0] / inside, overwrite=True)

    def test_a_bad_value_in_the_middle_leaves_nothing(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        tensors = load_file(paths[1] / "adapter_model.safetensors")
        name = "base_model.model.encoder.layer.1.output.dense.lora_B.weight"
        tensors[name][0, 0] = float("nan")
        save_file(tensors, paths[1] / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=f"'expert2': tensor '{name}' holds 1 NaN"):
            merge(recipe_of(paths), tmp_path / "out")
        assert_nothing_left(tmp_path, *(path.name for path in paths))

    def test_a_full_disk_is_noticed_before_any_tensor_is_read(self, tmp_path, monkeypatch) -> None:
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        paths = adapters(tmp_path)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError, match=r"the disk is full: [\d,]+ bytes are needed"):
            merge(recipe_of(paths), tmp_path / "out")
        assert_nothing_left(tmp_path, *(path.name for path in paths))

    @pytest.mark.parametrize(
        ("works", "finished"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2)]
    )  # the header, then two factors a module
    def test_a_write_that_fails_later_keeps_what_is_finished(self, tmp_path, monkeypatch, works, finished) -> None:
        calls = []
        real = os.pwrite

        def failing(*arguments):
            calls.append(1)
            if len(calls) > works:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments)

        paths = adapters(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing)
            with pytest.raises(DiskError, match="cannot be written") as caught:
                merge(recipe_of(paths), tmp_path / "out", executor="serial")
        assert ("run the same merge again to go on" in str(caught.value)) == bool(finished)
        kept = [".out.partial"] if finished else []
        assert_nothing_left(tmp_path, *kept, *(path.name for path in paths))
        recorder = Recorder()
        merge(recipe_of(paths), tmp_path / "out", reporters=[recorder])
        assert sum(isinstance(event, ModuleMerged) for event in recorder.events) == len(MODULES) - finished
        assert_nothing_left(tmp_path, "out", *(path.name for path in paths))

    def test_an_overflow_in_the_stored_type_is_caught_after_the_cast(self, tmp_path) -> None:
        paths = adapters(tmp_path, 1, lora_alpha=1e7, dtype=torch.float16)
        with pytest.raises(OutputError, match="exceed the range of float16") as caught:
            merge(recipe_of(paths), tmp_path / "out")
        assert "out_dtype: bfloat16" in str(caught.value)

    def test_what_a_killed_run_left_is_dealt_with(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        merge(recipe_of(paths), tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / ".out.replaced")
        (tmp_path / ".out.partial").mkdir()
        (tmp_path / ".out.partial" / "adapter_model.safetensors").write_bytes(b"half")
        with pytest.raises(OutputError, match="exists already"):
            merge(recipe_of(paths), tmp_path / "out")
        merge(recipe_of(paths), tmp_path / "out", overwrite=True)
        assert_nothing_left(tmp_path, "out", *(path.name for path in paths))

    def test_two_merges_into_one_directory_do_not_mix(self, tmp_path) -> None:
        fcntl = pytest.importorskip("fcntl")
        partial = tmp_path / ".out.partial"
        partial.mkdir()
        handle = os.open(partial, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another merge is writing here"):
            merge(recipe_of(adapters(tmp_path)), tmp_path / "out")
        os.close(handle)


class TestOutputPaths:
    def test_the_working_directory_itself_is_refused(self, tmp_path, monkeypatch) -> None:
        paths = adapters(tmp_path)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        (tmp_path / "here" / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match="which no merge writes"):
            merge(recipe_of(paths), ".", overwrite=True)

    def test_an_output_that_appears_during_the_merge_is_not_touched(self, tmp_path) -> None:
        class Intruder(Reporter):
            name, summary = "intruder", "makes the output meanwhile"

            def handle(self, event):
                (tmp_path / "out").mkdir(exist_ok=True)
                (tmp_path / "out" / "theirs").write_text("")

        paths = adapters(tmp_path)
        with pytest.raises(OutputError, match="exists already"):
            merge(recipe_of(paths), tmp_path / "out", reporters=[Intruder()])
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]

    def test_a_directory_with_more_than_an_adapter_is_not_replaced(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        merge(recipe_of(paths), tmp_path / "out")
        (tmp_path / "out" / "checkpoint-10").mkdir()
        with pytest.raises(OutputError, match="holds 'checkpoint-10', which no merge writes"):
            merge(recipe_of(paths), tmp_path / "out", overwrite=True)

    def test_a_link_keeps_pointing_at_the_new_adapter(self, tmp_path) -> None:
        paths = adapters(tmp_path)
        merge(recipe_of(paths), tmp_path / "real")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        for method in ("drm", "ties"):
            merge(recipe_of(paths, method), tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert json.loads((tmp_path / "real" / "report.json").read_text())["method"] == "ties"

    def test_parents_made_for_a_failed_merge_go_again(self, tmp_path) -> None:
        paths = adapters(tmp_path, 1, lora_alpha=1e7, dtype=torch.float16)
        with pytest.raises(OutputError, match="exceed the range"):
            merge(recipe_of(paths), tmp_path / "a" / "b" / "out")
        assert_nothing_left(tmp_path, *(path.name for path in paths))


def misbehaving(result):
    class Misbehaving(ElementwiseStrategy):
        name, summary = "misbehaving", "returns nonsense"

        def merge(self, coordinates, context):
            return result(super().merge(coordinates, context))

        def merge_block(self, block, weights, context):
            return block.sum(dim=0)

    class Plugin:
        @hookimpl
        def strategies(self):
            return [Misbehaving]

    registry = Registry()
    registry.register(Plugin(), "misbehaving")
    return registry


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda update: update.scaled(float("nan")), "values that are not finite"),
        (lambda update: update.transposed(), "expected an update of shape"),
        (lambda update: None, "returned None; expected an update"),
    ],
)
def test_a_strategy_that_returns_nonsense_is_stopped_and_named(tmp_path, result, message) -> None:
    modules = {"layers.0.q": (6, 5)}
    paths = [write_tiny_adapter(tmp_path / str(seed), modules, seed=seed) for seed in (1, 2)]
    with pytest.raises(
        StrategyError, match=r"strategy 'misbehaving' of plugin 'misbehaving' on module 'layers\.0\.q'"
    ) as caught:
        merge(recipe_of(paths, "misbehaving"), tmp_path / "out", registry=misbehaving(result))
    assert message in str(caught.value)
    assert_nothing_left(tmp_path, "1", "2")


class Recorder(Reporter):
    name, summary = "recorder", "keeps events"

    def __init__(self):
        self.events, self.closed = [], False

    def handle(self, event):
        self.events.append(event)

    def close(self):
        self.closed = True


def test_reporters_follow_a_merge_from_start_to_end(tmp_path) -> None:
    recorder = Recorder()
    merge(recipe_of(adapters(tmp_path), "knots"), tmp_path / "out", reporters=[recorder])
    kinds = [type(event) for event in recorder.events]
    assert kinds[0] is MergeStarted
    assert kinds[-1] is MergeFinished
    assert kinds.count(ModuleMerged) == len(MODULES)
    assert kinds.count(SurveyRound) == 3 * len(MODULES)  # two digits of the threshold, then the signs
    assert recorder.closed


def test_a_reporter_that_fails_is_left_out_and_the_merge_goes_on(tmp_path) -> None:
    class Broken(Recorder):
        name = "broken"

        def handle(self, event):
            raise RuntimeError("no connection")

    healthy = Recorder()
    report = merge(recipe_of(adapters(tmp_path)), tmp_path / "out", reporters=[Broken(), healthy])
    assert report.warnings == ("reporter 'broken' failed and was left out: RuntimeError: no connection",)
    assert isinstance(healthy.events[-1], MergeFinished)


def test_a_plugins_exception_names_strategy_plugin_and_module(tmp_path) -> None:
    modules = {"layers.0.q": (6, 5)}
    paths = [write_tiny_adapter(tmp_path / str(seed), modules, seed=seed) for seed in (1, 2)]
    with pytest.raises(
        StrategyError, match="strategy 'misbehaving' of plugin 'misbehaving' failed on module"
    ) as caught:
        merge(recipe_of(paths, "misbehaving"), tmp_path / "out", registry=misbehaving(lambda update: 1 / 0))
    assert "ZeroDivisionError" in str(caught.value)


def test_a_sum_that_cancels_has_no_relative_error(tmp_path) -> None:
    (path,) = adapters(tmp_path, 1)
    models = [{"model": str(path), "parameters": {"weight": w}} for w in (1.0, 1.0, -2.0)]
    report = merge({"merge_method": "task_arithmetic", "models": models}, tmp_path / "out")
    assert {module["relative_error"] for module in report.modules} == {None}


def test_reporters_are_closed_when_a_merge_fails(tmp_path) -> None:
    recorder = Recorder()
    paths = adapters(tmp_path, 1, lora_alpha=1e7, dtype=torch.float16)
    with pytest.raises(OutputError):
        merge(recipe_of(paths), tmp_path / "out", reporters=[recorder])
    assert recorder.closed
    assert not any(isinstance(event, MergeFinished) for event in recorder.events)
