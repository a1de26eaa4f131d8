"""The products of tensors that files of diffusion LoRAs hold, each as one low-rank update: exact, no SVD.

Sources: kohya's sd-scripts ``networks/lora.py`` (2025); LyCORIS 4.1 ``modules/locon.py``, ``loha.py`` and ``lokr.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lowrank import LowRankUpdate
from mergekit_lowrank.formats import LINEAR, Convolution, Factored, TensorSpec
from mergekit_lowrank.lowrank import hadamard, kronecker, tucker

__all__ = ["FORMS", "Form", "form_of", "layout_of"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Form:
    """A set of tensors, and the update that they stand for.

    Attributes:
        name: what messages call it.
        tensors: the sets of names that make one up, the names as they end in a kohya file.
        update: of the tensors by name; its scaling is 1.
        rank_tensors: the names of which the first that is there has the rank that alpha is divided by, as its first
            size; where none is there, the update is not scaled.
        is_stored: whether the update's factors are the tensors themselves, not products that are computed.
    """

    name: str
    tensors: tuple[frozenset[str], ...]
    update: Callable[[Tensors], LowRankUpdate]
    rank_tensors: tuple[str, ...]
    is_stored: bool = False

    def headers(self, specs: Mapping[str, TensorSpec]) -> LowRankUpdate:
        """The update without its data, on the device ``meta``: its shape, rank and type.

        Raises:
            RuntimeError: the shapes do not fit together.
        """
        return self.computed({name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in specs.items()})

    def computed(self, tensors: Tensors) -> LowRankUpdate:
        """The update; products are computed in float32 at least, so that half precision does not round them."""
        if self.is_stored:
            return self.update(tensors)
        dtype = torch.float32
        for tensor in tensors.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        return self.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


def form_of(names: frozenset[str]) -> Form | None:
    """The form that tensors of these names make up; None where they make up none."""
    return next((form for form in FORMS if names in form.tensors), None)


def layout_of(specs: Mapping[str, TensorSpec], name: str, d_in: int) -> Factored:
    """How a module with these tensors is stored in PEFT: as a convolution where a kernel shows, or the name is one's.

    Args:
        specs: by the names as they end in a kohya file.
        name: of the module.
        d_in: columns of the update.
    """
    sizes = (specs[key].shape[2:] for key in _KERNELS if key in specs)
    named = next((kernel for leaf, kernel in _CONVOLUTIONS.items() if name.endswith(leaf)), ())
    is_flat = any(key in specs for key in _FLAT)
    kernel = next((size for size in sizes if size), named if is_flat else ())
    if not kernel or d_in % math.prod(kernel):
        return LINEAR
    return Convolution(d_in // math.prod(kernel), tuple(kernel))


_KERNELS = ("lora_mid.weight", "hada_t1", "lokr_t2", "lora_down.weight", "lokr_w2", "lokr_w2_b")
_FLAT = ("hada_w1_b", "lokr_w2_b")
"""Tensors in which LyCORIS stores a kernel as columns."""
_CONVOLUTIONS: Mapping[str, tuple[int, int]] = {
    ".conv_shortcut": (1, 1),
    **dict.fromkeys(
        (".conv1", ".conv2", ".conv_in", ".conv_out", ".downsamplers.0.conv", ".upsamplers.0.conv"), (3, 3)
    ),
}
"""Of diffusers' UNet2DConditionModel."""


def _lora(tensors: Tensors) -> LowRankUpdate:
    return LowRankUpdate(tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"].flatten(1))


def _locon(tensors: Tensors) -> LowRankUpdate:
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"].flatten(1)
    return tucker(tensors["lora_mid.weight"], up.T, down)


def _loha(tensors: Tensors) -> LowRankUpdate:
    return hadamard(_hada(tensors, 1), _hada(tensors, 2))


def _hada(tensors: Tensors, number: int) -> LowRankUpdate:
    a, b = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
    core = tensors.get(f"hada_t{number}")
    return LowRankUpdate(a, b.flatten(1)) if core is None else tucker(core, a, b)


def _lokr(tensors: Tensors) -> LowRankUpdate:
    return kronecker(_kron(tensors, 1), _kron(tensors, 2))


def _kron(tensors: Tensors, number: int) -> LowRankUpdate | Tensor:
    whole, core = tensors.get(f"lokr_w{number}"), tensors.get(f"lokr_t{number}")
    if whole is not None:
        return whole.flatten(1)
    a, b = tensors[f"lokr_w{number}_a"], tensors[f"lokr_w{number}_b"]
    return LowRankUpdate(a, b.flatten(1)) if core is None else tucker(core, a, b)


_PAIR = frozenset({"lora_down.weight", "lora_up.weight"})
_HADA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_FIRST = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_SECOND = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})

FORMS: tuple[Form, ...] = (
    Form("LoRA", (_PAIR,), _lora, ("lora_down.weight",), is_stored=True),
    Form("LoCon (Tucker)", (_PAIR | {"lora_mid.weight"},), _locon, ("lora_down.weight",)),
    Form("LoHa", (_HADA, _HADA | {"hada_t1", "hada_t2"}), _loha, ("hada_w1_b",)),
    Form(
        "LoKr",
        tuple(frozenset(one | other) for one in _FIRST for other in _SECOND),
        _lokr,
        ("lokr_w1_b", "lokr_w2_b"),
    ),
)
