"""Files of kohya, LyCORIS and diffusers: read, written, turned back and merged."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import mergekit_lowrank_diffusion
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit_lowrank_diffusion import DiffusersFormat, DiffusersWriter, KohyaFormat, KohyaWriter
from mergekit_lowrank_diffusion.forms import FORMS
from mergekit_lowrank_diffusion.header import KOHYA_FILE
from mergekit_lowrank_diffusion.origin import Origin
from mergekit_lowrank_diffusion.reading import DIFFUSERS_FILE, DIFFUSERS_KEY
from mergekit_lowrank_diffusion.writing import alpha_of
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from mergekit_lowrank import Checkpoint, CheckpointError, LowRankUpdate, Registry, merge
from mergekit_lowrank.formats import Convolution, PeftFormat, PeftWriter, Writer
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.testing import FormatContract, random_update, write_tiny_adapter

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SD = {f"unet.{ATTENTION}.to_q": (6, 4), f"unet.{ATTENTION}.to_out.0": (6, 6)}
SD |= {"text_encoder.text_model.encoder.layers.0.mlp.fc1": (8, 3)}
DOUBLE, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.3"
FLUX_QKV = {f"{DOUBLE}.attn.{leaf}": (4, 5) for leaf in ("to_q", "to_k", "to_v")}
FLUX_LINEAR1 = {f"{SINGLE}.attn.{leaf}": (4, 5) for leaf in ("to_q", "to_k", "to_v")} | {f"{SINGLE}.proj_mlp": (16, 5)}


@pytest.fixture
def registry() -> Registry:
    registry = Registry()
    registry.register(mergekit_lowrank_diffusion, "diffusion")
    return registry


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape)))


def kohya_file(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata=metadata or None)
    return path


def pair(
    name: str, d_out: int, d_in: int, rank: int, *, alpha: float | None = None, seed: int = 0
) -> dict[str, Tensor]:
    found = {
        f"{name}.lora_down.weight": randn(rank, d_in, seed=seed),
        f"{name}.lora_up.weight": randn(d_out, rank, seed=seed + 1),
    }
    return found if alpha is None else found | {f"{name}.alpha": torch.tensor(alpha)}


def opened(path: Path) -> Checkpoint:
    reader = DiffusersFormat() if DiffusersFormat().recognises(path) else KohyaFormat()
    assert reader.recognises(path)
    return reader.open(path, label=path.stem)


def delta(checkpoint: Checkpoint, module: str) -> Tensor:
    update = checkpoint.read(module)
    assert isinstance(update, LowRankUpdate)
    return densify(update.to("cpu", torch.float64))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def written(writer: Writer, checkpoint: Checkpoint, directory: Path) -> Path:
    directory.mkdir()
    writer.write(checkpoint, directory)
    return directory


class TestKohya(FormatContract):
    format = KohyaFormat
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def write(self, directory: Path, updates: Mapping[str, LowRankUpdate]) -> Path:
        names = {module: f"lora_unet_{module.replace('.', '_')}" for module in updates}
        tensors = {}
        for module, update in updates.items():
            tensors |= {
                f"{names[module]}.lora_down.weight": update.a,
                f"{names[module]}.lora_up.weight": update.b,
                f"{names[module]}.alpha": torch.tensor(update.scaling * update.rank),
            }
        origin = Origin(modules={name: [module] for module, name in names.items()})
        return kohya_file(directory / "style.safetensors", tensors, **{Origin.key: origin.text()})


class TestDiffusers(FormatContract):
    format = DiffusersFormat

    def write(self, directory: Path, updates: Mapping[str, LowRankUpdate]) -> Path:
        tensors = {}
        for module, update in updates.items():
            tensors |= {f"unet.{module}.lora_A.weight": update.a, f"unet.{module}.lora_B.weight": update.b}
        patterns = {f"^{module}": update.rank for module, update in updates.items()}
        alphas = {f"^{module}": update.scaling * update.rank for module, update in updates.items()}
        config = LoraConfig(r=2, lora_alpha=4, rank_pattern=patterns, alpha_pattern=alphas).to_dict()
        stored = {f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        origin = Origin(modules={f"unet.{module}": [module] for module in updates})
        metadata = {DIFFUSERS_KEY: json.dumps(stored), Origin.key: origin.text()}
        kohya_file(directory / DIFFUSERS_FILE, tensors, **metadata)
        return directory


def test_alpha_over_rank_is_the_scaling_and_without_alpha_it_is_one(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    other = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = pair(name, 6, 4, 2, alpha=3.0) | pair(other, 8, 3, 2)
    checkpoint = opened(kohya_file(tmp_path / "a.safetensors", tensors, ss_base_model_version="sd_v1", other="x"))
    assert {module: own.scaling for module, own in checkpoint.modules.items()} == {
        f"unet.{ATTENTION}.to_q": 1.5,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 1.0,
    }
    assert checkpoint.base_model == "sd_v1"
    assert checkpoint.config == {"ss_base_model_version": "sd_v1"}


def test_a_convolution_and_a_locon_are_exactly_low_rank(tmp_path: Path) -> None:
    conv, locon = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_mid_block_resnets_1_conv2"
    point = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {
        f"{conv}.lora_down.weight": randn(2, 5, 3, 3),
        f"{conv}.lora_up.weight": randn(7, 2, 1, 1),
        f"{locon}.lora_down.weight": randn(2, 5, 1, 1),
        f"{locon}.lora_mid.weight": randn(2, 2, 3, 3),
        f"{locon}.lora_up.weight": randn(7, 2, 1, 1, seed=1),
        f"{locon}.alpha": torch.tensor(1.0),
        f"{point}.lora_down.weight": randn(2, 5, 1, 1, seed=2),
        f"{point}.lora_up.weight": randn(7, 2, 1, 1, seed=3),
    }
    checkpoint = opened(kohya_file(tmp_path / "a.safetensors", tensors))
    layouts = {module: own.layout for module, own in checkpoint.modules.items()}
    assert layouts["unet.down_blocks.0.resnets.0.conv1"] == Convolution(5, (3, 3))
    assert layouts["unet.mid_block.resnets.1.conv2"] == Convolution(5, (3, 3))
    assert layouts["unet.down_blocks.0.attentions.0.proj_in"] == Convolution(5, (1, 1))
    mid = tensors[f"{locon}.lora_mid.weight"].double()
    down, up = (tensors[f"{locon}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
    expected = torch.einsum("mnkl,im,nj->ijkl", mid, up, down).flatten(1) * 0.5  # LyCORIS 4.1 functional/general.py
    torch.testing.assert_close(delta(checkpoint, "unet.mid_block.resnets.1.conv2"), expected, rtol=1e-5, atol=1e-6)


def lycoris(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors, and the delta that LyCORIS 4.1 makes of them."""
    w = {key: randn(*shape, seed=sum(map(ord, key))).half() for key, shape in LYCORIS[name].items()}
    d = {key: tensor.double() for key, tensor in w.items()}
    if name == "loha":
        return w, (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"])
    if name == "loha tucker":
        rebuilt = [
            torch.einsum("ijkl,jr,ip->prkl", d[f"hada_t{i}"], d[f"hada_w{i}_b"], d[f"hada_w{i}_a"]) for i in (1, 2)
        ]
        return w, (rebuilt[0] * rebuilt[1]).flatten(1)
    first = d["lokr_w1"] if "lokr_w1" in d else d["lokr_w1_a"] @ d["lokr_w1_b"]
    second = d["lokr_w2"] if "lokr_w2" in d else d["lokr_w2_a"] @ d["lokr_w2_b"].flatten(1)
    kernel = (1, 1) if second.dim() == 4 else ()
    return w, torch.kron(first.reshape(*first.shape, *kernel), second).flatten(1)


LYCORIS: dict[str, dict[str, tuple[int, ...]]] = {
    "loha": {"hada_w1_a": (9, 2), "hada_w1_b": (2, 8), "hada_w2_a": (9, 2), "hada_w2_b": (2, 8)},
    "loha tucker": {f"hada_w{i}_a": (2, 9) for i in (1, 2)}
    | {f"hada_w{i}_b": (2, 5) for i in (1, 2)}
    | {f"hada_t{i}": (2, 2, 3, 3) for i in (1, 2)},
    "lokr": {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)},
    "lokr both": {"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 6), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6)},
    "lokr conv": {"lokr_w1": (2, 2), "lokr_w2": (3, 4, 3, 3)},
}


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_products_are_exact_low_rank_updates(name: str, tmp_path: Path) -> None:
    tensors, expected = lycoris(name)
    module = (
        "lora_unet_mid_block_resnets_0_conv1"
        if expected.shape[1] % 9 == 0
        else "lora_unet_mid_block_attentions_0_proj_in"
    )
    file = {f"{module}.{key}": tensor for key, tensor in tensors.items()} | {f"{module}.alpha": torch.tensor(1.0)}
    checkpoint = opened(kohya_file(tmp_path / "a.safetensors", file))
    (found,) = checkpoint.modules
    header, update = checkpoint.modules[found], checkpoint.read(found)
    assert isinstance(update, LowRankUpdate)
    assert (header.d_out, header.d_in, header.rank) == (*update.shape, update.rank) == (*expected.shape, update.rank)
    assert header.dtype == update.dtype == torch.float32
    scaling = 1.0 if name == "lokr conv" else 0.5  # two full matrices are not scaled
    torch.testing.assert_close(delta(checkpoint, found), expected * scaling, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_conv_in.dora_scale": randn(1, 4)}, r"DoRA magnitudes \(dora_scale\).*conv_in.dora_scale'"),
        ({"lora_unet_conv_in.diff": randn(4, 4)}, "whole weights, biases and norms"),
        ({"lora_unet_conv_in.oft_blocks": randn(4, 4)}, "LyCORIS methods other than"),
        ({"lora_unet_conv_in.weight_map": randn(4, 4)}, "that nothing here handles: 'lora_unet_conv_in.weight_map'"),
        ({"down_blocks.0.lora_A.weight": randn(4, 4)}, "keys without a component"),
        ({"lora_unet_conv_out.lora_up.weight": randn(4, 4)}, r"do not fit together: 'lora_unet_conv_out' \(lora_up"),
        (pair("lora_unet_conv_out", 4, 4, 2, alpha=0.0), "alphas that are no number other than 0"),
        (pair("lora_unet_double_blocks_0_img_attn_qkv", 7, 4, 2), "fused layers that cannot be divided"),
        ({k: v.to(torch.int8) for k, v in pair("lora_unet_conv_out", 4, 4, 2).items()}, "a type that is not handled"),
        (pair("lora_unet_out_2", 4, 4, 2) | pair("lora_unet_conv_out", 4, 4, 2), "there twice, under two names"),
    ],
)
def test_what_is_not_handled_is_refused_by_kind(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "a.safetensors", pair("lora_unet_up_blocks_0_resnets_0_conv1", 4, 4, 2) | tensors)
    with pytest.raises(CheckpointError, match=message):
        opened(file)


def test_a_thousand_unmatched_keys_make_one_message(tmp_path: Path) -> None:
    tensors = {f"lora_unet_conv_in.strange_{index}": randn(1, 1) for index in range(1000)}
    with pytest.raises(CheckpointError, match="and 997 more") as caught:
        opened(kohya_file(tmp_path / "a.safetensors", tensors))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", [f"unet.{ATTENTION}.to_out.0", f"unet.{ATTENTION}.processor.to_out_lora"])
def test_older_names_of_diffusers_are_read(key: str, tmp_path: Path) -> None:
    sides = ("down", "up") if "processor" in key else ("lora.down", "lora.up")
    tensors = {f"{key}.{sides[0]}.weight": randn(2, 6), f"{key}.{sides[1]}.weight": randn(6, 2)}
    tensors |= {f"unet.{ATTENTION}.to_out.0.alpha": torch.tensor(1.0)}
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors |= {
        f"{text}.lora_linear_layer.{side}.weight": t for side, t in (("down", randn(2, 3)), ("up", randn(8, 2)))
    }
    checkpoint = opened(kohya_file(tmp_path / DIFFUSERS_FILE, tensors))
    scalings = {module: own.scaling for module, own in checkpoint.modules.items()}
    assert scalings == {f"unet.{ATTENTION}.to_out.0": 0.5, text: 1.0}


def test_the_configuration_in_the_header_of_diffusers_is_honoured_and_checked(tmp_path: Path) -> None:
    tensors = {f"unet.{ATTENTION}.to_q.lora_A.weight": randn(4, 6), f"unet.{ATTENTION}.to_q.lora_B.weight": randn(6, 4)}
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True, "unet.base_model_name_or_path": "org/base"}
    good = kohya_file(tmp_path / "a" / DIFFUSERS_FILE, tensors, **{DIFFUSERS_KEY: json.dumps(config)})
    checkpoint = opened(good)
    assert checkpoint.modules[f"unet.{ATTENTION}.to_q"].scaling == 8 / math.sqrt(4)
    assert checkpoint.base_model == "org/base"
    for broken, message in (
        (config | {"unet.r": 2}, r"contradicts the ranks.*\(configuration 2, tensors 4\)"),
        (config | {"unet.use_qalora": True}, "'use_qalora' is set to True"),
        (config | {"unet.use_dora": True}, "'use_dora' is set"),
        ({"r": 4}, "belong to no component: 'r'"),
    ):
        file = kohya_file(tmp_path / "b" / DIFFUSERS_FILE, tensors, **{DIFFUSERS_KEY: json.dumps(broken)})
        with pytest.raises(CheckpointError, match=message):
            opened(file)


def test_either_dialect_is_read_under_either_name(tmp_path: Path) -> None:
    tensors = pair("lora_unet_mid_block_attentions_0_proj_in", 6, 4, 2)
    assert list(opened(kohya_file(tmp_path / DIFFUSERS_FILE, tensors)).modules) == [
        "unet.mid_block.attentions.0.proj_in"
    ]
    tensors = {"unet.x.lora_A.weight": randn(2, 4), "unet.x.lora_B.weight": randn(4, 2)}
    assert list(opened(kohya_file(tmp_path / "style.safetensors", tensors)).modules) == ["unet.x"]


def test_a_fused_layer_is_divided_into_rows_of_b_with_one_a(tmp_path: Path) -> None:
    name = "lora_unet_single_blocks_3_linear1"
    tensors = pair(name, 28, 5, 2, alpha=1.0)
    checkpoint = opened(kohya_file(tmp_path / "a.safetensors", tensors))
    assert list(checkpoint.modules) == list(FLUX_LINEAR1)
    whole = 0.5 * tensors[f"{name}.lora_up.weight"].double() @ tensors[f"{name}.lora_down.weight"].double()
    assert torch.equal(torch.cat([delta(checkpoint, module) for module in FLUX_LINEAR1]), whole)
    back = written(KohyaWriter(), checkpoint, tmp_path / "back")
    found = load_file(back / KOHYA_FILE)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def write_adapter(path: Path, modules: Mapping[str, tuple[int, int]], **options: object) -> Path:
    return write_tiny_adapter(path, dict(modules), base_model="org/base", **options)  # type: ignore[arg-type]


ADAPTERS: dict[str, tuple[dict[str, tuple[int, int]], dict[str, object]]] = {
    "SD": (SD, {}),
    "mixed ranks and alphas": (SD, {"ranks": {f"unet.{ATTENTION}.to_q": 3}, "alphas": {f"unet.{ATTENTION}.to_q": 5}}),
    "rsLoRA of rank 3": (SD, {"rank": 3, "use_rslora": True, "lora_alpha": 7}),
    "bfloat16": (SD, {"dtype": torch.bfloat16}),
    "without a component": ({f"{ATTENTION}.to_q": (6, 4), "mid_block.attentions.0.proj_in": (6, 6)}, {}),
    "Flux": (FLUX_QKV | FLUX_LINEAR1, {}),
    "Flux with other ranks": (FLUX_QKV, {"ranks": {f"{DOUBLE}.attn.to_k": 3}, "alphas": {f"{DOUBLE}.attn.to_k": 6}}),
    "Flux without to_k": ({k: v for k, v in FLUX_QKV.items() if "to_k" not in k} | {f"{SINGLE}.proj_mlp": (16, 5)}, {}),
    "a transformer alone": ({"transformer_blocks.0.ff.net.2": (6, 4), "transformer_blocks.0.attn.to_q": (4, 5)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("writer", [KohyaWriter, DiffusersWriter])
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_to_a_dialect_and_back_is_bit_exact(name: str, writer: type[Writer], tmp_path: Path) -> None:
    modules, options = ADAPTERS[name]
    path = write_adapter(tmp_path / "peft", modules, **options)
    before = PeftFormat().open(path, label="mine")
    dialect = opened(written(writer(), before, tmp_path / "dialect"))
    after_path = written(PeftWriter(), dialect, tmp_path / "back")
    after = PeftFormat().open(after_path, label="back")
    expected, found = load_file(path / "adapter_model.safetensors"), load_file(after_path / "adapter_model.safetensors")
    assert set(found) == set(expected)
    assert all(found[key].dtype == tensor.dtype and torch.equal(found[key], tensor) for key, tensor in expected.items())
    for module, header in before.modules.items():
        assert dialect.modules[module].scaling == header.scaling
        assert after.modules[module].scaling == pytest.approx(header.scaling, rel=1e-15)
    assert after.base_model == before.base_model == "org/base"


def test_convolutions_go_there_and_back(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{name}.lora_down.weight": randn(2, 5, 3, 3), f"{name}.lora_up.weight": randn(7, 2, 1, 1)}
    tensors |= {f"{name}.alpha": torch.tensor(2.0)}
    checkpoint = opened(kohya_file(tmp_path / "a.safetensors", tensors))
    peft = PeftFormat().open(written(PeftWriter(), checkpoint, tmp_path / "peft"), label="peft")
    diffusers = opened(written(DiffusersWriter(), peft, tmp_path / "diffusers"))
    back = load_file(written(KohyaWriter(), diffusers, tmp_path / "kohya") / KOHYA_FILE)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_parts_that_do_not_share_a_are_written_as_blocks(tmp_path: Path) -> None:
    before = PeftFormat().open(write_adapter(tmp_path / "peft", FLUX_QKV), label="mine")
    found = load_file(written(KohyaWriter(), before, tmp_path / "kohya") / KOHYA_FILE)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = (found[f"{name}.lora_{side}.weight"].double() for side in ("down", "up"))
    assert (down.shape, up.shape, float(found[f"{name}.alpha"])) == ((6, 5), (12, 6), 12.0)
    expected = torch.cat([delta(before, module) for module in FLUX_QKV])
    torch.testing.assert_close(2.0 * up @ down, expected, rtol=1e-12, atol=0)


def test_parts_of_a_fused_layer_with_other_scalings_are_refused(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "peft", FLUX_QKV, alphas={f"{DOUBLE}.attn.to_k": 5})
    before = PeftFormat().open(path, label="mine")
    with pytest.raises(
        CheckpointError, match="parts differ in scaling or size: 'lora_unet_double_blocks_0_img_attn_qkv'"
    ):
        KohyaWriter().write(before, tmp_path)


@pytest.mark.parametrize("writer", [KohyaWriter, DiffusersWriter])
def test_an_adapter_of_a_language_model_is_refused_by_name(writer: type[Writer], tmp_path: Path) -> None:
    before = PeftFormat().open(write_adapter(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (6, 4)}), label="chat")
    with pytest.raises(
        CheckpointError, match=r"'chat': modules that belong to no UNet.*'model.layers.0.self_attn.q_proj'"
    ):
        writer().write(before, tmp_path)


def test_opaque_names_merge_in_kohya_files_and_are_refused_by_diffusers(tmp_path: Path) -> None:
    tensors = pair("lora_unet_joint_blocks_0_x_block_mlp_fc1", 6, 4, 2, alpha=2.0)
    checkpoint = opened(kohya_file(tmp_path / "a.safetensors", tensors))
    assert list(checkpoint.modules) == ["lora_unet_joint_blocks_0_x_block_mlp_fc1"]
    back = load_file(written(KohyaWriter(), checkpoint, tmp_path / "kohya") / KOHYA_FILE)
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    with pytest.raises(
        CheckpointError, match="no documented one in diffusers: 'lora_unet_joint_blocks_0_x_block_mlp_fc1'"
    ):
        DiffusersWriter().write(checkpoint, tmp_path)


def test_the_header_of_a_kohya_file_is_what_sd_scripts_writes(tmp_path: Path) -> None:
    modules = {f"unet.{ATTENTION}.to_q": (600, 400), f"unet.{ATTENTION}.to_out.0": (600, 600)}
    path = write_tiny_adapter(tmp_path / "a", modules, rank=400, base_model="runwayml/stable-diffusion-v1-5")
    file = written(KohyaWriter(), PeftFormat().open(path, label="mine"), tmp_path / "kohya") / KOHYA_FILE
    metadata = metadata_of(file)
    said = {key: metadata[key] for key in ("ss_network_module", "ss_network_dim", "ss_network_alpha")}
    assert said == {"ss_network_module": "networks.lora", "ss_network_dim": "400", "ss_network_alpha": "4.0"}
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    stream = BytesIO(save(load_file(file), training))  # as precalculate_safetensors_hashes does it
    data = stream.getvalue()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[begin:]).hexdigest()
    assert len(data) > 0x100000 + 0x10000
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_what_a_header_says_of_the_training_survives(tmp_path: Path) -> None:
    tensors = pair("lora_unet_mid_block_attentions_0_proj_in", 6, 4, 2, alpha=2.0) | pair(
        "lora_unet_mid_block_attentions_0_proj_out", 6, 6, 3
    )
    file = kohya_file(tmp_path / "a.safetensors", tensors, ss_tag="猫", ss_base_model_version="sdxl_base_v1-0")
    diffusers = written(DiffusersWriter(), opened(file), tmp_path / "diffusers")
    metadata = metadata_of(written(KohyaWriter(), opened(diffusers), tmp_path / "kohya") / KOHYA_FILE)
    assert metadata["ss_tag"] == "猫"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_the_configuration_for_diffusers_is_one_that_peft_takes(tmp_path: Path) -> None:
    modules, options = ADAPTERS["mixed ranks and alphas"]
    before = PeftFormat().open(write_adapter(tmp_path / "peft", modules, **options), label="mine")
    metadata = metadata_of(written(DiffusersWriter(), before, tmp_path / "out") / DIFFUSERS_FILE)
    config = json.loads(metadata[DIFFUSERS_KEY])
    own = LoraConfig(**{k.removeprefix("unet."): v for k, v in config.items() if k.startswith("unet.")})
    assert own.rank_pattern == {f"^{re.escape(f'{ATTENTION}.to_q')}": 3}
    assert own.base_model_name_or_path == "org/base"
    assert {name.partition(".")[0] for name in config} == {"unet", "text_encoder"}


def test_a_kohya_and_a_diffusers_file_of_one_base_merge_into_one_adapter(tmp_path: Path, registry: Registry) -> None:
    names = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (6, 4),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0": (6, 6),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (8, 3),
    }
    tensors = {key: tensor for name, shape in names.items() for key, tensor in pair(name, *shape, 2, alpha=1.0).items()}
    kohya = kohya_file(tmp_path / "style.safetensors", tensors)
    updates = {module: random_update(*shape, 2, seed) for seed, (module, shape) in enumerate(SD.items())}
    tensors = {f"{m}.lora_A.weight": u.a for m, u in updates.items()} | {
        f"{m}.lora_B.weight": u.b for m, u in updates.items()
    }
    diffusers = kohya_file(tmp_path / "person" / DIFFUSERS_FILE, tensors).parent
    recipe = {
        "merge_method": "task_arithmetic",
        "models": [{"model": str(path)} for path in (kohya, diffusers)],
        "output": {"rank": "sum"},
        "out_dtype": "float32",
    }
    merged = merge(recipe, registry=registry).open(label="merged")
    assert set(merged.modules) == set(SD)
    for module in SD:
        expected = delta(opened(kohya), module) + delta(opened(diffusers), module)
        torch.testing.assert_close(delta(merged, module), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reader", [KohyaFormat, DiffusersFormat])
def test_directories_of_other_formats_are_left_to_them(reader: type, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SD)
    model = tmp_path / "model"
    model.mkdir()
    save_file({"weight": randn(2, 2)}, model / "model.safetensors")
    two = tmp_path / "two"
    for name in ("a", "b"):
        kohya_file(two / f"{name}.safetensors", {"x": randn(2, 2)})
    for path in (adapter, adapter / "adapter_model.safetensors", model, model / "model.safetensors", two):
        assert not reader().recognises(path)


def test_a_header_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    tensors = pair("lora_unet_mid_block_attentions_0_proj_in", 6, 4, 2)
    with pytest.raises(CheckpointError, match="header key 'mergekit_lowrank' is not what this package writes"):
        opened(kohya_file(tmp_path / "a.safetensors", tensors, **{Origin.key: '{"modules": 3}'}))


SETS = [sorted(names) for form in FORMS for names in form.tensors]
LEAVES = [*sorted({name for names in SETS for name in names}), "alpha", "dora_scale", "x"]
STEMS = ("lora_unet_mid_block_attentions_0_proj_in", "lora_unet_single_blocks_0_linear1", "lora_te3_x")
SHAPES = st.one_of(st.tuples(st.just(2), st.just(2)), st.lists(st.sampled_from([0, 1, 2, 7]), max_size=4).map(tuple))
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.float32, torch.int8])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), stem=st.sampled_from(STEMS))
def test_whatever_a_file_holds_it_opens_or_is_refused(data: st.DataObject, stem: str, tmp_path: Path) -> None:
    leaves = [*data.draw(st.sampled_from(SETS)), *data.draw(st.lists(st.sampled_from(LEAVES), max_size=2))]
    tensors = {f"{stem}.{leaf}": torch.ones(data.draw(SHAPES), dtype=data.draw(DTYPES)) for leaf in leaves}
    keys = st.sampled_from([Origin.key, DIFFUSERS_KEY, "ss_x"])
    metadata = data.draw(st.dictionaries(keys, st.text(max_size=20), max_size=2))
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata or None)
    with suppress(CheckpointError):
        checkpoint = opened(tmp_path / "a.safetensors")
        for module, header in checkpoint.modules.items():
            update = checkpoint.read(module)
            assert isinstance(update, LowRankUpdate)
            assert (header.d_out, header.d_in, header.rank) == (*update.shape, update.rank)


@given(st.floats(1e-3, 1e3), st.integers(1, 512))
def test_an_alpha_gives_its_scaling_back(scaling: float, rank: int) -> None:
    assert alpha_of(scaling, rank) / rank == pytest.approx(scaling, rel=3e-16)


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]))
def test_the_alpha_of_a_common_scaling_is_exact(alpha: int, rank: int) -> None:
    assert alpha_of(alpha / rank, rank) == alpha
