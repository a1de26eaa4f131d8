"""The report of a finished output, read again."""

import json
from pathlib import Path

import pytest

from mergekit_lowrank import CheckpointError, Report, merge
from mergekit_lowrank.report.results import SCHEMA_VERSION
from tests.end_to_end.makers import adapters


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    directory = tmp_path_factory.mktemp("merge")
    recipe = {"merge_method": "ties", "models": [{"model": str(path)} for path in adapters(directory)]}
    report = merge(recipe, directory / "out")
    assert isinstance(report, Report)
    return report, directory / "out"


@pytest.fixture
def output(made: tuple[Report, Path], tmp_path: Path) -> Path:
    for name in ("report.json", "timings.json"):
        (tmp_path / name).write_bytes((made[1] / name).read_bytes())
    return tmp_path


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_is_read_is_what_the_merge_gave(made: tuple[Report, Path]) -> None:
    report, directory = made
    found = Report.read(directory)
    assert found.to_json() == report.to_json()
    assert found.timings() == report.timings()
    assert found.totals == report.totals
    assert found.memory == report.memory


def test_the_evidence_about_inputs_and_result(made: tuple[Report, Path]) -> None:
    report, _ = made
    count = len(report.inputs)
    for module in report.modules:
        assert [len(row) for row in module["cosines"]] == [count] * count
        assert all(module["cosines"][t][t] == pytest.approx(1, abs=1e-5) for t in range(count))
        assert 0 <= module["sign_conflict"] <= 0.5
        assert sum(v * v for v in module["spectrum"]) == pytest.approx(module["energy"], rel=1e-4)
        for values, own in zip(module["input_spectra"], module["input_norms"], strict=True):
            assert sum(v * v for v in values) ** 0.5 == pytest.approx(own, rel=1e-4)
        assert 0 < module["peak_bytes"] <= report.memory.planned_peak_bytes <= report.memory.allowed_bytes


@pytest.mark.parametrize("name", ["report.json", "timings.json"])
def test_a_missing_file_is_named(output: Path, name: str) -> None:
    (output / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}; expected what a merge has made"):
        Report.read(output)


@pytest.mark.parametrize(("content", "said"), [(b"{", "cannot be read as JSON"), (b"[]", "holds a list")])
def test_a_damaged_file_is_named(output: Path, content: bytes, said: str) -> None:
    (output / "report.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"report.json: {said}"):
        Report.read(output)


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, None])
def test_another_version_is_refused(output: Path, version: int | None) -> None:
    changed(output / "report.json", schema_version=version)
    with pytest.raises(CheckpointError, match=f"has schema version {version!r}, and .* reads {SCHEMA_VERSION}"):
        Report.read(output)


@pytest.mark.parametrize("change", [{"modules": {}}, {"memory": {}}, {"memory": 3}, {"wall_seconds": "long"}])
def test_times_of_another_merge_are_refused(output: Path, change: dict[str, object]) -> None:
    changed(output / "timings.json", **change)
    with pytest.raises(CheckpointError, match="are not of one merge"):
        Report.read(output)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"energy": None}, "modules.0.energy: Input should be a valid number"),
        ({"cosines": [[1.0]]}, "is not of its inputs"),
        ({"participants": ["who"]}, "is not of its inputs"),
        ({"energy": float("nan")}, "no merge writes the number NaN"),
        ({"energy": 1e300}, r"no merge writes the number 1e\+300"),
        ({"rank_for_99": 10**400}, "no merge writes the number 1000"),
    ],
)
def test_a_damaged_module_is_named(output: Path, change: dict[str, object], said: str) -> None:
    modules = json.loads((output / "report.json").read_text())["modules"]
    changed(output / "report.json", modules=[modules[0] | change, *modules[1:]])
    with pytest.raises(CheckpointError, match=said):
        Report.read(output)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modules": []}, "it has a rank, and none of its modules has one"),
        ({"modules": None}, "not iterable"),
        ({"inputs": []}, "it has no inputs"),
        ({"server": "apache"}, "there is no server 'apache'"),
        ({"method": 3}, "method: Input should be a valid string"),
    ],
)
def test_parts_that_do_not_go_together_are_named(output: Path, change: dict[str, object], said: str) -> None:
    changed(output / "report.json", **change)
    with pytest.raises(CheckpointError, match=f"damaged: .*{said}.*Merge again"):
        Report.read(output)
