"""Make a pretrained transformer language model smaller and faster with Kronecker products and kindred structures.

Importing this package registers its checkpoint format with transformers.
"""

from kronpress import matrices
from kronpress.calibration import Moments, calibrate
from kronpress.checkpoint import attached_plan, load_model, save_checkpoint, to_dense
from kronpress.compression import LayerReport, compress_
from kronpress.errors import RequestError, WorkError
from kronpress.evaluation import EvaluationResult, evaluate
from kronpress.healing import HealingLog, heal_
from kronpress.layers import StructuredEmbedding, StructuredLinear
from kronpress.plan import LayerPlan, Plan
from kronpress.planning import make_plan
from kronpress.recipe import Recipe, load_recipe
from kronpress.tokens import load_running_text, load_train_tokens
from kronpress.version import __version__

__all__ = [
    "EvaluationResult",
    "HealingLog",
    "LayerPlan",
    "LayerReport",
    "Moments",
    "Plan",
    "Recipe",
    "RequestError",
    "StructuredEmbedding",
    "StructuredLinear",
    "WorkError",
    "__version__",
    "attached_plan",
    "calibrate",
    "compress_",
    "evaluate",
    "heal_",
    "load_model",
    "load_recipe",
    "load_running_text",
    "load_train_tokens",
    "make_plan",
    "matrices",
    "save_checkpoint",
    "to_dense",
]
