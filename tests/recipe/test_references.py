from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from mergekit_lowrank.errors import CheckpointError, MergeError, RecipeError
from mergekit_lowrank.recipe import resolve_directory, resolve_model
from mergekit_lowrank.recipe.hub import HubId


def never(_: HubId) -> NoReturn:
    pytest.fail("asked the Hub")


class Hub:
    """Records what was asked of it."""

    def __init__(self, answer: Exception | None = None) -> None:
        self.asked: list[HubId] = []
        self.answer = answer

    def __call__(self, hub_id: HubId) -> Path:
        self.asked.append(hub_id)
        if self.answer:
            raise self.answer
        return Path("/cache/snapshot")


def test_an_existing_path_wins_over_the_hub(tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    assert resolve_model("org/name", tmp_path, download=never) == tmp_path / "org/name"


def test_a_path_is_relative_to_the_directory_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "a").mkdir()
    assert resolve_model("./a", tmp_path, download=never) == tmp_path / "a"


def test_an_absolute_path_stays(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), Path("/"), download=never) == tmp_path


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    assert resolve_model("~/a", Path("/"), download=never) == tmp_path / "a"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1", HubId("org/name", "v1")),
        ("hf:org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("hf:org/name/math", HubId("org/name", None, "math")),
        ("hf:org/name/runs/epoch 3.safetensors@v1", HubId("org/name", "v1", "runs/epoch 3.safetensors")),
    ],
)
def test_a_hub_id_is_fetched_at_its_revision(reference: str, expected: HubId, tmp_path: Path) -> None:
    asked = Hub()
    assert resolve_model(reference, tmp_path, download=asked) == Path("/cache/snapshot")
    assert asked.asked == [expected]
    assert HubId.parse(f"hf:{expected}") == expected


def test_what_is_left_out_is_fetched_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Hub()
    monkeypatch.setattr("mergekit_lowrank.recipe.references.fetch", asked)
    assert resolve_model("org/name", tmp_path) == Path("/cache/snapshot")
    assert asked.asked == [HubId("org/name")]


def test_hf_reaches_the_hub_past_a_local_path(tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    assert resolve_model("hf:org/name", tmp_path, download=Hub()) == Path("/cache/snapshot")


def test_a_slip_inside_a_local_directory_never_downloads(tmp_path: Path) -> None:
    (tmp_path / "adapters/math").mkdir(parents=True)
    expected = (
        rf"'adapters/mth': there is no {tmp_path}/adapters/mth \(did you mean 'adapters/math'\?\); it looks like a "
        r"misspelt path, so the Hugging Face Hub was not asked \('hf:adapters/mth' asks it\)"
    )
    with pytest.raises(RecipeError, match=expected):
        resolve_model("adapters/mth", tmp_path, download=never)


def test_a_slip_in_the_directory_itself_never_downloads(tmp_path: Path) -> None:
    (tmp_path / "adapters/math").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"did you mean 'adapters/math'\?"):
        resolve_model("adaptres/math", tmp_path, download=never)


@pytest.mark.parametrize(
    "reference",
    ["math", "./a/b", "../x/y", "a/b/c", "/no/such", "a b/c", "org/name.safetensors", "org/-x", "o--x/n", "org/name@",
     "o" * 60 + "/" + "n" * 60, "~nobody-here/x", "a/\0", "x" * 5000, "org/name@../../x"],
)  # fmt: skip
def test_what_is_neither_path_nor_hub_id_names_both_readings(reference: str, tmp_path: Path) -> None:
    expected = r"there is no /.*; and it is no Hugging Face id, which has the form 'org/name' or 'org/name@revision'"
    with pytest.raises(RecipeError, match=expected):
        resolve_model(reference, tmp_path, download=never)


def test_the_nearest_sibling_is_named(tmp_path: Path) -> None:
    (tmp_path / "math").mkdir()
    with pytest.raises(RecipeError, match=r"there is no .*/maht \(did you mean 'math'\?\)"):
        resolve_model("maht", tmp_path, download=never)


def test_the_plus_form_of_mergekit_is_answered(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"name the adapter alone in place of mergekit's 'base\+adapter'"):
        resolve_model("org/base+org/lora", tmp_path, download=never)


@pytest.mark.parametrize("reference", ["hf:name", "hf:", "hf:org/name/", "hf:org/name//a", "hf:org/name/../a"])
def test_hf_needs_an_id(reference: str, tmp_path: Path) -> None:
    expected = rf"'{reference}': after 'hf:' goes 'org/name', 'org/name@revision' or 'org/name/path'"
    with pytest.raises(RecipeError, match=expected):
        resolve_model(reference, tmp_path, download=never)


@pytest.mark.parametrize("kind", [RecipeError, CheckpointError])
def test_a_failure_of_the_hub_names_both_readings(kind: type[MergeError], tmp_path: Path) -> None:
    with pytest.raises(kind) as caught:
        resolve_model("org/name@v9", tmp_path, download=Hub(kind("no such thing")))
    assert str(caught.value) == f"'org/name@v9': no such thing; and there is no {tmp_path}/org/name@v9"


def test_a_bug_in_the_download_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        resolve_model("org/name", tmp_path, download=Hub(TypeError()))


class TestDirectories:
    def test_an_existing_one_is_found_from_the_recipe(self, tmp_path: Path) -> None:
        (tmp_path / "org/base").mkdir(parents=True)
        assert resolve_directory("org/base", tmp_path) == tmp_path / "org/base"
        assert resolve_directory(str(tmp_path), Path("/elsewhere")) == tmp_path

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(RecipeError, match=r"model\.safetensors is a file; name the directory of the model$"):
            resolve_directory("model.safetensors", tmp_path)

    def test_a_misspelt_one_is_refused_with_the_nearest(self, tmp_path: Path) -> None:
        (tmp_path / "llama").mkdir()
        with pytest.raises(RecipeError, match=r"^'./lama': there is no .*lama \(did you mean 'llama'\?\); and it"):
            resolve_directory("./lama", tmp_path)

    def test_one_on_the_hub_is_fetched(self, tmp_path: Path) -> None:
        assert resolve_directory("org/base@v1", tmp_path, download=lambda _: tmp_path) == tmp_path

    def test_a_file_on_the_hub_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "lora.safetensors").touch()
        with pytest.raises(RecipeError, match=r"^'org/base': .*lora\.safetensors is a file; name the directory"):
            resolve_directory("org/base", tmp_path, download=lambda _: tmp_path / "lora.safetensors")
