"""Where sparse attention pays on a model: candidates, measurement, step weights, allocation, recipe, proof."""

from glocal.advise.advice import Advice
from glocal.advise.apply import RecipeMethod, attach
from glocal.advise.effort import EFFORTS, AdviseOptions, Effort, Target
from glocal.advise.forecast import StageForecast, forecast_advice, forecast_stages
from glocal.advise.identity import Mismatch
from glocal.advise.methods import MethodSpec, candidates
from glocal.advise.objective import Frames, Latents, Objective, Operator, Output
from glocal.advise.preflight import AdviceError, Preflight, preflight
from glocal.advise.recipe import Phase, Recipe, RecipeError, Rule
from glocal.advise.reprove import validate
from glocal.advise.run import advise
from glocal.advise.validation import Validation, validate_pairs
from glocal.advise.workload import Sample, Workload, demo_workload

__all__ = [
    "EFFORTS",
    "Advice",
    "AdviceError",
    "AdviseOptions",
    "Effort",
    "Frames",
    "Latents",
    "MethodSpec",
    "Mismatch",
    "Objective",
    "Operator",
    "Output",
    "Phase",
    "Preflight",
    "Recipe",
    "RecipeError",
    "RecipeMethod",
    "Rule",
    "Sample",
    "StageForecast",
    "Target",
    "Validation",
    "Workload",
    "advise",
    "attach",
    "candidates",
    "demo_workload",
    "forecast_advice",
    "forecast_stages",
    "preflight",
    "validate",
    "validate_pairs",
]
