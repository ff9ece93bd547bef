"""Compress a checkpoint that need not fit into memory: layer by layer, from weights on disk to weights on disk.

The module tree is on the meta device. What will be written follows from the plan, so that every tensor has its place in
a file before the first fit, and is written there when it is made. A journal beside the files names what is done, with
its SHA-256: work that was interrupted goes on after the last layer and gives the same files.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kronpress.calibration import Moments
from kronpress.checkpoint import (
    attach_plan_,
    base_of,
    cast_parameters_,
    check_writable,
    load_config,
    model_path,
    take_name,
)
from kronpress.compression import LayerReport, check_moments, check_shapes, replace_layers_, without_lost_heads
from kronpress.errors import RequestError, WorkError
from kronpress.model_card import Story, plan_fields, step, write_card
from kronpress.plan import Plan, owners_first, reduced_shapes
from kronpress.planning import meta_model
from kronpress.surgery import replace_by_matrix_, replaceable_layers
from kronpress.version import __version__
from kronpress.weight_files import Journal, Shard, ShardFiles, StoredWeights, TensorType, shards

# What stands beside the weights and is taken over as it is.
TAKEN_OVER = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
MAX_SHARD_BYTES = 2 * 10**9


def compress_streaming(
    source: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    moments: Moments | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    device: torch.device | str | None = None,
    story: Callable[[], Story] | None = None,
) -> dict[str, LayerReport]:
    """Load the model `source`, `compress_` and `save_checkpoint`, with a few matrices in memory at a time.

    As in the command `compress`, layers are fitted in float32 and stored in the model's dtype. Until all is done it
    stands in a hidden folder beside `out`, from which the same call goes on.

    Args:
        source: a folder with config.json and weights in safetensors, or `pocket`.
        plan: made by `make_plan` from the model or its configuration.
        out: the folder to write.
        moments: of the dense model's inputs; needed for every metric but `none`.
        progress: called with a layer's name, how many are done and how many there are.
        max_shard_bytes: of the tensors in one weights file; a single larger one has a file of its own.
        device: where layers are fitted; the GPU if there is one.
        story: what the model card is to say, as of `save_checkpoint`.

    Returns:
        The error of every replaced layer, by its name.

    Raises:
        RequestError: the plan needs the whole model, or is of another one; or the weights are not in safetensors.
        WorkError: a weight or a moment is damaged, missing, NaN or infinity, or the folder could not be written; the
            layers that are done are kept.
    """
    out = Path(out).resolve()
    check_writable(out, overwrite)
    _check_separable(plan, moments)
    if not Path(path := model_path(str(source))).is_dir():
        raise RequestError(f"model {str(source)!r} is no local folder: streaming reads one, so download it first")
    weights = StoredWeights.of(str(source), Path(path))
    config = load_config(str(source))
    if getattr(config, "quantization_config", None) is not None:
        raise RequestError(f"model {str(source)!r} is compressed or quantised already: streaming needs a dense one")
    model = meta_model(copy.deepcopy(config))
    check_shapes(replaceable_layers(model), plan)
    dense = _Dense(weights, _source_keys(model, weights), _stored_dtype(config, weights))
    target = _compressed_on_meta(config, plan, dense.dtype)
    layout = shards(_stored_types(target), max_shard_bytes)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    request: dict[str, object] = {
        "versions": [__version__, version("torch"), version("transformers")],
        "source": weights.identity(),
        "plan": hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
        "moments": None if moments is None else moments.key,
        "max_shard_bytes": max_shard_bytes,
        "device": str(device),
    }
    folder = out.with_name(f".{out.name}.streaming")
    with _writing(out, folder):
        journal = Journal(folder, request, overwrite)
        files = ShardFiles(folder, layout)
        reports, made = _fit_layers(model, plan, moments, dense, device, files, journal, layout, progress)
        _copy_rest(target, dense, files, journal, layout, made)
        files.finish()
        _write_rest(weights.folder, target, folder)
        write_card(
            folder,
            story or (lambda: Story(base=base_of(str(source)), steps=[step("save")], plan=plan_fields(plan))),
        )
        journal.path.unlink()
        take_name(folder, out)
    return reports


def _check_separable(plan: Plan, moments: Moments | None) -> None:
    """RequestError if some layer's fit needs more than its own weight and moments."""
    needs = {
        "weighting.sequential": plan.weighting.sequential,
        "folding": bool(plan.folding),
        "rotation": plan.rotation,
        "a stage after the first": plan.stage > 1,
        "reduced widths": bool(reduced_shapes(plan.layers)),
    }
    for what, is_asked in needs.items():
        if is_asked:
            raise RequestError(
                f"recipe {plan.recipe!r} has {what}, which needs the whole model in memory: no streaming"
            )
    if plan.weighting.metric != "none":
        for name in plan.new_layers:
            if moments is None or name not in moments:
                raise RequestError(
                    f"the metric {plan.weighting.metric!r} needs moments of {name!r}, and there are none"
                )


@dataclass(frozen=True)
class _Dense:
    """The dense model on disk: `keys` are those of its weights by the keys that the module tree has for them."""

    weights: StoredWeights
    keys: Mapping[str, str]
    dtype: torch.dtype

    def read(self, key: str) -> Tensor:
        """As transformers would load it: floating-point numbers in the model's dtype."""
        tensor = self.weights.read(self.keys[key])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _stored_dtype(config: PreTrainedConfig, weights: StoredWeights) -> torch.dtype:
    """The dtype that the configuration names, or else that of the first weights."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next(each.dtype for each in weights.types.values() if each.dtype.is_floating_point)


def _source_keys(model: nn.Module, weights: StoredWeights) -> dict[str, str]:
    """For each key of the module tree, tied ones too, that under which its tensor is stored.

    Raises:
        WorkError: a tensor is missing, or has another shape.
        RequestError: tensors that the configuration ties are stored, and differ.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    missing: list[str] = []
    for keys in _tied_keys(model):
        names = [
            name for key in keys for name in (key, key.removeprefix(prefix), prefix + key) if name in weights.types
        ]
        if not names:
            missing += keys[:1]
            continue
        first = weights.read(names[0]) if len(set(names)) > 1 else None
        if first is not None and not all(torch.equal(first, weights.read(name)) for name in names[1:]):
            raise RequestError(
                f"model {weights.name!r}: the configuration ties {keys[0]!r} and {keys[1]!r}, and the weights differ"
            )
        shape = tuple(model.state_dict()[keys[0]].shape)
        if weights.types[names[0]].shape != shape:
            raise WorkError(
                f"model {weights.name!r}: the checkpoint is damaged: {names[0]} has shape "
                f"{weights.types[names[0]].shape}, its configuration says {shape}"
            )
        found |= dict.fromkeys(keys, names[0])
    if missing:
        raise WorkError(
            f"model {weights.name!r}: the checkpoint is damaged or of another architecture: {len(missing)} tensors are "
            f"missing, such as {min(missing)}"
        )
    return found


def _tied_keys(model: nn.Module) -> list[list[str]]:
    """The keys of the model's state, together where they are one tensor; that which a checkpoint has comes first."""
    groups: dict[int, list[str]] = {}
    for key in model.state_dict():
        place, _, part = key.rpartition(".")
        groups.setdefault(id(getattr(model.get_submodule(place), part)), []).append(key)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return [sorted(keys, key=lambda key: key in tied) for keys in groups.values()]


def _compressed_on_meta(config: PreTrainedConfig, plan: Plan, dtype: torch.dtype) -> PreTrainedModel:
    """What will be written, without its numbers."""
    target = meta_model(config)
    assert isinstance(target, PreTrainedModel)
    cast_parameters_(target, dtype)
    for name, layer_plan in owners_first(plan.layers).items():  # of a first stage, all are new
        replace_by_matrix_(target, name, layer_plan.empty_matrix(dtype), layer_plan.heads, layer_plan.shared_with)
    attach_plan_(target, plan)
    target.config.dtype = dtype
    target.config.architectures = [type(target).__name__]
    return target


def _stored_types(target: PreTrainedModel) -> dict[str, TensorType]:
    state = target.state_dict()
    ignored = set(target._keys_to_ignore_on_save or ())
    keys = [keys[0] for keys in _tied_keys(target) if keys[0] not in ignored]
    return {key: TensorType(tuple(state[key].shape), state[key].dtype) for key in keys}


def _fit_layers(
    model: nn.Module,
    plan: Plan,
    moments: Moments | None,
    dense: _Dense,
    device: torch.device,
    files: ShardFiles,
    journal: Journal,
    layout: list[Shard],
    progress: Callable[[str, int, int], None] | None,
) -> tuple[dict[str, LayerReport], set[str]]:
    """Fit and write each planned layer that the journal does not have; the reports, and the keys that are written.

    Those of a group are in the journal together, by the first.
    """
    stored = {key for shard in layout for key in shard.places}
    seen = without_lost_heads(plan, moments)
    reports: dict[str, LayerReport] = {}
    written: set[str] = set()
    for names in plan.new_groups:
        if progress is not None:
            progress(names[0], len(reports), len(plan.new_layers))
        known = journal.done.get(names[0])
        if known is not None and files.checksum(known["keys"]) == known["sha256"]:
            reports |= {name: LayerReport.model_validate(report) for name, report in known["reports"].items()}
            written |= set(known["keys"])
            continue
        for name in names:
            _load_layer_(model, name, dense, device)
            check_moments(name, model.get_submodule(name), plan.weighting, moments or {})
        found = replace_layers_(model, names, plan, seen)
        reports |= found
        tensors = {
            key: tensor.to(dense.dtype) if tensor.is_floating_point() else tensor
            for key, tensor in model.state_dict().items()
            if not tensor.is_meta and key in stored
        }
        _forget_(model)
        sha256 = files.write(tensors)
        described = {name: report.model_dump(mode="json") for name, report in found.items()}
        journal.add(names[0], keys=list(tensors), sha256=sha256, reports=described)
        written |= set(tensors)
    return reports, written


def _copy_rest(
    target: nn.Module, dense: _Dense, files: ShardFiles, journal: Journal, layout: list[Shard], written: set[str]
) -> None:
    """Write every tensor that is not `written` as it is in the dense model."""
    state = target.state_dict()
    for key in (key for shard in layout for key in shard.places if key not in written):
        known = journal.done.get(key)
        if known is None or files.checksum([key]) != known["sha256"]:
            journal.add(key, sha256=files.write({key: dense.read(key).to(state[key].dtype)}))


def _load_layer_(model: nn.Module, name: str, dense: _Dense, device: torch.device) -> None:
    """Put the numbers of the layer called `name` into the tree, in float32, wherever it holds them."""
    for part, parameter in list(model.get_submodule(name).named_parameters(recurse=False)):
        loaded = nn.Parameter(dense.read(f"{name}.{part}").to(device, torch.float32))
        _exchange_(model, {id(parameter): loaded})


def _forget_(model: nn.Module) -> None:
    """Put all that has numbers back on the meta device; what is tied stays tied."""
    held = {id(each): each for each in (*model.parameters(), *model.buffers()) if not each.is_meta}
    _exchange_(
        model,
        {
            key: nn.Parameter(each.detach().to("meta")) if isinstance(each, nn.Parameter) else each.to("meta")
            for key, each in held.items()
        },
    )


def _exchange_(model: nn.Module, exchanged: Mapping[int, Tensor]) -> None:
    """Put another tensor in all places of those with these ids."""
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for part, tensor in own:
            if id(tensor) in exchanged:
                setattr(module, part, exchanged[id(tensor)])


def _write_rest(source: Path, target: PreTrainedModel, folder: Path) -> None:
    """Configuration, tokenizer and the settings for generation."""
    target.config.save_pretrained(folder)
    if target.can_generate():
        target.generation_config.save_pretrained(folder)
    for pattern in TAKEN_OVER:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


@contextmanager
def _writing(out: Path, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkError(
            f"could not write {str(out)!r}: {error}; the layers that are done are kept in {str(folder)!r}, and the "
            "same request goes on from there"
        ) from error
