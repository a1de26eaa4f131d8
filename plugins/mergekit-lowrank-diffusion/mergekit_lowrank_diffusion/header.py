"""The header of a kohya file, and the hashes in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from mergekit_lowrank import Checkpoint
from mergekit_lowrank.formats import SafetensorsHeader, writing
from mergekit_lowrank_diffusion.names import Family
from mergekit_lowrank_diffusion.reading import kept

__all__ = ["KOHYA_FILE", "in_order", "kohya_metadata", "sign"]

KOHYA_FILE = "lora.safetensors"

_MODEL_HASH, _LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
_UNSIGNED = {_MODEL_HASH: "0" * 64, _LEGACY_HASH: "0" * 8}
"""As long as the hashes that take their place once the data are written."""
_LEGACY_BEGIN, _LEGACY_BYTES = 0x100000, 0x10000
_CHUNK_BYTES = 1 << 20
_LENGTH_BYTES = _ALIGNMENT_BYTES = 8

_DTYPES_FROM_WIDEST = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_NETWORKS = {Family.SD: "networks.lora", Family.SDXL: "networks.lora", Family.FLUX: "networks.lora_flux"}
_VERSIONS: Mapping[str, str] = {
    "runwayml/stable-diffusion-v1-5": "sd_v1",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd_v1",
    "CompVis/stable-diffusion-v1-4": "sd_v1",
    "stabilityai/stable-diffusion-2-base": "sd_v2",
    "stabilityai/stable-diffusion-2-1-base": "sd_v2",
    "stabilityai/stable-diffusion-2": "sd_v2_v",
    "stabilityai/stable-diffusion-2-1": "sd_v2_v",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl_base_v1-0",
    "black-forest-labs/FLUX.1-dev": "flux1",
    "black-forest-labs/FLUX.1-schnell": "flux1",
}
"""``ss_base_model_version`` as sd-scripts (2025) writes it (``model_util``, ``sdxl_model_util``, ``flux_utils``)."""
_ARCHITECTURES: Mapping[str, str] = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
    "flux1": "flux-1",
}
"""``modelspec.architecture`` by version, as ``library/sai_model_spec.py`` of sd-scripts (2025) has it."""
_IMPLEMENTATIONS = {
    Family.SD: "diffusers",
    Family.SDXL: "https://github.com/Stability-AI/generative-models",
    Family.FLUX: "https://github.com/black-forest-labs/flux",
}


def kohya_metadata(checkpoint: Checkpoint, family: Family, sizes: Collection[tuple[int, float]]) -> dict[str, str]:
    """What sd-scripts writes: network, base and ModelSpec; hashes of zeros, until ``sign`` is called.

    What the adapter's own header said of its training stays. Ranks and alphas that differ are ``Dynamic``, as
    ``resize_lora.py`` writes them.

    Args:
        checkpoint: the adapter.
        family: which names it is written under.
        sizes: rank and alpha of each module.
    """
    ranks, alphas = {rank for rank, _ in sizes}, {alpha for _, alpha in sizes}
    carried = kept(checkpoint.config)
    base = checkpoint.base_model or ""
    version = carried.get("ss_base_model_version", _VERSIONS.get(base, base if base in _ARCHITECTURES else ""))
    network = {
        "ss_network_module": _NETWORKS[family],
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(next(iter(alphas))) if len(alphas) == 1 else "Dynamic",
    }
    described = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": _IMPLEMENTATIONS[family],
        "modelspec.title": checkpoint.label,
    }
    if version:
        described["ss_base_model_version"] = version
    if version in _ARCHITECTURES:
        described["modelspec.architecture"] = f"{_ARCHITECTURES[version]}/lora"
    return {"format": "pt", **described, **carried, **network, **_UNSIGNED}


def in_order(
    announced: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors in the order in which the safetensors library lays them out, on which the hashes depend."""
    return dict(sorted(announced.items(), key=lambda item: (_DTYPES_FROM_WIDEST.index(item[1][0]), item[0])))


def sign(path: Path, metadata: Mapping[str, str]) -> None:
    """Put the hashes in their place in the header of a file whose data are complete.

    ``sshs_model_hash`` is SHA-256 of all data; ``sshs_legacy_hash`` the first 8 digits of that of 64 KiB, 1 MiB into
    the file as it would be with the ``ss_`` metadata alone.

    Raises:
        DiskError: the disk failed.

    Source: ``precalculate_safetensors_hashes`` in sd-scripts (2025) ``library/train_util.py``.
    """
    header = SafetensorsHeader.read(path)
    legacy_begin = _LEGACY_BEGIN - _training_header_bytes(header, metadata)
    model, legacy = hashlib.sha256(), hashlib.sha256()
    position = 0
    with writing(path):
        for chunk in _data(path, len(header.content)):
            model.update(chunk)
            begin, end = legacy_begin - position, legacy_begin + _LEGACY_BYTES - position
            legacy.update(chunk[max(0, begin) : max(0, end)])
            position += len(chunk)
        signed = header.content
        hashes = {_MODEL_HASH: model.hexdigest(), _LEGACY_HASH: legacy.hexdigest()[:8]}
        for key, value in hashes.items():
            signed = signed.replace(f'"{key}":"{_UNSIGNED[key]}"'.encode(), f'"{key}":"{value}"'.encode())
        with path.open("r+b") as file:
            file.write(signed)


def _data(path: Path, begin: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _training_header_bytes(header: SafetensorsHeader, metadata: Mapping[str, str]) -> int:
    """Bytes before the data in a file of the safetensors library with the ``ss_`` metadata alone."""
    entries = json.loads(header.content[_LENGTH_BYTES:])
    entries["__metadata__"] = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return _LENGTH_BYTES + len(text) + -len(text) % _ALIGNMENT_BYTES
