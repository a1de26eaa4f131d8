"""What fuzzing found, each in its smallest form."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergekit_lowrank.errors import CheckpointError
from mergekit_lowrank.formats import PeftFormat, open_tensors
from tests.fuzzing import samples
from tests.fuzzing.contents import Json, Pickled, Tensors, encoded
from tests.fuzzing.guard import guard
from tests.fuzzing.mutators import OUTSIDE
from tests.fuzzing.targets import Target, targets

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
PAIR = {f"{PREFIX}q.lora_A.weight": torch.ones(2, 3), f"{PREFIX}q.lora_B.weight": torch.ones(4, 2)}


def adapter(path: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_bytes(encoded(Json({**CONFIG, **config})))
    (path / "adapter_model.safetensors").write_bytes(encoded(Tensors({**PAIR, **tensors})))
    return path


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        PeftFormat().open(path, label="a")
    return str(caught.value)


def test_a_pickle_that_shows_more_than_it_stores_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(encoded(Pickled({"x": torch.zeros(1).expand(1 << 20, 1 << 20)})))
    with pytest.raises(CheckpointError, match=r"'x' \[1048576, 1048576\] repeats the 4 bytes that it stores"):
        open_tensors(path)


def test_views_of_what_a_pickle_stores_are_read(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.bin", torch.arange(12.0).reshape(3, 4)
    path.write_bytes(encoded(Pickled({"whole": whole, "part": whole[1:, ::2], "turned": whole.T})))
    source = open_tensors(path)
    assert torch.equal(source.read("part"), whole[1:, ::2])
    assert torch.equal(source.read("turned"), whole.T)


def test_an_archive_that_grows_when_it_is_unpacked_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(BytesIO(encoded(Pickled({"x": torch.ones(1)})))) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, b"\0" * (1 << 20) if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match=r"the record '.*' is compressed, and PyTorch never does that") as caught:
        open_tensors(path)
    assert len(str(caught.value)) < 1000


def test_extras_of_eight_bits_are_read(tmp_path: Path) -> None:
    saved = torch.ones(2, 3).to(torch.float8_e4m3fn)
    path = adapter(tmp_path / "a", {f"{PREFIX}head.weight": saved}, modules_to_save=["head"])
    read = PeftFormat().open(path, label="a").read_extra("head.weight", slice(0, 1))
    assert torch.equal(read.float(), torch.ones(1, 3))


@pytest.mark.parametrize("bias", [torch.ones(()), torch.ones(3), torch.ones(1, 4)])
def test_a_bias_of_another_shape_than_its_factor_is_refused(tmp_path: Path, bias: Tensor) -> None:
    path = adapter(tmp_path / "a", {f"{PREFIX}q.lora_B.bias": bias}, lora_bias=True)
    assert "biases that do not fit their lora_B: 'base_model.model.q.lora_B.bias'" in error_of(path)


def test_a_bias_of_fused_experts_is_refused(tmp_path: Path) -> None:
    shapes = {"lora_A.weight": (6, 3), "lora_B.weight": (4, 6), "lora_B.bias": (4,)}
    tensors = {f"{PREFIX}experts.{name}": torch.ones(shape) for name, shape in shapes.items()}
    path = adapter(tmp_path / "a", tensors, lora_bias=True, target_parameters=["experts.w"])
    assert "biases that do not fit their lora_B" in error_of(path)


def test_a_bias_of_integers_is_refused(tmp_path: Path) -> None:
    bias = {f"{PREFIX}q.lora_B.bias": torch.ones(4, dtype=torch.uint8)}
    assert "factors of a type that is not handled" in error_of(adapter(tmp_path / "a", bias, lora_bias=True))


@pytest.mark.parametrize("name", [f"../{OUTSIDE}", "../../etc/passwd", "/etc/passwd"])
def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / OUTSIDE).write_bytes(encoded(Tensors(PAIR)))
    path = tmp_path / "a"
    path.mkdir()
    (path / "adapter_config.json").write_bytes(encoded(Json(CONFIG)))
    index = {"weight_map": dict.fromkeys(PAIR, name)}
    (path / "adapter_model.safetensors.index.json").write_bytes(encoded(Json(index)))
    with guard().watching([path], 60):
        assert "lies outside the directory of the index, and was refused" in error_of(path)
    assert guard().trespasses == []


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Target:
    base = tmp_path_factory.mktemp("base")
    for name, content in samples.FINE_TUNES[0].items():
        (base / name).write_bytes(encoded(content))
    return targets(base)["diffusion"]


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.ones(()), "tensors that do not fit together"),
        (torch.ones(0, 4), "tensors that do not fit together"),
        (torch.ones(2, 4).to(torch.float8_e4m3fn), "factors of a type that is not handled"),
    ],
)
def test_factors_of_diffusers_that_are_none_are_refused(
    tmp_path: Path, diffusion: Target, a: Tensor, message: str
) -> None:
    tensors = {"unet.x.to_q.lora_A.weight": a, "unet.x.to_q.lora_B.weight": torch.ones(6, 2)}
    config = {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4}'}
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(encoded(Tensors(tensors, config)))
    with pytest.raises(CheckpointError, match=message):
        diffusion.read(tmp_path)
