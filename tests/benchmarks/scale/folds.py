"""Who else writes a model with an adapter in it, and what it takes to write the model at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.benchmarks.measuring import Figures, measured


def copied(base: str, out: str) -> Figures:
    """The files copied and flushed to the disk; then deleted."""

    def work() -> None:
        shutil.copytree(base, out, copy_function=_copy)
        os.sync()

    figures = measured(work)
    shutil.rmtree(out)
    return figures


def _copy(source: str, target: str) -> None:
    """As ``cp`` does, without reflinks."""
    with Path(source).open("rb") as read, Path(target).open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 20)


def merged_by_peft(base: str, adapter: str, out: str) -> Figures:
    """Model and adapter loaded, ``merge_and_unload``, ``save_pretrained``, flushed to the disk; then deleted."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
        os.sync()

    figures = measured(work)
    shutil.rmtree(out)
    return figures
