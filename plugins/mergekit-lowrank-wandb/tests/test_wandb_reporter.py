"""What wandb's offline mode keeps of a merge, read from its files."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mergekit_lowrank_wandb
import pytest
from mergekit_lowrank_wandb import reporter
from mergekit_lowrank_wandb.reporter import PROJECT_VARIABLE

from mergekit_lowrank import MergeError, Registry, Report, finalize, merge
from mergekit_lowrank.testing import write_tiny_adapter

MODULES = {f"layers.{layer}.{name}": (6, 5) for layer in range(2) for name in ("q", "v")}
OFFLINE = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
BLOCK = 1 << 15
"""Of LevelDB's log format, in which wandb keeps its records: a checksum, a length and a kind before each piece."""
WHOLE, LAST = 1, 4
SECONDS = 60


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = Registry()
    found.register(mergekit_lowrank_wandb, "wandb")
    return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("adapters")
    paths = [write_tiny_adapter(place / name, MODULES, seed=seed) for seed, name in enumerate(("math", "code"))]
    return {"merge_method": "linear", "models": [{"model": str(path)} for path in paths]}


@pytest.fixture(scope="module")
def wandb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tracker, offline, at home nowhere but in a directory of the tests."""
    with pytest.MonkeyPatch.context() as environment:
        for name in OFFLINE:
            environment.setenv(name, str(tmp_path_factory.mktemp(name)))
        environment.setenv("WANDB_MODE", "offline")
        environment.setenv("WANDB_SILENT", "true")
        environment.setenv(PROJECT_VARIABLE, "merges")
        tracker = pytest.importorskip("wandb")
        yield tracker
        tracker.teardown()


class Kept:
    """One offline run as its file holds it: ``config``, ``rows`` of the history, ``summary``, ``files``, ``status``."""

    def __init__(self, path: Path) -> None:
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.status: int | None = None
        for record in records(path):
            match record.WhichOneof("record_type"):
                case "run":
                    self.project, self.config = record.run.project, plain(record.run.config.update)
                case "history":
                    self.rows.append(plain(record.history.item))
                case "summary":
                    self.summary |= plain(record.summary.update)
                case "artifact":
                    self.files |= {
                        own.path: Path(own.local_path).read_bytes() for own in record.artifact.manifest.contents
                    }
                case "exit":
                    self.status = record.exit.exit_code


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, held = path.read_bytes(), 7, b""
    while position + 7 < len(data):
        if BLOCK - position % BLOCK < 7:  # no room for the head of a piece
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + size > len(data):  # it is being written
            return
        held += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (WHOLE, LAST):
            yield Record.FromString(held)
            held = b""


def plain(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def runs() -> set[Path]:
    return set(Path(os.environ["WANDB_DIR"]).glob("wandb/offline-run-*/*.wandb"))


def only_new(before: set[Path]) -> Kept:
    """The run that was not there before, once wandb's own process has written the end of it."""
    (path,) = runs() - before
    end = time.monotonic() + SECONDS
    while (kept := Kept(path)).status is None and time.monotonic() < end:
        time.sleep(0.05)
    return kept


@pytest.fixture(scope="module")
def merged(
    wandb: Any, recipe: Mapping[str, Any], registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Kept, Report, Path]:
    """A merge while the program has a run of its own open: what was kept, its report and its place."""
    own, out = wandb.init(project="training"), tmp_path_factory.mktemp("out") / "merged"
    before = runs()
    report = merge(recipe, out, registry=registry)
    assert isinstance(report, Report)
    assert wandb.run is own
    kept = only_new(before)
    own.finish()
    return kept, report, out


def test_a_run_is_found_by_what_was_merged(merged: tuple[Kept, Report, Path], recipe: Mapping[str, Any]) -> None:
    kept, _, _ = merged
    assert kept.project == "merges"
    assert (kept.config["method"], kept.config["inputs"], kept.config["modules"]) == ("linear", ["math", "code"], 4)
    assert kept.config["recipe"]["models"][0]["model"] == recipe["models"][0]["model"]


def test_every_module_is_a_step_with_the_numbers_of_the_report(merged: tuple[Kept, Report, Path]) -> None:
    kept, report, _ = merged
    assert [row["_step"] for row in kept.rows] == [1, 2, 3, 4]
    entries = {entry["module"]: entry for entry in report.modules}
    assert {row["module/name"] for row in kept.rows} == set(entries)
    for row in kept.rows:
        entry = entries[row["module/name"]]
        for name in ("merged_norm", "kept_energy", "cut_error", "relative_error", "retention", "rank"):
            assert row[f"module/{name}"] == pytest.approx(entry[name])


def test_the_summary_holds_the_totals(merged: tuple[Kept, Report, Path]) -> None:
    kept, report, _ = merged
    totals = {name: value for name, value in report.totals.model_dump().items() if value is not None}
    assert {name: kept.summary[name] for name in totals} == pytest.approx(totals)
    assert kept.summary["warnings"] == list(report.warnings)
    assert kept.status == 0


def test_the_report_is_kept_byte_for_byte(merged: tuple[Kept, Report, Path]) -> None:
    kept, _, out = merged
    assert kept.files["report.json"] == (out / "report.json").read_bytes()


@pytest.mark.usefixtures("wandb")
def test_a_merge_that_fails_is_a_run_that_failed(recipe: Mapping[str, Any], registry: Registry, tmp_path: Path) -> None:
    broken = write_tiny_adapter(tmp_path / "broken", MODULES)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\xc0\x7f")
    before = runs()
    with pytest.raises(MergeError) as caught:
        merge({**recipe, "models": [*recipe["models"], {"model": str(broken)}]}, tmp_path / "out", registry=registry)
    kept = only_new(before)
    assert (kept.status, kept.summary["error"]) == (1, str(caught.value))
    assert kept.files == {}


@pytest.mark.usefixtures("wandb")
def test_variants_of_a_sweep_have_names_and_reports_of_their_own(
    recipe: Mapping[str, Any], registry: Registry, tmp_path: Path
) -> None:
    before = runs()
    reports = merge({**recipe, "sweep": {"scale": [1, 0.5]}}, tmp_path / "out", registry=registry)
    assert isinstance(reports, dict)
    kept = only_new(before)
    assert len(kept.rows) == 2 * len(MODULES)
    for name, report in reports.items():
        assert sum(f"{name}/module/merged_norm" in row for row in kept.rows) == len(MODULES)
        assert kept.summary[f"{name}/merged_norm"] == pytest.approx(report.totals.merged_norm)
        assert kept.files[f"{name}/report.json"] == (tmp_path / "out" / name / "report.json").read_bytes()


@pytest.mark.usefixtures("wandb")
def test_parts_that_are_put_together_are_a_run_with_the_totals(
    recipe: Mapping[str, Any], registry: Registry, tmp_path: Path
) -> None:
    merge(recipe, tmp_path / "out", shard=(0, 1), registry=Registry())
    before = runs()
    report = finalize(tmp_path / "out", registry=registry)
    assert isinstance(report, Report)
    kept = only_new(before)
    assert kept.summary["merged_norm"] == pytest.approx(report.totals.merged_norm)
    assert "report.json" in kept.files


def test_without_a_project_nothing_is_imported(
    recipe: Mapping[str, Any], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PROJECT_VARIABLE, raising=False)
    monkeypatch.setattr(reporter, "import_module", missing)
    assert merge(recipe, registry=registry).report.warnings == ()


def test_without_wandb_the_merge_goes_on_and_the_report_says_why_there_is_no_run(
    recipe: Mapping[str, Any], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROJECT_VARIABLE, "merges")
    monkeypatch.setattr(reporter, "import_module", missing)
    (warning,) = merge(recipe, registry=registry).report.warnings
    assert warning == "reporter 'wandb' failed and was left out: ModuleNotFoundError: No module named 'wandb'"


def missing(name: str) -> None:
    raise ModuleNotFoundError(f"No module named '{name}'")
