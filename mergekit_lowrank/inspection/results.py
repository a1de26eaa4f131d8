"""What ``inspect`` finds, as data and as HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from mergekit_lowrank.inspection.headers import counted, kinds_text, ranks_text, span
from mergekit_lowrank.pages.cells import cell
from mergekit_lowrank.pages.tables import html_table, number

__all__ = ["AdapterInfo", "ExtraInfo", "ModuleInfo", "grouped", "total_norm"]

MODULE_COLUMNS = ("module", "kind", "out", "in", "rank", "scaling", "type", "norm", "stable rank", "effective rank")
EXTRA_COLUMNS = ("beside LoRA", "kind", "shape", "type", "bytes")
Grouped = TypeVar("Grouped")


@dataclass(frozen=True)
class ModuleInfo:
    """One module, and the size of its update; None where that is not known.

    Attributes:
        module: its name in the base model.
        kind: ``matrix``, ``embedding``, ``convolution``, ``expert`` (of a fused parameter) or ``vector``.
        d_out: rows of the update.
        d_in: columns of the update.
        rank: of its factors; min(d_out, d_in) without factors.
        scaling: what multiplies B · A.
        dtype: as stored.
        stored_bytes: of its tensors.
        norm: ‖ΔW‖_F.
        stable_rank: ‖ΔW‖²_F / σ₁², between 1 and the rank (Rudelson & Vershynin 2007, arXiv:math/0503442); 0 of a
            zero update, None of one that has no factors.
        effective_rank: exp(−Σ p·ln p) with p = σ / Σσ (Roy & Vetterli 2007, EUSIPCO); the same.
    """

    module: str
    kind: str
    d_out: int
    d_in: int
    rank: int
    scaling: float
    dtype: str
    stored_bytes: int
    norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None

    @property
    def group(self) -> tuple[str, str, int, int]:
        """What modules that differ in their layer only have in common: name behind its number, kind and shape."""
        return _tail(self.module), self.kind, self.d_out, self.d_in


@dataclass(frozen=True)
class ExtraInfo:
    """A tensor beside the factors.

    Attributes:
        name: the parameter in the base.
        key: its name in the file.
        kind: ``side tensor``, ``block of token rows``, ``saved module``, ``bias`` or ``whole parameter``.
        shape: as stored.
        dtype: as stored.
        stored_bytes: of it.
        tokens: the rows that it replaces; None where it is all of the parameter.
    """

    name: str
    key: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    stored_bytes: int
    tokens: tuple[int, ...] | None = None

    @property
    def group(self) -> tuple[str, str, tuple[int, ...]]:
        """As of a module."""
        return _tail(self.name), self.kind, self.shape


@dataclass(frozen=True)
class AdapterInfo:
    """What a checkpoint holds, mostly a LoRA adapter. A notebook shows it as a table.

    Attributes:
        location: as it was asked for.
        format: which reader opened it.
        kind: ``rsLoRA``, ``LoHa (r 3, read as a LoRA of rank 9)`` and the like; ``a whole model``.
        base_model: the base that its configuration names; None where it names none.
        revision: of the base.
        task_type: as its configuration says.
        fan_in_fan_out: whether its linear layers are stored transposed.
        scaling_rule: where scalings come from; None of a whole model.
        needs_base: why its updates are known only with the base; None where they are without.
        in_a_merge: what a merge does with each part, a sentence for each.
        files: it consists of.
        stored_bytes: of its modules.
        norm: ‖ΔW‖_F over all modules; None where the updates are not known without the base.
        modules: in the order of its files.
        extras: tensors beside the modules.
    """

    location: str
    format: str
    kind: str
    base_model: str | None
    revision: str | None
    task_type: str | None
    fan_in_fan_out: bool
    scaling_rule: str | None
    needs_base: str | None
    in_a_merge: tuple[str, ...]
    files: tuple[str, ...]
    stored_bytes: int
    norm: float | None
    modules: tuple[ModuleInfo, ...]
    extras: tuple[ExtraInfo, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for ``inspect --json``."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """For notebooks: the facts, and the modules to unfold."""
        modules = html_table(MODULE_COLUMNS, map(_row, self.modules), right=MODULE_COLUMNS[2:6] + MODULE_COLUMNS[7:])
        extras = html_table(EXTRA_COLUMNS, map(_row_of_extra, self.extras), right=("shape", "bytes"))
        folded = {counted(len(self.modules), "module"): modules} if self.modules else {}
        if self.extras:
            folded[f"{counted(len(self.extras), 'tensor')} beside LoRA"] = extras
        return cell(self.location, self._facts(), folded)

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "format", self.format
        yield "kind", self.kind
        yield "base model", self.base_model or "not named"
        if self.modules:
            yield "modules", kinds_text(module.kind for module in self.modules)
        if self.modules and self.scaling_rule is not None:
            yield "rank", ranks_text(self.modules)
            yield "scaling", f"{span(module.scaling for module in self.modules)} ({self.scaling_rule})"
        if self.norm is not None:
            yield "update norm", f"{number(self.norm)} over all modules"
        yield from (("in a merge", sentence) for sentence in self.in_a_merge)


def grouped(items: Iterable[Grouped], key: Callable[[Grouped], object]) -> Iterable[list[Grouped]]:
    """Items of one key together, in the order of the first of each."""
    groups: dict[object, list[Grouped]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.values()


def total_norm(modules: Iterable[ModuleInfo]) -> float:
    """‖ΔW‖_F over modules, of those where it is known."""
    return math.hypot(*(module.norm for module in modules if module.norm is not None))


def _tail(name: str) -> str:
    """The name behind the last number, which is that of the layer."""
    return re.split(r"\.\d+\.", name)[-1]


def _row(module: ModuleInfo) -> Sequence[object]:
    measures = (module.norm, module.stable_rank, module.effective_rank)
    known = ["" if value is None else number(value) for value in measures]
    shape = (module.d_out, module.d_in, module.rank, f"{module.scaling:g}")
    return module.module, module.kind, *shape, module.dtype, *known


def _row_of_extra(extra: ExtraInfo) -> Sequence[object]:
    return extra.name, extra.kind, " × ".join(map(str, extra.shape)), extra.dtype, extra.stored_bytes
