"""Formats that each break one promise, under the contract; see ``broken_strategies``."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergekit_lowrank import Checkpoint, CheckpointError, Format, LowRankUpdate, ModuleHeader
from mergekit_lowrank.testing import FormatContract


class PairsCheckpoint(Checkpoint):
    def __init__(self, path, label):
        self.label, self.location, self.files = label, str(path), (path,)
        self.base_model, self.config = None, {}
        self._path = path
        try:
            with safe_open(path, "pt") as file:
                names = sorted({key.rpartition(".")[0] for key in file.keys()})  # noqa: SIM118
                self.modules = {name: self.header(file, name) for name in names}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{label}: {path} is no file of pairs: {error}") from error

    def header(self, file, name):
        (d_out, rank), (_, d_in) = (file.get_slice(f"{name}.{side}").get_shape() for side in "ba")
        return ModuleHeader(
            name=name,
            d_out=d_out,
            d_in=d_in,
            rank=rank,
            scaling=1.0,
            dtype=torch.float32,
            stored_bytes=4 * rank * (d_out + d_in),
        )

    def read(self, module):
        with safe_open(self._path, "pt") as file:
            b, a = (file.get_tensor(f"{module}.{side}") for side in "ba")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise CheckpointError(f"{self.label}: module '{module}' is not finite")
        return LowRankUpdate(b, a)


class Pairs(Format):
    """Factors in one file."""

    name = "pairs"
    summary = "MODULE.a and MODULE.b in one .pairs file"
    checkpoint = PairsCheckpoint

    def recognises(self, path):
        return path.suffix == ".pairs"

    def open(self, path, *, label):
        return self.checkpoint(path, label)


class PairsContract(FormatContract):
    format = Pairs

    def write(self, directory, updates):
        path = directory / "adapter.pairs"
        tensors = {f"{name}.a": u.a for name, u in updates.items()}
        save_file(tensors | {f"{name}.b": u.b * u.scaling for name, u in updates.items()}, path)
        return path


class TestSound(PairsContract):
    caught_by = None


def broken(check: str):
    """Of a format, or of a checkpoint: its contract, and the check that must fail."""

    def decorate(cls):
        kind = (
            cls if issubclass(cls, Format) else type(cls.__name__, (Pairs,), {"__doc__": "Broken.", "checkpoint": cls})
        )
        return type(cls.__name__, (PairsContract,), {"format": kind, "caught_by": check, "__module__": __name__})

    return decorate


@broken("test_it_recognises_its_own_and_nothing_else")
class TestRecognisesEverything(Pairs):
    """Broken."""

    def recognises(self, path):
        return True


@broken("test_it_recognises_its_own_and_nothing_else")
class TestRecognisesNothing(Pairs):
    """Broken."""

    def recognises(self, path):
        return False


@broken("test_headers_say_what_is_read")
class TestMistakesTheRank(PairsCheckpoint):
    def header(self, file, name):
        return replace(super().header(file, name), rank=8)


@broken("test_headers_say_what_is_read")
class TestUnderstatesItsBytes(PairsCheckpoint):
    def header(self, file, name):
        return replace(super().header(file, name), stored_bytes=0)


@broken("test_what_was_written_is_read")
class TestLosesTheSign(PairsCheckpoint):
    def read(self, module):
        update = super().read(module)
        return LowRankUpdate(update.b.abs(), update.a)


@broken("test_modules_are_read_in_any_order_and_from_several_threads")
class TestReadsInOrderOnly(PairsCheckpoint):
    def read(self, module):
        self.left = getattr(self, "left", None) or list(self.modules)
        return super().read(self.left.pop(0))


@broken("test_opening_keeps_no_tensor")
class TestReadsAllAtOnce(PairsCheckpoint):
    def __init__(self, path, label):
        super().__init__(path, label)
        self.everything = {name: self.read(name).b.clone() for name in self.modules}


@broken("test_a_checkpoint_says_what_it_is")
class TestHasNoFiles(PairsCheckpoint):
    def __init__(self, path, label):
        super().__init__(path, label)
        self.files = ()


@broken("test_a_factor_that_is_not_finite_is_named")
class TestReadsNan(PairsCheckpoint):
    def read(self, module):
        with safe_open(self._path, "pt") as file:
            return LowRankUpdate(file.get_tensor(f"{module}.b"), file.get_tensor(f"{module}.a"))


@broken("test_a_damaged_file_is_an_error_that_names_the_checkpoint")
class TestRaisesWhatItsLibraryRaises(PairsCheckpoint):
    def __init__(self, path, label):
        try:
            super().__init__(path, label)
        except CheckpointError as error:
            raise ValueError(str(error)) from error


@broken("test_a_damaged_file_is_an_error_that_names_the_checkpoint")
class TestNamesNothing(PairsCheckpoint):
    def __init__(self, path, label):
        try:
            super().__init__(path, label)
        except CheckpointError as error:
            raise CheckpointError(json.dumps("a file is damaged")) from error


@broken("test_two_checkpoints_merge")
class TestCannotBeOpenedTwice(PairsCheckpoint):
    def __init__(self, path, label):
        super().__init__(path, label)
        if label != "mine":
            raise CheckpointError("only one at a time")


@broken("test_the_format_is_documented")
class TestSaysNothing(Pairs):
    pass
