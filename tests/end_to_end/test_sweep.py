"""Many merges of the same inputs at once: each as it is alone, every input read once."""

import json
import weakref

import pytest

from mergekit_lowrank import MergeError, OutputError, merge, plan, plan_variants
from mergekit_lowrank.events import Reporter, SurveyRound
from mergekit_lowrank.formats import PeftCheckpoint
from mergekit_lowrank.recipe import parse_recipe
from mergekit_lowrank.spaces import CoreSpace, DeltaSpace, JointSpace
from tests.end_to_end.makers import MODULES, adapters

WEIGHT = "models[0].parameters.weight"


def sweep_of(paths, method, sweep, **keys):
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths]
    return {"merge_method": method, "models": models, "sweep": sweep, **keys}


def files_of(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
        and path.name not in ("timings.json", "report.html", "recipe.yaml", "manifest.json", "README.md")
    }


@pytest.mark.parametrize(
    ("method", "sweep", "keys"),
    [
        ("ties", {"parameters.density": [0.2, 0.5], "scale": [1.0, "auto"]}, {}),
        ("knots", {"parameters.density": [0.2, 0.5], WEIGHT: [0.5, -1.0]}, {}),
        ("core_ties", {WEIGHT: [0.5, 2.0], "parameters.density": [0.3]}, {}),
        ("robustmerge", {WEIGHT: [0.5, 2.0], "canonical": ["svd"]}, {}),
        ("ctm", {WEIGHT: [0.5, 2.0]}, {}),
        ("linear", {"merge_method": ["linear", "drm", "ties"], "seed": [3]}, {}),
        ("ties", {"parameters.density": [0.2, 0.5]}, {"parameters": {"scope": "model"}}),
        ("linear", {"output.rank": [{"energy": 0.9}, {"energy": 0.5}, 2]}, {}),
        ("linear", {"output.rank": [{"budget": 3000}, {"budget": 6000}]}, {"output": {"uniform_rank": False}}),
    ],
)
def test_every_variant_is_what_it_is_alone(tmp_path, method, sweep, keys) -> None:
    recipe = sweep_of(adapters(tmp_path), method, sweep, **keys)
    reports = merge(recipe, tmp_path / "out")
    variants = parse_recipe(recipe).variants()
    assert list(reports) == [name for name, _ in variants]
    for name, variant in variants:
        merge(variant, tmp_path / "alone" / name)
        assert files_of(tmp_path / "out" / name) == files_of(tmp_path / "alone" / name)


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_each_module_of_each_input_is_read_once(tmp_path, monkeypatch, executor) -> None:
    read, original = [], PeftCheckpoint.read

    def counted(self, module):
        read.append((self.label, module))
        return original(self, module)

    monkeypatch.setattr(PeftCheckpoint, "read", counted)
    recipe = sweep_of(adapters(tmp_path, 3), "ties", {"parameters.density": [0.2, 0.4, 0.6, 0.8]}, space="joint")
    merge(recipe, tmp_path / "out", executor=executor)
    assert len(read) == len(set(read)) == 3 * len(MODULES)


def test_variants_go_through_the_rounds_of_a_survey_together(tmp_path) -> None:
    class Rounds(Reporter):
        name, summary = "rounds", "counts survey rounds"

        def __init__(self):
            self.events = []

        def handle(self, event):
            if isinstance(event, SurveyRound):
                self.events.append((event.round, event.module))

    counts = []
    for densities in ([0.2], [0.2, 0.4, 0.6]):
        rounds = Rounds()
        recipe = sweep_of(adapters(tmp_path), "knots", {"parameters.density": densities})
        merge(recipe, tmp_path / f"out{len(densities)}", reporters=[rounds])
        assert len(rounds.events) == len(set(rounds.events))
        counts.append(len(rounds.events))
    assert counts[0] == counts[1] > 0


def test_decompositions_are_shared(tmp_path, monkeypatch) -> None:
    from mergekit_lowrank.spaces import joint

    calls, original = [], joint.joint_decomposition
    monkeypatch.setattr(joint, "joint_decomposition", lambda *args: calls.append(1) or original(*args))
    merge(sweep_of(adapters(tmp_path), "drm", {WEIGHT: [0.1, 0.2, 0.3]}), tmp_path / "out")
    assert len(calls) == len(MODULES)


def test_coordinates_of_one_space_are_held_at_a_time(tmp_path, monkeypatch) -> None:
    made, living = [], []

    def watched(original):
        def encode(self, updates, weights):
            living.append(sum(reference() is not None for reference in made))
            coordinates = original(self, updates, weights)
            made.append(weakref.ref(coordinates))
            return coordinates

        return encode

    for space in (DeltaSpace, JointSpace, CoreSpace):
        monkeypatch.setattr(space, "encode", watched(space.encode))
    sweep = {"space": ["delta", "joint", "core"], "parameters.density": [0.2, 0.5]}
    merge(sweep_of(adapters(tmp_path), "ties", sweep), tmp_path / "out", executor="serial")
    assert len(made) == 3 * len(MODULES)
    assert set(living) == {0}


def test_an_index_says_what_lies_where(tmp_path) -> None:
    merge(sweep_of(adapters(tmp_path), "ties", {"parameters.density": [0.2, 0.5]}), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [variant["name"] for variant in index["variants"]] == ["density=0.2", "density=0.5"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["density=0.2", "density=0.5", "sweep.json"]
    assert not list(tmp_path.glob(".out*"))


def test_a_sweep_is_replaced_as_a_whole_and_by_nothing_else(tmp_path) -> None:
    paths = adapters(tmp_path)
    merge(sweep_of(paths, "ties", {"parameters.density": [0.2, 0.5]}), tmp_path / "out")
    merge(sweep_of(paths, "ties", {"parameters.density": [0.3]}), tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["density=0.3", "sweep.json"]
    (tmp_path / "out" / "density=0.3" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'notes.txt', which no merge writes"):
        merge(sweep_of(paths, "ties", {"parameters.density": [0.4]}), tmp_path / "out", overwrite=True)


def test_the_problems_of_all_variants_come_together(tmp_path) -> None:
    recipe = sweep_of(adapters(tmp_path), "ties", {"merge_method": ["ties", "robustmerge"]}, space="delta")
    with pytest.raises(MergeError, match="'robustmerge' does not work in space 'delta'"):
        merge(recipe, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_into_memory_there_is_one_adapter(tmp_path) -> None:
    recipe = sweep_of(adapters(tmp_path), "ties", {"parameters.density": [0.2, 0.5]})
    with pytest.raises(OutputError, match="this recipe gives 2 variants; name an output"):
        merge(recipe)
    with pytest.raises(MergeError, match="plan_variants"):
        plan(recipe)
    assert list(plan_variants(recipe)) == ["density=0.2", "density=0.5"]


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": -1}, {"memory_bytes": 0}, {"vram_bytes": -5}])
def test_what_a_merge_may_use_is_at_least_one(tmp_path, options) -> None:
    ((name, number),) = options.items()
    with pytest.raises(MergeError, match=f"{name}={number}: expected a whole number of at least 1"):
        merge({"merge_method": "linear", "models": [{"model": str(p)} for p in adapters(tmp_path)]}, **options)
