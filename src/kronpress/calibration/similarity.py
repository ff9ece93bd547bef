"""How little each transformer block changes what it reads: the mean cosine between its input and its output."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronpress.calibration.batches import Part, to_device
from kronpress.calibration.block_stream import block_prefix
from kronpress.calibration.sums import as_for_use
from kronpress.errors import RequestError


def block_similarities(model: nn.Module, parts: list[Part]) -> dict[str, float]:
    """E cos(h, h′) of each block by its name, h (width,) being the hidden state of a token before it and h′ after it.

    1 less this is ShortGPT's block influence (arXiv 2403.03853), by which MoDeGPT shares out its sparsity. The tokens
    are those of the parts that are not held out; the model is run once and left as it was.

    Raises:
        RequestError: the model's blocks are not known.
    """
    prefix = block_prefix(model)
    if prefix is None:
        raise RequestError("allocation: similarity compares what blocks read and give, and this model has none known")
    blocks = {f"{prefix}.{name}": block for name, block in model.get_submodule(prefix).named_children()}
    totals = dict.fromkeys(blocks, 0.0)
    num_tokens = dict.fromkeys(blocks, 0)
    device = next(model.parameters()).device

    def add(name: str, part: Part, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before: Tensor = (*args, *kwargs.values())[0]
        after: Tensor = output if isinstance(output, Tensor) else output[0]
        cosines = F.cosine_similarity(part.tokens(before).double(), part.tokens(after).double(), dim=-1)
        totals[name] += cosines.sum().item()
        num_tokens[name] += len(cosines)

    with as_for_use(model), torch.no_grad():
        for part in parts:
            if part.is_held_out:
                continue
            hooks = [
                block.register_forward_hook(partial(add, name, part), with_kwargs=True)
                for name, block in blocks.items()
            ]
            try:
                model(**to_device(part.arguments, device))
            finally:
                for hook in hooks:
                    hook.remove()
    return {name: totals[name] / num_tokens[name] for name in blocks}
