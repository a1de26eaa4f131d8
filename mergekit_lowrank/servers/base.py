"""A server, as far as adapters go, and what it says of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from mergekit_lowrank.formats import Checkpoint, ModuleHeader
from mergekit_lowrank.servers.contents import Contents

__all__ = ["FOLD", "KEEP", "Server", "Verdict", "anew", "converted", "misapplied", "verdict"]

FOLD = "Fold it into the base model (output: {kind: model}) and serve that."
KEEP = "That is right unless tokens were added to the vocabulary. Then fold it (output: {kind: model})."

_SHOWN = 3
_TOLERANCE = 1e-6  # of a scaling: alphas are stored as float32 in some dialects
_DIALECTS = {
    "peft": "a PEFT directory",
    "gguf": "a GGUF file",
    "kohya": "a file in kohya's names",
    "diffusers": "a file in diffusers' names",
}
_NEEDED = {"gguf": " (and --base DIRECTORY, where its base is not on this machine)"}
"""What a writer needs beside the adapter."""
_ELSEWHERE = (
    "Serve it by vllm, sglang or llama.cpp. If it is of a diffusion model, put the part of the pipeline before its "
    "names, as in 'transformer.blocks.0.attn1.to_q'."
)


@dataclass(frozen=True)
class Verdict:
    """One thing that a server does with an adapter.

    Attributes:
        is_fatal: whether something is refused, dropped or applied wrongly; else it is a remark.
        what: what would happen.
        advice: what to do.
    """

    is_fatal: bool
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}. {self.advice}"


class Server(ABC):
    """One server, by the rules of one release.

    Class attributes:
        name: as ``output.target`` calls it.
        version: the release whose code the rules were taken from.
        format: the writer of what it loads.
        reads: the dialects that it loads as they are.
        is_for_diffusion: whether its models are those of a diffusion pipeline; else they are language models.
        accepted_ranks: the ranks that it can be started with, ascending; empty where it takes any.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    format: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    is_for_diffusion: ClassVar[bool] = False
    accepted_ranks: ClassVar[tuple[int, ...]] = ()

    def judge(self, checkpoint: Checkpoint, *, dialect: str | None = None, called: str | None = None) -> list[Verdict]:
        """All that it refuses, drops or misapplies, from headers alone.

        Args:
            checkpoint: an adapter, opened.
            dialect: the writer that is going to write it (``peft``, ``gguf``, …); left out, the adapter is judged as
                it lies.
            called: what the commands in advice call the adapter; by default the path that it was opened at.
        """
        contents = Contents.of(checkpoint, dialect, called)
        return [*self._judge_model(contents)] or [*self._judge(contents), *self._judge_dialect(contents)]

    @abstractmethod
    def _judge(self, contents: Contents) -> Iterator[Verdict]:
        """What it does with the modules, their scaling and all that lies beside them."""

    def _judge_model(self, contents: Contents) -> Iterator[Verdict]:
        """What has no place here, whatever is done to it."""
        if contents.dialect == "model":
            advice = "Serve it as a model, or make an adapter of it: mergekit-lowrank extract."
            yield Verdict(True, "it is a whole model and no adapter", advice)
        elif self.is_for_diffusion and not contents.is_of_diffusion:
            what = f"{self.name} loads LoRAs of diffusion models; this is of a language model"
            yield from verdict(contents.modules, what, _ELSEWHERE)
        elif contents.is_of_diffusion and not self.is_for_diffusion:
            what = f"{self.name} serves language models; this is a LoRA of a diffusion model"
            yield from verdict(contents.modules, what, "Load it in diffusers or comfyui.")

    def _judge_dialect(self, contents: Contents) -> Iterator[Verdict]:
        if contents.dialect not in self.reads:
            own = " or ".join(_DIALECTS[name] for name in self.reads)
            other = _DIALECTS.get(contents.dialect, f"of the format '{contents.dialect}'")
            yield Verdict(True, f"this is {other}; {self.name} loads {own}", self._conversion(contents))

    def _conversion(self, contents: Contents) -> str:
        """Advice to convert it; to fold it, where what it would be converted to has no place for something in it."""
        written = replace(contents, dialect=self.format)
        is_refused = any(found.is_fatal for found in self._judge(written))
        return FOLD if is_refused else converted(contents, self.format)


def converted(contents: Contents, writer: str) -> str:
    """Advice to write it in another dialect; to make a plain LoRA of it first, if its updates need the base."""
    if contents.needs_base:
        made = f"{contents.source} {contents.named('lora')} --rank {contents.ranks[-1]} --base BASE"
        return f"Make it a plain LoRA first: mergekit-lowrank resize {made}."
    command = f"mergekit-lowrank convert {contents.source} {contents.named(writer)} --format {writer}"
    return f"Convert it: {command}{_NEEDED.get(writer, '')}."


def anew(contents: Contents) -> str:
    """Advice to write it with one rank, and all scaling in the factors."""
    command = f"mergekit-lowrank merge --method linear {contents.source} -o {contents.named('served')}"
    return f"Write it anew: {command} puts all scaling into the factors."


def verdict(names: Iterable[str], what: str, advice: str, *, is_fatal: bool = True) -> Iterator[Verdict]:
    """One verdict on all modules or tensors of a kind; none where there are none."""
    listed = list(names)
    if listed:
        more = len(listed) - _SHOWN
        shown = ", ".join(f"'{name}'" for name in listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        yield Verdict(is_fatal, f"{what}: {shown}", advice)


def misapplied(
    contents: Contents, used: Callable[[ModuleHeader], float], how: str, advice: str, *, is_fatal: bool = True
) -> Iterator[Verdict]:
    """One verdict on the modules whose scaling a server takes for another one, and by which factor.

    Args:
        contents: of the adapter.
        used: the scaling that the server computes.
        how: in which way it does.
        advice: what to do.
        is_fatal: whether this server does it, or only others like it.
    """
    factors = {
        header.name: used(header) / header.scaling if header.scaling else float("inf")
        for header in contents.factored
        if abs(used(header) - header.scaling) > _TOLERANCE * abs(header.scaling)
    }
    if factors:
        low, high = f"{min(factors.values()):.3g}", f"{max(factors.values()):.3g}"
        by = low if low == high else f"{low} to {high}"
        what = f"{how}, so {len(factors)} of {len(contents.factored)} updates would be applied {by} times as strong"
        yield from verdict(factors, what, advice, is_fatal=is_fatal)
