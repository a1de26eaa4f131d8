"""Cases: each is the mutation of a sample by its own generator, so that any one can be made again."""

from __future__ import annotations

import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

from mergekit_lowrank.errors import MergeError
from tests.fuzzing import samples
from tests.fuzzing.contents import Sample, Tensors, encoded
from tests.fuzzing.guard import TooLong, Trespass, guard, peak_bytes
from tests.fuzzing.mutators import OUTSIDE, mutated
from tests.fuzzing.targets import Target, targets

__all__ = ["Case", "Fuzzer", "Tally"]

_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|/\S+|\d+")


@dataclass(frozen=True)
class Case:
    """One mutated input, read.

    Attributes:
        target: the kind of input.
        number: of the case.
        outcome: ``read``, or the error's type and the invariable part of its message.
        seconds: by the clock.
        grown_bytes: by how much the most memory that the process ever had grew.
        failure: what should not have happened; None where nothing did.
    """

    target: str
    number: int
    outcome: str
    seconds: float
    grown_bytes: int
    failure: str | None = None


@dataclass
class Tally:
    """Of the cases of one target.

    Attributes:
        cases: how many there were.
        outcomes: how often each came out.
        longest: the one that took longest.
        grown_bytes: by how much they raised the most memory that the process ever had.
        failures: cases in which something happened that should not.
    """

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    longest: Case | None = None
    grown_bytes: int = 0
    failures: list[Case] = field(default_factory=list)

    def add(self, case: Case) -> None:
        """Count one."""
        self.cases += 1
        self.outcomes[case.outcome] += 1
        self.grown_bytes += case.grown_bytes
        if self.longest is None or case.seconds > self.longest.seconds:
            self.longest = case
        if case.failure:
            self.failures.append(case)


class Fuzzer:
    """Gives readers mutated inputs.

    Args:
        root: an empty directory to do it in.
        seed: of all cases.
        limit_seconds: what one case may take, by the clock.
        limit_bytes: by how much one case may raise the most memory that the process ever had.
    """

    def __init__(self, root: Path, *, seed: int = 0, limit_seconds: float = 5.0, limit_bytes: int = 1 << 28) -> None:
        self._seed, self._limit_seconds, self._limit_bytes = seed, limit_seconds, limit_bytes
        self._base, self._directory = root / "base", root / "cases" / "case"
        outside = {OUTSIDE: Tensors({"secret": torch.ones(2)})}
        for directory, sample in ((self._base, samples.FINE_TUNES[0]), (self._directory.parent, outside)):
            _write(sample, directory)
        _write(samples.TOKENIZERS[0], self._base)
        self.targets = targets(self._base)
        self._encoded = {
            target.name: [{file: encoded(content) for file, content in sample.items()} for sample in target.samples]
            for target in self.targets.values()
        }
        for target in self.targets.values():
            self._check(target)

    def cases(self, name: str, numbers: Sequence[int]) -> Iterator[Case]:
        """Cases of one target."""
        for number in numbers:
            yield self.case(name, number)

    def case(self, name: str, number: int) -> Case:
        """One case: the same each time."""
        target, chance = self.targets[name], Random(f"{self._seed}/{name}/{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on deprecated kinds of tensors
            self._put(self._made(target, chance))
        return self._read(target, number)

    def _made(self, target: Target, chance: Random) -> dict[str, bytes]:
        """The files of one case: a sample of which one or two are mutated."""
        index = chance.randrange(len(target.samples))
        sample, files = target.samples[index], dict(self._encoded[target.name][index])
        names = [file for file in sample if file not in target.kept]
        for file in chance.sample(names, chance.choice([1, 1, 1, min(2, len(names))])):
            files[file] = mutated(sample[file], chance)
        if chance.random() < 0.01:
            del files[chance.choice(names)]
        return files

    def keep(self, directory: Path) -> Path:
        """Copy the files of the last case into a directory that exists."""
        return Path(shutil.copytree(self._directory, directory, dirs_exist_ok=True))

    def _check(self, target: Target) -> None:
        """Read all samples as they are, which also loads what readers load when they are first used."""
        for files in self._encoded[target.name]:
            self._put(files)
            target.read(self._directory)

    def _put(self, files: Sample) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        _write(files, self._directory)

    def _read(self, target: Target, number: int) -> Case:
        readable = [Path("/")] if target.reads_anywhere else [self._directory, self._base]
        watch, before, start = guard(), peak_bytes(), time.perf_counter()
        outcome, failure = "read", None
        try:
            with warnings.catch_warnings(), watch.watching(readable, self._limit_seconds):
                warnings.simplefilter("error")
                target.read(self._directory)
        except MergeError as error:
            outcome = f"{type(error).__name__}: {_VARYING.sub('…', str(error))[:80]}"
        except TooLong:
            outcome = failure = f"took more than {self._limit_seconds:g} s"
        except (Exception, Trespass) as error:
            outcome = f"{type(error).__name__}: {_VARYING.sub('…', str(error))[:80]}"
            failure = f"{type(error).__name__}: {str(error)[:300]}"
        seconds, grown = time.perf_counter() - start, peak_bytes() - before
        if watch.trespasses:
            failure = f"trespass: {watch.trespasses[0]}"
        elif grown > self._limit_bytes:
            failure = f"took {grown >> 20} MiB"
        return Case(target.name, number, outcome, seconds, grown, failure)


def _write(sample: Sample, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in sample.items():
        (directory / name).write_bytes(encoded(content))
