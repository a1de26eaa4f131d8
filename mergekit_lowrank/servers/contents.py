"""What an adapter holds, sorted by what servers treat differently."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from mergekit_lowrank.formats import (
    CONFIG_NAME,
    Checkpoint,
    Convolution,
    Embedding,
    Expert,
    Extra,
    ModuleHeader,
    SafetensorsHeader,
    WholeModel,
)

__all__ = ["Contents"]

_SHARD_INDEX = ".index.json"
_DIFFUSION = re.compile(
    r"^(unet|text_encoder(_\d)?)\.|^lora_(unet|te\d?|transformer)_|^transformer\..*\.((to|add)_[qkv]|ff\w*\.net)"
    r"|(^|\.)(down_blocks|mid_block|up_blocks|(single_)?transformer_blocks)\."
)
"""In names of modules of a pipeline. Some language models' names start with ``transformer`` too."""


@dataclass(frozen=True)
class Contents:
    """An adapter's headers by kind.

    Attributes:
        called: where it lies, as a person says it.
        dialect: ``peft``, ``kohya``, ``diffusers``, ``gguf``, or ``model`` of a full fine-tune.
        config: as stored.
        needs_base: why its updates cannot be written without the base, as those of DoRA; None where they can.
        factored: the modules with two factors.
        biases: the biases of ``lora_B``, by module.
        extras: whole tensors and rows.
        has_alphas: whether the file holds an alpha beside the factors, as kohya's does.
        files: names of the files it consists of.
        is_nested: whether it lies in a sub-directory of the path that was given.
    """

    called: str
    dialect: str
    config: Mapping[str, object]
    needs_base: str | None
    factored: tuple[ModuleHeader, ...]
    biases: tuple[str, ...]
    extras: tuple[Extra, ...]
    has_alphas: bool
    files: tuple[str, ...]
    is_nested: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, dialect: str | None = None, called: str | None = None) -> Contents:
        """Of an adapter as it lies; or as it is going to be written, whatever files it lies in."""
        files = () if dialect else checkpoint.files
        keys = _keys(files)
        headers = checkpoint.modules.values()
        configs = [path.parent for path in files if path.name == CONFIG_NAME]
        return cls(
            called=called or checkpoint.location,
            dialect=dialect or _dialect(checkpoint, keys),
            config=checkpoint.config,
            needs_base=checkpoint.needs_base,
            factored=tuple(header for header in headers if not header.is_dense),
            biases=tuple(header.name for header in headers if header.is_dense and header.kind == "vector"),
            extras=tuple(checkpoint.extras.values()),
            has_alphas=any(key.endswith(".alpha") for key in keys),
            files=tuple(path.name for path in files),
            is_nested=bool(configs) and configs[0].resolve() != Path(checkpoint.location).resolve(),
        )

    @property
    def source(self) -> str:
        """The adapter in a command line."""
        return quote(self.called) if self.files else "ADAPTER"

    def named(self, kind: str) -> str:
        """What a command line makes of it."""
        return quote(f"{Path(self.called).name or 'adapter'}-{kind}/") if self.files else "OUT"

    @property
    def is_dora(self) -> bool:
        """Whether it is a LoRA with magnitudes."""
        return self.needs_base is not None and self.variant is None

    @property
    def is_of_diffusion(self) -> bool:
        """Whether its modules are those of a diffusion pipeline."""
        return any(_DIFFUSION.search(name) for name in self.modules)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules with factors."""
        return tuple(header.name for header in self.factored)

    @property
    def variant(self) -> str | None:
        """The kind of adapter in PEFT's words, where it is no LoRA."""
        kind = self.config.get("peft_type", "LORA")
        return None if kind == "LORA" else str(kind)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({header.rank for header in self.factored}))

    @property
    def shards(self) -> tuple[str, ...]:
        """The index of an adapter in several files."""
        return tuple(name for name in self.files if name.endswith(_SHARD_INDEX))

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Modules whose factors are of a table."""
        return self._laid_out(Embedding)

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Modules whose factors are of a kernel."""
        return self._laid_out(Convolution)

    @property
    def experts(self) -> tuple[str, ...]:
        """Experts of fused parameters."""
        return self._laid_out(Expert)

    @property
    def saved(self) -> tuple[str, ...]:
        """Parameters of ``modules_to_save``."""
        return tuple(extra.name for extra in self._beside if extra.saved_under)

    @property
    def whole(self) -> tuple[str, ...]:
        """Parameters that are stored whole for another reason."""
        return tuple(
            extra.name
            for extra in self._beside
            if not (extra.saved_under or _is_bias(extra) or _is_beside_factors(extra))
        )

    @property
    def copies(self) -> tuple[str, ...]:
        """Weights of the base that PEFT saves with their factors: embeddings, changed only where tokens were added."""
        return tuple(extra.name for extra in self._beside if _is_beside_factors(extra) and not _is_bias(extra))

    @property
    def base_biases(self) -> tuple[str, ...]:
        """Biases of the base that were trained."""
        return tuple(extra.name for extra in self._beside if not extra.saved_under and _is_bias(extra))

    @property
    def rows(self) -> tuple[str, ...]:
        """Embeddings of which some rows were trained."""
        return tuple(extra.name for extra in self.extras if extra.tokens is not None)

    @property
    def side(self) -> tuple[str, ...]:
        """Tensors of LLaVA's side file."""
        return tuple(extra.name for extra in self.extras if extra.in_side_file)

    @property
    def _beside(self) -> list[Extra]:
        return [extra for extra in self.extras if extra.tokens is None and not extra.in_side_file]

    def _laid_out(self, kind: type) -> tuple[str, ...]:
        return tuple(header.name for header in self.factored if isinstance(header.layout, kind))


def _is_beside_factors(extra: Extra) -> bool:
    return ".base_layer." in extra.key


def _is_bias(extra: Extra) -> bool:
    return extra.name.endswith(".bias")


def _keys(files: Sequence[Path]) -> tuple[str, ...]:
    """Names of the tensors in the first safetensors file; nothing where there is none."""
    path = next((path for path in files if path.suffix == ".safetensors"), None)
    return tuple(SafetensorsHeader.read(path).specs) if path is not None else ()


def _dialect(checkpoint: Checkpoint, keys: Sequence[str]) -> str:
    if isinstance(checkpoint, WholeModel):
        return "model"
    if any(path.name == CONFIG_NAME for path in checkpoint.files) or not checkpoint.files:
        return "peft"
    return "kohya" if any(key.startswith(("lora_", "lycoris_")) for key in keys) else "diffusers"
