"""What every model of the recipe builds on: strict models, and errors in one sentence of our own."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from mergekit_lowrank.errors import nearest_name
from mergekit_lowrank.recipe.origin import Loc

__all__ = ["LIST_TO_TUPLE", "Strict", "expected", "refused", "told_as"]


class Strict(BaseModel):
    """A frozen model that takes no unknown key, converts nothing, and holds finite numbers only."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


def expected(what: str, *, at: Loc = (), **found: object) -> PydanticCustomError:
    """The error of a value that is not ``what``; ``at`` leads from the field to the value ``found`` inside it."""
    return PydanticCustomError("expected", "expected {what}", {"what": what, "at": at, **found})


def refused(why: str, *, at: Loc = ()) -> PydanticCustomError:
    """The error of a value that is well-formed and still cannot be used."""
    return PydanticCustomError("refused", "{why}", {"why": why, "at": at})


def told_as(what: str, *names: str) -> WrapValidator:
    """Replaces whatever pydantic says about a value by "expected ``what``", and the nearest of ``names``."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            nearest = nearest_name(value, names) if isinstance(value, str) else None
            raise expected(f"{what} (did you mean {nearest!r}?)" if nearest else what) from None

    return WrapValidator(validate)


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


LIST_TO_TUPLE = BeforeValidator(_list_to_tuple)
"""Lets a list stand for a tuple; strict validation takes tuples only, and frozen models hold no lists."""
