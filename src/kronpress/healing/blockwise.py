"""`reconstruct_blocks_`: one block after another learns alone to give what the teacher's block gives.

Of block i, with parameters θ, the inputs x̃ are what the student's blocks before it give, once they are reconstructed,
and h is what the teacher's block gives in the teacher:

    min_θ  E ‖f_θ(x̃) − h‖² / c

Block by block as in BRECQ (Li et al. 2021, arXiv 2102.05426), on the inputs that a block will really get as in AdaRound
(Nagel et al. 2020, arXiv 2004.10568). c is a block's squared error at its first step: a constant, which only makes the
gradients of all blocks alike in size.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronpress.calibration import BlockStream
from kronpress.calibration.block_stream import block_prefix, state_bytes
from kronpress.calibration.moments import sha256
from kronpress.calibration.states import StatesFile
from kronpress.errors import RequestError, WorkError
from kronpress.evaluation import longest_context, num_embeddings
from kronpress.families import FAMILIES
from kronpress.healing.checkpoints import PARTIAL, find_damage, only_one, publish, retire, sweep, write_whole
from kronpress.healing.inner_states import match_blocks
from kronpress.healing.losses import state_loss
from kronpress.healing.progress import differences
from kronpress.healing.trainer import learning_rates
from kronpress.processes import from_main, give_
from kronpress.recipe import Healing, Reconstruction
from kronpress.surgery import healing_parametrizations, structured_layers
from kronpress.tokens import TrainData

# In a working folder: the folder of the blocks that are done, and what it says of the reconstruction they are of.
FOLDER, SETTINGS = "reconstruction", "settings.json"
# In the folder of a block that is done.
_WEIGHTS, _REPORT = "block.safetensors", "report.json"


class BlockReport(BaseModel):
    """What came of one block, on held-out windows: (E‖f(x̃) − h‖² / E‖h‖²)^½ before and after.

    A block that was not better has kept its weights, and its error.
    """

    model_config = ConfigDict(frozen=True)

    block: int
    teacher_block: int
    relative_error_before: float
    relative_error_after: float
    is_better: bool
    seconds: float


class ReconstructionLog(BaseModel):
    """What `reconstruct_blocks_` did, all its runs together if it was resumed.

    A step of every block is together one step of the model, without its head: `tokens` are those that one block read.
    """

    steps: int
    tokens: int
    num_windows: int
    num_held_out: int
    state_bytes: int  # that the hidden states took on the disk
    seconds: float
    resumed_at_block: int | None
    blocks: list[BlockReport]


def reconstruct_blocks_(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Tensor,
    settings: Reconstruction,
    *,
    seed: int = 0,
    work_dir: Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: Callable[[BlockReport], None] | None = None,
    messages: Callable[[str], None] = lambda _: None,
) -> ReconstructionLog:
    """Train the blocks of `model` in place, from the first to the last; what is before and after them stays.

    A block that is no better on the held-out windows after its steps gets the weights back that it had. Dropout is off.
    `match_blocks` says which of the teacher's blocks each block is compared with. Where a launcher has started several
    processes all of them call this; the main one does the work, and all get the weights.

    Args:
        tokens: token ids (num_windows, sequence_length). The last of them are held out: the fraction
            `settings.held_out` and what else fills no step.
        work_dir: where blocks that are done are kept, in a folder of their own. No other process may work there.
        resume: continue after the last block that is kept in `work_dir`; the end is bit for bit the same as without
            the interruption. Without `resume` blocks that are there are deleted.
        device: where blocks are run, one at a time; a GPU if there is one.
        progress: called after each block.
        messages: told the room that hidden states take, and which blocks have kept their weights.

    Raises:
        RequestError: a model of an unknown family, widths that differ, fewer blocks in the teacher than in the
            student, too few windows or too long ones, a token that the model does not know, a folder in use, or one
            with blocks of another reconstruction.
        WorkError: hidden states or a block could not be written; blocks that are done stay.
    """
    log = from_main(
        lambda: _in_this_process(
            model, teacher, tokens, settings, seed, work_dir, resume, device, progress, messages
        ).model_dump(mode="json")
    )
    for block in _checked_blocks(model, teacher, tokens):
        give_(block.state_dict().values())
    return ReconstructionLog.model_validate(log)


def _in_this_process(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Tensor,
    settings: Reconstruction,
    seed: int,
    work_dir: Path | None,
    resume: bool,
    device: torch.device | str | None,
    progress: Callable[[BlockReport], None] | None,
    messages: Callable[[str], None],
) -> ReconstructionLog:
    """`reconstruct_blocks_` in one process."""
    started = time.monotonic()
    blocks = _checked_blocks(model, teacher, tokens)
    num_trained = _num_trained(len(tokens), settings)
    if device is None and torch.cuda.is_available():
        device = "cuda"
    state_files = [model, teacher] if settings.student_inputs == 1 else [model, teacher, teacher]
    needed = sum(state_bytes(each, tokens.numel()) for each in state_files)

    with ExitStack() as during:
        done: list[Path] = []
        if work_dir is None:
            folder = Path(during.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = work_dir / FOLDER
            during.enter_context(only_one(folder))
            sweep(folder)
            done = _blocks_done(folder, _described(model, teacher, tokens, settings, seed), resume, messages)
        reports = [_load_block_(block, kept) for block, kept in zip(blocks, done, strict=False)]
        seconds = sum(report.seconds for report in reports)
        if len(reports) < len(blocks):
            messages(f"the hidden states of {tokens.numel()} tokens take {needed / 1e6:,.1f} MB in {str(folder)!r}")
            batches = [
                *tokens[:num_trained].split(settings.sequences_per_step),
                *tokens[num_trained:].split(settings.sequences_per_step),
            ]
            student_stream = during.enter_context(BlockStream(model, batches, folder, device=device))
            teacher_stream = during.enter_context(BlockStream(teacher, batches, folder, device=device))
            teacher_inputs = None
            if settings.student_inputs < 1:
                teacher_inputs = StatesFile(folder)
                during.callback(teacher_inputs.close)
            pair = _Pair(student_stream, teacher_stream, teacher_inputs, num_trained // settings.sequences_per_step)
            for index, block in enumerate(blocks):
                begun = time.monotonic()
                _arrive(pair, index)
                if index == len(reports):
                    generator = torch.Generator().manual_seed(seed + 1_000_003 * index)
                    before, after = _reconstruct_(pair, index, settings, generator)
                    report = BlockReport(
                        block=index,
                        teacher_block=pair.matched[index],
                        relative_error_before=before,
                        relative_error_after=after,
                        is_better=after < before,
                        seconds=time.monotonic() - begun,
                    )
                    if work_dir is not None:
                        _keep_block(folder, block, report)
                    reports.append(report)
                    if not report.is_better:
                        messages(f"block {index} is no better on held-out windows, and keeps its weights")
                    if progress is not None:
                        progress(report)
                if index + 1 < len(blocks):
                    pair.student.advance(index)
    return ReconstructionLog(
        steps=settings.steps,
        tokens=settings.steps * settings.sequences_per_step * tokens.shape[1],
        num_windows=len(tokens),
        num_held_out=len(tokens) - num_trained,
        state_bytes=needed,
        seconds=seconds + time.monotonic() - started,
        resumed_at_block=len(done) or None,
        blocks=reports,
    )


def first_windows(data: TrainData, sequence_length: int, seed: int, num_windows: int) -> Tensor:
    """The first windows of a training on `data`, (at most num_windows, sequence_length); none is there twice.

    Raises:
        RequestError: there are fewer tokens than one window.
    """
    windows = data.windows(sequence_length, seed)
    return torch.stack([windows[number]["input_ids"] for number in range(min(num_windows, len(windows)))])


def num_tokens_read(healing: Healing, reconstruction: Reconstruction) -> int:
    """How many tokens of text a reconstruction and the healing after it need; both begin with the same."""
    windows = reconstruction.windows if reconstruction.steps else 0
    return max(healing.num_tokens, windows * healing.sequence_length)


def has_blocks(work_dir: Path) -> bool:
    """Whether a reconstruction has left blocks that are done in its working folder."""
    return any((work_dir / FOLDER).glob("block-*"))


# ---- one block ----


@dataclass(frozen=True)
class _Pair:
    """Student and teacher on the same parts of the data, of which the first `num_trained` are trained on.

    Before block i the student's states are what its block i reads. Once the pair has arrived there the teacher's are
    what its matching block gives, and `teacher_inputs` has what is read in the teacher at the student's place.
    """

    student: BlockStream
    teacher: BlockStream
    teacher_inputs: StatesFile | None
    num_trained: int

    @property
    def matched(self) -> list[int]:
        """The teacher's block for each of the student's."""
        return match_blocks(self.student.num_blocks, self.teacher.num_blocks)

    def wanted(self, number: int) -> Tensor:
        """h of a part (sequences, sequence_length, width)."""
        return self.teacher.states.read(0, number)


def _arrive(pair: _Pair, index: int) -> None:
    """Take the teacher through the blocks that the student's block `index` stands for."""
    if pair.teacher_inputs is not None:
        for number in range(len(pair.teacher.parts)):
            pair.teacher_inputs.write(0, number, pair.wanted(number))
    first = pair.matched[index - 1] + 1 if index else 0
    for passed in range(first, pair.matched[index] + 1):
        pair.teacher.advance(passed)


def _reconstruct_(pair: _Pair, index: int, settings: Reconstruction, generator: torch.Generator) -> tuple[float, float]:
    """Train the block, and undo that if it is no better: its relative error before and after."""
    block = pair.student.blocks[index]
    before = {name: value.clone() for name, value in block.state_dict().items()}
    error = _held_out_error(pair, index)
    with healing_parametrizations(block):
        _train_(pair, index, settings, generator)
    trained = _held_out_error(pair, index)
    if trained < error:
        return error, trained
    block.load_state_dict(before)
    return error, error


def _train_(pair: _Pair, index: int, settings: Reconstruction, generator: torch.Generator) -> None:
    """The steps of AdamW on state_loss, in units of that of the first step."""
    trained = _trained_parameters(pair.student.blocks[index], settings)
    if not trained:
        return
    rates = learning_rates(
        Healing(
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            final_learning_rate=settings.final_learning_rate,
            warmup_steps=settings.warmup_steps,
        )
    )
    scale: Tensor | None = None
    with pair.student.ready(index) as block, torch.enable_grad():
        optimizer = torch.optim.AdamW([each.requires_grad_() for each in trained], weight_decay=0.0)
        for rate, (number, reads_student) in zip(rates, _steps(pair, settings, generator), strict=False):
            optimizer.param_groups[0]["lr"] = rate
            read = None if reads_student else pair.teacher_inputs.read(0, number)  # type: ignore[union-attr]
            given = pair.student.output(block, index, number, read)
            loss = state_loss(given, pair.wanted(number).to(given.device))
            if scale is None:
                scale = loss.detach().clamp_min(torch.finfo(loss.dtype).tiny)
            optimizer.zero_grad()
            (loss / scale).backward()
            optimizer.step()
        optimizer.zero_grad()


def _steps(pair: _Pair, settings: Reconstruction, generator: torch.Generator) -> Iterator[tuple[int, bool]]:
    """Of each step without end, the part of the data and whether the student's states are read; epoch by epoch."""
    while True:
        for number in torch.randperm(pair.num_trained, generator=generator).tolist():
            yield number, torch.rand((), generator=generator).item() < settings.student_inputs


def _trained_parameters(block: nn.Module, settings: Reconstruction) -> list[nn.Parameter]:
    """Those of the block that are trained; none that was frozen before."""
    modules = [block] if settings.trains == "all" else list(structured_layers(block).values())
    found = {id(each): each for module in modules for each in module.parameters() if each.requires_grad}
    return list(found.values())


def _held_out_error(pair: _Pair, index: int) -> float:
    """(E‖f(x̃) − h‖² / E‖h‖²)^½ on the held-out parts."""
    error, energy = 0.0, 0.0
    with pair.student.ready(index) as block:
        for number in range(pair.num_trained, len(pair.student.parts)):
            given = pair.student.output(block, index, number)
            wanted = pair.wanted(number).to(given.device).double()
            error += (given.double() - wanted).square().sum().item()
            energy += wanted.square().sum().item()
    return (error / max(energy, torch.finfo(torch.float64).tiny)) ** 0.5


# ---- what is asked for ----


def _checked_blocks(model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor) -> list[nn.Module]:
    """The student's blocks."""
    of_each = []
    for each in (model, teacher):
        prefix = block_prefix(each)
        if prefix is None:
            raise RequestError(
                f"reconstruction: the blocks of a model of type {each.config.model_type!r} are not known; known types "
                f"are {', '.join(FAMILIES)}"
            )
        of_each.append(list(each.get_submodule(prefix)))  # type: ignore[call-overload]
        known, limit = num_embeddings(each), longest_context(each)
        if known is not None and tokens.max() >= known:
            raise RequestError(f"token {tokens.max().item()} in the text: the model knows {known} tokens")
        if limit is not None and tokens.shape[1] > limit:
            raise RequestError(
                f"reconstruction: sequences of {tokens.shape[1]} tokens: the model reads at most {limit}"
            )
    blocks, teacher_blocks = of_each
    widths = model.config.hidden_size, teacher.config.hidden_size
    if widths[0] != widths[1]:
        raise RequestError(f"reconstruction: hidden_size is {widths[0]} in the student and {widths[1]} in the teacher")
    if len(blocks) > len(teacher_blocks):
        raise RequestError(
            f"reconstruction: the student has {len(blocks)} blocks and the teacher {len(teacher_blocks)}; it needs as "
            "many at least"
        )
    return blocks


def _num_trained(num_windows: int, settings: Reconstruction) -> int:
    """How many windows are trained on: whole steps of those that need not be held out."""
    num_held_out = max(1, round(settings.held_out * num_windows))
    num_trained = (num_windows - num_held_out) // settings.sequences_per_step * settings.sequences_per_step
    if num_trained < 1:
        raise RequestError(
            f"reconstruction: {num_windows} windows, of which {num_held_out} are held out, leave no step of "
            f"{settings.sequences_per_step} sequences"
        )
    return num_trained


# ---- what is kept ----


def _described(
    model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, settings: Reconstruction, seed: int
) -> dict[str, Any]:
    """All that decides what becomes of the blocks."""
    weights = {
        name: sha256([*each.named_parameters(), *each.named_buffers()])
        for name, each in {"student": model, "teacher": teacher}.items()
    }
    named = {f"reconstruction.{name}": value for name, value in settings.model_dump(mode="json").items()}
    return {"seed": seed, "windows": sha256([("ids", tokens)]), **weights, **named}


def _blocks_done(folder: Path, described: dict[str, Any], resume: bool, messages: Callable[[str], None]) -> list[Path]:
    """The folders of the first blocks that are done, if they are to be used; all others go."""
    note = folder / SETTINGS
    done: list[Path] = []
    if resume and note.is_file():
        if changed := differences(json.loads(note.read_text(encoding="utf-8")), described):
            raise RequestError(
                f"{str(folder)!r} holds blocks of another reconstruction: {'; '.join(changed.values())}; --overwrite "
                "without --resume drops them"
            )
        while (kept := _block_folder(folder, len(done))).is_dir():
            if damage := find_damage(kept):
                messages(f"{str(kept)!r} is damaged, and the reconstruction goes on before it: {damage}")
                break
            done.append(kept)
    for other in folder.glob("block-*"):
        if other not in done:
            retire(other)
    write_whole(note, json.dumps(described, indent=1))
    return done


def _block_folder(folder: Path, index: int) -> Path:
    return folder / f"block-{index}"


def _keep_block(folder: Path, block: nn.Module, report: BlockReport) -> None:
    """Keep a block that is done; the folder is there whole or not at all."""
    partial_folder = folder / PARTIAL
    try:
        partial_folder.mkdir()
        save_model(block, str(partial_folder / _WEIGHTS))
        (partial_folder / _REPORT).write_text(report.model_dump_json(), encoding="utf-8")
        publish(partial_folder, _block_folder(folder, report.block))
    except (OSError, SafetensorError) as error:
        raise WorkError(f"block {report.block} could not be kept in {str(folder)!r}: {error}") from error


def _load_block_(block: nn.Module, kept: Path) -> BlockReport:
    """Give the block the weights that it had when it was done."""
    load_model(block, kept / _WEIGHTS)
    return BlockReport.model_validate_json((kept / _REPORT).read_text(encoding="utf-8"))
