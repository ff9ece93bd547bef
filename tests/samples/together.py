"""What the processes of tests/test_processes.py do: `python together.py FOLDER`, alone or under a launcher.

The main process writes the losses and weights of each case into the folder; every process makes sure that it has the
main one's weights.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from reference.healing import TOKENS, schedule
from safetensors.torch import save_model

import kronpress as kp
from kronpress.errors import RequestError, Terminated
from kronpress.healing.blocks import is_sharded
from kronpress.healing.trainer import HealingTrainer
from kronpress.processes import from_main, give_, is_main, join, leave, num_processes, process_number, wait_for_all
from kronpress.tokens import TrainData
from kronpress.tokens.streams import Piece, TokenStream
from samples.networks import network

# With a tied head. It has no biases: keys' have no gradient, and Adam makes steps of their rounding errors.
FAMILY = "mistral"
DISTILLED = {"distillation_weight": 1.0, "max_steps": 4, "validation_data": "x", "validation_tokens": 80}
# The first is what all others are to be equal to.
HEALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "passes": {"sequences_per_pass": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "sharded": {"sharded": True},
    "sharded passes": {"sharded": True, "sequences_per_pass": 1, "gradient_checkpointing": True},
    "all logits": {"chunk_tokens": 0},
}
INSIDE = {"hidden_weight": 0.5, "attention_weight": 0.5, "embedding_weight": 0.5, "sequences_per_pass": 1}


def student() -> Any:
    """With sums whose scale is learnt by itself while they are healed, and tied to its embedding."""
    recipe = kp.Recipe(spec={"right_shape": (2, 2), "num_terms": 2}, fit={"start": "adaptive"})
    model = network(FAMILY, torch.float32)
    kp.compress_(model, kp.make_plan(model, recipe))
    return model


def answers() -> TrainData:
    """Of very different numbers of tokens that count in each sequence."""
    counts = torch.arange(1024) % 37 < torch.arange(1024) // 100
    return TrainData((TokenStream([Piece((2 * TOKENS[:1024] + counts).numpy(), masked=True)]),))


def keep(folder: Path, name: str, model: Any, **story: Any) -> None:
    mine = [parameter.detach().clone() for parameter in model.parameters()]
    given = [parameter.detach().clone() for parameter in model.parameters()]
    give_(given)
    assert all(map(torch.equal, mine, given)), f"{name}: process {process_number()} has other weights than the main one"
    assert not is_sharded(model)
    assert "forward" not in vars(model)
    if is_main():
        save_model(model, str(folder / f"{name}.safetensors"))
        (folder / f"{name}.json").write_text(json.dumps(story))


def heal(folder: Path, name: str, data: Any = TOKENS, work: Path | None = None, **changes: Any) -> None:
    model = student()
    told: list[int] = []
    log = kp.heal_(
        model,
        network(FAMILY, torch.float32),
        data,
        schedule(**{**DISTILLED, **changes}),
        validation_tokens=TOKENS,
        work_dir=work,
        resume=work is not None,
        progress=lambda row: told.append(row.step),
    )
    assert bool(told) == is_main(), f"{name}: process {process_number()} was told {told}"
    rows = [row.model_dump(exclude={"tokens_per_second", "seconds_left"}) for row in log.rows]
    keep(folder, name, model, rows=rows, resumed_at=log.resumed_at_step)


def compress(folder: Path) -> None:
    model = network("llama", torch.float32)
    recipe = kp.Recipe(structure="low_rank", targets="blocks", spec={"rank": 3})
    reports = kp.compress_(model, kp.make_plan(model, recipe))
    keep(folder, "compressed", model, reports={name: report.model_dump() for name, report in reports.items()})


def refuse() -> None:
    """A step that the processes cannot share; whatever the main process alone is refused."""
    if num_processes() == 1:
        return
    for asked in (lambda: heal(Path(), "refused", sequences_per_step=3), lambda: from_main(_refused)):
        try:
            asked()
        except RequestError as error:
            assert "a multiple of 2" in str(error) or str(error) == "no"
        else:
            raise AssertionError("nothing was refused")


def _refused() -> None:
    raise RequestError("no")


def stop(work: Path) -> None:
    """Only the last process gets the signal, in the second step, and all stop together behind it."""
    clip = HealingTrainer._clip_grad_norm

    def clip_and_signal(trainer: Any, model: Any) -> Any:
        if trainer.state.global_step == 1 and process_number() == num_processes() - 1:
            signal.raise_signal(signal.SIGTERM)
        return clip(trainer, model)

    HealingTrainer._clip_grad_norm = clip_and_signal  # type: ignore[method-assign]
    try:
        heal(work, "stopped", work=work, save_steps=4)
    except Terminated as error:
        assert "after step 2 of 4" in str(error)
    else:
        raise AssertionError("the training went on")
    finally:
        HealingTrainer._clip_grad_norm = clip  # type: ignore[method-assign]
    wait_for_all()
    assert (work / "checkpoint-2").is_dir()


def die() -> None:
    """The last process is gone in the second step, as one that is killed for its memory."""
    step = HealingTrainer.training_step

    def step_and_die(trainer: Any, *args: Any) -> Any:
        if trainer.state.global_step == 1 and process_number() == num_processes() - 1:
            os._exit(9)
        return step(trainer, *args)

    HealingTrainer.training_step = step_and_die  # type: ignore[method-assign]
    heal(Path(), "unfinished")


def main(folder: Path, case: str) -> None:
    join()
    if case == "die":
        return die()
    for name, changes in HEALINGS.items():
        heal(folder, name, **changes)
    heal(folder, "inside", **INSIDE)
    heal(folder, "answers", answers(), sequences_per_pass=1)
    heal(folder, "sharded answers", answers(), sharded=True)
    compress(folder)
    refuse()
    stop(folder / "work")
    heal(folder, "resumed", work=folder / "work", save_steps=4)
    stop(folder / "sharded work")
    heal(folder, "resumed sharded", work=folder / "sharded work", save_steps=4, sharded=True)
    leave()
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
