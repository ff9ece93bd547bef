"""Saving and loading through transformers: the only file that touches its loading internals.

A compressed model is an ordinary checkpoint whose config.json carries `quantization_config = {"quant_method":
"kronpress", "format_version": 1, "plan": {...}}`. Importing kronpress registers that method; loading then swaps
the planned layers on the meta device before the weights arrive.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kronpress.errors import RequestError, WorkError
from kronpress.families import GEOMETRIES
from kronpress.model_card import Base, Story, plan_fields, read_base, read_story, step, write_card
from kronpress.plan import Plan, owners_first, reduced_shapes, structured_plans
from kronpress.recipe import POCKET
from kronpress.reduction import put_empty_, widen_
from kronpress.surgery import replace_by_matrix_, replaceable_layers, structured_layers, to_dense_

METHOD = "kronpress"
# 2: a layer's plan has the options of its fit.
# 3: layers may share factors, or be dense ones of another size.
FORMAT_VERSION = 3
# Of a weights file, in its own header.
CHECKSUM = "kronpress.sha256"
# The code in the folder of a self-contained export.
SELF_CONTAINED = "kronpress_runtime.py"
NO_CHECKSUM = "0" * 64
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@register_quantization_config(METHOD)
class KronpressConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json: a format version and the plan as JSON."""

    def __init__(self, plan: dict[str, Any], format_version: int = FORMAT_VERSION, **_: Any) -> None:
        # transformers passes the loading arguments of other methods as well, hence the ignored rest.
        if format_version > FORMAT_VERSION:
            raise WorkError(
                f"the checkpoint has kronpress format version {format_version}, newer than {FORMAT_VERSION}, "
                "the newest that this version of kronpress reads: upgrade kronpress"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.plan = plan


@register_quantizer(METHOD)
class KronpressQuantizer(HfQuantizer):
    """Swaps the planned layers before the weights are loaded, and gives dense ones back on `dequantize`."""

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> nn.Module:
        # Parsed here, not in the config, which transformers copies and serialises freely.
        try:
            plan = Plan.model_validate(self.quantization_config.plan)  # type: ignore[attr-defined]
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise WorkError(f"the checkpoint's plan cannot be read at {place}: {problem['msg']}") from error
        layers = replaceable_layers(model)
        stored = _stored_shapes(checkpoint_files or [])
        # Some architectures rename their keys on saving; then only the check after loading is left.
        prefix = f"{model.base_model_prefix}."
        names = [*plan.layers, *(name.removeprefix(prefix) for name in plan.layers)]
        by_name = any(key.startswith(f"{name}.") for name in names for key in stored)
        shapes = reduced_shapes(plan.layers)
        local_names = _names_in(model, shapes)
        put_empty_(model, {local_names[name]: shape for name, shape in shapes.items()})
        for name, layer in self._reduced(model).items() if by_name else ():
            _check_stored(dict(layer.named_parameters()), {name, f"{prefix}{name}"}, stored)
        for name, layer_plan in owners_first(structured_plans(plan.layers)).items():
            # A base model (AutoModel) names its modules without the prefix that the head's model gives them.
            local = name if name in layers else name.removeprefix(prefix)
            if local not in layers:
                raise WorkError(f"the checkpoint's plan names {name!r}, which {type(model).__name__} does not have")
            matrix = layer_plan.empty_matrix(layers[local].weight.dtype)  # type: ignore[arg-type]
            others = matrix.shared_factors if layer_plan.shared_with is not None else ()
            if by_name:
                _check_stored(matrix.factors, {name, local}, stored, others)
            first = layer_plan.shared_with
            if first is not None and local != name:
                first = first.removeprefix(prefix)
            # A base model has no head.
            replace_by_matrix_(model, local, matrix, [head for head in layer_plan.heads if head in layers], first)
        for path in checkpoint_files or []:
            check_checksum(Path(path))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, layer in {**structured_layers(model), **self._reduced(model)}.items():
            for part, tensor in layer.named_parameters():
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise WorkError(f"the checkpoint is damaged: {name}.{part} is missing from its weights")
        _treat_as_float_(model)
        return model

    def _reduced(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model's dense layers of another size."""
        plan = Plan.model_validate(self.quantization_config.plan)  # type: ignore[attr-defined]
        names = _names_in(model, reduced_shapes(plan.layers))
        return {name: model.get_submodule(name) for name in names.values()}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        to_dense_(model)
        layers = Plan.model_validate(self.quantization_config.plan).layers  # type: ignore[attr-defined]
        names = _names_in(model, reduced_shapes(layers))
        widen_(model, {names[name]: (layers[name].out_features, layers[name].in_features) for name in names})
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _names_in(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What the model calls its modules of these names: a base model has none of the prefix of the head's model."""
    modules = dict(model.named_modules())
    local = {name: name if name in modules else name.removeprefix(f"{model.base_model_prefix}.") for name in names}
    if absent := [name for name, found in local.items() if found not in modules]:
        raise WorkError(f"the checkpoint's plan names {absent[0]!r}, which {type(model).__name__} does not have")
    return local


def _stored_shapes(checkpoint_files: list[str]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in checkpoint_files:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
    return shapes


def _check_stored(
    tensors: Mapping[str, Tensor], names: set[str], stored: Mapping[str, tuple[int, ...]], others: Collection[str] = ()
) -> None:
    """Refuse what transformers would only warn of, going on with random values; `others` stand elsewhere."""
    for part, tensor in tensors.items():
        if part in others:
            continue
        keys = [f"{name}.{part}" for name in names if f"{name}.{part}" in stored]
        if not keys:
            raise WorkError(f"the checkpoint is damaged: {max(names, key=len)}.{part} is missing from its weights")
        if stored[keys[0]] != tuple(tensor.shape):
            raise WorkError(
                f"the checkpoint is damaged: {keys[0]} has shape {stored[keys[0]]}, its plan says {tuple(tensor.shape)}"
            )


def record_checksum_(path: Path) -> None:
    """Write the SHA-256 of a safetensors file into its own header.

    There it stays with the file wherever that is copied, and goes when the file is written anew, by
    `save_pretrained` for instance: a checksum beside the file would then accuse sound weights.
    """
    header, start = _read_header(path)
    header["__metadata__"][CHECKSUM] = _checksum(path)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_suffix(".partial")
    with path.open("rb") as old, partial.open("wb") as new:
        old.seek(start)
        new.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(old, new)
    partial.replace(path)


def fill_checksum_(path: Path) -> None:
    """`record_checksum_` in place, in a header with NO_CHECKSUM for it."""
    checksum = _checksum(path).encode()
    with path.open("r+b") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        place = file.read(num_bytes).index(NO_CHECKSUM.encode())
        file.seek(8 + place)
        file.write(checksum)
        os.fsync(file.fileno())


def check_checksum(path: Path) -> None:
    """Refuse a weights file in which a bit has changed since kronpress wrote it; others have no checksum.

    Raises:
        WorkError: the SHA-256 in the header is not that of the file.
    """
    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as file:
        recorded = (file.metadata() or {}).get(CHECKSUM)
    if recorded is not None and recorded != _checksum(path):
        raise WorkError(f"the checkpoint is damaged: {path.name} has another SHA-256 than when it was written")


def _checksum(path: Path) -> str:
    """SHA-256 in hex of a safetensors file's header, less the checksum itself, and data."""
    header, start = _read_header(path)
    header.get("__metadata__", {}).pop(CHECKSUM, None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the byte at which its data start: 8 bytes hold the header's length."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(num_bytes)), 8 + num_bytes


def _treat_as_float_(model: nn.Module) -> None:
    """Factors are floating-point parameters like any other: without this, `.half()` and `.float()` would raise."""
    model.is_quantized = False  # type: ignore[assignment]


def attach_plan_(model: nn.Module, plan: Plan) -> None:
    """Make `save_pretrained` write, and `dequantize` undo, the structured layers. No-op on other modules."""
    if not isinstance(model, PreTrainedModel):
        return
    config = KronpressConfig(plan=plan_fields(plan))
    model.config.quantization_config = config
    model.hf_quantizer = KronpressQuantizer(config)  # type: ignore[assignment]
    _treat_as_float_(model)


def attached_plan(model: nn.Module) -> Plan | None:
    """The plan with which a compressed transformers model was made; None for a dense model."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return Plan.model_validate(config.plan) if isinstance(config, KronpressConfig) else None


def is_compressed(model: nn.Module) -> bool:
    """Whether the model has structured layers, or dense ones of another size."""
    return bool(structured_layers(model)) or attached_plan(model) is not None


def to_dense(model: AnyModule) -> AnyModule:
    """A copy of a compressed model in which every layer is dense again; it loads in stock transformers.

    Raises:
        RequestError: the model has no structured layer.
    """
    if not is_compressed(model):
        raise RequestError("the model has no structured layer: it is dense already")
    dense = copy.deepcopy(model)
    if isinstance(dense, PreTrainedModel):
        dense.dequantize()
    else:
        to_dense_(dense)
    return dense


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32 for work, its tokenizer, and the dtype in which its weights are stored."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    revision: str | None


def model_path(name: str) -> str:
    """What transformers is to load for MODEL: the bundled model, a local checkpoint, a run's model, or a Hub id.

    Raises:
        RequestError: a local folder that holds no checkpoint.
    """
    if name == POCKET:
        return str(resources.files("kronpress") / "pocket")
    path = Path(name)
    if not path.exists():
        if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise RequestError(f"model {name!r}: no such folder")
        return name
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return str(folder)
    raise RequestError(f"model {name!r} is no checkpoint: neither it nor its folder `model` holds a config.json")


def base_of(name: str, revision: str | None = None) -> Base:
    """What is known of the dense model MODEL for the cards of what is made of it; its own card may be on the Hub."""
    path = model_path(name)
    return read_base(path if name == POCKET else name, Path(path) if Path(path).is_dir() else None, revision)


def story_of(name: str) -> Story | None:
    """How the checkpoint MODEL came to be, if its folder says so.

    Raises:
        WorkError: what it says is damaged.
    """
    return read_story(Path(model_path(name)))


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of MODEL or of a known bare geometry, which needs neither weights nor network."""
    if name in GEOMETRIES and not Path(name).exists():
        geometry = dict(GEOMETRIES[name])
        return AutoConfig.for_model(geometry.pop("model_type"), **geometry)
    with _loading(name):
        return AutoConfig.from_pretrained(model_path(name), revision=revision, trust_remote_code=False)


def load_model(name: str, revision: str | None = None) -> LoadedModel:
    """The causal language model MODEL and its tokenizer, on the GPU if there is one.

    Raises:
        RequestError: no such model, a folder that is no checkpoint, or a self-contained export.
        WorkError: the checkpoint is damaged or holds NaN or infinity, or the Hub could not be reached.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = model_path(name)
    if (Path(path) / SELF_CONTAINED).is_file():
        raise RequestError(
            f"model {name!r} is a self-contained export, which kronpress does not read: give what it was made from"
        )
    with _loading(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
        model, info = loaded
        if info["missing_keys"]:
            # transformers has filled them with random values.
            raise WorkError(
                f"the checkpoint is damaged or of another architecture: {len(info['missing_keys'])} tensors are "
                f"missing, such as {min(info['missing_keys'])}"
            )
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    commit = getattr(model.config, "_commit_hash", None)
    stored_dtype = model.dtype
    cast_parameters_(model.to(device), torch.float32)  # type: ignore[arg-type]
    for tensor, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            kind = "NaN" if parameter.isnan().any() else "infinity"
            raise WorkError(f"model {name!r}: its weight {tensor!r} holds {kind}")
    return LoadedModel(name, model, tokenizer, stored_dtype, commit)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """What transformers raises for a model that cannot be had, as one sentence."""
    try:
        yield
    except RequestError:
        raise
    except WorkError as error:
        raise WorkError(f"model {name!r}: {error}") from error
    except SafetensorError as error:
        raise WorkError(f"model {name!r}: its weights are damaged: {error}") from error
    except Exception as error:  # whatever transformers, the Hub and a wrong config.json make of it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if Path(name).exists() or name == POCKET:
            raise WorkError(f"model {name!r} could not be loaded: {reason}") from error
        kind = RequestError if _is_no_such_thing(error) else WorkError
        raise kind(
            f"model {name!r} is neither {POCKET!r} nor a local folder, and could not be had from the Hub: {reason}"
        ) from error


def _is_no_such_thing(error: BaseException | None) -> bool:
    """Whether the Hub answered that there is no such repository, revision or file, or was never asked."""
    while error is not None:
        if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError | HFValidationError):
            return not isinstance(error, LocalEntryNotFoundError)
        error = error.__cause__ or error.__context__
    return False


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    story: Callable[[], Story] | None = None,
) -> None:
    """Write model and tokenizer to the folder `out`, whole or not at all, and a model card.

    Args:
        dtype: cast the model to this dtype first, in place; as it is if None.
        story: what the card is to say, asked for when all else is written; if None, what the model itself has of it.

    Raises:
        RequestError: `out` is not an empty folder and `overwrite` is False.
        WorkError: the folder could not be written (a full disk, say); what was in `out` is still there.
    """
    with atomic_folder(out, overwrite) as partial:
        write_model(model, tokenizer, partial, dtype, story)


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype`, in place; buffers, such as rotary frequencies, keep the precision they need."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    dtype: torch.dtype | None,
    story: Callable[[], Story] | None = None,
) -> None:
    """Model and tokenizer as files of `folder`, and for a compressed model a card, for use inside `atomic_folder`."""
    if dtype is not None:
        cast_parameters_(model, dtype)
    model.save_pretrained(folder)
    if is_compressed(model):
        for path in folder.glob("*.safetensors"):
            record_checksum_(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    plan = attached_plan(model)
    if story is not None:
        write_card(folder, story)
    elif plan is not None:
        write_card(folder, lambda: _story_from_python(model, plan))


def _story_from_python(model: PreTrainedModel, plan: Plan) -> Story:
    """What a model that no command has made says of itself: from where it was loaded, and its plan."""
    source = str(getattr(model.config, "name_or_path", "") or "")
    folder = Path(source)
    if not source:
        known = Story()
    elif not folder.is_dir():
        known = Story(base=read_base(source, None, getattr(model.config, "_commit_hash", None)))
    elif _holds_compressed(folder):
        known = read_story(folder) or Story()
    else:
        known = Story(base=read_base(source, folder))
    return known.after(step("save")).model_copy(update={"plan": plan_fields(plan)})


def _holds_compressed(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return (config.get("quantization_config") or {}).get("quant_method") == METHOD


def check_writable(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written or holds something, before any work is done."""
    if Path.cwd().is_relative_to(out.resolve()):
        raise RequestError(f"output folder {str(out)!r} is or holds the current folder: it cannot be replaced")
    existing = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    if not existing.is_dir():
        raise RequestError(f"output folder {str(out)!r}: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RequestError(f"output folder {str(out)!r}: {str(existing)!r} is not writable")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise RequestError(f"output folder {str(out)!r} is not empty: choose another, or pass --overwrite")


def take_name(folder: Path, out: Path) -> None:
    """Rename a finished folder to `out`, in place of what is there; if that fails it is there still."""
    earlier = out.with_name(f".{out.name}.earlier-{os.getpid()}")
    if out.exists():
        out.rename(earlier)
    try:
        folder.rename(out)
    except BaseException:
        if earlier.exists():
            earlier.rename(out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def atomic_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that takes the name `out` only when the block ends without an error."""
    out = out.resolve()
    check_writable(out, overwrite)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        take_name(partial, out)
    except (OSError, SafetensorError) as error:
        raise WorkError(f"could not write {str(out)!r}: {error}; what was there before is unchanged") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
