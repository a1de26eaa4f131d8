"""How updates lie in PEFT's tensors: small ones by hand, and each way there and back."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from mergekit_lowrank.formats import LINEAR, Convolution, Embedding, Expert, Member, TokenRow, Whole, slots_of
from mergekit_lowrank.lowrank import LowRankUpdate

B = torch.arange(12.0).reshape(6, 2)
A = torch.arange(24.0).reshape(2, 12)


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@pytest.mark.parametrize(
    ("layout", "names", "shapes"),
    [
        (LINEAR, ("lora_A.weight", "lora_B.weight"), ((2, 12), (6, 2))),
        (Embedding(), ("lora_embedding_A", "lora_embedding_B"), ((2, 6), (12, 2))),
        (Convolution(4, (3,)), ("lora_A.weight", "lora_B.weight"), ((2, 4, 3), (6, 2, 1))),
        (Convolution(2, (2, 3)), ("lora_A.weight", "lora_B.weight"), ((2, 2, 2, 3), (6, 2, 1, 1))),
        (Convolution(1, (2, 2, 3)), ("lora_A.weight", "lora_B.weight"), ((2, 1, 2, 2, 3), (6, 2, 1, 1, 1))),
    ],
)
def test_an_update_goes_there_and_back_bit_for_bit(layout, names, shapes) -> None:
    assert layout.names("x.m") == tuple(f"base_model.model.x.m.{name}" for name in names)
    assert layout.shapes(6, 12, 2) == shapes
    stored = layout.stored(LowRankUpdate(B, A, 3.0))
    assert tuple(tuple(tensor.shape) for tensor in stored) == shapes
    back = layout.update(*stored, 3.0)
    assert torch.equal(back.a, A)
    assert torch.equal(back.b, B)
    assert back.scaling == 3.0
    member = Member("x.m", layout, 6, 12, 2)
    assert layout.announced([member]) == dict(zip(layout.names("x.m"), shapes, strict=True))
    packed = layout.packed([member], [LowRankUpdate(B, A, 3.0)])
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == layout.announced([member])
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_the_update_of_an_embedding_is_the_transposed_product() -> None:
    stored_a, stored_b = numbers(2, 5), numbers(3, 2)
    found = Embedding().update(stored_a, stored_b, 0.5)
    assert torch.equal(found.rows(slice(None)), 0.5 * (stored_b @ stored_a).T)


def test_the_update_of_a_convolution_is_that_of_peft() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(3, 4, (2, 3))), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    layer = model.base_model.model[0]
    stored = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    found = Convolution(3, (2, 3)).update(*stored, layer.scaling["default"]).rows(slice(None))
    expected = layer.get_delta_weight("default").flatten(1)
    assert torch.allclose(found, expected, atol=1e-6)


def expert(index: int, count: int = 3) -> Expert:
    return Expert("mlp.experts", index, count, ("experts.down_proj",))


def test_experts_are_the_innermost_dimension_of_b() -> None:
    stored_a, stored_b = numbers(6, 2), numbers(2, 6)  # three experts of rank 2, which lie as (out, r, E)
    found = expert(1).update(stored_a[2:4], stored_b, 1.0)
    assert torch.equal(found.b, torch.tensor([[1.0, 4.0], [7.0, 10.0]]))
    assert torch.equal(found.a, torch.tensor([[4.0, 5.0], [6.0, 7.0]]))


class Experts(nn.Module):
    """Three of them in one parameter (E, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->beo", self.weights, x)


def test_the_updates_of_experts_are_those_of_peft() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_parameters=["experts.weights"], target_modules=[], init_lora_weights=False)
    model = get_peft_model(nn.ModuleDict({"experts": Experts()}), config)
    wrapper = next(own for own in model.modules() if isinstance(own, ParamWrapper))
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    expected = wrapper.get_delta_weight("default")
    for index in range(3):
        update = expert(index).update(a[2 * index : 2 * index + 2], b, wrapper.scaling["default"])
        assert torch.allclose(update.rows(slice(None)), expected[index], atol=1e-6)


def test_experts_of_unlike_ranks_are_packed_at_the_largest() -> None:
    torch.manual_seed(0)
    updates = [LowRankUpdate(torch.randn(5, rank), torch.randn(rank, 4)) for rank in (1, 3, 2)]
    order = (2, 0, 1)
    members = [Member(f"mlp.experts[{e}]", expert(e), 5, 4, updates[e].rank) for e in order]
    packed = expert(0).packed(members, [updates[e] for e in order])
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == {
        "base_model.model.mlp.experts.lora_A.weight": (9, 4),
        "base_model.model.mlp.experts.lora_B.weight": (5, 9),
    }
    assert expert(0).announced(members) == {name: tuple(tensor.shape) for name, tensor in packed.items()}
    stored_a, stored_b = packed.values()
    for e, update in enumerate(updates):
        back = expert(e).update(stored_a[3 * e : 3 * e + 3], stored_b, 1.0)
        assert torch.equal(back.b[:, : update.rank], update.b)
        assert torch.equal(back.a[: update.rank], update.a)
        assert not back.b[:, update.rank :].any()
        assert not back.a[update.rank :].any()


@pytest.mark.parametrize(
    ("shape", "matrix"), [((4,), (1, 4)), ((2, 3), (2, 3)), ((2, 3, 5), (2, 15)), ((1,), (1, 1))], ids=str
)
def test_a_whole_tensor_is_merged_as_a_matrix(shape, matrix) -> None:
    layout = Whole("k", shape)
    assert layout.matrix_shape == matrix
    member = Member("m", layout, *matrix, 0)
    assert layout.announced([member]) == {"k": shape}
    tensor = numbers(*shape)
    packed = layout.packed([member], [tensor.reshape(matrix)])
    assert torch.equal(packed["k"], tensor)


def test_token_rows_are_packed_in_the_order_of_their_numbers() -> None:
    members = [Member(f"e[{token}]", TokenRow("k", "e", token), 1, 3, 0) for token in (9, 2, 5)]
    rows = [torch.full((1, 3), float(token)) for token in (9, 2, 5)]
    assert members[0].layout.announced(members) == {"k": (3, 3)}
    assert members[0].layout.packed(members, rows)["k"][:, 0].tolist() == [2.0, 5.0, 9.0]


def test_modules_that_share_tensors_make_one_slot() -> None:
    members = [Member("q", LINEAR, 2, 2, 1), *(Member(f"m[{e}]", expert(e), 2, 2, 1) for e in range(3))]
    members += [Member(f"e[{token}]", TokenRow("k", "e", token), 1, 3, 0) for token in (1, 2)]
    slots = slots_of(members)
    assert {slot: len(own) for slot, own in slots.items()} == {"q": 1, "mlp.experts": 3, "k": 2}
