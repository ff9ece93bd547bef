"""One process and several, with and without accumulation and splitting of weights, are the same training and the same
fits; `samples/together.py` is what the processes do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import together
from samples.networks import CONFIGS, VOCABULARY, network

import kronpress as kp
from kronpress.checkpoint import save_checkpoint
from kronpress.healing.blocks import checkpointed
from kronpress.processes import any_of, from_main, in_main, num_processes, process_number, summed

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
# Of losses and weights in float32 whose sums are taken in another order, after a few steps of Adam.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def call(command: Sequence[Any], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command, with all processes that it starts: none is left behind."""
    with subprocess.Popen(
        list(map(str, command)),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # a launcher hands it on
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(40)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """What one process leaves, and two."""
    made = []
    for launcher in ((sys.executable,), TORCHRUN):
        folder = tmp_path_factory.mktemp("together")
        done = call([*launcher, TESTS / "samples" / "together.py", folder, "all"])
        assert done.returncode == 0, done.stderr[-4000:]
        made.append(folder)
    return made[0], made[1]


def story(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def assert_same(expected: tuple[Path, str], actual: tuple[Path, str]) -> None:
    losses = [
        [{key: value for key, value in row.items() if value is not None} for row in story(*each)["rows"]]
        for each in (expected, actual)
    ]
    assert len(losses[0]) == 4
    for one, two in zip(*losses, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    weights = [load_file(folder / f"{name}.safetensors") for folder, name in (expected, actual)]
    torch.testing.assert_close(weights[1], weights[0], **CLOSE)


@pytest.mark.parametrize("name", together.HEALINGS)
def test_all_ways_of_computing_a_training_give_one_loss_curve(folders, name):
    one, two = folders
    assert_same((one, "plain"), (one, name))
    assert_same((one, "plain"), (two, name))


@pytest.mark.parametrize("name", ["inside", "answers"])
def test_inner_terms_and_masks_are_means_over_all_processes(folders, name):
    one, two = folders
    assert_same((one, name), (two, name))


def test_masks_count_over_all_processes_where_weights_are_split_too(folders):
    one, two = folders
    assert_same((one, "answers"), (two, "sharded answers"))


@pytest.mark.parametrize("name", ["resumed", "resumed sharded"])
def test_a_training_that_was_stopped_in_several_processes_goes_on(folders, name):
    one, two = folders
    assert story(two, name)["resumed_at"] == story(one, name)["resumed_at"] == 2
    assert_same((one, "plain"), (two, name))


def test_fits_that_are_spread_are_bit_for_bit_those_of_one_process(folders):
    one, two = folders
    assert story(one, "compressed") == story(two, "compressed")
    weights = [load_file(folder / "compressed.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_process_that_dies_ends_the_others(tmp_path):
    done = call([*TORCHRUN, TESTS / "samples" / "together.py", tmp_path, "die"], timeout=120)
    assert done.returncode != 0
    assert re.search(r"exitcode\s*: 9", done.stderr), done.stderr[-4000:]
    assert not (tmp_path / "unfinished.json").exists()


def test_the_command_line_compresses_and_heals_into_one_folder(tmp_path, tiny_tokenizer):
    dense, compressed, healed = (tmp_path / name for name in ("dense", "compressed", "healed"))
    model = network("mistral", torch.float32, vocab_size=300)
    save_checkpoint(model, tiny_tokenizer, dense, dtype=torch.float32)
    text = tmp_path / "text.txt"
    text.write_text("The winter went by like every other winter, and nobody asked. " * 200)
    done = call(
        [*ACCELERATE, "-m", "kronpress", "compress", dense, "--recipe", "low-rank", "--out", compressed, "--json"]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["out"] == str(compressed)  # one document, of the main process
    changes = {"max_steps": 3, "sequences_per_step": 4, "sequence_length": 16, "save_steps": 2, "learning_rate": 1e-2}
    settings = [part for name, value in changes.items() for part in ("--set", f"healing.{name}={value}")]
    heal = ["-m", "kronpress", "heal", compressed, "--teacher", dense, "--data", text, *settings, "--json"]
    done = call([*TORCHRUN, *heal, "--out", healed])
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [row["loss"] for row in json.loads(done.stdout)["healing"]["rows"]]
    assert done.stderr.count("step 3/3") == 1
    assert done.stderr.count("healing takes about") == 1

    alone = call([sys.executable, *heal, "--out", tmp_path / "alone"])
    assert losses == pytest.approx([row["loss"] for row in json.loads(alone.stdout)["healing"]["rows"]], rel=1e-4)
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path / "alone", healed)]
    torch.testing.assert_close(files[1], files[0], **CLOSE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "compressed", "dense", "healed", "text.txt"]


# ---- one process ----


def test_one_process_needs_no_group():
    assert (num_processes(), process_number()) == (1, 0)
    assert from_main(lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert summed([1.0, 2.5]) == [1.0, 2.5]
    assert (any_of(False), any_of(True)) == (False, True)
    assert not torch.distributed.is_initialized()


def test_what_only_the_main_process_enters_is_left_in_any_case(tmp_path):
    left = []

    class Entered:
        def __enter__(self) -> Path:
            return tmp_path

        def __exit__(self, *_: Any) -> None:
            left.append(True)

    with in_main(Entered) as path:
        assert path == tmp_path
    with pytest.raises(ValueError, match="inside"), in_main(Entered):
        raise ValueError("inside")
    assert left == [True, True]


# ---- how it is computed, in one process ----


def heal_one(**changes: Any) -> tuple[list[float], Any]:
    model = together.student()
    changes = {"max_steps": 3, "distillation_weight": 1.0, **changes}
    log = kp.heal_(model, network(together.FAMILY, torch.float32), together.TOKENS, together.schedule(**changes))
    return [row.loss for row in log.rows], model


@pytest.mark.parametrize("family", CONFIGS)
def test_checkpointed_blocks_give_the_same_gradients_keep_less_and_are_put_back(family):
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients(model: Any) -> tuple[dict[str, Any], int]:
        kept = 0

        def pack(tensor: Any) -> Any:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return {name: each.grad for name, each in model.named_parameters()}, kept

    expected, all_kept = gradients(network(family))
    model = network(family)
    with checkpointed(model):
        actual, kept = gradients(model)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert kept < all_kept / 2
    assert all("forward" not in vars(module) for module in model.modules())


def test_bfloat16_is_that_of_products_and_weights_stay_single():
    losses, _ = heal_one()
    rounded, model = heal_one(precision="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert rounded != losses
    assert rounded == pytest.approx(losses, rel=0.05)
    # Steps far smaller than half a digit of bfloat16 are not lost.
    before = dict(together.student().named_parameters())
    _, model = heal_one(precision="bfloat16", learning_rate=1e-6)
    moved = [(each != before[name]).float().mean().item() for name, each in model.named_parameters()]
    assert min(moved) > 0.5


def test_compiled_blocks_give_the_same_losses(monkeypatch):
    compiled = []
    compile_ = torch.compile

    def counted(function: Any, **_: Any) -> Any:
        compiled.append(function)
        return compile_(function, backend="aot_eager")  # traced and differentiated alike, without a compiler

    monkeypatch.setattr(torch, "compile", counted)
    losses, expected = heal_one()
    assert not compiled
    others, model = heal_one(compile=True)
    assert len(compiled) == 4  # two blocks of the student, two of the teacher
    assert others == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()), **CLOSE)
    assert all("forward" not in vars(module) for module in model.modules())
