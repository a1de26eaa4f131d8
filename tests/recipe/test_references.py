# ruff: noqa: E501 (one case a line)
from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub import errors as hub

from mergekit_lowrank.errors import CheckpointError, MergeError, RecipeError
from mergekit_lowrank.recipe import resolve_directory, resolve_model


def never(**_: Any) -> NoReturn:
    pytest.fail("asked the Hub")


class Hub:
    """Records what was asked of it."""

    def __init__(self, answer: Exception | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer = answer

    def __call__(self, **request: Any) -> str:
        self.asked.append(request)
        if self.answer:
            raise self.answer
        return "/cache/snapshot"


def http_error(kind: type[Exception], text: str = "404") -> Exception:
    """An error of the Hub's client without the response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


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


@pytest.mark.parametrize("reference", ["org/name@v1", "hf:org/name@v1"])
def test_a_hub_id_is_fetched_at_its_revision(reference: str, tmp_path: Path) -> None:
    asked = Hub()
    assert resolve_model(reference, tmp_path, download=asked) == Path("/cache/snapshot")
    assert asked.asked == [
        {
            "repo_id": "org/name",
            "revision": "v1",
            "allow_patterns": ["adapter_config.json", "adapter_model*", "README.md"],
        }
    ]


def test_snapshot_download_is_what_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    resolve_model("org/name", tmp_path)
    assert asked.asked[0]["revision"] is None


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


def test_hf_needs_an_id(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'hf:name': after 'hf:' goes 'org/name' or 'org/name@revision'"):
        resolve_model("hf:name", tmp_path, download=never)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (http_error(hub.RepositoryNotFoundError), RecipeError, "the Hugging Face Hub has no repository 'org/name'"),
        (http_error(hub.RevisionNotFoundError), RecipeError, "'org/name' on the Hugging Face Hub has no revision 'v9'"),
        (http_error(hub.GatedRepoError), CheckpointError, "'org/name@v9' on the Hugging Face Hub is gated: ask for access"),
        (hub.LocalEntryNotFoundError("x"), CheckpointError, "cannot be reached, and 'org/name@v9' is not in the local cache"),
        (hub.OfflineModeIsEnabled("offline mode is on"), CheckpointError, "cannot be fetched .*: offline mode is on"),
        (http_error(hub.HfHubHTTPError, "500 oops\nmore"), CheckpointError, "cannot be fetched from .*: 500 oops;"),
        (ConnectionError(), CheckpointError, "cannot be fetched from the Hugging Face Hub: ConnectionError"),
        (OSError("disk full"), CheckpointError, "cannot be fetched from the Hugging Face Hub: disk full"),
        (hub.HFValidationError("bad"), RecipeError, "'org/name@v9' is not an id of the Hugging Face Hub: bad"),
    ],
)  # fmt: skip
def test_a_failure_of_the_hub_names_both_readings(
    failure: Exception, kind: type[MergeError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        resolve_model("org/name@v9", tmp_path, download=Hub(failure))
    assert str(caught.value).startswith("'org/name@v9': ")
    assert str(caught.value).endswith(f"; and there is no {tmp_path}/org/name@v9")


def test_a_bug_in_the_download_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        resolve_model("org/name", tmp_path, download=Hub(TypeError()))


def test_a_timeout_of_the_http_client_is_a_checkpoint_error(tmp_path: Path) -> None:
    failure = type("ReadTimeout", (hub.HfHubHTTPError.__bases__[0],), {})
    with pytest.raises(CheckpointError, match="cannot be fetched from the Hugging Face Hub: timed out"):
        resolve_model("org/name", tmp_path, download=Hub(http_error(failure, "timed out")))


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
        with pytest.raises(RecipeError, match=r"^'./lama': there is no .*lama \(did you mean 'llama'\?\)$"):
            resolve_directory("./lama", tmp_path)

    @pytest.mark.parametrize("reference", ["org/base", "hf:org/base", "org/base@main"])
    def test_the_hub_is_not_asked(self, tmp_path: Path, reference: str) -> None:
        with pytest.raises(RecipeError) as caught:
            resolve_directory(reference, tmp_path)
        assert str(caught.value).endswith(
            "; a whole model is not fetched for you: run 'hf download org/base --local-dir DIRECTORY' and write that "
            "directory"
        )
