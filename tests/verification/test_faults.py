from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lowrank import CheckpointError, MemoryBudgetError, merge
from mergekit_lowrank.engine.records import ARBITRARY_CUT
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
    hash_again,
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
            (
                '{"schema_version": 1, "mergekit_lowrank": "0.0.1"}',
                r"Field required \(schema version 1 of mergekit-lowrank '0\.0\.1'; this is .*, which reads 1\)",
            ),
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

    def test_a_file_of_the_manifest_without_a_hash_is_a_fault_and_is_not_counted(self, copy, merged, registry) -> None:
        output = copy(merged)
        outputs = json.loads((output / "manifest.json").read_text())["outputs"]
        change_json(output / "manifest.json", outputs=[{**own, "sha256": None} for own in outputs])
        found = verified(output, registry, recompute=False)
        assert (found.output_files, len(found.faults), kinds(found)) == (0, len(outputs), {"output"})
        assert "has no hash in manifest.json" in found.faults[0].message

    def test_weights_that_the_manifest_does_not_list_are_a_fault(self, copy, merged, registry) -> None:
        output = copy(merged)
        change_json(output / "manifest.json", outputs=[])
        found = verified(output, registry, recompute=False)
        assert (found.output_files, [own.where for own in found.faults]) == (0, [WEIGHTS])
        assert "holds weights, and is not in manifest.json" in found.faults[0].message

    def test_hashes_of_other_files_are_not_counted(self, copy, merged, registry) -> None:
        output = copy(merged)
        (output / "README.md").unlink()
        before = verified(merged / "out", registry, recompute=False)
        assert verified(output, registry, recompute=False).output_files == before.output_files - 1

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    @pytest.mark.parametrize("name", ["manifest.json", "report.json", "recipe.yaml", "adapter_config.json", WEIGHTS])
    def test_a_pipe_in_place_of_a_file_is_not_read(self, name, copy, merged, registry) -> None:
        output = copy(merged)
        (output / name).unlink()
        os.mkfifo(output / name)
        with pytest.raises(CheckpointError, match=f"{name}: is neither a file nor a directory, and is not read"):
            verified(output, registry)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_a_pipe_in_an_input_is_not_read(self, copy, merged, registry) -> None:
        output = copy(merged)
        (output.parent / "in1" / WEIGHTS).unlink()
        os.mkfifo(output.parent / "in1" / WEIGHTS)
        assert "is neither a file nor a directory" in fault(verified(output, registry), "source").message

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda own: own["modules"][0].update(merged_norm=math.nan), "the report says that nan was merged"),
            (lambda own: own["modules"].append(own["modules"][0]), f"'{FIRST}' is there 2 times"),
            (lambda own: own.update(schema_version=99), "has schema version 99"),
        ],
    )
    def test_a_report_that_contradicts_itself_is_found_though_its_hash_agrees(
        self, spoil, said, copy, merged, registry
    ) -> None:
        output = copy(merged)
        report = json.loads((output / "report.json").read_text())
        spoil(report)
        (output / "report.json").write_text(json.dumps(report))
        hash_again(output, "report.json")
        (found,) = verified(output, registry, recompute=False).faults
        assert said in found.message

    def test_a_missing_report_is_one_fault(self, copy, merged, registry) -> None:
        output = copy(merged)
        (output / "report.json").unlink()
        assert [str(own).split(" the manifest")[0] for own in verified(output, registry).faults] == [
            "report.json: is missing;"
        ]

    def test_advice_is_given_once(self, copy, merged, registry) -> None:
        output = copy(merged)
        (output / "report.json").write_text("{")
        change_tensors(output / WEIGHTS, changed(**{KEY_B: lambda b: b * math.nan}))
        for own in verified(output, registry).faults:
            assert "Download" not in own.message
            assert own.message.count("again.") == 1

    def test_a_file_is_no_output(self, merged, registry) -> None:
        with pytest.raises(CheckpointError, match=r"README\.md: is no directory; expected what a merge has made"):
            verified(merged / "out" / "README.md", registry)

    def test_an_output_that_was_moved_is_told_from_one_without_its_inputs(self, copy, merged, registry) -> None:
        output = copy(merged)
        moved = output.parent / "elsewhere" / "out"
        moved.parent.mkdir()
        output.rename(moved)
        message = fault(verified(moved, registry), "source").message
        assert f"there is no {moved.parent / 'in1'} ('../in1' in recipe.yaml)" in message
        assert "it or the inputs were moved" in message
        assert "Hugging Face" not in message


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

    def test_a_tensor_that_is_gone_is_missing(self, copy, folded, registry) -> None:
        output = copy(folded)
        change_tensors(output / "model.safetensors", lambda own: {key: own[key] for key in own if "norm" not in key})
        assert fault(verified(output, registry), "structure").message.startswith("is missing; the base has ")

    def test_a_base_that_was_moved_is_told(self, copy, folded, registry) -> None:
        output = copy(folded)
        (output.parent / "base").rename(output.parent / "moved")
        message = fault(verified(output, registry), "recipe").message
        assert f"there is no {output.parent / 'base'} ('../base' in recipe.yaml)" in message

    def test_a_base_that_changed_is_found_by_recomputation(self, copy, folded, registry) -> None:
        output = copy(folded)
        weights = output.parent / "base" / "model.safetensors"
        change_tensors(weights, changed(**{"model.norm.weight": lambda weight: weight + 1}))
        assert kinds(verified(output, registry)) == {"recomputation"}
        assert verified(output, registry, recompute=False).is_ok


@pytest.fixture
def swept(tmp_path, registry):
    """Two variants."""
    paths = adapters(tmp_path, 2)
    merge(recipe_of(paths, sweep={"parameters.density": [0.4, 0.8]}), tmp_path / "out", registry=registry)
    return tmp_path / "out"


class TestSweep:
    def test_a_fault_is_named_with_its_variant(self, swept, registry) -> None:
        found = verified(swept, registry)
        assert (found.is_ok, found.variants, found.modules) == (True, ("density=0.4", "density=0.8"), 2 * len(MODULES))
        change_tensors(swept / "density=0.8" / WEIGHTS, changed(**{KEY_B: lambda b: b.flip(0)}))
        found = verified(swept, registry)
        assert [own.where for own in found.faults] == [f"density=0.8/{WEIGHTS}", f"density=0.8/{FIRST}"]
        (swept / "density=0.8" / WEIGHTS).write_bytes(b"")
        assert {own.where for own in verified(swept, registry).faults} == {f"density=0.8/{WEIGHTS}", "density=0.8"}

    @pytest.mark.parametrize("index", [{}, {"variants": []}, {"variants": {}}, {"variants": 3}, {"variants": ["a"]}])
    def test_an_index_without_variants_is_an_error(self, index, swept, registry) -> None:
        (swept / "sweep.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"sweep\.json: does not list variants: variants.*Merge again"):
            verified(swept, registry)

    @pytest.mark.parametrize("name", ["", ".", "..", "../out", "/etc", "density=0.4/", "density=0.8"])
    def test_variants_are_directories_in_it_each_named_once(self, name, swept, registry) -> None:
        variants = json.loads((swept / "sweep.json").read_text())["variants"]
        change_json(swept / "sweep.json", variants=[{**variants[0], "name": name}, variants[1]])
        with pytest.raises(CheckpointError, match=r"is not the name of a directory in the output|is listed twice"):
            verified(swept, registry)

    def test_a_variant_that_is_gone_leaves_the_others_to_be_proven(self, swept, registry) -> None:
        (swept / "density=0.4").rename(swept / "other")
        found = verified(swept, registry)
        (own,) = found.faults
        assert (own.kind, own.where) == ("structure", "density=0.4")
        assert "there is no such directory" in own.message
        assert (found.is_recomputed, found.identical) == (True, len(MODULES))
        assert "beside the variants of sweep.json lies 'other'" in found.information

    def test_a_sweep_in_a_sweep_is_not_entered(self, swept, registry) -> None:
        (swept / "density=0.4" / "manifest.json").unlink()
        (swept / "density=0.4" / "sweep.json").write_bytes((swept / "sweep.json").read_bytes())
        (own,) = verified(swept, registry).faults
        assert "has no manifest.json" in own.message

    def test_variants_that_changed_places_are_found(self, swept, registry) -> None:
        (swept / "density=0.4").rename(swept / "between")
        (swept / "density=0.8").rename(swept / "density=0.4")
        (swept / "between").rename(swept / "density=0.8")
        found = verified(swept, registry)
        assert [(own.kind, own.where) for own in found.faults] == [
            ("structure", "density=0.4"),
            ("structure", "density=0.8"),
        ]
        assert "its report has merged_norm " in found.faults[0].message


class TestOpenDirections:
    """Modules whose warning says that they were cut between equal singular values."""

    @pytest.fixture(params=["adapter", "model"])
    def output(self, request, copy, merged, folded):
        """Rows of one module in another order, which is another update of the same norm; and the warning."""
        is_model = request.param == "model"
        output = copy(folded if is_model else merged)
        report = json.loads((output / "report.json").read_text())
        report["modules"][0]["warnings"] = [f"{ARBITRARY_CUT} at rank 3: which directions"]
        (output / "report.json").write_text(json.dumps(report))
        if is_model:
            key = f"{FIRST}.weight"
            base = load_file(output.parent / "base" / "model.safetensors")[key]
            change = lambda weight: (base.double() + (weight.double() - base.double()).flip(0)).to(weight.dtype)  # noqa: E731
            return output, output / "model.safetensors", key, change
        return output, output / WEIGHTS, KEY_B, lambda b: b.flip(0)

    def test_other_directions_of_the_same_norm_are_information(self, output, registry) -> None:
        directory, weights, key, change = output
        change_tensors(weights, changed(**{key: change}))
        found = verified(directory, registry)
        assert kinds(found) == {"output"}
        assert any(f"'{FIRST}': cut between equal singular values" in text for text in found.information)
        check = found.recomputed[0]
        assert (check.module, check.is_identical, check.is_ok, check.tolerance) == (FIRST, False, True, 2.0)

    def test_another_norm_is_a_fault(self, output, registry) -> None:
        directory, weights, key, change = output
        base = directory.parent / "base" / "model.safetensors"
        less = load_file(base)[key] if base.exists() else 0
        change_tensors(weights, changed(**{key: lambda own: less + (change(own) - less) * 2}))
        assert fault(verified(directory, registry), "recomputation").where == FIRST
