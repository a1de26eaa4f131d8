"""What others do with the same adapters: the papers' loops in plain torch, peft's merges, dense decompositions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.benchmarks.measuring import Figures, measured
from tests.benchmarks.ours import DENSITY, size
from tests.benchmarks.shapes import Model, Shape, one_module, write_adapter

MASK_RATIO = ATT_RATIO = 0.2
"""Constants of RobustMerge's code; the first is the kept share."""


def robustmerge_loop(paths: Sequence[str], out: str) -> None:
    """RobustMerge as its authors write it: load all adapters, stack and merge tensor after tensor, save."""
    states = [load_file(f"{path}/adapter_model.safetensors") for path in paths]
    merged = {name: tensor.to(states[0][name].dtype) for name, tensor in robustmerge_tensors(states).items()}
    Path(out).mkdir()
    save_file(merged, f"{out}/adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(Path(paths[0], "adapter_config.json"), out)


def run_robustmerge_loop(paths: Sequence[str], out: str) -> Figures:
    """The figures of ``robustmerge_loop``."""
    return _with_bytes(measured(lambda: robustmerge_loop(paths, out)), paths, out)


def robustmerge_tensors(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The merged tensors, float32. A's scale is used for the B that follows it, as sorted names have it."""
    merged, scale = {}, torch.ones(())
    for name in sorted(states[0]):
        stacked = torch.stack([state[name].float() for state in states])
        pruned = _pruned(stacked)
        if "lora_A" in name:
            scale = _component_scales(stacked, pruned)
            merged[name] = (2.0 * pruned).sum(dim=0)
        else:
            merged[name] = (2.0 * scale[:, None, :] * pruned).sum(dim=0) / scale.sum(dim=0)
    return merged


def _pruned(stacked: Tensor) -> Tensor:
    """Each of the (T, …) tensors with its smallest entries zero."""
    magnitudes = stacked.abs().flatten(1)
    thresholds = torch.kthvalue(magnitudes, int(magnitudes.shape[1] * (1 - MASK_RATIO)), dim=1).values
    return stacked * (stacked.abs() >= thresholds[:, None, None])


def _component_scales(stacked: Tensor, pruned: Tensor) -> Tensor:
    """(T, r): the norm of each row over what pruning left of it, the smaller ones lifted."""
    scale = stacked.abs().sum(dim=2) / pruned.abs().sum(dim=2)
    ordered = scale.sort(dim=1).values
    rank = scale.shape[1]
    return scale.clamp(ordered[:, int(rank * (1 - ATT_RATIO)), None], ordered[:, rank - 1, None])


def skeleton(model: Model) -> nn.Module:
    """A model of linear layers whose weights take no memory."""
    root = nn.Module()
    for path, shape in model.modules.items():
        *parents, leaf = path.split(".")
        module = root
        for name in parents:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = getattr(module, name)
        module.add_module(leaf, _weightless(shape))
    root.config = {"model_type": "custom"}
    root.forward = lambda *_, **__: None
    return root


def _weightless(shape: Shape) -> nn.Linear:
    """A linear layer of half precision whose entries share one number."""
    linear = nn.Linear(1, 1, bias=False, dtype=torch.float16)
    linear.out_features, linear.in_features = shape
    linear.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float16).expand(shape), requires_grad=False)
    return linear


def peft_merge(base: nn.Module, kind: str, paths: Sequence[str], out: str, options: dict[str, Any]) -> None:
    """Load, ``add_weighted_adapter``, save: what a user of peft does, given the base model."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(base, paths[0], adapter_name="a0")
    for i, path in enumerate(paths[1:], 1):
        wrapped.load_adapter(path, f"a{i}")
    _add_weighted(wrapped, kind, len(paths), options)
    # Without this it looks for the base model on the network.
    wrapped.save_pretrained(out, selected_adapters=["merged"], save_embedding_layers=False)


def run_peft(model: Model, kind: str, paths: Sequence[str], out: str) -> Figures:
    """The figures of ``peft_merge``, peft and the base model loaded before."""
    import peft  # noqa: F401

    base = skeleton(model)
    return _with_bytes(measured(lambda: peft_merge(base, kind, paths, out, {})), paths, out)


def run_peft_module(
    kind: str, shape: Shape, inputs: int, rank: int, options: dict[str, Any], directory: str
) -> Figures:
    """The ``add_weighted_adapter`` of one module, its adapters in memory; loading and saving apart."""
    from peft import PeftModel

    model = one_module(shape)
    paths = [Path(directory, f"a{i}") for i in range(inputs)]
    for seed, path in enumerate(paths):
        write_adapter(path, model, rank=rank, seed=seed)
    wrapped = PeftModel.from_pretrained(skeleton(model), paths[0], adapter_name="a0")
    for i, path in enumerate(paths[1:], 1):
        wrapped.load_adapter(path, f"a{i}")
    shutil.rmtree(directory)
    warm_up()
    return measured(lambda: _add_weighted(wrapped, kind, inputs, {"svd_rank": rank, **options}))


def _add_weighted(wrapped: Any, kind: str, inputs: int, options: dict[str, Any]) -> None:
    density = {"density": DENSITY} if "ties" in kind else {}
    names = [f"a{i}" for i in range(inputs)]
    wrapped.add_weighted_adapter(names, [1.0] * inputs, "merged", combination_type=kind, **density, **options)


def _with_bytes(figures: Figures, paths: Sequence[str], out: str) -> Figures:
    """The figures with bytes in and out; what was written is deleted again."""
    figures["bytes_read"] = sum(size(Path(path)) for path in paths)
    figures["bytes_written"] = size(Path(out))
    shutil.rmtree(out)
    return figures


def warm_up() -> None:
    """Let the libraries start their threads before a clock starts."""
    torch.linalg.svd(torch.randn(256, 256))


def run_dense_svd(rows: int, columns: int) -> Figures:
    """The thin ``torch.linalg.svd`` of a dense matrix of that shape; making the matrix is not counted."""
    warm_up()
    matrix = torch.randn(rows, columns)
    return measured(lambda: torch.linalg.svd(matrix, full_matrices=False))


def dense_ties(deltas: Sequence[Tensor]) -> Tensor:
    """TIES of dense deltas, written out as peft has it: exactly density · n entries stay (magnitude ties apart)."""
    trimmed = []
    for delta in deltas:
        kept = max(1, int(delta.numel() * DENSITY))
        threshold = delta.abs().flatten().topk(kept, sorted=False).values.min()
        trimmed.append(torch.where(delta.abs() >= threshold, delta, 0))
    total = torch.stack(trimmed).sum(dim=0)
    sign = torch.where(total >= 0, 1, -1)
    agreeing = [torch.where(delta.sign() == sign, delta, 0) for delta in trimmed]
    count = torch.stack([(delta != 0).to(torch.int32) for delta in agreeing]).sum(dim=0)
    return torch.stack(agreeing).sum(dim=0) / count.clamp(min=1)


def deltas(paths: Sequence[str], module: str) -> list[Tensor]:
    """The scaled delta of a module in each adapter, float32."""
    found = []
    for path in paths:
        state = load_file(f"{path}/adapter_model.safetensors")
        config = json.loads(Path(path, "adapter_config.json").read_text())
        a, b = (state[f"base_model.model.{module}.lora_{side}.weight"].float() for side in "AB")
        found.append(b @ a * (config["lora_alpha"] / config["r"]))
    return found


def energies(recipe: dict[str, Any], out: str) -> Figures:
    """Energy of a one-module merge beside that of the exact truncation of dense TIES, as shares of the dense energy.

    ``captured_energy`` is 1 − ‖M − BA‖² / ‖M‖² of the written adapter, ``exact_energy`` the best that its rank allows.
    """
    from mergekit_lowrank import merge

    merge(recipe, out)
    module = next(iter(one_module((1, 1)).modules))
    dense = dense_ties(deltas([entry["model"] for entry in recipe["models"]], module))
    (written,) = deltas([out], module)
    shutil.rmtree(out)
    squares = torch.linalg.svdvals(dense if dense.shape[0] >= dense.shape[1] else dense.T).double().square()
    captured = 1 - float((dense - written).double().square().sum() / squares.sum())
    best = float(squares[: recipe["output"]["rank"]].sum() / squares.sum())
    return {"captured_energy": captured, "exact_energy": best, "shortfall": 1 - captured / best}
