from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lowrank import CheckpointError, OutputError, RecipeError, convert

from .builders import MODULES, FlatWriter, registry, write_adapter


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def add(directory: Path, tensors: dict[str, torch.Tensor], **settings: object) -> None:
    save_file({**tensors_of(directory), **tensors}, directory / "adapter_model.safetensors")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_through_another_dialect_gives_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_adapter(tmp_path / "math", use_rslora=True, ranks={"layers.0.v_proj": 3}, dtype=dtype)
    convert(source, tmp_path / "flat", format="flat", registry=registry())
    path = tmp_path / "flat" / "flat.safetensors"
    assert set(load_file(path)) == {f"{m.replace('.', '_')}.{p}" for m in MODULES for p in ("down", "up", "alpha")}
    convert(tmp_path / "flat", tmp_path / "back", registry=registry())
    before = tensors_of(source)
    after = {
        name.replace("layers_0_", "layers.0.").replace("layers_1_", "layers.1."): tensor
        for name, tensor in tensors_of(tmp_path / "back").items()
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_report_says_what_came_back(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math", lora_alpha=6)
    report = convert(source, tmp_path / "flat", format="flat", registry=registry())
    assert (report.source_format, report.format, report.modules, report.tensors) == ("peft", "flat", 3, 6)
    assert report.stored_bytes == sum(tensor.nbytes for tensor in tensors_of(source).values())
    assert report.largest_scaling_change == 0
    assert dict(report.renamed) == {module: module.replace(".", "_") for module in MODULES}
    assert report.not_kept == ("base_model (tiny/base)",)
    assert (report.files, report.is_read_back) == (("flat.safetensors",), True)


def test_peft_to_peft_keeps_names_and_facts(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math", alphas={"layers.1.q_proj": 3})
    report = convert(source, tmp_path / "again", registry=registry())
    assert (dict(report.renamed), report.not_kept) == ({}, ())
    assert tensors_of(tmp_path / "again").keys() == tensors_of(source).keys()


def test_an_alpha_that_float32_rounds_is_reported_and_no_error(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math", lora_alpha=0.1)
    report = convert(source, tmp_path / "flat", format="flat", registry=registry())
    assert 0 < report.largest_scaling_change < 1e-7


@pytest.mark.parametrize(
    ("writer", "said"),
    [
        ("forgetful", "modules that did not come back: 'layers.0.v_proj'"),
        ("inventive", "modules that the source lacks: 'head'"),
        ("loud", r"scalings that differ: 'layers.1.q_proj \(2, now 4\)'"),
        ("rounding", "modules that did not come back: 'layers.0.q_proj'"),
    ],
)
def test_a_difference_is_an_error_and_nothing_is_left(tmp_path: Path, writer: str, said: str) -> None:
    source = write_adapter(tmp_path / "math")
    with pytest.raises(CheckpointError, match=said):
        convert(source, tmp_path / "out", format=writer, registry=registry())
    assert [path.name for path in tmp_path.iterdir()] == ["math"]


def test_one_bit_of_a_module_that_keeps_its_name_is_a_difference(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math")
    convert(source, tmp_path / "flat", format="flat", registry=registry())
    tensors = load_file(tmp_path / "flat" / "flat.safetensors")
    tensors["layers_0_q_proj.up"][0, 0] = 0.0
    save_file(tensors, tmp_path / "flat" / "flat.safetensors")

    class Negative(FlatWriter):
        def spoilt(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            tensors["layers_0_q_proj.up"] = tensors["layers_0_q_proj.up"].clone()
            tensors["layers_0_q_proj.up"][0, 0] = -0.0
            return tensors

    made = registry()
    made.writers["negative"] = Negative
    with pytest.raises(CheckpointError, match="tensors with other values: 'layers_0_q_proj'"):
        convert(tmp_path / "flat", tmp_path / "out", format="negative", registry=made)


def test_a_saved_module_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math")
    head = torch.randn(7, 5).bfloat16()
    add(source, {"base_model.model.lm_head.weight": head}, modules_to_save=["lm_head"])
    report = convert(source, tmp_path / "again", registry=registry())
    assert report.tensors == 7
    assert torch.equal(tensors_of(tmp_path / "again")["base_model.model.lm_head.weight"], head)


def test_a_dialect_that_leaves_a_saved_module_out_is_found_out(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math")
    add(source, {"base_model.model.lm_head.weight": torch.ones(7, 5)}, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"beside the factors that did not come back: 'lm_head\.weight'"):
        convert(source, tmp_path / "out", format="flat", registry=registry())


def test_a_bias_of_lora_b_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math")
    biases = {f"base_model.model.{name}.lora_B.bias": torch.randn(d_out) for name, (d_out, _) in MODULES.items()}
    add(source, biases, lora_bias=True)
    assert convert(source, tmp_path / "again", registry=registry()).tensors == 9
    assert tensors_of(tmp_path / "again").keys() == tensors_of(source).keys()


def test_dora_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math")
    key = "base_model.model.{}.lora_magnitude_vector"
    add(source, {key.format(name): torch.ones(d_out) for name, (d_out, _) in MODULES.items()}, use_dora=True)
    with pytest.raises(CheckpointError, match=r"'math' cannot be converted: it is a DoRA adapter.*resize --base"):
        convert(source, tmp_path / "out", registry=registry())


def test_a_whole_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = tmp_path / "tuned"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "tiny"}')
    save_file({"q.weight": torch.ones(3, 3)}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'tuned' is a whole model.*mergekit-lowrank extract"):
        convert(model, tmp_path / "out", registry=registry())


def test_what_nothing_reads_is_said_not_to_be_read_back(tmp_path: Path) -> None:
    report = convert(write_adapter(tmp_path / "math"), tmp_path / "out", format="unread", registry=registry())
    assert (report.is_read_back, report.tensors, report.modules) == (False, 0, 3)
    assert (tmp_path / "out" / "unread.safetensors").is_file()


def test_a_misspelt_format_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown format to write 'flta'; did you mean 'flat'"):
        convert(write_adapter(tmp_path / "math"), tmp_path / "out", format="flta", registry=registry())


def test_the_configuration_of_the_base_goes_to_a_writer_that_takes_it(tmp_path: Path) -> None:
    source, base = write_adapter(tmp_path / "math"), tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "tiny"}')
    assert convert(source, tmp_path / "out", format="based", base=base, registry=registry()).modules == 3
    with pytest.raises(RecipeError, match="format 'flat' needs no base model"):
        convert(source, tmp_path / "flat", format="flat", base=base, registry=registry())


def test_a_base_without_a_readable_configuration_is_named(tmp_path: Path) -> None:
    source, base = write_adapter(tmp_path / "math"), tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a list; expected a JSON object"):
        convert(source, tmp_path / "out", format="based", base=base, registry=registry())
    (base / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not readable as JSON"):
        convert(source, tmp_path / "out", format="based", base=base, registry=registry())


@pytest.mark.parametrize("output", ["math", "math/inside", "."])
def test_an_output_that_overlaps_the_source_is_refused(tmp_path: Path, output: str) -> None:
    source = write_adapter(tmp_path / "math")
    with pytest.raises(OutputError, match="overlap; choose another directory"):
        convert(source, tmp_path / output, registry=registry(), overwrite=True)


def test_a_single_file_is_converted_beside_itself(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math")
    convert(source, tmp_path / "flat", format="flat", registry=registry())
    assert convert(tmp_path / "flat" / "flat.safetensors", tmp_path / "flat" / "peft", registry=registry()).modules == 3
    with pytest.raises(OutputError, match="overlap; choose another directory"):
        convert(tmp_path / "flat" / "flat.safetensors", tmp_path / "flat", registry=registry(), overwrite=True)


def test_a_conversion_replaces_a_conversion_where_it_may(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math")
    convert(source, tmp_path / "out", format="flat", registry=registry())
    with pytest.raises(OutputError, match="exists already"):
        convert(source, tmp_path / "out", registry=registry())
    convert(source, tmp_path / "out", registry=registry(), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]


def test_the_manifest_holds_sources_outputs_and_the_comparison(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "math")
    convert(source, tmp_path / "out", format="flat", registry=registry())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [file["name"] for file in manifest["sources"][0]["files"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    (output,) = manifest["outputs"]
    assert (output["name"], len(output["sha256"])) == ("flat.safetensors", 64)
    assert manifest["conversion"]["tensors"] == 6
