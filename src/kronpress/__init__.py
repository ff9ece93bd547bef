"""Make a pretrained transformer language model smaller and faster with Kronecker products and kindred structures.

Importing this package registers its checkpoint format with transformers.
"""

from kronpress import matrices
from kronpress.calibration import Moments, calibrate
from kronpress.checkpoint import attached_plan, load_model, save_checkpoint, to_dense
from kronpress.compiled import compile_, uncompile_
from kronpress.compression import LayerReport, compress_, initialise_
from kronpress.dispatch import Dispatch, drop_dense_caches, explain, set_dispatch
from kronpress.errors import RequestError, WorkError
from kronpress.evaluation import EvaluationResult, evaluate
from kronpress.healing import HealingLog, heal_
from kronpress.layers import StructuredEmbedding, StructuredLinear
from kronpress.layout import fold_layout_
from kronpress.plan import LayerPlan, Plan
from kronpress.planning import make_plan
from kronpress.recipe import Recipe, load_recipe
from kronpress.streaming import compress_streaming
from kronpress.tokens import TrainData, load_running_text, load_train_data, load_train_tokens
from kronpress.version import __version__

__all__ = [
    "Dispatch",
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
    "TrainData",
    "WorkError",
    "__version__",
    "attached_plan",
    "calibrate",
    "compile_",
    "compress_",
    "compress_streaming",
    "drop_dense_caches",
    "evaluate",
    "explain",
    "fold_layout_",
    "heal_",
    "initialise_",
    "load_model",
    "load_recipe",
    "load_running_text",
    "load_train_data",
    "load_train_tokens",
    "make_plan",
    "matrices",
    "save_checkpoint",
    "set_dispatch",
    "to_dense",
    "uncompile_",
]
