"""What every format owes the merges that read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.api import merge
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import Checkpoint, Format
from mergekit_lowrank.lowrank import LowRankUpdate, densify
from mergekit_lowrank.testing.checks import assert_close, assert_documented, from_threads
from mergekit_lowrank.testing.contract import Contract
from mergekit_lowrank.testing.makers import random_update, write_tiny_adapter
from mergekit_lowrank.testing.memory import held

__all__ = ["FormatContract"]

SHAPES = {"layers.0.attn.q_proj": (6, 5, 2), "layers.0.mlp.down_proj": (5, 8, 3), "layers.1.attn.q_proj": (6, 5, 1)}
LARGE = {f"layers.{layer}.q_proj": (1024, 2048, 32) for layer in range(4)}
"""(d_out, d_in, rank) by module."""

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Relative, of what is stored in a type, the scaling perhaps multiplied into a factor."""

DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "overwritten": lambda file: file.write_bytes(b"\x00\xff" * (file.stat().st_size // 2)),
    "deleted": Path.unlink,
}


class FormatContract(Contract):
    """The tests of a format.

    Inherit it, name the format, and say how a checkpoint is written::

        class TestNpz(FormatContract):
            format = NpzFormat

            def write(self, directory, updates):
                ...

    Attributes:
        plugin: the module or object with the hooks; left out, names are looked up in what is installed.
        format: by its name, or a class that no plugin registers.
        dtypes: the types in which factors may be stored.
        maps_files: whether an open checkpoint maps its files by torch, which counts that as memory held.
    """

    format: ClassVar[str | type[Format]] = ""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    maps_files: ClassVar[bool] = False

    def write(self, directory: Path, updates: Mapping[str, LowRankUpdate]) -> Path:
        """A checkpoint of these updates by module, somewhere in an empty directory; the path that opens it."""
        raise NotImplementedError(f"{type(self).__name__} must say how a checkpoint is written")

    @classmethod
    def alone(cls) -> dict[str, Any]:
        """The format, where its class is given in place of a name."""
        return {} if isinstance(cls.format, str) else {"formats": cls.format}

    @classmethod
    def kind(cls) -> type[Format]:
        """The format's class."""
        return cls.registry().formats[cls.format if isinstance(cls.format, str) else cls.format.name]

    def opened(self, path: Path) -> Checkpoint:
        """The checkpoint, as a merge opens it."""
        return self.kind()().open(path, label="mine")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test for every stored type where it asks for one."""
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))

    def test_it_recognises_its_own_and_nothing_else(self, tmp_path: Path) -> None:
        own = self.write(_folder(tmp_path, "own"), _updates(self.dtypes[0]))
        notes = _folder(tmp_path, "notes") / "notes.txt"
        notes.write_text("no checkpoint", encoding="utf-8")
        recognises = self.kind()().recognises
        assert recognises(own), f"{own} is not recognised"
        for other in (tmp_path / "missing", _folder(tmp_path, "empty"), notes, notes.parent):
            assert not recognises(other), f"{other} is recognised"
        if self.kind().name != "peft":
            adapter = write_tiny_adapter(tmp_path / "adapter", {"layers.0.q_proj": (6, 5)})
            assert not recognises(adapter), "a PEFT adapter is recognised"

    def test_headers_say_what_is_read(self, tmp_path: Path, dtype: torch.dtype) -> None:
        checkpoint = self.opened(self.write(_folder(tmp_path, "own"), _updates(dtype)))
        assert set(checkpoint.modules) == set(SHAPES)
        for name, header in checkpoint.modules.items():
            update = _read(checkpoint, name)
            said = (header.name, header.d_out, header.d_in, header.rank, header.scaling, header.dtype)
            stored = torch.promote_types(update.a.dtype, update.b.dtype)
            assert said == (name, *update.shape, update.rank, update.scaling, stored)
            assert (header.d_out, header.d_in, header.rank) == SHAPES[name]
            assert header.stored_bytes >= update.a.nbytes + update.b.nbytes, "stored_bytes is less than is read"

    def test_what_was_written_is_read(self, tmp_path: Path, dtype: torch.dtype) -> None:
        updates = _updates(dtype)
        checkpoint = self.opened(self.write(_folder(tmp_path, "own"), updates))
        for name, written in updates.items():
            read = _read(checkpoint, name)
            assert read.a.device == read.b.device == torch.device("cpu")
            assert read.a.dtype == read.b.dtype == dtype
            assert_close(_delta(read), _delta(written), ROUNDING[dtype], f"module '{name}'")

    def test_modules_are_read_in_any_order_and_from_several_threads(self, tmp_path: Path) -> None:
        checkpoint = self.opened(self.write(_folder(tmp_path, "own"), _updates(self.dtypes[0])))
        names = [*SHAPES, *reversed(SHAPES)] * 4
        alone = {name: _delta(_read(checkpoint, name)) for name in SHAPES}
        found = from_threads([lambda name=name: _delta(_read(checkpoint, name)) for name in names])  # type: ignore[misc]
        assert all(torch.equal(alone[name], delta) for name, delta in zip(names, found, strict=True))

    def test_opening_keeps_no_tensor(self, tmp_path: Path) -> None:
        self.opened(self.write(_folder(tmp_path, "small"), _updates(self.dtypes[0])))  # imports and caches
        path = self.write(_folder(tmp_path, "large"), _updates(self.dtypes[0], LARGE))
        stored = sum(header.stored_bytes for header in self.opened(path).modules.values())
        kept = held(lambda: self.opened(path)).kept_bytes
        assert self.maps_files or kept < stored / 4, (
            f"an open checkpoint holds {kept} of {stored} bytes; read tensors when they are asked for"
        )

    def test_a_checkpoint_says_what_it_is(self, tmp_path: Path) -> None:
        path = self.write(_folder(tmp_path, "own"), _updates(self.dtypes[0]))
        checkpoint, again = self.opened(path), self.opened(path)
        copy = self.opened(shutil.copytree(tmp_path / "own", tmp_path / "copy") / path.relative_to(tmp_path / "own"))
        assert (checkpoint.label, checkpoint.location) == ("mine", str(path))
        assert checkpoint.files, "files is empty: the manifest of a merge could not name its sources"
        for file in checkpoint.files:
            assert file.is_file()
            assert file == path or path in file.parents, f"{file} does not belong to {path}"
        assert checkpoint.identity == again.identity != copy.identity
        assert isinstance(checkpoint.config, Mapping)
        assert checkpoint.base_model is None or isinstance(checkpoint.base_model, str)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_factor_that_is_not_finite_is_named(self, value: float, tmp_path: Path) -> None:
        updates = _updates(self.dtypes[0])
        spoilt = "layers.0.mlp.down_proj"
        updates[spoilt].a[0, 0] = value
        with pytest.raises(CheckpointError) as caught:
            self._read_all(self.write(_folder(tmp_path, "own"), updates))
        assert "mine" in str(caught.value)
        assert spoilt in str(caught.value)

    @pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
    def test_a_damaged_file_is_an_error_that_names_the_checkpoint(
        self, damage: Callable[[Path], object], tmp_path: Path
    ) -> None:
        files = self.opened(self.write(_folder(tmp_path, "whole"), _updates(self.dtypes[0]))).files
        for number in range(len(files)):
            path = self.write(_folder(tmp_path, f"damaged{number}"), _updates(self.dtypes[0]))
            file = self.opened(path).files[number]
            damage(file)
            with pytest.raises(CheckpointError) as caught:
                self._read_all(path)
            named = [name for name in ("mine", str(path), str(file)) if name in str(caught.value)]
            assert named, f"the error names neither the label nor the file: {caught.value}"

    def test_two_checkpoints_merge(self, tmp_path: Path) -> None:
        inputs = [_updates(self.dtypes[0], seed=seed) for seed in range(2)]
        paths = [self.write(_folder(tmp_path, str(seed)), updates) for seed, updates in enumerate(inputs)]
        recipe = {
            "merge_method": "task_arithmetic",
            "models": [{"model": str(path)} for path in paths],
            "output": {"rank": "sum"},
            "out_dtype": "float32",
        }
        merged = merge(recipe, registry=self.registry()).open(label="merged")
        for name in SHAPES:
            expected = _delta(inputs[0][name]) + _delta(inputs[1][name])
            found = _delta(_read(merged, name))
            assert_close(found, expected, max(ROUNDING[self.dtypes[0]], 1e-4), f"module '{name}'")

    def test_the_format_is_documented(self) -> None:
        assert_documented(self.kind(), self.kind())

    def _read_all(self, path: Path) -> None:
        checkpoint = self.opened(path)
        for name in checkpoint.modules:
            _read(checkpoint, name)


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


def _read(checkpoint: Checkpoint, module: str) -> LowRankUpdate:
    """The update of a module, which has factors: those of fine-tunes have none, and are not checked here."""
    update = checkpoint.read(module)
    assert isinstance(update, LowRankUpdate), "it is dense"
    return update


def _updates(
    dtype: torch.dtype, shapes: Mapping[str, tuple[int, int, int]] = SHAPES, seed: int = 0
) -> dict[str, LowRankUpdate]:
    return {
        name: random_update(*shape, seed * 1000 + index, scaling=2.0, dtype=dtype)
        for index, (name, shape) in enumerate(shapes.items())
    }


def _delta(update: LowRankUpdate) -> Tensor:
    return densify(update.to("cpu", torch.float64))
