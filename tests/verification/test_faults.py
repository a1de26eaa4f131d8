from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank import CheckpointError, MemoryBudgetError, merge
from tests.verification.builders import (
    FIRST,
    KEY_B,
    MODULES,
    WEIGHTS,
    adapters,
    change_json,
    change_tensors,
    copy,
    fault,
    folded,
    kinds,
    merged,
    recipe_of,
    registry,
    verified,
)

__all__ = ["copy", "folded", "merged", "registry"]


def changed(**tensors):
    return lambda own: own | {key: change(own[key]) for key, change in tensors.items()}


class TestAdapter:
    def test_a_flipped_bit_is_found_by_its_hash_and_by_recomputation(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_tensors(output / WEIGHTS, changed(**{KEY_B: lambda b: b.index_fill(0, torch.tensor([3]), 9.0)}))
        found = verified(output, registry)
        assert {"output", "recomputation"} <= kinds(found)
        assert fault(found, "output").where == WEIGHTS
        assert "its content changed. Merge again." in fault(found, "output").message
        assert fault(found, "recomputation").where == FIRST
        assert [check.module for check in found.recomputed if not check.is_identical] == [FIRST]

    def test_the_least_bit_is_found_by_its_hash(self, copy, merged, registry) -> None:
        path = copy(merged) / WEIGHTS
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        found = verified(path.parent, registry)
        assert kinds(found) == {"output"}
        assert found.identical == len(MODULES) - 1

    def test_swapped_rows_have_the_same_norm_and_are_found(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_tensors(output / WEIGHTS, changed(**{KEY_B: lambda b: b.flip(0)}))
        assert kinds(verified(output, registry)) == {"output", "recomputation"}
        assert kinds(verified(output, registry, recompute=False)) == {"output"}

    def test_an_update_that_was_lost_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_tensors(output / WEIGHTS, changed(**{KEY_B: torch.zeros_like}))
        found = verified(output, registry, recompute=False)
        assert kinds(found) == {"output", "zero"}
        assert str(fault(found, "zero")).startswith(f"{FIRST}: is zero; the report says that an update of norm ")

    def test_an_update_that_was_merged_to_zero_without_a_word_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_tensors(output / WEIGHTS, changed(**{KEY_B: torch.zeros_like}))
        report = json.loads((output / "report.json").read_text())
        report["modules"][0]["merged_norm"] = 0.0
        (output / "report.json").write_text(json.dumps(report))
        assert "zero" in kinds(verified(output, registry, recompute=False))
        report["modules"][0]["warnings"] = ["merged to zero, though its inputs are not"]
        (output / "report.json").write_text(json.dumps(report))
        assert kinds(verified(output, registry, recompute=False)) == {"output"}

    def test_another_alpha_is_another_scaling(self, copy, merged, registry) -> None:
        output = copy(merged)
        alpha = json.loads((output / "adapter_config.json").read_text())["lora_alpha"]
        change_json(output / "adapter_config.json", lora_alpha=2 * alpha)
        found = verified(output, registry)
        assert kinds(found) == {"output", "scaling", "recomputation"}
        assert sum(own.kind == "scaling" for own in found.faults) == len(MODULES)
        assert found.largest_error == pytest.approx(1.0, rel=1e-6)

    def test_a_number_that_is_not_one_is_named_with_its_tensor(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_tensors(output / WEIGHTS, changed(**{KEY_B: lambda b: b.index_fill(0, torch.tensor([0]), math.nan)}))
        found = verified(output, registry)
        assert kinds(found) == {"output", "values"}
        assert f"tensor '{KEY_B}' holds 3 NaN or infinite values" in fault(found, "values").message
        assert len(found.recomputed) == len(MODULES) - 1

    def test_another_type_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_tensors(output / WEIGHTS, lambda own: {key: tensor.float() for key, tensor in own.items()})
        found = verified(output, registry)
        assert kinds(found) == {"output", "structure"}
        assert fault(found, "structure").message == "is stored as float32; the report says bfloat16. Merge again."
        assert found.identical == 0

    def test_a_module_with_another_name_is_missing_and_a_stranger(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_tensors(
            output / WEIGHTS, lambda own: {key.replace(FIRST, "model.layers.7.q_proj"): own[key] for key in own}
        )
        settings = json.loads((output / "adapter_config.json").read_text())
        names = [name.replace(FIRST, "model.layers.7.q_proj") for name in settings["target_modules"]]
        change_json(output / "adapter_config.json", target_modules=names)
        found = verified(output, registry)
        named = {own.where: own.message for own in found.faults if own.kind == "structure"}
        assert named == {
            FIRST: "is in the report and not in the output. Merge again.",
            "model.layers.7.q_proj": "is in the output and not in the report. Merge again.",
        }

    def test_a_module_that_is_gone_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_tensors(output / WEIGHTS, lambda own: {key: own[key] for key in own if FIRST not in key})
        found = verified(output, registry)
        assert ("structure", FIRST) in {(own.kind, own.where) for own in found.faults}

    def test_ranks_that_contradict_the_configuration_do_not_open(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_json(output / "adapter_config.json", r=1, lora_alpha=1)
        found = verified(output, registry)
        assert "contradicts the ranks of the tensors" in fault(found, "structure").message
        assert not found.is_recomputed

    def test_an_adapter_of_another_rank_is_not_what_was_reported(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_json(output / "adapter_config.json", r=2, lora_alpha=2)
        change_tensors(
            output / WEIGHTS, lambda own: {key: t[:2] if "lora_A" in key else t[:, :2] for key, t in own.items()}
        )
        found = verified(output, registry)
        assert {"output", "structure", "recomputation"} <= kinds(found)
        assert fault(found, "structure").message == "has rank 2; the report says 3. Merge again."


class TestFiles:
    def test_a_file_that_is_missing_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        (output / "README.md").unlink()
        found = verified(output, registry)
        assert [own.where for own in found.faults] == ["README.md"]
        assert "is missing; the manifest has " in found.faults[0].message
        assert found.identical == len(MODULES)

    def test_a_name_that_leads_out_of_the_output_is_not_followed(self, copy, merged, registry) -> None:
        output = copy(merged)
        manifest = json.loads((output / "manifest.json").read_text())
        outside = [str(output.parent / "in1" / WEIGHTS), f"../in1/{WEIGHTS}"]
        manifest["outputs"] += [{"name": name, "bytes": 1, "sha256": "0"} for name in outside]
        (output / "manifest.json").write_text(json.dumps(manifest))
        found = verified(output, registry, recompute=False)
        assert [own.where for own in found.faults] == outside
        assert all(own.message.startswith("lies outside of the output") for own in found.faults)

    def test_a_file_beside_them_is_information(self, copy, merged, registry) -> None:
        output = copy(merged)
        (output / "notes.txt").write_text("mine")
        found = verified(output, registry)
        assert found.is_ok
        assert "beside the files of the merge lies 'notes.txt'" in found.information

    def test_json_that_does_not_parse_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        (output / "report.json").write_text("{")
        found = verified(output, registry)
        assert kinds(found) == {"output", "structure"}
        assert "is not readable as JSON" in fault(found, "structure").message

    def test_a_report_without_modules_is_no_report(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_json(output / "report.json", modules=[])
        assert "is not the report of a merge: modules" in fault(verified(output, registry), "structure").message

    def test_an_input_that_changed_is_named_and_recomputed(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_tensors(output.parent / "in2" / WEIGHTS, changed(**{KEY_B: lambda b: b * 2}))
        found = verified(output, registry)
        assert kinds(found) == {"source", "recomputation"}
        assert fault(found, "source").where == f"in2: {WEIGHTS}"
        assert kinds(verified(output, registry, recompute=False)) == {"source"}

    def test_an_input_that_is_gone_is_a_fault_only_where_it_is_needed(self, copy, merged, registry) -> None:
        output = copy(merged)
        (output.parent / "in2").rename(output.parent / "moved")
        found = verified(output, registry)
        assert (kinds(found), found.faults[0].where, found.is_recomputed) == ({"source"}, "in2", False)
        assert "cannot be opened: " in found.faults[0].message
        assert "verify the output alone (--no-recompute)" in found.faults[0].message
        found = verified(output, registry, recompute=False)
        assert found.is_ok
        assert any(said.startswith("input 'in2' was not checked: ") for said in found.information)

    def test_an_input_of_other_files_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        tensors = output.parent / "in1" / WEIGHTS
        torch.save(load_file(tensors), tensors.with_name("adapter_model.bin"))
        tensors.unlink()
        message = fault(verified(output, registry), "source").message
        assert "consists of 'adapter_config.json', 'adapter_model.bin'; it was merged from" in message

    def test_a_recipe_that_was_edited_makes_something_else(self, copy, merged, registry) -> None:
        output = copy(merged)
        path = output / "recipe.yaml"
        path.write_text(path.read_text() + "parameters: {density: 0.7}\n")
        found = verified(output, registry)
        assert kinds(found) == {"output", "recomputation"}
        assert "compare the versions in manifest.json" in fault(found, "recomputation").message

    def test_a_recipe_that_cannot_be_merged_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        path = output / "recipe.yaml"
        path.write_text(path.read_text().replace("merge_method: ties", "merge_method: tise"))
        found = verified(output, registry)
        assert kinds(found) == {"output", "recipe"}
        assert "cannot be merged again: " in fault(found, "recipe").message

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("sweep: {seed: [1, 2]}\n", "makes 2 outputs, and this is one"),
            ("base_model: ../base\noutput: {kind: model}\n", "makes a model, and the output is an adapter"),
        ],
    )
    def test_a_recipe_of_something_else_is_named(self, change, said, copy, merged, folded, registry) -> None:
        output = copy(merged)
        shutil.copytree(folded / "base", output.parent / "base")
        path = output / "recipe.yaml"
        lines = [line for line in path.read_text().splitlines() if not line.startswith("output:")]
        path.write_text("\n".join(lines) + "\n" + change)
        assert said in fault(verified(output, registry), "recipe").message

    def test_a_recipe_that_merges_fewer_modules_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        for name in ("in1", "in2", "in3"):
            weights = output.parent / name / WEIGHTS
            change_tensors(weights, lambda own: {key: own[key] for key in own if FIRST not in key})
        found = verified(output, registry)
        assert kinds(found) == {"source", "recipe"}
        assert str(fault(found, "recipe")).startswith(f"{FIRST}: is in the report, and the recipe does not merge it")

    def test_too_little_memory_is_no_fault_of_the_output(self, merged, registry) -> None:
        with pytest.raises(MemoryBudgetError):
            verified(merged / "out", registry, memory_bytes=1000)

    def test_a_recipe_of_fewer_models_or_none_is_named(self, copy, merged, registry) -> None:
        output = copy(merged)
        path = output / "recipe.yaml"
        path.write_text(path.read_text().replace("- {model: ../in3}\n", ""))
        assert fault(verified(output, registry), "recipe").message.startswith("has 2 models; the manifest has 3")
        path.write_text("]")
        assert fault(verified(output, registry), "recipe").message.startswith("cannot be read: ")

    def test_what_no_merge_made_is_an_error(self, tmp_path, merged, copy, registry) -> None:
        with pytest.raises(CheckpointError, match="there is no such directory; expected what a merge has made"):
            verified(tmp_path / "nothing", registry)
        with pytest.raises(CheckpointError, match=r"in1: has no manifest\.json; expected what a merge has made"):
            verified(merged / "in1", registry)
        manifest = copy(merged) / "manifest.json"
        for text, said in (
            ("{", "cannot be read as JSON"),
            ("[]", "is not the manifest of a merge: all of it"),
            ("{}", "is not the manifest of a merge: schema_version"),
            ('{"schema_version": 9}', "has schema version 9, and this version of mergekit-lowrank reads up to 1"),
            ('{"conversion": {}}', "was made by convert; expected what merge, resize or extract has made"),
        ):
            manifest.write_text(text)
            with pytest.raises(CheckpointError, match=said):
                verified(manifest.parent, registry)

    def test_other_versions_are_information(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_json(output / "manifest.json", mergekit_lowrank="0.0.1", machine="vax")
        found = verified(output, registry)
        assert found.is_ok
        assert found.information[0].startswith("it was merged with mergekit-lowrank 0.0.1 (here ")
        assert "vax (here " in found.information[0]

    def test_an_input_under_another_name_is_information(self, copy, merged, registry) -> None:
        output = copy(merged)
        sources = json.loads((output / "manifest.json").read_text())["sources"]
        change_json(output / "manifest.json", sources=[{**sources[0], "label": "math"}, *sources[1:]])
        found = verified(output, registry)
        assert found.is_ok
        assert "input 'math' is called 'in1' here, and methods key random numbers by these names" in (
            " ".join(found.information)
        )


class TestModel:
    def test_a_tensor_that_changed_is_found_by_its_hash_and_by_recomputation(self, copy, folded, registry) -> None:
        output = copy(folded)
        key = f"{FIRST}.weight"
        change_tensors(output / "model.safetensors", changed(**{key: lambda weight: weight * 2}))
        found = verified(output, registry)
        assert kinds(found) == {"output", "recomputation"}
        assert f"tensor '{key}' has other bytes than the manifest tells of" in fault(found, "output").message
        assert fault(found, "recomputation").where == FIRST

    def test_an_update_that_was_not_added_is_found_though_it_is_below_the_rounding(
        self, copy, folded, registry
    ) -> None:
        output = copy(folded)
        key = f"{FIRST}.weight"
        before = load_file(folded / "base" / "model.safetensors")[key]
        change_tensors(output / "model.safetensors", lambda own: own | {key: before})
        found = verified(output, registry)
        assert fault(found, "recomputation").where == FIRST

    def test_a_copied_tensor_that_differs_from_the_base_is_found(self, copy, folded, registry) -> None:
        output = copy(folded)
        change_tensors(output / "model.safetensors", changed(**{"model.norm.weight": lambda weight: weight + 1}))
        found = verified(output, registry)
        assert kinds(found) == {"output", "recomputation"}
        assert "is not as in the base, and no input changes it" in fault(found, "recomputation").message

    def test_a_tensor_of_another_type_or_that_is_not_finite_is_named(self, copy, folded, registry) -> None:
        output = copy(folded)
        own = {"model.norm.weight": torch.Tensor.float, f"{FIRST}.weight": lambda weight: weight * math.inf}
        change_tensors(output / "model.safetensors", changed(**own))
        found = verified(output, registry)
        assert {"output", "values", "structure", "recomputation"} == kinds(found)
        assert fault(found, "values").where == FIRST
        assert fault(found, "structure").where == "model.norm.weight"
        assert found.largest_error is None

    def test_tensors_that_come_or_go_are_named(self, copy, folded, registry) -> None:
        output = copy(folded)

        def change(own):
            return {key: tensor for key, tensor in own.items() if "norm" not in key} | {"more": torch.ones(1)}

        change_tensors(output / "model.safetensors", change)
        message = fault(verified(output, registry), "output").message
        assert message == "lacks 'model.norm.weight'; adds 'more'; expected the tensors of the manifest. Merge again."

    def test_a_base_that_changed_is_found_by_recomputation(self, copy, folded, registry) -> None:
        output = copy(folded)
        weights = output.parent / "base" / "model.safetensors"
        change_tensors(weights, changed(**{"model.norm.weight": lambda weight: weight + 1}))
        assert kinds(verified(output, registry)) == {"recomputation"}
        assert verified(output, registry, recompute=False).is_ok


def test_a_fault_in_a_sweep_is_named_with_its_variant(tmp_path, registry) -> None:
    paths = adapters(tmp_path, 2)
    merge(recipe_of(paths, sweep={"parameters.density": [0.4, 0.8]}), tmp_path / "out", registry=registry)
    output = tmp_path / "out"
    found = verified(output, registry)
    assert (found.is_ok, found.variants, found.modules) == (True, ("density=0.4", "density=0.8"), 2 * len(MODULES))
    change_tensors(output / "density=0.8" / WEIGHTS, changed(**{KEY_B: lambda b: b.flip(0)}))
    found = verified(output, registry)
    assert [own.where for own in found.faults] == [f"density=0.8/{WEIGHTS}", f"density=0.8/{FIRST}"]
    (output / "sweep.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not list variants"):
        verified(output, registry)
