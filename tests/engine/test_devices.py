"""Devices are chosen before any work, and what is not there is said."""

import pytest
import torch

from mergekit_lowrank import RecipeError, merge
from mergekit_lowrank.engine import select_device
from tests.engine.makers import adapters, recipe_of


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown device 'gpu'; expected auto, cpu, cuda, cuda:N or mps"):
        select_device("gpu")


def test_a_device_that_is_not_supported_is_refused() -> None:
    with pytest.raises(RecipeError, match="device 'meta' is not supported"):
        select_device("meta")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'cuda:99' was asked for, but this machine has \d+ of its kind"):
        select_device("cuda:99")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["linear", "ties", "robustmerge", "drm", "knots", "core_ties"])
def test_a_gpu_gives_the_values_of_the_cpu(tmp_path, method) -> None:
    paths = adapters(tmp_path, 3)
    on_cpu = merge(recipe_of(paths, method, output={"rank": "sum"}), device="cpu").state_dict
    on_gpu = merge(recipe_of(paths, method, output={"rank": "sum"}), device="cuda").state_dict
    for name in on_cpu:
        if name.endswith("lora_B.weight"):
            a = name.replace("lora_B", "lora_A")
            torch.testing.assert_close(
                on_gpu[name] @ on_gpu[a],
                on_cpu[name] @ on_cpu[a],
                rtol=1e-3,
                atol=1e-4 * on_cpu[name].abs().max().item(),
            )
