from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors_of
from safetensors.torch import load_file, save

from mergekit_lowrank.errors import CheckpointError, MergeError, RecipeError
from mergekit_lowrank.filenames import OUTLINE_MARK
from mergekit_lowrank.formats import ModelDirectory, open_tensors
from mergekit_lowrank.recipe.hub import HubId, fetch, hub_errors
from mergekit_lowrank.recipe.outlines import Outlines

from .hub_server import HubServer

REVISED = {"README.md": b"card of v1", "adapter_config.json": b"{}", "adapter_model.safetensors": b"v1"}
LORA = save({"lora_unet_x.lora_up.weight": torch.ones(3, 2), "lora_unet_x.alpha": torch.tensor(2.0)})
LARGE = {f"model.layers.{index}.weight": torch.full((400, 500), 1.0 + index) for index in range(3)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that huggingface_hub asks in place of the real one, with an empty cache."""
    with HubServer() as server:
        server.stand_in(monkeypatch, tmp_path)
        yield server


def adapter_files(**more: bytes) -> dict[str, bytes]:
    named = {name.replace("__", "."): data for name, data in more.items()}
    return {"README.md": b"card", "adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", **named}


def sharded_model() -> dict[str, bytes]:
    """Three shards, and a pickle of the same that nobody needs."""
    shards = {f"model-{number}.safetensors": save({key: LARGE[key]}) for number, key in enumerate(LARGE)}
    index = {"metadata": {}, "weight_map": {key: f"model-{number}.safetensors" for number, key in enumerate(LARGE)}}
    return {
        "config.json": b'{"model_type": "tiny"}',
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "pytorch_model.bin": b"pickle",
        "optimizer.pt": b"state",
        **shards,
    }


def safetensors(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


class TestWhatIsFetched:
    def test_of_an_adapter_the_safetensors_its_configuration_tokenizer_and_card(self, hub: HubServer) -> None:
        wanted = adapter_files(tokenizer_config__json=b"{}", merges__txt=b"", LICENSE=b"MIT")
        left = {
            "adapter_model.bin": b"", "training_args.bin": b"", "trainer_state.json": b"", ".gitattributes": b"",
            "checkpoint-5/adapter_config.json": b"", "images/a.png": b"",
        }  # fmt: skip
        hub.add("org/lora", {**wanted, **left})
        path = fetch(HubId("org/lora"))
        assert {name: (path / name).read_bytes() for name in names(path)} == wanted

    def test_a_pickle_where_there_is_no_safetensors_and_what_llava_keeps_beside_it(self, hub: HubServer) -> None:
        llava = {"config.json", "adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"}
        hub.add("org/llava", dict.fromkeys([*llava, "training_args.bin"], b"{}"))
        assert names(fetch(HubId("org/llava"))) == llava

    def test_of_a_sharded_model_the_shards_of_its_index(self, hub: HubServer) -> None:
        files = sharded_model()
        hub.add("org/base", {**files, "model-of-another-save.safetensors": b""})
        assert names(fetch(HubId("org/base"))) == {*files} - {"pytorch_model.bin", "optimizer.pt"}

    def test_shards_of_an_adapter(self, hub: HubServer) -> None:
        index = json.dumps({"weight_map": {"a": "adapter_model-1.bin", "b": "../../x", "c": "adapter_model-2.bin"}})
        files = dict.fromkeys(["adapter_config.json", "adapter_model-1.bin", "adapter_model-2.bin"], b"{}")
        files["adapter_model.bin.index.json"] = index.encode()
        hub.add("org/lora", files)
        assert names(fetch(HubId("org/lora"))) == {*files}

    @pytest.mark.parametrize("index", [b"", b"[]", b'{"weight_map": [1]}'])
    def test_a_broken_index_is_left_to_its_reader(self, hub: HubServer, index: bytes) -> None:
        hub.add("org/base", {"config.json": b"{}", "model.safetensors.index.json": index})
        path = fetch(HubId("org/base"))
        with pytest.raises(CheckpointError, match=r"index\.json: (not readable as JSON|has no 'weight_map')"):
            open_tensors(path / "model.safetensors.index.json")

    @pytest.mark.parametrize("name", ["lora.safetensors", "pytorch_lora_weights.safetensors"])
    def test_a_repository_of_one_file_is_that_file(self, hub: HubServer, name: str) -> None:
        hub.add("org/style", {name: LORA, "README.md": b"card", "sample.png": b""})
        path = fetch(HubId("org/style"))
        assert path.name == name
        assert names(path.parent) == {name, "README.md"}

    def test_one_file_of_several_is_named(self, hub: HubServer) -> None:
        hub.add("org/style", {"v1.safetensors": b"", "v2.safetensors": LORA})
        with pytest.raises(
            CheckpointError,
            match=r"^'org/style@main' holds 2 checkpoints, 'v1.safetensors', 'v2.safetensors': name one, as in "
            r"'hf:org/style/v1.safetensors@main'$",
        ):
            fetch(HubId("org/style", "main"))
        path = fetch(HubId("org/style", path="v2.safetensors"))
        assert load_file(path)["lora_unet_x.alpha"] == 2

    def test_a_named_adapter_lies_in_a_directory_of_its_own(self, hub: HubServer) -> None:
        math = {f"runs/math/{name}": data for name, data in adapter_files().items()}
        hub.add("org/many", {**math, "runs/code/adapter_config.json": b"", "README.md": b""})
        with pytest.raises(CheckpointError, match=r"holds 2 checkpoints, 'runs/code', 'runs/math': name one, as in"):
            fetch(HubId("org/many"))
        path = fetch(HubId("org/many", path="runs/math"))
        assert path.parts[-2:] == ("runs", "math")
        assert names(path) == {*adapter_files()}

    def test_a_template_in_a_directory_of_the_model(self, hub: HubServer) -> None:
        template = "additional_chat_templates/tools.jinja"
        hub.add("org/lora", {**adapter_files(), template: b"", "other/x.jinja": b""})
        path = fetch(HubId("org/lora"))
        assert names(path) == {*adapter_files(), template}

    @pytest.mark.parametrize(
        ("files", "path", "found"),
        [
            ({"tf_model.h5": b"", "config.json": b""}, "", "it has 'config.json', 'tf_model.h5'"),
            ({"README.md": b""}, "sub", "no file lies there"),
            ({f"{n}.txt": b"" for n in range(10)}, "", "it has '0.txt', .*'7.txt' and 2 more"),
        ],
    )
    def test_no_checkpoint_is_an_error_that_says_what_is_there(
        self, hub: HubServer, files: Mapping[str, bytes], path: str, found: str
    ) -> None:
        hub.add("org/none", files)
        with pytest.raises(CheckpointError, match=rf"holds no checkpoint: {found}; expected adapter_config.json, or"):
            fetch(HubId("org/none", path=path))


class TestNothingTwice:
    def test_each_file_is_fetched_once_and_one_listing_asked_for(self, hub: HubServer) -> None:
        hub.add("org/base", sharded_model())
        path = fetch(HubId("org/base"))
        assert hub.asked("GET", "model-0.safetensors") == hub.asked("GET", "model-0.safetensors")[:1]
        assert len(hub.asked("GET", "/org/base")) == 1
        assert sorted(hub.asked("GET")) == sorted(set(hub.asked("GET")))
        hub.forget()
        assert fetch(HubId("org/base")) == path
        assert hub.requests == ["GET /api/models/org/base"]

    def test_a_commit_that_is_in_the_cache_is_not_asked_for(self, hub: HubServer) -> None:
        commit = hub.add("org/lora", adapter_files()).at("main")
        assert commit is not None
        path = fetch(HubId("org/lora", commit[0]))
        hub.forget()
        assert fetch(HubId("org/lora", commit[0])) == path
        assert hub.requests == []

    def test_large_files_are_fetched_by_the_thread_that_can_be_interrupted(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: dict[str, str] = {}
        real = huggingface_hub.hf_hub_download

        def noted(repository: str, name: str, **options: Any) -> str:
            asked[name] = threading.current_thread().name
            return real(repository, name, **options)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", noted)
        monkeypatch.setattr("mergekit_lowrank.recipe.hub.LARGE_BYTES", len(b"weights") - 1)
        hub.add("org/lora", adapter_files())
        fetch(HubId("org/lora"))
        here = threading.current_thread().name
        assert {name for name, thread in asked.items() if thread == here} == {"adapter_model.safetensors"}
        assert {*asked} == {*adapter_files()}

    def test_a_file_that_two_revisions_share_is_fetched_once(self, hub: HubServer) -> None:
        hub.add("org/lora", adapter_files(), revisions={"v1": {**adapter_files(), "README.md": b"card of v1"}})
        fetch(HubId("org/lora"))
        assert (fetch(HubId("org/lora", "v1")) / "README.md").read_bytes() == b"card of v1"
        assert hub.bytes_served["adapter_model.safetensors"] == len(b"weights")

    def test_what_changed_is_fetched_anew(self, hub: HubServer) -> None:
        repository = hub.add("org/lora", adapter_files())
        fetch(HubId("org/lora"))
        repository.files["adapter_model.safetensors"] = b"better"
        assert (fetch(HubId("org/lora")) / "adapter_model.safetensors").read_bytes() == b"better"

    def test_a_cache_that_may_not_be_noted_in_still_serves(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add("org/lora", adapter_files())
        (tmp_path / "file").touch()
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "file/assets"))
        assert fetch(HubId("org/lora")) == fetch(HubId("org/lora"))


class TestOffline:
    @pytest.mark.parametrize("revision", [None, "v1", "refs/pr/1"])
    def test_what_was_fetched_is_found_without_a_request(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, revision: str | None
    ) -> None:
        hub.add("org/lora", adapter_files(), revisions={"v1": REVISED, "refs/pr/1": REVISED})
        path = fetch(HubId("org/lora", revision))
        hub.forget()
        offline(monkeypatch)
        assert fetch(HubId("org/lora", revision)) == path
        with Outlines() as outlined:
            assert names(outlined(HubId("org/lora", revision))) == names(path)
        assert hub.requests == []

    def test_what_was_not_fetched_is_an_error(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add("org/lora", adapter_files())
        offline(monkeypatch)
        expected = (
            r"^it is not in the local cache, and HF_HUB_OFFLINE keeps .* asked \(unset .* or run 'hf download' first"
        )
        with pytest.raises(CheckpointError, match=expected):
            fetch(HubId("org/lora"))

    def test_a_file_that_is_lacking_is_named(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add("org/lora", adapter_files())
        path = fetch(HubId("org/lora"))
        (path / "adapter_model.safetensors").unlink()
        offline(monkeypatch)
        expected = "^'adapter_model.safetensors' of 'org/lora@main' is not in the local cache, and HF_HUB_OFFLINE"
        with pytest.raises(CheckpointError, match=expected):
            fetch(HubId("org/lora"))
        with Outlines() as outlined, pytest.raises(CheckpointError, match=expected):
            outlined(HubId("org/lora"))

    def test_what_another_program_fetched_is_used(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = tmp_path / "cache/models--org--lora"
        for name, data in {f"snapshots/{'a' * 40}/{name}": data for name, data in adapter_files().items()}.items():
            (storage / name).parent.mkdir(parents=True, exist_ok=True)
            (storage / name).write_bytes(data)
        (storage / "refs").mkdir()
        (storage / "refs/main").write_text("a" * 40)
        offline(monkeypatch)
        assert fetch(HubId("org/lora")) == storage / "snapshots" / ("a" * 40)

    @pytest.mark.parametrize("failure", [429, 500, 503])
    def test_a_hub_that_fails_leaves_what_is_in_the_cache(self, hub: HubServer, failure: int) -> None:
        hub.add("org/lora", adapter_files())
        path = fetch(HubId("org/lora"))
        hub.failure = failure
        assert fetch(HubId("org/lora")) == path


class TestErrors:
    def test_a_repository_that_is_missing_or_private(self, hub: HubServer) -> None:
        with pytest.raises(RecipeError, match=r"has no repository 'org/none' \(a private one needs 'hf auth login'\)"):
            fetch(HubId("org/none"))

    def test_a_revision_that_is_missing(self, hub: HubServer) -> None:
        hub.add("org/lora", adapter_files())
        with pytest.raises(RecipeError, match=r"^'org/lora' on the Hugging Face Hub has no revision 'v9'$"):
            fetch(HubId("org/lora", "v9"))

    def test_a_gated_repository(self, hub: HubServer) -> None:
        hub.add("org/lora", adapter_files(), refusal=(403, "GatedRepo"))
        gated = "^'org/lora' on the Hugging Face Hub is gated: ask for access on its page, then run 'hf auth login'$"
        with pytest.raises(CheckpointError, match=gated):
            fetch(HubId("org/lora"))
        with Outlines() as outlined, pytest.raises(CheckpointError, match=gated):
            outlined(HubId("org/lora"))

    def test_a_hub_that_fails(self, hub: HubServer) -> None:
        hub.failure = 500
        with pytest.raises(CheckpointError, match=r"^'org/lora' cannot be fetched from the Hugging Face Hub: .*500"):
            fetch(HubId("org/lora"))

    def test_no_hub_at_all(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(CheckpointError, match=r"^'org/lora' cannot be fetched from the Hugging Face Hub: "):
            fetch(HubId("org/lora"))

    @pytest.mark.parametrize(
        ("failure", "kind", "message"),
        [
            (hub_errors_of.HFValidationError("bad"), RecipeError, "'org/lora' is not an id of .*: bad$"),
            (hub_errors_of.LocalEntryNotFoundError("x"), CheckpointError, "cannot be reached, and it is not in the"),
            (ConnectionError(), CheckpointError, "cannot be fetched from the Hugging Face Hub: ConnectionError$"),
            (OSError("disk full\nmore"), CheckpointError, "cannot be fetched from the Hugging Face Hub: disk full$"),
            (OSError("429 Too Many\nRetry after 9 s.\nUrl"), CheckpointError, "Hub: 429 Too Many; Retry after 9 s.$"),
        ],
    )  # fmt: skip
    def test_what_huggingface_hub_raises_is_explained(
        self, failure: Exception, kind: type[MergeError], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(kind, match=message), hub_errors(HubId("org/lora")):
            raise failure

    def test_a_bug_is_not_hidden(self) -> None:
        with pytest.raises(TypeError), hub_errors(HubId("org/lora")):
            raise TypeError


class TestOutlines:
    def test_headers_are_read_and_next_to_nothing_is_served(self, hub: HubServer) -> None:
        files = sharded_model()
        hub.add("org/base", files)
        with Outlines() as outlined:
            outline = outlined(HubId("org/base"))
            assert names(outline) == {*files} - {"pytorch_model.bin", "optimizer.pt"}
            model = ModelDirectory(outline)
            assert [(m.d_out, m.d_in) for m in model.modules.values()] == [(400, 500)] * 3
        served = {name: size for name, size in hub.bytes_served.items() if name.endswith(".safetensors")}
        assert {*served} == {"model-0.safetensors", "model-1.safetensors", "model-2.safetensors"}
        assert all(size < len(files[name]) / 7 for name, size in served.items())

    def test_it_takes_no_space_is_marked_and_goes_away(self, hub: HubServer) -> None:
        hub.add("org/base", sharded_model())
        with Outlines() as outlined:
            shard = outlined(HubId("org/base")) / "model-0.safetensors"
            assert shard.stat().st_blocks * 512 < 10_000 < shard.stat().st_size
            length = int.from_bytes(shard.read_bytes()[:8], "little")
            assert json.loads(shard.read_bytes()[8 : 8 + length])["__metadata__"] == {OUTLINE_MARK: "true"}
        assert not shard.exists()

    def test_no_data_can_be_read(self, hub: HubServer) -> None:
        hub.add("org/base", sharded_model())
        with Outlines() as outlined:
            source = open_tensors(outlined(HubId("org/base")) / "model-0.safetensors")
            for read in (source.read, lambda key: source.read_rows(key, slice(1))):
                with pytest.raises(CheckpointError, match=r"tensor 'model.layers.0.weight' was not fetched: only the"):
                    read("model.layers.0.weight")

    def test_a_header_is_fetched_once(self, hub: HubServer) -> None:
        hub.add("org/base", sharded_model())
        for _ in range(2):
            hub.forget()
            with Outlines() as outlined:
                assert outlined(HubId("org/base")) == outlined(HubId("org/base"))
        assert {*hub.requests} == {"GET /api/models/org/base"}

    def test_what_was_kept_of_it_and_is_broken_is_fetched_anew(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add("org/base", sharded_model())
        with Outlines() as outlined:
            outlined(HubId("org/base"))
        notes = [path for path in (tmp_path / "assets").rglob("*") if path.is_file()]
        assert len(notes) == 4
        for note in notes:
            note.write_text("{")
        with Outlines() as outlined:
            assert len(ModelDirectory(outlined(HubId("org/base"))).modules) == 3

    def test_a_header_longer_than_the_first_request(self, hub: HubServer) -> None:
        tensors = {f"model.layers.{index}.weight": torch.ones(1, 1) for index in range(2000)}
        hub.add("org/base", {"config.json": b"{}", "model.safetensors": save(tensors, {"format": "pt"})})
        with Outlines() as outlined:
            assert len(ModelDirectory(outlined(HubId("org/base"))).modules) == 2000

    def test_what_the_cache_holds_is_the_real_file(self, hub: HubServer) -> None:
        hub.add("org/base", sharded_model())
        path = fetch(HubId("org/base"))
        hub.forget()
        with Outlines() as outlined:
            outline = outlined(HubId("org/base"))
            assert (outline / "model-1.safetensors").resolve() == (path / "model-1.safetensors").resolve()
        assert hub.bytes_served == {}

    def test_pickles_are_fetched(self, hub: HubServer) -> None:
        hub.add("org/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
        with Outlines() as outlined:
            assert (outlined(HubId("org/old")) / "adapter_model.bin").read_bytes() == b"pickle"

    def test_numbers_that_are_read_at_once_are_real(self, hub: HubServer) -> None:
        dora = save({"base_model.model.x.lora_magnitude_vector.weight": torch.ones(3)})
        hub.add("org/dora", {"adapter_config.json": b"{}", "adapter_model.safetensors": dora})
        hub.add("org/style", {"lora.safetensors": LORA})
        with Outlines() as outlined:
            assert load_file(outlined(HubId("org/style")))["lora_unet_x.alpha"] == 2
            (magnitude,) = load_file(outlined(HubId("org/dora")) / "adapter_model.safetensors").values()
            assert magnitude.eq(1).all()

    def test_one_file_has_an_outline_too(self, hub: HubServer) -> None:
        file = save({"unet.x.lora_A.weight": torch.ones(300, 400)}, {"lora_adapter_metadata": "{}"})
        hub.add("org/style", {"sub/pytorch_lora_weights.safetensors": file, "sub/README.md": b"card"})
        with Outlines() as outlined:
            path = outlined(HubId("org/style", path="sub"))
            assert path.name == "pytorch_lora_weights.safetensors"
            assert (path.parent / "README.md").read_bytes() == b"card"
            (spec,) = open_tensors(path).specs.values()
            assert spec.shape == (300, 400)
        assert hub.bytes_served["sub/pytorch_lora_weights.safetensors"] < len(file) / 4

    def test_an_outline_does_not_stand_in_for_the_real_file(self, hub: HubServer) -> None:
        hub.add("org/base", sharded_model())
        with Outlines() as outlined:
            outlined(HubId("org/base"))
        shard = fetch(HubId("org/base")) / "model-2.safetensors"
        assert load_file(shard)["model.layers.2.weight"].eq(3).all()

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "is not valid safetensors"),
            (b"\xff" * 40, "is not valid safetensors"),
            (b"\x02\0\0\0\0\0\0\0[]", "is not valid safetensors"),
            (safetensors({"a": [1]}), "is not valid safetensors"),
            (safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}), "is not valid safetensors"),
            (safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": "ab"}}), "is not valid safetensors"),
            (safetensors({".alpha": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}), "is not valid"),
            (safetensors({".alpha": {"dtype": "F32", "shape": [[]], "data_offsets": [0, 4]}}), "is not valid"),
            (safetensors({"__metadata__": [1], "a": {}}), "is not valid safetensors"),
            (save(LARGE)[:-300_000], "has 2100.* bytes, and its header promises 2400000 of data: it is truncated"),
        ],
    )
    def test_a_broken_file_is_named(self, hub: HubServer, content: bytes, reason: str) -> None:
        hub.add("org/base", {"config.json": b"{}", "model.safetensors": content})
        with Outlines() as outlined, pytest.raises(CheckpointError, match=f"on the Hugging Face Hub {reason}"):
            outlined(HubId("org/base"))


def test_the_environment_of_huggingface_hub_decides(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/lora", adapter_files())
    code = "from mergekit_lowrank.recipe.hub import HubId, fetch; print(fetch(HubId('org/lora')))"
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    path = Path(made.stdout.strip())
    assert path.is_relative_to(tmp_path / "hub")
    assert names(path) == {*adapter_files()}
