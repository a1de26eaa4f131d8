"""The recipe: strict models of the YAML, loading with positions, values per module, and references to models."""

from mergekit_lowrank.recipe.document import write_yaml
from mergekit_lowrank.recipe.execution import Execution
from mergekit_lowrank.recipe.hub import HubId
from mergekit_lowrank.recipe.models import (
    From,
    InMemoryAdapter,
    ModelEntry,
    Recipe,
    Retention,
    Rule,
    Scale,
    recipe_schema,
)
from mergekit_lowrank.recipe.origin import Loc
from mergekit_lowrank.recipe.outlines import Outlines
from mergekit_lowrank.recipe.output import Budget, Energy, ErrorBound, Output, Rank, RuleRank
from mergekit_lowrank.recipe.references import resolve_directory, resolve_model
from mergekit_lowrank.recipe.sizes import bytes_of, parse_bytes
from mergekit_lowrank.recipe.source import load_recipe, parse_recipe
from mergekit_lowrank.recipe.values import Depths, Filtered, Scalar, Value, leaves, matches, resolve, unused_filters

__all__ = [
    "Budget",
    "Depths",
    "Energy",
    "ErrorBound",
    "Execution",
    "Filtered",
    "From",
    "HubId",
    "InMemoryAdapter",
    "Loc",
    "ModelEntry",
    "Outlines",
    "Output",
    "Rank",
    "Recipe",
    "Retention",
    "Rule",
    "RuleRank",
    "Scalar",
    "Scale",
    "Value",
    "bytes_of",
    "leaves",
    "load_recipe",
    "matches",
    "parse_bytes",
    "parse_recipe",
    "recipe_schema",
    "resolve",
    "resolve_directory",
    "resolve_model",
    "unused_filters",
    "write_yaml",
]
