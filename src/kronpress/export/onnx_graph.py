"""A causal language model as one ONNX graph of standard operators, with a cache, checked in onnxruntime.

Letters: B sequences, T new tokens, P tokens in the cache of keys and values, V words of the vocabulary, layer l. One
graph serves the prompt, with P = 0, and every token after it:

    input_ids (B, T), attention_mask (B, P + T), position_ids (B, T),
    past_key_values.<l>.key and .value (B, heads, P, head width)
        ─▶ logits (B, T, V), present.<l>.key and .value (B, heads, P + T, head width)

Compressed layers stay factors: each initialiser is a parameter of the model, under its own name and of its own shape.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kronpress.errors import RequestError, WorkError
from kronpress.export.runtime import FactoredEmbedding, FactoredLinear
from kronpress.layers import StructuredEmbedding
from kronpress.surgery import replace_module_, structured_layers

FILE = "model.onnx"
REQUIRED = ("onnx", "onnxruntime", "onnxscript")
# In float32, of the largest logit, or of 1 where that is less.
TOLERANCE = 1e-4
# Of a prompt, and of tokens that follow at once.
LENGTHS = (9, 3)
# Greedy ones, one by one.
NUM_STEPS = 4


def check_installed() -> None:
    """Refuse at once what would fail for lack of the extra.

    Raises:
        RequestError: a package of the extra `onnx` is not installed.
    """
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        raise RequestError(
            f"format onnx needs {', '.join(REQUIRED)}, and {missing[0]} is not installed: pip install 'kronpress[onnx]'"
        )


def write_onnx(model: PreTrainedModel, folder: Path) -> None:
    """Write `model.onnx`, and for more than 1.5 GB of weights `model.onnx.data`, in the model's dtype; then check it.

    Turns the model's structured layers into plain ones with the same factors, in place.

    Raises:
        WorkError: the model cannot be traced, or onnxruntime gives other logits than torch.
    """
    model.eval().requires_grad_(False)
    cache = _cache_of(model)
    expected = conversations(model)
    for name, layer in structured_layers(model).items():
        # Whatever a layer may do to be fast, the graph has the factors and nothing else.
        if isinstance(layer, StructuredEmbedding):
            plain: nn.Module = FactoredEmbedding(layer.structure, layer.factors, layer.padding_idx)
        else:
            plain = FactoredLinear(layer.structure, layer.factors, layer.bias)  # type: ignore[arg-type]
        replace_module_(model, name, plain)
    for is_strict in (True, False):
        try:
            _write_checked(model, folder / FILE, cache, expected, is_strict)
            return
        except WorkError:
            if not is_strict:
                raise


def _write_checked(
    model: PreTrainedModel, path: Path, cache: list[tuple[int, int]], expected: list[list[Step]], is_strict: bool
) -> None:
    program = _traced(model, cache, is_strict)
    _simplify_(program.model)
    domains = {node.domain for node in program.model.graph.all_nodes()} - {""}
    if domains or program.model.functions:
        raise WorkError(
            f"the graph has operators that are not ONNX's own, of {', '.join(sorted(domains)) or 'functions'}"
        )
    program.save(path)
    check(path, expected, cache)


@dataclass(frozen=True)
class Step:
    """What the model reads beside the cache of the steps before, and the logits (B, T, V) that torch gives."""

    input_ids: Tensor
    attention_mask: Tensor
    logits: Tensor


def conversations(model: PreTrainedModel) -> list[list[Step]]:
    """What graph and model are compared on: prompts, tokens that follow, and the greedy continuation of torch.

    One sequence alone, and two of which the first is padded on its left.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or sum(LENGTHS) + NUM_STEPS
    lengths = [max(1, min(length, context // 8)) for length in LENGTHS]
    found = []
    for batch, padding in ((1, 0), (2, 2)):
        cache = DynamicCache(config=model.config)
        attention_mask = torch.ones(batch, 0, dtype=torch.int64)
        steps: list[Step] = []
        for length in [*lengths, *[1] * NUM_STEPS]:
            if len(steps) < len(lengths):
                input_ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
            else:
                input_ids = steps[-1].logits[:, -1:].argmax(-1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1)
            attention_mask[0, : min(padding, lengths[0] - 1)] = 0
            positions = {"position_ids": _positions(attention_mask, length)} if _takes_positions(model) else {}
            with torch.no_grad():
                output = model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    past_key_values=cache,
                    use_cache=True,
                    **positions,
                )
            steps.append(Step(input_ids, attention_mask, output.logits))
        found.append(steps)
    return found


def check(path: Path, expected: list[list[Step]], cache: list[tuple[int, int]]) -> None:
    """Compare the graph in onnxruntime with torch: logits to TOLERANCE of the largest one.

    So both have the same greedy token, unless two are nearer to each other than twice the tolerance.

    Raises:
        WorkError: onnxruntime refuses the graph, or gives something else.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for steps in expected:
            past = [torch.zeros(len(steps[0].input_ids), heads, 0, width) for heads, width in cache]
            for number, step in enumerate(steps):
                given = [step.input_ids, step.attention_mask]
                if "position_ids" in [each.name for each in session.get_inputs()]:
                    given.append(_positions(step.attention_mask, step.input_ids.shape[1]))
                names = [each.name for each in session.get_inputs()]
                feed = {name: tensor.numpy() for name, tensor in zip(names, [*given, *past], strict=True)}
                logits, *past = (torch.from_numpy(array) for array in session.run(None, feed))
                _compare(logits, step, f"step {number} of {len(steps[0].input_ids)} sequences")
    except WorkError:
        raise
    except Exception as error:  # onnxruntime has an exception of its own for each kind of trouble
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WorkError(f"onnxruntime cannot run the graph: {reason}") from error


def _compare(logits: Tensor, step: Step, where: str) -> None:
    real = step.attention_mask[:, -step.input_ids.shape[1] :] == 1
    found, wanted = logits[real], step.logits[real]  # (tokens, V)
    allowed = TOLERANCE * max(1.0, wanted.abs().max().item())
    error = (found - wanted).abs().max().item()
    if not error <= allowed:
        raise WorkError(
            f"onnxruntime gives logits that are up to {error:.1e} from torch's at {where}: at most {allowed:.1e}"
        )


class _WithFlatCache(nn.Module):
    """The model as a function of tensors: keys and values of all layers go in and come out one after the other."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        positions = {} if position_ids is None else {"position_ids": position_ids}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            use_cache=True,
            **positions,
        )
        return output.logits, *_flat(output.past_key_values)


def _flat(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _cache_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, head width) of keys and values of each layer, in turns."""
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    return [(tensor.shape[1], tensor.shape[3]) for tensor in _flat(output.past_key_values)]


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _positions(attention_mask: Tensor, num_new: int) -> Tensor:
    """Those of the last `num_new` tokens, counted from the first that is not masked, (B, T)."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -num_new:].contiguous()


def _traced(model: PreTrainedModel, cache: list[tuple[int, int]], is_strict: bool) -> Any:
    """The ONNX program, its sizes B, T and P free.

    Neither way of tracing is good for all code. Strictly, Python is interpreted, and not all of it can be; otherwise it
    is run, and a length that it asks for by `len` becomes a number in the graph, which the check finds.
    """
    batch, new, past = 2, 3, 4  # any sizes that differ and are not 1
    attention_mask = torch.ones(batch, past + new, dtype=torch.int64)
    free = torch.export.Dim.DYNAMIC
    names = [f"{number // 2}.{'value' if number % 2 else 'key'}" for number in range(len(cache))]
    inputs = ["input_ids", "attention_mask"] + ["position_ids"] * _takes_positions(model)
    with _quiet(), torch.no_grad():
        try:
            traced = torch.export.export(
                _WithFlatCache(model),
                (
                    torch.zeros(batch, new, dtype=torch.int64),
                    attention_mask,
                    _positions(attention_mask, new) if _takes_positions(model) else None,
                    [torch.zeros(batch, heads, past, width) for heads, width in cache],
                ),
                dynamic_shapes=(
                    {0: free, 1: free},
                    {0: free, 1: free},
                    {0: free, 1: free} if _takes_positions(model) else None,
                    [{0: free, 2: free} for _ in cache],
                ),
                strict=is_strict,
                # Guards on sizes become checks in the traced program, which the graph leaves out.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            program = torch.onnx.export(
                traced,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=inputs + [f"past_key_values.{name}" for name in names],
                output_names=["logits"] + [f"present.{name}" for name in names],
            )
        except Exception as error:  # whatever torch.export makes of code that it cannot trace
            root: BaseException = error
            while root.__cause__ is not None:  # the last says only which step it was
                root = root.__cause__
            reason = (str(root).strip().splitlines() or [type(root).__name__])[0]
            raise WorkError(f"{type(model).__name__} cannot be written as an ONNX graph: {reason}") from error
    return program


def _simplify_(model: Any) -> None:
    """Fold what is constant but the weights, give these the names of the model's tensors, and name the free sizes.

    A weight that is transposed or reshaped before its use would be folded into a second tensor: a tied one would then
    be in the file twice. onnxruntime folds it when it loads the graph.
    """
    import onnxscript.optimizer

    weights = set(model.graph.initializers.values())
    onnxscript.optimizer.optimize_ir(
        model, should_fold=lambda node: False if any(value in weights for value in node.inputs) else None
    )
    for value in list(model.graph.initializers.values()):
        value.name = value.name.removeprefix("model.")
    for node in model.graph.all_nodes():  # the line of code that each node comes from, by its path on this machine
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name.startswith(("past_key_values", "present")):
            names = {0: "batch", 2: "past_length" if value.name.startswith("past") else "total_length"}
        else:
            names = {0: "batch", 1: "total_length" if value.name == "attention_mask" else "length"}
        for dimension, name in names.items():
            value.shape[dimension] = name


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of packages that it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
