"""Modules and artefacts in small files of their own, until all of them are there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.formats import SafetensorsStream, writing

__all__ = ["ARTEFACT_FILE", "ArtefactSpool", "digest_of", "digests_of", "store_module", "stored_module"]

ARTEFACT_FILE = "artefacts.safetensors"


def store_module(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write a small safetensors file, whole or not at all; the digests of its tensors.

    Raises:
        DiskError: the disk is full or failed.
    """
    owned = {name: tensor.contiguous() for name, tensor in tensors.items()}
    fresh = file.with_suffix(f".{uuid4().hex}.new")  # a worker that was thought lost may write it too
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(save(owned))
        fresh.replace(file)
    return {name: digest_of(tensor) for name, tensor in owned.items()}


def stored_module(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``store_module`` wrote.

    Raises:
        OutputError: it is missing or broken.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in sorted(stored.keys())}
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{file}: cannot be read: {error}.") from error


def digests_of(file: Path) -> dict[str, str]:
    """The digests of the tensors in such a file; none where it is missing or broken."""
    with suppress(OutputError):
        return {name: digest_of(tensor) for name, tensor in stored_module(file).items()}
    return {}


def digest_of(tensor: Tensor) -> str:
    """xxh3_128 of the bytes of a contiguous tensor, in hexadecimal."""
    return xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)


class ArtefactSpool:
    """What strategies return beside the merged updates, from any thread; in the end one file, in the order of the plan.

    Their sizes are known only then, so each module's wait in a file of their own.

    Args:
        directory: where ``artefacts.safetensors`` is to lie.
        spool: where they wait.
        modules: names, in the order of the file.
    """

    def __init__(self, directory: Path, spool: Path, modules: Sequence[str]) -> None:
        self._path = directory / ARTEFACT_FILE
        self._files = {module: spool / "artefacts" / f"{i:06d}.safetensors" for i, module in enumerate(modules)}

    def put(self, module: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Take one module's tensors; their digests."""
        return store_module(self._files[module], tensors) if tensors else {}

    def digests(self, module: str) -> dict[str, str]:
        """Of what waits for a module; nothing does for a tensor that was copied."""
        return digests_of(self._files[module]) if module in self._files else {}

    def finish(self, modules: Collection[str]) -> None:
        """Put those of these modules together as ``<module>.<name>``; nothing where there are none."""
        files = {module: file for module, file in self._files.items() if module in modules}
        if not files:
            return
        announced = {}
        for module, file in files.items():
            for name, tensor in stored_module(file).items():
                announced[f"{module}.{name}"] = (tensor.dtype, tuple(tensor.shape))
        with SafetensorsStream(self._path, announced, metadata={"format": "pt"}) as stream:
            for module, file in files.items():
                for name, tensor in stored_module(file).items():
                    stream.write(f"{module}.{name}", tensor)
