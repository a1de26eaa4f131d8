"""Recipes that name models on the Hub, and merges that go there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from mergekit_lowrank import OutputError, RecipeError, merge, plan
from mergekit_lowrank.cli import main
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.report.pushing import push
from tests.cli.builders import tensors, write_adapter, write_model
from tests.recipe.hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with two adapters and their base; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        server.stand_in(monkeypatch, tmp_path / "home")
        for seed, name in enumerate(("math", "code")):
            add(server, f"org/{name}", write_adapter(tmp_path / f"made/{name}", tensors(seed=seed)))
        add(server, "org/base", write_model(tmp_path / "made/base"))
        yield server


def add(server: HubServer, name: str, directory: Path) -> None:
    server.add(name, {path.name: path.read_bytes() for path in directory.iterdir()})


def linear(*models: str, **more: object) -> dict[str, object]:
    return {"merge_method": "linear", "models": [{"model": model} for model in models], **more}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_adapters_on_the_hub_merge_as_their_copies_do(hub: HubServer, tmp_path: Path) -> None:
    merge(linear("made/math", "made/code"), tmp_path / "here")
    merge(linear("org/math", "org/code@main"), tmp_path / "there")
    here, there = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("here", "there"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)
    assert len(hub.asked("GET", "/adapter_model.safetensors")) == 2


def test_a_base_and_a_fine_tune_on_the_hub_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    tuned = tmp_path / "made/tuned"
    write_model(tuned)
    hub.add("org/tuned", {path.name: path.read_bytes() for path in tuned.iterdir()})
    recipe = linear("org/tuned", "org/math", base_model="org/base", output={"kind": "model"})
    merge(recipe, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_plan_reads_headers_and_a_merge_the_rest(hub: HubServer, tmp_path: Path) -> None:
    base = {f"layers.{index}.q_proj.weight": torch.ones(400, 500) for index in range(4)}
    adapter = {
        f"base_model.model.layers.{index}.q_proj.lora_{side}.weight": torch.ones(shape)
        for index in range(4)
        for side, shape in {"A": (64, 500), "B": (400, 64)}.items()
    }
    large, own = tmp_path / "made/large", write_adapter(tmp_path / "made/own", adapter, r=64)
    write_model(large)
    save_file(base, large / "model.safetensors")
    add(hub, "org/large", large)
    add(hub, "org/own", own)
    recipe = linear("org/own", base_model="org/large", output={"kind": "model"})
    made = plan(recipe)
    assert len(made.modules) == 4
    assert sum(hub.bytes_served.values()) < 250_000
    merge(recipe, tmp_path / "out")
    assert sum(hub.bytes_served.values()) > 4_000_000
    with pytest.raises(CheckpointError, match=r"was not fetched: only the header was"):
        made.inputs[0].read(made.modules[0].name)


def test_a_missing_repository_is_placed_in_the_recipe(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("merge_method: linear\nmodels:\n- model: org/none\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml:3:10: 'org/none': the Hugging Face Hub has no repository"):
        merge(tmp_path / "recipe.yaml", tmp_path / "out")


class TestPush:
    def merged(self, *options: object) -> Result:
        return run("merge", "--method", "linear", "made/math", "made/code", "-o", "out", *options)

    def test_everything_is_uploaded_into_a_private_repository(self, hub: HubServer, tmp_path: Path) -> None:
        result = self.merged("--push", "me/merged")
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith(f"  pushed       {hub.endpoint}/me/merged\n")
        made = hub.repositories["me/merged"]
        assert made.is_private
        assert made.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def test_what_was_pushed_merges_again(self, hub: HubServer, tmp_path: Path) -> None:
        self.merged("--push", "me/merged")
        merge(linear("me/merged"), tmp_path / "again")
        assert json.loads((tmp_path / "again/report.json").read_text())["inputs"][0]["label"] == "merged"

    def test_a_quiet_merge_says_nothing(self, hub: HubServer) -> None:
        result = self.merged("--push", "me/merged", "--quiet")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "adapter_model.safetensors" in hub.repositories["me/merged"].files

    def test_an_existing_repository_keeps_what_it_is_and_has(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add("me/merged", {"notes.md": b"kept", "README.md": b"old"}, is_private=False)
        assert push(tmp_path / "made/math", "me/merged") == f"{hub.endpoint}/me/merged"
        there = hub.repositories["me/merged"]
        assert (there.is_private, there.files["notes.md"]) == (False, b"kept")
        assert "adapter_config.json" in there.files

    def test_a_public_one_is_asked_for(self, hub: HubServer, tmp_path: Path) -> None:
        push(tmp_path / "made/math", "me/merged", private=False)
        assert not hub.repositories["me/merged"].is_private

    def test_a_failure_leaves_the_output_and_says_how_to_push_it_again(self, hub: HubServer, tmp_path: Path) -> None:
        result = self.merged("--push", "forbidden/merged")
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("error: out is complete, but was not pushed to 'forbidden/")
        assert result.stderr.endswith(
            "; run 'hf auth login' with a token that may write there. To push it again: hf upload forbidden/merged out "
            ". --private\n"
        )
        assert (tmp_path / "out/adapter_model.safetensors").is_file()

    def test_ctrl_c_leaves_the_output(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object, **__: object) -> NoReturn:
            raise KeyboardInterrupt

        monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupted)
        result = self.merged("--push", "me/merged")
        assert result.exit_code == 130
        assert result.stderr.endswith("interrupted: out is complete, but was not pushed\n")
        assert (tmp_path / "out/adapter_model.safetensors").is_file()

    def test_a_directory_that_is_not_there_is_refused(self, hub: HubServer, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match=r"none: is no directory, so there is nothing to push$"):
            push(tmp_path / "none", "me/merged")
        assert hub.requests == []

    @pytest.mark.parametrize("name", ["merged", "me/merged@main", "hf:me/merged", "hf:me/merged/sub", "./me/merged"])
    def test_a_name_that_is_none_is_refused_before_the_merge(self, hub: HubServer, tmp_path: Path, name: str) -> None:
        result = self.merged("--push", name)
        assert result.exit_code == 2
        assert f"error: '{name}' cannot be pushed to; name a repository on the Hugging Face Hub" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_nobody_logged_in_is_found_before_the_merge(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        result = self.merged("--push", "me/merged")
        assert result.exit_code == 2
        assert "nothing can be pushed to 'me/merged' without a token: run 'hf auth login' first" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_offline_is_found_before_the_merge(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        result = self.merged("--push", "me/merged")
        assert result.exit_code == 2
        assert "nothing can be pushed to 'me/merged' while HF_HUB_OFFLINE is set" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_a_part_is_not_pushed(self, hub: HubServer) -> None:
        result = self.merged("--push", "me/merged", "--shard", "0/2")
        assert result.exit_code == 2
        assert "after finalize, run: hf upload me/merged out . --private" in result.stderr
