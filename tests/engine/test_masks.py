"""Random masks belong to an input, wherever it stands in the recipe."""

from __future__ import annotations

import os

import pytest
import torch

from mergekit_lowrank import merge, plan
from mergekit_lowrank.testing import write_tiny_adapter
from tests.engine.makers import adapters, recipe_of


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_models_in_another_order_give_equal_values(tmp_path, method, executor) -> None:
    paths = adapters(tmp_path, 3)
    keys = {"output": {"rank": "sum"}, "space": "core"} if method == "dare_ties" else {"output": {"rank": "sum"}}
    first = merge(recipe_of(paths, method, **keys), executor="serial")
    second = merge(recipe_of(paths[::-1], method, **keys), executor=executor)
    for name, b in first.state_dict.items():
        if "lora_B" in name:
            a = name.replace("lora_B", "lora_A")
            torch.testing.assert_close(
                second.state_dict[name] @ second.state_dict[a], b @ first.state_dict[a], rtol=1e-4, atol=1e-4
            )


def test_adapters_in_directories_of_one_name_keep_their_masks_in_another_order(tmp_path) -> None:
    paths = [adapters(tmp_path / root, 1)[0] for root in ("x", "y")] + adapters(tmp_path / "z", 2)[1:]
    first, second = (merge(recipe_of(own, "dare_linear", output={"rank": "sum"})) for own in (paths, paths[::-1]))
    b, a = (next(name for name in first.state_dict if factor in name) for factor in ("lora_B", "lora_A"))
    deltas = [merged.state_dict[b.replace("lora_A", "lora_B")] @ merged.state_dict[a] for merged in (first, second)]
    assert a.replace("lora_A", "lora_B") == b
    torch.testing.assert_close(*deltas, rtol=1e-4, atol=1e-4)
    labels = plan(recipe_of(paths)).to_dict()["inputs"]
    assert [entry["label"] for entry in labels][2] == "adapter2"
    assert {"x/adapter1", "y/adapter1"} <= {entry["label"] for entry in labels}


def test_another_seed_gives_other_masks(tmp_path) -> None:
    paths = adapters(tmp_path)
    first, second = (merge(recipe_of(paths, "dare_linear", seed=seed)) for seed in (0, 1))
    assert any(not torch.equal(b, second.state_dict[name]) for name, b in first.state_dict.items())


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
@pytest.mark.parametrize("count", [1, 3])
def test_methods_for_two_models_say_how_many_were_given(tmp_path, method, count) -> None:
    with pytest.raises(Exception, match=f"'{method}' merges exactly 2 models, and the recipe gives {count}"):
        merge(recipe_of(adapters(tmp_path, count), method))


def test_labels_do_not_depend_on_where_paths_start_from(tmp_path, monkeypatch) -> None:
    """The recipe in the output names the inputs from there."""
    paths = [write_tiny_adapter(tmp_path / name, {"layers.0.q": (6, 5)}) for name in ("a0", "sub/a0")]
    (tmp_path / "elsewhere").mkdir()
    found = []
    for start in (tmp_path, tmp_path / "elsewhere", tmp_path / "sub"):
        monkeypatch.chdir(start)
        for names in ([os.path.relpath(path) for path in paths], [str(path) for path in paths]):
            found.append([entry["label"] for entry in plan(recipe_of(names)).to_dict()["inputs"]])
    assert found == [["a0", "sub/a0"]] * 6
