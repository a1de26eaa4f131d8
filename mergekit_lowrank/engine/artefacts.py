"""What a strategy returns beside the merged update, gathered into one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lowrank.errors import OutputError
from mergekit_lowrank.formats import SafetensorsStream

__all__ = ["ARTEFACT_FILE", "ArtefactSpool"]

ARTEFACT_FILE = "artefacts.safetensors"


class ArtefactSpool:
    """Tensors of modules as they come, from any thread; in the end one file, in the order of the plan.

    Their sizes are known only then, so each module's wait in a file of their own.

    Args:
        directory: where ``artefacts.safetensors`` is to lie.
        modules: names, in the order of the file.
    """

    def __init__(self, directory: Path, modules: Sequence[str]) -> None:
        self._path, self._spool = directory / ARTEFACT_FILE, directory / "artefacts"
        self._files = {module: self._spool / f"{i:06d}.safetensors" for i, module in enumerate(modules)}

    def put(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Take one module's tensors."""
        try:
            self._spool.mkdir(exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._files[module])
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{self._files[module]}: cannot be written: {error}") from error

    def finish(self) -> None:
        """Put them together as ``<module>.<name>``; nothing where there are none."""
        files = {module: file for module, file in self._files.items() if file.exists()}
        if not files:
            return
        announced = {}
        for module, file in files.items():
            with safe_open(file, framework="pt") as stored:
                for name in sorted(stored.keys()):
                    tensor = stored.get_tensor(name)
                    announced[f"{module}.{name}"] = (tensor.dtype, tuple(tensor.shape))
        with SafetensorsStream(self._path, announced, metadata={"format": "pt"}) as stream:
            for module, file in files.items():
                with safe_open(file, framework="pt") as stored:
                    for name in sorted(stored.keys()):
                        stream.write(f"{module}.{name}", stored.get_tensor(name))
                file.unlink()
        self._spool.rmdir()
