"""What a model weighs and what one token costs it, counted and not timed: the bounds beside every measured ratio."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from torch import Tensor, nn

from kronpress.benchmark.timing import Frozen
from kronpress.checkpoint import model_path
from kronpress.layers import StructuredLinear
from kronpress.surgery import dense_weight, embeddings, linear_layers, structured_layers

INT8 = "int8"


class Sizes(Frozen):
    """Sizes of a model as it is computed with.

    `streamed_bytes_per_token` are the weights of all linear layers, head included, biases not: what decoding one token
    has to read. `flops_per_token` are counted as in `planning.Plan`; of the least, a layer that needs fewer operations
    as one dense matrix counts as that. `arithmetic` says what is multiplied.
    """

    num_params: int
    num_bytes: int
    streamed_bytes_per_token: int
    flops_per_token: int
    least_flops_per_token: int
    arithmetic: str

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        dense = [dense_weight(layer) for layer in linear_layers(model).values()]
        # An embedding's factors are looked up, not streamed; its tied head is a layer of its own.
        structured = [layer for layer in structured_layers(model).values() if isinstance(layer, StructuredLinear)]
        streamed = [*dense, *(factor for layer in structured for factor in layer.factors.values())]
        params = list(model.parameters())
        orders = [order for layer in structured_layers(model).values() for order in layer.buffers(recurse=False)]
        flops = [layer.structure.count_flops(layer.out_features, layer.in_features, layer.spec) for layer in structured]
        as_dense = [2 * layer.out_features * layer.in_features for layer in structured]
        flops_dense = 2 * sum(weight.numel() for weight in dense)
        return cls(
            num_params=sum(param.numel() for param in params),
            num_bytes=sum(tensor.nbytes for tensor in [*params, *orders]),
            streamed_bytes_per_token=sum(weight.nbytes for weight in streamed),
            flops_per_token=flops_dense + sum(flops),
            least_flops_per_token=flops_dense + sum(map(min, flops, as_dense)),
            arithmetic=str(params[0].dtype).removeprefix("torch."),
        )

    @classmethod
    def of_int8(cls, model: nn.Module) -> Sizes:
        """What they will be of the dense `model` when `rivals.quantize_` has changed it.

        One byte for every entry of a linear layer or embedding, tied ones once, and a float32 scale for each row.
        """
        sizes = cls.of(model)
        linear = list(linear_layers(model).values())
        held = {id(layer.weight): dense_weight(layer) for layer in (*linear, *embeddings(model).values())}
        streamed = [dense_weight(layer) for layer in linear]

        def rounded_bytes(weights: Iterable[Tensor]) -> int:
            return sum(weight.numel() + 4 * weight.shape[0] for weight in weights)

        others = sizes.num_bytes - sum(weight.nbytes for weight in held.values())
        return sizes.model_copy(
            update={
                "num_bytes": others + rounded_bytes(held.values()),
                "streamed_bytes_per_token": rounded_bytes(streamed),
                "arithmetic": INT8,
            }
        )


def decode_bound(model: Sizes, against: Sizes) -> float:
    """How many times as fast one token could be decoded if only weights had to be read."""
    return against.streamed_bytes_per_token / model.streamed_bytes_per_token


def prefill_bound(model: Sizes, against: Sizes) -> float | None:
    """How many times as fast a prompt could be read if linear layers cost only operations; None of other arithmetic."""
    if model.arithmetic != against.arithmetic:
        return None
    return against.least_flops_per_token / model.least_flops_per_token


def disk_bytes(name: str, revision: str | None) -> int:
    """Size of the weight files of MODEL, which has been loaded before."""
    path = Path(model_path(name))
    if not path.is_dir():
        path = Path(snapshot_download(name, revision=revision, local_files_only=True))
    files = list(path.glob("*.safetensors")) or list(path.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files)
