"""The same merge again, into sinks that compare each module with what is stored instead of writing it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lowrank.engine import ARTEFACT_FILE, Destination, Device, Fold, Plan, run_plans
from mergekit_lowrank.engine.adapter_files import rows_as_stored
from mergekit_lowrank.engine.folding import BLOCK_ENTRIES
from mergekit_lowrank.engine.records import ARBITRARY_CUT
from mergekit_lowrank.engine.sinks import Receipt, Sink
from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.events import Event, ModuleMerged, SurveyRound
from mergekit_lowrank.executors import Executor
from mergekit_lowrank.formats import Checkpoint, ModelDirectory, open_tensors
from mergekit_lowrank.lowrank import DenseUpdate, LowRankUpdate, Update, blocks_of_rows, norm
from mergekit_lowrank.policies import BudgetRank
from mergekit_lowrank.verification.comparing import (
    TOLERANCE,
    Difference,
    are_same_bits,
    difference_of_factors,
    difference_of_roundings,
    half_gap,
    least_change,
)
from mergekit_lowrank.verification.contents import Contents, Place, Said
from mergekit_lowrank.verification.results import Fault, ModuleCheck

__all__ = ["Compared", "recompute"]

ANY_DIRECTIONS = 2.0
"""What two updates of one norm differ by at most, relative to it."""
STAGE = "verify"
"""What events call it."""
CHANGED = (
    "The output, the recipe or an input is not what was merged, or this version of the package or of a plugin merges "
    "otherwise: compare the versions in manifest.json, or merge again."
)


@dataclass(frozen=True)
class Compared:
    """One module, or copied tensor, beside its recomputation.

    Attributes:
        check: how far they are apart; None where nothing could be compared.
        faults: what is wrong.
        information: what is not.
        keeps_other_directions: whether they differ as a cut between equal singular values leaves open.
    """

    check: ModuleCheck | None = None
    faults: tuple[Fault, ...] = ()
    information: tuple[str, ...] = ()
    keeps_other_directions: bool = False

    @classmethod
    def of(cls, module: str, difference: Difference) -> Compared:
        """Whether a module is within its tolerance."""
        error = difference.error if math.isfinite(difference.error) else None
        check = ModuleCheck(
            module=module, error=error, tolerance=difference.tolerance, is_identical=difference.is_identical
        )
        return cls(check) if check.is_ok else cls(check, (_deviation(module, difference),))

    def of_equal_norm(self, found: float, expected: float, rounding: float) -> Compared:
        """The same of a module whose directions were left open: only its norm has to agree, up to rounding."""
        if self.check is None or self.check.is_ok or not abs(found - expected) <= rounding:
            return self
        return Compared(self.check.model_copy(update={"tolerance": ANY_DIRECTIONS}), keeps_other_directions=True)


def _deviation(module: str, difference: Difference) -> Fault:
    found = f"differs from its recomputation by {difference.error:.2g} of it; expected at most "
    message = f"{found}{difference.tolerance:.2g}. {CHANGED}"
    return Fault(kind="recomputation", where=module, message=message)


def recompute(
    plan: Plan,
    found: Contents,
    said: Said,
    directory: Path,
    *,
    executor: Executor,
    devices: Sequence[Device],
    vram_bytes: int | None,
    tell: Callable[[Event], None],
) -> list[Compared]:
    """Every module and copied tensor of a plan, beside what is stored.

    Ranks that a budget bought are those that the report names.

    Args:
        plan: of the recipe of the output.
        found: the output, opened.
        said: its report.
        directory: of the output.
        executor: how modules are scheduled.
        devices: where they are merged.
        vram_bytes: what may be held on each device.
        tell: takes each event.

    Raises:
        MergeError: the recipe can no longer be merged.
    """
    bought = {module.name for module in plan.modules if isinstance(module.rank, BudgetRank)}
    ranks = {module.module: module.rank or 1 for module in said.modules if module.module in bought}
    is_open = {own.module for own in said.modules if any(text.startswith(ARBITRARY_CUT) for text in own.warnings)}

    def open_sink(made: Plan) -> Sink:
        if found.model is not None and made.fold is not None:
            return _ModelComparison(directory, is_open, found.model, made.fold)
        assert found.adapter is not None  # noqa: S101 - something is opened
        return _AdapterComparison(directory, is_open, made, found.adapter, found.places)

    destination = Destination(open_sink, ranks=ranks or None)
    told = _Told(tell, len(plan.modules))
    (outcome,) = run_plans([plan], [destination], executor=executor, devices=devices, vram_bytes=vram_bytes, tell=told)
    return [receipt.payload for receipt in outcome.receipts.values()]


class _Told:
    """Tells of modules that are merged again as of modules that are looked at: nothing of them is written.

    Args:
        tell: takes each event.
        modules: how many are merged.
    """

    def __init__(self, tell: Callable[[Event], None], modules: int) -> None:
        self._tell, self._modules, self._rounds = tell, modules, 0

    def __call__(self, event: Event) -> None:
        """Hand an event on."""
        if isinstance(event, SurveyRound):
            self._rounds = event.round
            event = replace(event, stage=STAGE)
        elif isinstance(event, ModuleMerged):
            event = SurveyRound(event.module, self._rounds + 1, self._modules, STAGE)
        self._tell(event)


class _Comparison(Sink):
    """Takes merged modules, and tells how far what is stored is from them. Nothing is written.

    Args:
        directory: of the output.
        is_open: modules that were cut between equal singular values: which directions are left is chance.
    """

    def __init__(self, directory: Path, is_open: Collection[str]) -> None:
        self._is_open = is_open
        path = directory / ARTEFACT_FILE
        self._artefacts = open_tensors(path) if path.is_file() else None

    def put(self, module: str, update: Update, artefacts: Mapping[str, Tensor]) -> Receipt:
        """Compare one module."""
        faults = self._faults_of_artefacts(module, artefacts)
        try:
            compared = self._compared(module, update)
        except CheckpointError:  # which was a fault when it was read the first time
            compared = Compared()
        return Receipt(module, 0, payload=replace(compared, faults=(*compared.faults, *faults)))

    @abstractmethod
    def _compared(self, module: str, update: Update) -> Compared:
        """The module beside what is stored."""

    def _faults_of_artefacts(self, module: str, artefacts: Mapping[str, Tensor]) -> Iterator[Fault]:
        for name, expected in artefacts.items():
            key = f"{module}.{name}"
            if self._artefacts is None or key not in self._artefacts.specs:
                message = f"is not in {ARTEFACT_FILE}, where the method puts it. Merge again."
                yield Fault(kind="structure", where=key, message=message)
                continue
            found = self._artefacts.read(key)
            if (found.dtype, found.shape) != (expected.dtype, expected.shape):
                message = (
                    f"is {found.dtype} {[*found.shape]}; recomputed {expected.dtype} {[*expected.shape]}. {CHANGED}"
                )
                yield Fault(kind="structure", where=key, message=message.replace("torch.", ""))
                continue
            difference = difference_of_roundings([(found, expected)])
            if not difference.error <= difference.tolerance:
                yield _deviation(key, difference)

    def holds(self, receipt: Receipt) -> bool:
        """Nothing is written."""
        del receipt
        return False

    def finish(self, receipts: Mapping[str, Receipt]) -> dict[str, int]:
        """Nothing is written."""
        del receipts
        return {}


class _AdapterComparison(_Comparison):
    """Compares with an adapter.

    Args:
        directory: of the output.
        is_open: modules that were cut between equal singular values.
        plan: what is merged again.
        found: the adapter, opened.
        places: where the modules lie in it.
    """

    def __init__(
        self, directory: Path, is_open: Collection[str], plan: Plan, found: Checkpoint, places: Mapping[str, Place]
    ) -> None:
        super().__init__(directory, is_open)
        self._plan, self._found, self._places = plan, found, places

    def _compared(self, module: str, update: Update) -> Compared:
        place = self._places.get(module)
        if place is None:  # which was a fault when the output was read
            return Compared()
        stored = None if place.is_extra else self._found.read(place.name)
        if isinstance(update, LowRankUpdate) and isinstance(stored, LowRankUpdate):
            if stored.shape != update.shape:
                return _other_shape(module, stored.shape, update.shape)
            difference = difference_of_factors(stored, update)
            compared = Compared.of(module, difference)
            if module not in self._is_open:
                return compared
            size = norm(update)
            return compared.of_equal_norm(norm(stored), size, difference.tolerance * size)
        return Compared.of(module, difference_of_roundings(self._blocks(module, place, update)))

    def _blocks(self, module: str, place: Place, update: Update) -> Iterator[tuple[Tensor, Tensor]]:
        for first, expected in rows_as_stored(update, self._plan, module):
            found = place.rows(self._found, slice(first, first + len(expected)))
            yield found.reshape(expected.shape).to(expected.dtype), expected


def _other_shape(module: str, found: tuple[int, int], expected: tuple[int, int]) -> Compared:
    message = f"is an update {list(found)}; the inputs have {list(expected)}. {CHANGED}"
    return Compared(None, (Fault(kind="structure", where=module, message=message),))


class _ModelComparison(_Comparison):
    """Compares with a model: what is stored must be a rounding of the base plus the update.

    Args:
        directory: of the output.
        is_open: modules that were cut between equal singular values.
        found: the model, opened.
        fold: how the updates come into it.
    """

    def __init__(self, directory: Path, is_open: Collection[str], found: ModelDirectory, fold: Fold) -> None:
        super().__init__(directory, is_open)
        self._found, self._fold = found, fold

    def copy(self, key: str) -> Receipt:
        """Compare a tensor that no input changes with that of the base."""
        wanted = self._fold.layout.spec(key)
        own = self._found.source.specs.get(key)
        if own != wanted:
            message = f"is {own or 'missing'}; the base has {wanted}. Merge again."
            return Receipt(key, 0, payload=Compared(None, (Fault(kind="structure", where=key, message=message),)))
        for base, found in self._pairs(key):
            wide = base.float() if base.dtype.itemsize < torch.float32.itemsize else base
            if not are_same_bits(base if base.dtype == wanted.dtype else wide.to(wanted.dtype), found):
                message = "is not as in the base, and no input changes it. Merge again."
                return Receipt(
                    key, 0, payload=Compared(None, (Fault(kind="recomputation", where=key, message=message),))
                )
        return Receipt(key, 0, payload=Compared())

    def _pairs(self, key: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of rows of the base and of what is stored."""
        base, found = self._fold.base.source, self._found.source
        shape = base.specs[key].shape
        if not shape:
            yield base.read(key), found.read(key)
            return
        for where in blocks_of_rows((shape[0], math.prod(shape[1:])), BLOCK_ENTRIES):
            yield base.read_rows(key, where), found.read_rows(key, where)

    def _compared(self, module: str, update: Update) -> Compared:
        assert isinstance(update, LowRankUpdate | DenseUpdate)  # noqa: S101 - it is merged
        key = self._fold.keys[module]
        size = norm(update)
        all_found = [self._of_tensor(own, update, size) for own in (key, *self._fold.base.partners(key))]
        worst = max(all_found, key=lambda own: own.difference.error if own.difference.error >= 0 else math.inf)
        is_identical = all(own.difference.is_identical for own in all_found)
        compared = Compared.of(module, replace(worst.difference, is_identical=is_identical))
        if module in self._is_open and compared.faults:
            added, rounding = self._added_norm(key)
            compared = compared.of_equal_norm(added, size, TOLERANCE * size + rounding)
        if size and not any(own.is_changed for own in all_found):
            told = f"module '{module}': its update is too small for the type of the base, which it does not change"
            return replace(compared, information=(told,))
        return compared

    def _added_norm(self, key: str) -> tuple[float, float]:
        """‖found − base‖_F, and what rounding to the stored type can change it by."""
        added = rounding = 0.0
        for base, found in self._pairs(key):
            added += float((found.double() - base.double()).square().sum())
            rounding += float(half_gap(found).square().sum())
        return math.sqrt(added), math.sqrt(rounding)

    def _of_tensor(self, key: str, update: LowRankUpdate | DenseUpdate, size: float) -> _Added:
        base = self._fold.base
        if base.is_transposed(base.module_of(key)):
            update = update.transposed()
        wide = torch.float64 if torch.float64 in {update.dtype, base.source.specs[key].dtype} else torch.float32
        if isinstance(update, LowRankUpdate):
            update = LowRankUpdate(update.b * update.scaling, update.a).to(update.device, wide)
        missed, is_identical, is_changed = 0.0, True, False
        for where in blocks_of_rows(update.shape, BLOCK_ENTRIES):
            weights, found = base.read_rows(key, where), self._found.read_rows(key, where)
            total = _sum(weights.to(wide, copy=True), update, where)
            is_changed = is_changed or not torch.equal(found.to(weights.dtype), weights)
            if not are_same_bits(total.to(found.dtype), found):
                is_identical = False
                slack = half_gap(found) + 2 * half_gap(total)  # sums may be made in another order
                missed += float(least_change(found.double(), total.double(), slack).square().sum())
        return _Added(Difference(_relative(math.sqrt(missed), size), TOLERANCE, is_identical), is_changed)


@dataclass(frozen=True)
class _Added:
    """One tensor of a model beside base and update."""

    difference: Difference
    is_changed: bool


def _sum(weights: Tensor, update: LowRankUpdate | DenseUpdate, where: slice) -> Tensor:
    """The weights with the update's rows in them, added as the merge does."""
    if isinstance(update, LowRankUpdate) and update.device == weights.device:
        return weights.addmm_(update.b[where], update.a)
    return weights.add_(update.rows(where).to(weights))


def _relative(missed: float, size: float) -> float:
    if size:
        return missed / size
    return math.inf if missed else missed
