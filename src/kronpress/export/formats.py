"""`export_checkpoint`: one compressed checkpoint in, one folder of another format out, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from kronpress.checkpoint import (
    atomic_folder,
    attached_plan,
    cast_parameters_,
    check_writable,
    is_compressed,
    load_model,
    story_of,
    to_dense,
    write_model,
)
from kronpress.errors import RequestError
from kronpress.export.onnx_graph import check_installed, write_onnx
from kronpress.export.self_contained import change_config, write_self_contained
from kronpress.model_card import Story, plan_fields, step, write_card

FORMATS = {
    "dense": "an ordinary checkpoint for stock transformers",
    "onnx": "a graph of standard operators with a cache, in float32",
    "self-contained": "factors with the code that runs them, for trust_remote_code",
}


def export_checkpoint(
    directory: str,
    format: str,
    out: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], object] = print,
    command: list[str] | None = None,
) -> None:
    """Write the compressed checkpoint in `directory` to the folder `out` in one of FORMATS, tokenizer included.

    Args:
        say: is told of what the user might not expect.
        command: the command line that asked for it, for the model card.

    Raises:
        RequestError: no such format, a package that it needs is missing, `directory` holds no compressed checkpoint, or
            `out` is not empty and `overwrite` is False.
        WorkError: the checkpoint is damaged, its model cannot be written in this format or comes out another one, or
            the folder could not be written; what was in `out` is still there.
    """
    if format not in FORMATS:
        raise RequestError(f"format {format!r}: allowed is {', '.join(FORMATS)}")
    if format == "onnx":
        check_installed()
    check_writable(out, overwrite)
    loaded = load_model(directory)
    model = loaded.model
    if not is_compressed(model):
        raise RequestError(f"model {directory!r} has no structured layer: it is dense already")
    plan, known = attached_plan(model), story_of(directory) or Story()
    assert plan is not None, "a compressed model of transformers has one"
    with atomic_folder(out, overwrite) as folder:
        match format:
            case "dense":
                write_model(to_dense(model), loaded.tokenizer, folder, loaded.dtype)
            case "self-contained":
                write_self_contained(model, loaded.tokenizer, folder, loaded.dtype)
            case "onnx":
                if loaded.dtype != torch.float32:
                    say(f"weights of {str(loaded.dtype).removeprefix('torch.')} are written as float32")
                cast_parameters_(model.to("cpu"), torch.float32)  # type: ignore[arg-type]
                write_onnx(model, folder)
                for part in (model.config, model.generation_config, loaded.tokenizer):
                    part.save_pretrained(folder)  # type: ignore[union-attr]
                change_config(folder, {"dtype": "float32"})
        exported = {"format": format, "plan": plan_fields(plan), "steps": [*known.steps, step("export", command)]}
        write_card(folder, lambda: known.model_copy(update=exported))
