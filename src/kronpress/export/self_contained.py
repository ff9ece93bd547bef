"""A compressed checkpoint that loads with torch and transformers alone, through `trust_remote_code=True`.

The folder holds ordinary weights files, and a file of code: `runtime.py` of this package with the functions of the
structures that the checkpoint has, as they stand in `kronpress.matrices`.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kronpress.checkpoint import SELF_CONTAINED, attached_plan, cast_parameters_, write_model
from kronpress.errors import RequestError, WorkError
from kronpress.export import runtime
from kronpress.export.source import source_of
from kronpress.matrices import STRUCTURES
from kronpress.plan import Plan, reduced_shapes, structured_plans
from kronpress.reduction.attention import ReducedAttention
from kronpress.version import __version__

MODULE = SELF_CONTAINED.removesuffix(".py")


def write_self_contained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, dtype: torch.dtype
) -> None:
    """Write weights in `dtype`, configuration, tokenizer and code, then load them and compare logits.

    Raises:
        RequestError: the model's class is not one of transformers' own, or its attention has reduced widths.
        WorkError: the written folder gives other logits.
    """
    plan = attached_plan(model)
    assert plan is not None, "the caller has a compressed model"
    if any(isinstance(module, ReducedAttention) for module in model.modules()):
        raise RequestError(
            "the model has attention of reduced widths, which cannot be taken along as code: --format dense, or onnx"
        )
    base = type(model).__name__
    if getattr(transformers, base, None) is not type(model):
        raise RequestError(f"{base} is not a class of transformers: its code cannot be taken along")
    name = f"Kronpress{base}"
    write_model(model, tokenizer, folder, dtype)
    change_config(
        folder,
        {
            "architectures": [name],
            "auto_map": {"AutoModelForCausalLM": f"{MODULE}.{name}"},
            "kronpress_layers": described_layers(plan),
            "kronpress_widths": reduced_shapes(plan.layers),
        },
    )
    layers = structured_plans(plan.layers).values()
    structures = sorted(
        {name for layer in layers for name in (layer.structure, *layer.matrix_class.part_structures(layer.spec))}
    )
    (folder / SELF_CONTAINED).write_text(runtime_source(structures, base), encoding="utf-8")
    _check(model, folder, name)


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    """Put `changes` into config.json in place of the method, which transformers does not know without kronpress."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    del config["quantization_config"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def described_layers(plan: Plan) -> dict[str, Any]:
    """What the code has to know of each layer: structure, shapes and lengths of all parts, and what is tied to what."""
    return {
        name: {
            "structure": layer.structure,
            "factors": layer.matrix_class.factor_shapes(layer.out_features, layer.in_features, layer.spec),
            "orders": layer.matrix_class.order_sizes(layer.out_features, layer.in_features, layer.spec),
            "heads": layer.heads,
            "shared": {part: layer.shared_with for part in layer.matrix_class.shared_factors if layer.shared_with},
        }
        for name, layer in structured_plans(plan.layers).items()
    }


def runtime_source(structures: list[str], base: str) -> str:
    """The file of code for these structures and the class of transformers called `base`."""
    methods = [(STRUCTURES[name], method) for name in structures for method in ("multiply", "rows")]
    table = "".join(f'STRUCTURES["{name}"] = {STRUCTURES[name].__name__}\n' for name in structures)
    return (
        f"# Written by kronpress {__version__} (Apache-2.0) for the checkpoint beside it, which is loaded with\n"
        "# transformers.AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)\n"
        f"{inspect.getsource(runtime)}\n\n"
        f"{source_of(methods).strip()}\n\n\n{table}\n\n"
        f"from transformers import {base}\n\n\n"
        f'class Kronpress{base}(FactoredModel, {base}):\n    """{base} with factored layers."""\n'
    )


def _check(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Load what was written, as transformers will, and compare its logits with the model's."""
    # Run as text: an import would leave compiled code in the folder.
    module = ModuleType(MODULE)
    path = folder / SELF_CONTAINED
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), vars(module))
    loaded = getattr(module, name).from_pretrained(folder).eval().to(model.device)
    for each in (model, loaded):
        cast_parameters_(each, torch.float32)
    size = model.config.get_text_config().vocab_size
    input_ids = torch.arange(min(8, size), device=model.device)[None]
    wanted, found = _logits(model.eval(), input_ids), _logits(loaded, input_ids)
    error = (found - wanted).abs().max().item()
    if not error <= 1e-4 * max(1.0, wanted.abs().max().item()):
        raise WorkError(f"the self-contained checkpoint gives logits that are {error:.1e} from the model's")


def _logits(model: Any, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=input_ids).logits
    return logits
