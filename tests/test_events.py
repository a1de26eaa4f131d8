"""What reporters are told: enough to follow a merge without anything else."""

from __future__ import annotations

import json

import pytest

from mergekit_lowrank import MergeError, finalize, merge
from mergekit_lowrank.events import (
    MergeFailed,
    MergeFinished,
    MergeResumed,
    MergeStarted,
    ModuleMerged,
    Notice,
    Reporter,
    SurveyRound,
)
from mergekit_lowrank.testing import write_tiny_adapter

MODULES = {f"layers.{layer}.{name}": (6, 5) for layer in range(2) for name in ("q", "v")}


class Recorder(Reporter):
    """Keeps events; interrupts after so many modules."""

    name, summary = "recorder", "keeps events"

    def __init__(self, interrupt_after=None):
        self.events, self.is_closed, self._after = [], False, interrupt_after

    def handle(self, event):
        assert not self.is_closed
        self.events.append(event)
        if isinstance(event, ModuleMerged) and len(self.of(ModuleMerged)) == self._after:
            raise KeyboardInterrupt

    def close(self):
        self.is_closed = True

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    paths = [write_tiny_adapter(place / name, MODULES, seed=seed) for seed, name in enumerate(("math", "code"))]
    return {"merge_method": "linear", "models": [{"model": str(path)} for path in paths]}


def told(recipe, *arguments, **options):
    recorder = Recorder()
    merge(recipe, *arguments, reporters=[recorder], **options)
    return recorder


@pytest.mark.parametrize(
    "event",
    [
        MergeStarted(2, 10),
        SurveyRound("m", 1, 2),
        MergeResumed(1),
        ModuleMerged("m", 1, 0.1),
        Notice("a word"),
        MergeFinished("out", 1.0),
        MergeFailed("why"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_event_made_as_ever_is_plain_data_with_its_name(event):
    data = json.loads(json.dumps(event.to_dict()))
    assert data.pop("event") == type(event).__name__
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    assert type(event)(**fields) == event


def test_the_start_says_what_is_merged(recipe):
    (started,) = told(recipe).of(MergeStarted)
    assert (started.modules, started.method, started.inputs) == (len(MODULES), "linear", ("math", "code"))
    assert [model["model"] for model in started.recipe["models"]] == [model["model"] for model in recipe["models"]]
    assert started.recipe["dtype"] == "float32"


def test_modules_come_with_the_numbers_of_the_report(recipe):
    recorder = Recorder()
    report = merge(recipe, reporters=[recorder]).report
    entries = {entry["module"]: entry for entry in report.modules}
    for event in recorder.of(ModuleMerged):
        assert {"merged_norm", "kept_energy", "cut_error", "relative_error", "sign_conflict"} <= event.measures.keys()
        assert {name: entries[event.module][name] for name in event.measures} == event.measures


def test_the_end_says_what_the_report_says(recipe, tmp_path):
    recorder = Recorder()
    report = merge(recipe, tmp_path / "out", reporters=[recorder])
    (finished,) = recorder.of(MergeFinished)
    assert finished.totals == report.totals.model_dump()
    assert (finished.location, finished.warnings) == (str(tmp_path / "out"), report.warnings)


def test_the_output_is_in_place_when_the_end_is_told(recipe, tmp_path):
    class Looker(Recorder):
        def handle(self, event):
            super().handle(event)
            if isinstance(event, MergeFinished):
                self.seen = (tmp_path / "out" / "report.json").exists()

    whole, parts = Looker(), Looker()
    merge(recipe, tmp_path / "out", reporters=[whole])
    for part in range(2):
        merge(recipe, tmp_path / "out", shard=(part, 2), overwrite=True)
    finalize(tmp_path / "out", overwrite=True, reporters=[parts])
    assert whole.seen
    assert parts.seen


def test_a_part_starts_with_its_own_modules(recipe, tmp_path):
    for part in range(2):
        recorder = told(recipe, tmp_path / "out", shard=(part, 2))
        assert recorder.of(MergeStarted)[0].modules == len(recorder.of(ModuleMerged)) == 2


def test_the_modules_of_a_sweep_say_whose_they_are(recipe, tmp_path):
    recorder = told({**recipe, "sweep": {"scale": [1, 0.5]}}, tmp_path / "out")
    (finished,) = recorder.of(MergeFinished)
    names = [event.variant for event in recorder.of(ModuleMerged)]
    assert {name: names.count(name) for name in finished.totals} == dict.fromkeys(finished.totals, len(MODULES))


def test_a_merge_that_goes_on_says_how_much_is_there(recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", executor="serial", reporters=[Recorder(interrupt_after=3)])
    recorder = told(recipe, tmp_path / "out")
    (resumed,) = recorder.of(MergeResumed)
    assert resumed.finished + len(recorder.of(ModuleMerged)) == recorder.of(MergeStarted)[0].modules


def test_a_failure_is_told_before_reporters_are_closed(recipe, tmp_path):
    broken = write_tiny_adapter(tmp_path / "broken", MODULES)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\xc0\x7f")
    recorder = Recorder()
    with pytest.raises(MergeError) as caught:
        merge({**recipe, "models": [{"model": str(broken)}]}, tmp_path / "out", reporters=[recorder])
    assert recorder.events[-1] == MergeFailed(str(caught.value))
    assert recorder.is_closed


def test_an_interrupt_is_a_failure_by_its_name(recipe, tmp_path):
    recorder = Recorder(interrupt_after=1)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", reporters=[recorder])
    assert recorder.events[-1] == MergeFailed("KeyboardInterrupt")
