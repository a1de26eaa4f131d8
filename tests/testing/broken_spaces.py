"""Spaces that each break one promise, under the contract; see ``broken_strategies``."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from pydantic import Field

from mergekit_lowrank import Coordinates, DenseUpdate, LowRankUpdate, Part, Space, SpaceParams
from mergekit_lowrank.lowrank import densify
from mergekit_lowrank.testing import SpaceContract


class DenseCoordinates(Coordinates):
    def __init__(self, updates, weights):
        self.updates, self.weights = tuple(updates), tuple(weights)
        self.parts = (Part.stacked("dense", torch.stack([densify(u) for u in updates]), self.weights),)

    def decode(self, merged):
        return DenseUpdate(merged[0])


class Dense(Space):
    """Every delta, held in memory."""

    name = "dense"
    summary = "every delta, held in memory"
    takes_dense = True

    def encode(self, updates, weights):
        return DenseCoordinates(updates, weights)

    def merged_rank(self, shape):
        return min(shape.d_out, shape.d_in)

    def working_entries(self, shape):
        return (2 * shape.inputs + 3) * shape.d_out * shape.d_in

    def scratch_entries(self, shape):
        return 2 * shape.d_out * shape.d_in


class TestSound(SpaceContract):
    space = Dense
    caught_by = None


def broken(check: str):
    """Of a space: its contract, and the check that must fail."""

    def decorate(cls):
        return type(cls.__name__, (SpaceContract,), {"space": cls, "caught_by": check, "__module__": __name__})

    return decorate


def changed(coordinates, **changes):
    """The coordinates with their part changed."""
    coordinates.parts = tuple(replace(part, **changes) for part in coordinates.parts)
    return coordinates


@broken("test_one_update_comes_back_at_its_weight")
class TestLosesTheScaling(Dense):
    """Broken."""

    def encode(self, updates, weights):
        return super().encode([LowRankUpdate(u.b, u.a) for u in updates], weights)


class SquaredCoordinates(DenseCoordinates):
    def decode(self, merged):
        lost = merged[0].clone()
        if len(self.updates) > 1:
            lost[0] = 0
        return DenseUpdate(lost)


@broken("test_weighted_coordinates_are_those_of_the_weighted_sum_where_the_space_is_linear")
class TestLosesARowOfSeveralInputs(Dense):
    """Broken."""

    def encode(self, updates, weights):
        return SquaredCoordinates(updates, weights)


@broken("test_dense_updates_decode_to_their_weighted_sum")
class TestForgetsTheScalingOfDenseUpdates(Dense):
    """Broken."""

    def encode(self, updates, weights):
        return super().encode(
            [u if isinstance(u, LowRankUpdate) else replace(u, scaling=1.0) for u in updates], weights
        )


@broken("test_other_weights_give_the_coordinates_of_a_new_encoding")
class TestKeepsTheWeights(Dense):
    """Broken."""

    def reweighted(self, coordinates, weights):
        return coordinates


@broken("test_coordinates_and_results_are_finite_and_keep_type_and_device")
class TestComputesInDouble(Dense):
    """Broken."""

    def encode(self, updates, weights):
        return super().encode([u.to("cpu", torch.float64) for u in updates], weights)


@broken("test_parts_say_what_their_blocks_hold")
class TestForgetsTheWeights(Dense):
    """Broken."""

    def encode(self, updates, weights):
        return changed(super().encode(updates, weights), weights=(1.0,))


@broken("test_blocks_are_slices_of_one_matrix_however_often_and_in_whatever_order_they_are_read")
class TestReadsInOrderOnly(Dense):
    """Broken."""

    def encode(self, updates, weights):
        coordinates = super().encode(updates, weights)
        (part,) = coordinates.parts
        position = 0

        def read(rows):
            nonlocal position
            length = min(rows.stop - rows.start, part.shape[0])
            start, position = position % part.shape[0], position + length
            return part.read(slice(start, start + length))

        return changed(coordinates, read=read)


@broken("test_updates_are_not_modified")
class TestScalesTheFactors(Dense):
    """Broken."""

    def encode(self, updates, weights):
        for update in updates:
            update.b.mul_(update.scaling * 2).div_(update.scaling * 2).add_(1e-3)
        return super().encode(updates, weights)


@broken("test_updates_need_not_be_contiguous")
class TestNeedsContiguousFactors(Dense):
    """Broken."""

    def encode(self, updates, weights):
        assert all(len(u.b.view(-1)) for u in updates)
        return super().encode(updates, weights)


@broken("test_the_same_updates_give_the_same_bits_in_several_threads")
class TestKeepsTheModuleInTheInstance(Dense):
    """Broken."""

    def encode(self, updates, weights):
        self.updates = updates
        time.sleep(0.002)
        return super().encode(self.updates, weights)


@broken("test_one_module_may_be_read_from_several_threads")
class TestReadsIntoOneBuffer(Dense):
    """Broken."""

    def encode(self, updates, weights):
        coordinates = super().encode(updates, weights)
        (part,) = coordinates.parts
        buffer = part.read(slice(None)).clone()

        def read(rows):
            buffer.zero_()
            time.sleep(0.002)
            return buffer[:, rows].add_(part.read(rows))

        return changed(coordinates, read=read)


@broken("test_zero_updates_decode_to_zero")
class TestDividesByTheNorm(Dense):
    """Broken."""

    def encode(self, updates, weights):
        norms = [densify(u).norm() for u in updates]
        scaled = [LowRankUpdate(u.b / norm * norm, u.a, u.scaling) for u, norm in zip(updates, norms, strict=True)]
        return super().encode(scaled, weights)


@broken("test_an_update_without_full_rank_comes_back")
class TestInvertsTheGramMatrix(Dense):
    """Broken."""

    def encode(self, updates, weights):
        def solved(update):
            gram = update.a @ update.a.T
            return LowRankUpdate(update.b @ gram, torch.linalg.inv_ex(gram).inverse @ update.a, update.scaling)

        return super().encode([solved(u) for u in updates], weights)


@broken("test_an_update_given_twice_has_equal_coordinates")
class TestMarksThePosition(Dense):
    """Broken."""

    def encode(self, updates, weights):
        coordinates = super().encode(updates, weights)
        coordinates.parts[0].read(slice(None)).mul_(1 + torch.arange(len(updates)).view(-1, 1, 1))
        return coordinates


@broken("test_no_result_exceeds_the_rank_that_the_space_states")
class TestStatesTheJointRank(Dense):
    """Broken."""

    def merged_rank(self, shape):
        return shape.joint_rank


class RootParams(SpaceParams):
    root: float = Field(1.0, ge=0, description="of the coordinates")


@broken("test_every_choice_and_bound_of_a_parameter_gives_finite_values")
class TestDividesByAParameter(Dense):
    """Broken."""

    Params = RootParams

    def encode(self, updates, weights):
        return super().encode([LowRankUpdate(u.b / torch.tensor(self.params.root), u.a) for u in updates], weights)


class ClashingParams(SpaceParams):
    density: float = Field(1.0, description="which ties has as well")


@broken("test_element_wise_methods_merge_adapters_in_it")
class TestHasAParameterOfTies(Dense):
    """Broken."""

    Params = ClashingParams


@broken("test_memory_estimates_grow_with_the_module")
class TestEstimatesLessForMore(Dense):
    """Broken."""

    def working_entries(self, shape):
        return 10**9 - shape.d_in


@broken("test_memory_stays_below_the_estimate")
class TestForgetsTheStack(Dense):
    """Broken."""

    def working_entries(self, shape):
        return shape.d_out * shape.d_in


class SilentParams(SpaceParams):
    root: float = 1.0


@broken("test_parameters_are_described_and_strict")
class TestDoesNotDescribeAParameter(Dense):
    """Broken."""

    Params = SilentParams


@broken("test_the_space_is_documented")
class TestSaysNothing(Dense):
    pass
