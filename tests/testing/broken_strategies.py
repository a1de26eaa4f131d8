"""Strategies that each break one promise, under the contract; ``test_contracts`` runs this file and looks for failures.

Pytest does not collect it by itself.
"""

from __future__ import annotations

import time

import torch
from pydantic import Field

from mergekit_lowrank import ElementwiseStrategy, MergeContext, Params, Strategy, StrategyError, Survey, per_input
from mergekit_lowrank.lowrank import DenseUpdate, LowRankUpdate, concatenate, densify
from mergekit_lowrank.testing import StrategyContract


class Sound(ElementwiseStrategy):
    """The weighted sum."""

    name = "sound"
    summary = "the weighted sum"
    spaces = ("core",)  # its blocks are views of stored coordinates

    @classmethod
    def supports(cls, space):
        return space in cls.spaces

    def merge_block(self, block, weights, context):
        return (block * weights).sum(dim=0)

    def returns_single_input(self):
        return True


class TestSound(StrategyContract):
    strategy = Sound
    caught_by = None


def broken(check: str, *, base: type[Strategy] = Sound):
    """Of a class: the contract of a strategy made of it, and the check that must fail."""

    def decorate(cls):
        own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__", "__doc__")}
        strategy = type(cls.__name__, (base,), {"name": "broken", "__doc__": "Broken.", **own})
        return type(
            cls.__name__, (StrategyContract,), {"strategy": strategy, "caught_by": check, "__module__": __name__}
        )

    return decorate


@broken("test_inputs_and_coordinates_are_not_modified")
class TestModifiesABlock:
    def merge_block(self, block, weights, context):
        return block.mul_(weights * 3).sum(dim=0)


@broken("test_inputs_and_coordinates_are_not_modified")
class TestModifiesAFactor:
    def merge(self, coordinates, context):
        coordinates.updates[0].b.mul_(2)
        return concatenate(coordinates.updates, context.weights)


@broken("test_the_result_is_finite_and_has_the_shape_type_and_device_of_the_inputs")
class TestReturnsAnotherShape:
    def merge(self, coordinates, context):
        return concatenate(coordinates.updates, context.weights).transposed()


@broken("test_the_result_is_finite_and_has_the_shape_type_and_device_of_the_inputs")
class TestReturnsAnotherType:
    def merge(self, coordinates, context):
        return concatenate(coordinates.updates, context.weights).to("cpu", torch.float64)


@broken("test_the_result_is_finite_and_has_the_shape_type_and_device_of_the_inputs")
class TestReturnsATensor:
    def merge(self, coordinates, context):
        return densify(concatenate(coordinates.updates, context.weights))


@broken("test_the_rank_of_the_result_stays_below_the_bound_of_the_space", base=Strategy)
class TestExceedsTheRankOfItsSpace:
    summary = "returns a sum where the space promises the largest input rank"
    spaces = ("factors",)

    def merge(self, coordinates, context):
        return concatenate(coordinates.updates, context.weights)


@broken("test_inputs_need_not_be_contiguous")
class TestNeedsContiguousFactors:
    def merge(self, coordinates, context):
        assert all(len(u.b.view(-1)) for u in coordinates.updates)
        return concatenate(coordinates.updates, context.weights)


@broken("test_one_input_comes_back_where_that_is_promised")
class TestHalvesOneInput:
    def merge_block(self, block, weights, context):
        return (block * weights).sum(dim=0) / 2


class SwitchParams(Params):
    keep: bool = Field(False, description="whether one input comes back")


@broken("test_one_input_comes_back_where_that_is_promised")
class TestPromisesOneInputUnderAParameter:
    Params = SwitchParams

    def returns_single_input(self):
        return self.params.keep

    def merge_block(self, block, weights, context):
        return (block * weights).sum(dim=0) / 2


@broken("test_permuted_inputs_give_the_same_where_that_is_promised")
class TestDependsOnTheOrder:
    def merge_block(self, block, weights, context):
        return block[0] + block[1:].sum(dim=0) / 2


@broken("test_the_same_inputs_give_the_same_bits_whatever_else_is_merged")
class TestRemembersTheModuleBefore:
    def merge_block(self, block, weights, context):
        self.calls = getattr(self, "calls", 0) + 1
        return (block * weights).sum(dim=0) * self.calls


class FirstSurvey(Survey):
    """Keeps what it sees first."""

    def measure(self, coordinates, context: MergeContext):
        return [float(coordinates.updates[0].b[0, 0])]

    def conclude(self, total):
        self.first = total[0]
        return False


@broken("test_the_same_inputs_give_the_same_bits_whatever_else_is_merged")
class TestSurveysInOrder:
    def survey(self):
        return FirstSurvey()

    def merge_block(self, block, weights, context):
        return (block * weights).sum(dim=0) * context.survey.first


@broken("test_several_threads_give_the_same_bits")
class TestKeepsTheModuleInTheInstance:
    def merge(self, coordinates, context):
        self.coordinates = coordinates
        time.sleep(0.002)
        return concatenate(self.coordinates.updates, context.weights)


@broken("test_random_numbers_depend_on_the_seed_and_the_module_and_nothing_else")
class TestDoesNotDeclareItsRandomness:
    def merge_block(self, block, weights, context):
        mask = torch.rand(block.shape[1:], generator=context.generator(0)) < 0.5
        return (block * weights).sum(dim=0) * mask


@broken("test_random_numbers_depend_on_the_seed_and_the_module_and_nothing_else")
class TestDrawsTheSameForEveryModule:
    is_random = True

    def merge_block(self, block, weights, context):
        mask = torch.rand(block.shape[1:], generator=torch.Generator().manual_seed(context.seed)) < 0.5
        return (block * weights).sum(dim=0) * mask


@broken("test_global_random_numbers_are_neither_used_nor_drawn")
class TestDrawsFromTheGlobalGenerator:
    is_random = True

    def merge_block(self, block, weights, context):
        return (block * weights).sum(dim=0) * (torch.rand(block.shape[1:]) < 0.5)


@broken("test_zero_inputs_merge_to_zero")
class TestDividesByTheNorm:
    spaces = ("delta",)

    def merge_block(self, block, weights, context):
        total = (block * weights).sum(dim=0)
        return total / total.norm()


@broken("test_a_zero_input_among_others_gives_finite_values")
class TestDividesByEachNorm:
    def merge_block(self, block, weights, context):
        norms = block.flatten(1).norm(dim=1).view(-1, 1, 1)
        return (block * weights / norms).sum(dim=0) * norms.mean()


@broken("test_an_adapter_given_twice_gives_finite_values")
class TestInvertsTheGramMatrix:
    def merge_block(self, block, weights, context):
        flat = block.flatten(1)
        inverse = torch.linalg.inv_ex(flat @ flat.T).inverse
        return (inverse.sum(dim=0).view(-1, 1, 1) * block).sum(dim=0)


@broken("test_dense_inputs_give_what_their_factors_give")
class TestMergesLowRankInputsOnly:
    spaces = ("delta",)

    def merge(self, coordinates, context):
        low = [u for u in coordinates.updates if isinstance(u, LowRankUpdate)]
        if len(low) == len(coordinates.updates):
            return concatenate(low, context.weights)
        return DenseUpdate(sum((densify(u) for u in low), torch.zeros(low[0].shape if low else (7, 9))))


@broken("test_dense_inputs_are_not_merged_where_the_method_says_that_it_takes_none")
class TestTakesDenseInputsThatItRefuses:
    spaces = ("delta",)
    takes_dense = False


@broken("test_weights_are_refused_or_give_finite_values")
class TestDividesByTheSumOfWeights:
    def merge_block(self, block, weights, context):
        return (block * weights).sum(dim=0) / weights.sum()


@broken("test_tiny_and_huge_inputs_give_finite_values")
class TestOverflows:
    def merge_block(self, block, weights, context):
        power = block**4
        return (block * weights * power).sum(dim=0) / power.sum(dim=0).clamp(min=1e-30)


@broken("test_a_module_that_some_inputs_lack_gives_finite_values")
class TestTakesEveryInputForAParticipant:
    def merge_block(self, block, weights, context):
        return sum(weights[t] * block[t] for t in context.participants)


@broken("test_float32_agrees_with_float64")
class TestLosesDigits:
    def merge_block(self, block, weights, context):
        total = (block * weights).sum(dim=0)
        return (total + 1e7) - 1e7


class LogParams(Params):
    strength: float = Field(1.0, ge=0, description="of the logarithm")


@broken("test_every_choice_and_bound_of_a_parameter_gives_finite_values")
class TestTakesTheLogarithmOfAParameter:
    Params = LogParams

    def merge_block(self, block, weights, context):
        return (block * weights).sum(dim=0) * torch.log(torch.tensor(self.params.strength) * 2)


class OwnParams(Params):
    factor: float = per_input(1.0, ge=0, le=2, description="multiplies an input")


@broken("test_a_parameter_given_for_every_model_is_one_given_for_the_merge")
class TestIgnoresParametersOfAModel:
    Params = OwnParams

    def merge_block(self, block, weights, context):
        return (block * weights).sum(dim=0) * self.params.factor


@broken("test_memory_estimates_grow_with_the_module")
class TestEstimatesLessForMore:
    def working_entries(self, shape, space):
        return 10**9 - shape.d_out


@broken("test_memory_stays_below_the_estimate", base=Strategy)
class TestHoldsEveryDelta:
    summary = "densifies all inputs and says that it holds one"
    spaces = ("delta",)

    def working_entries(self, shape, space):
        return shape.d_out * shape.d_in

    def merge(self, coordinates, context):
        return DenseUpdate(torch.stack([densify(u) for u in coordinates.updates]).sum(dim=0))


@broken("test_memory_stays_below_the_estimate", base=Strategy)
class TestHoldsEveryDeltaForAMoment:
    summary = "densifies in temporaries that no variable holds"
    spaces = ("factors",)

    def working_entries(self, shape, space):
        return 2 * shape.factor_entries

    def merge(self, coordinates, context):
        first = coordinates.updates[0]
        return LowRankUpdate(first.b / densify(first).norm(), first.a)


@broken("test_memory_stays_below_the_estimate")
class TestHoldsInMemoryWhatItSaysIsInScratch:
    spaces = ("delta",)

    def merge(self, coordinates, context):
        merged = Sound.merge(self, coordinates, context)
        return DenseUpdate(torch.stack([merged.delta] * 2).mean(dim=0))


@broken("test_the_stand_in_is_a_method_that_takes_dense_inputs_in_delta")
class TestNamesAStandInThatWorksOnFactors:
    stand_in = ("robustmerge", {})


class SilentParams(Params):
    strength: float = 1.0


@broken("test_parameters_are_described_and_strict")
class TestDoesNotDescribeAParameter:
    Params = SilentParams


class LenientParams(Params):
    model_config = {"extra": "allow"}  # noqa: RUF012


@broken("test_parameters_are_described_and_strict")
class TestTakesAnyParameter:
    Params = LenientParams


class RequiredParams(Params):
    strength: float = Field(description="has no default")


@broken("test_adapters_merge_with_nothing_but_defaults")
class TestNeedsAParameter:
    Params = RequiredParams


@broken("test_adapters_merge_with_nothing_but_defaults")
class TestRefusesItsOwnDefaults:
    def check_weights(self, weights, total_weight):
        raise StrategyError("weights other than 2 are not handled")


@broken("test_the_method_is_documented")
class TestSummarisesInTwoLines:
    summary = "first\nsecond"


@broken("test_the_method_is_documented")
class TestHasANameThatNoRecipeCanUse:
    name = "Broken Method"


@broken("test_artefacts_are_finite_and_the_same_each_time")
class TestCountsItsArtefacts:
    def artefacts(self, coordinates, written, context):
        return {"mask": torch.rand(3, generator=torch.Generator().manual_seed(time.perf_counter_ns()))}
