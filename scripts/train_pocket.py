"""Make `pocket`, the bundled GPT-2-architecture model: its text, its tokenizer, its weights; and others like it.

The three steps, in order, from the root of the repository (BOOKS is the folder of public-domain books
described in src/kronpress/pocket/SOURCES.md):

    python scripts/train_pocket.py text      BOOKS             writes src/kronpress/pocket/text/
    python scripts/train_pocket.py tokens    BOOKS --work DIR  writes the tokenizer, and DIR/tokens.bin
    python scripts/train_pocket.py train           --work DIR  writes the weights and training.jsonl

`train` saves DIR/latest.pt as it goes and continues from it when started again, with more tokens too. It runs
in one process or, under torchrun, in several that share each step; on a CPU one process of one thread per
core is the fastest (OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 ...). The weights bundled in the end are those
with the lowest loss on the bundled validation books; the test books are never read here. `pocket` itself was made by

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 scripts/train_pocket.py train --work DIR --total-tokens 70200000

after a first part of 16 million tokens whose rate had gone down to zero (the same without torchrun and with
--total-tokens 16000000). `train --architecture llama --width 128 --heads 4 --out FOLDER` makes a Llama-kind model of
1.6 million parameters with the same tokenizer, for measurements on a second architecture.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

POCKET = Path(__file__).parent.parent / "src" / "kronpress" / "pocket"
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT_TOKENS = 256
# Whole books, named by their file and place in it. No book is in two parts, and the books of
# validation.txt.xz are in no training file.
BUNDLED_BOOKS = {
    "heal": ("train_00.txt.xz", (6, 7, 8, 22)),
    "validation": ("validation.txt.xz", (4, 15, 23)),
    "test": ("validation.txt.xz", (0, 8, 18)),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Books = Annotated[Path, typer.Argument(exists=True, file_okay=False)]
Work = Annotated[Path, typer.Option(help="folder for the token file and the training checkpoint")]


def read_books(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [book.strip("\n") for book in file.read().split(END_OF_TEXT) if book.strip()]


@app.command()
def text(books: Books) -> None:
    """Write the three bundled parts: heal, validation and test."""
    for part, (name, places) in BUNDLED_BOOKS.items():
        shelf = read_books(books / name)
        path = POCKET / "text" / f"{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"\n{END_OF_TEXT}\n".join(shelf[place] for place in places) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size} bytes")


@app.command()
def tokens(books: Books, work: Work) -> None:
    """Fit the byte-level BPE on one training file and tokenise all of them."""
    shelves = [read_books(path) for path in sorted(books.glob("train_*.txt.xz"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(shelves[0], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT_TOKENS,
    ).save_pretrained(POCKET)

    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    work.mkdir(parents=True, exist_ok=True)
    count = 0
    with (work / "tokens.bin").open("wb") as file:
        for shelf in shelves:
            for book in shelf:
                ids = np.array([*tokenizer.encode(book).ids, end_of_text], dtype=np.uint16)
                file.write(ids.tobytes())
                count += len(ids)
            print(f"{count} tokens", flush=True)


def model_config(architecture: str, width: int, layers: int, heads: int) -> PreTrainedConfig:
    """GPT-2 without dropout, or Llama with grouped queries and a tied head."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=CONTEXT_TOKENS,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ends,
        )
    if architecture == "llama":
        return LlamaConfig(
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=CONTEXT_TOKENS,
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            tie_word_embeddings=True,
            **ends,
        )
    raise SystemExit(f"architecture {architecture!r}: gpt2 or llama")


def average_gradients_(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one exchange."""
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(gradients)
    gradients /= dist.get_world_size()
    for p, mean in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(mean.view_as(p))


@app.command()
def train(
    work: Work,
    out: Annotated[Path, typer.Option(help="folder of the weights and the log")] = POCKET,
    architecture: Annotated[str, typer.Option(help="gpt2 or llama")] = "gpt2",
    total_tokens: Annotated[int, typer.Option(help="training tokens, all steps together")] = 16_000_000,
    width: int = 192,
    layers: int = 6,
    heads: int = 6,
    sequences_per_step: int = 16,
    learning_rate: float = 3e-3,
    warmup_fraction: float = 0.02,
    weight_decay: float = 0.1,
    validate_every: Annotated[int, typer.Option(help="steps between validations")] = 250,
    seed: int = 0,
) -> None:
    """Train with AdamW, linear warm-up and linear decay to zero; bfloat16 autocast, one compiled loss."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if sequences_per_step % processes:
        raise SystemExit(f"{sequences_per_step} sequences a step do not divide over {processes} processes")
    stream = np.memmap(work / "tokens.bin", dtype=np.uint16, mode="r")
    window = CONTEXT_TOKENS + 1
    # One pass at most: disjoint windows in a seeded order.
    starts = np.random.default_rng(seed).permutation((len(stream) - 1) // CONTEXT_TOKENS) * CONTEXT_TOKENS
    steps = total_tokens // (sequences_per_step * CONTEXT_TOKENS)
    if steps * sequences_per_step > len(starts):
        raise SystemExit(f"{total_tokens} tokens asked for, {len(stream)} there")

    config = model_config(architecture, width, layers, heads)
    # Compiled, at 256 tokens and 32 channels a head, the written-out attention is the faster one on a CPU.
    attention = "eager" if device == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(device)
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = max(1, round(warmup_fraction * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )

    def nll(batch: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(batch[:, :-1], use_cache=False).last_hidden_state
        logits = F.linear(hidden, model.get_output_embeddings().weight)
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    compiled_nll = torch.compile(nll)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(POCKET)
    books = (POCKET / "text" / "validation.txt").read_text(encoding="utf-8")
    validation_ids = torch.tensor(tokenizer(books.replace(f"\n{END_OF_TEXT}\n", END_OF_TEXT))["input_ids"])
    validation = validation_ids[: (len(validation_ids) // window) * window].view(-1, window)

    def validation_loss() -> float:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            losses = [
                compiled_nll(batch.to(device))
                for batch in validation.split(sequences_per_step)
                if len(batch) == sequences_per_step
            ]
        return torch.stack(losses).mean().item()

    latest, step, best = work / "latest.pt", 0, math.inf
    log = out / "training.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    if latest.exists():
        state = torch.load(latest, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, best = state["step"], state["best"]
        if rank == 0:
            kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
            log.write_text("".join(line + "\n" for line in kept))
            print(f"continuing from step {step}", flush=True)
    elif rank == 0:
        log.write_text("")

    since, recent = time.monotonic(), []
    while step < steps:
        chosen = starts[step * sequences_per_step : (step + 1) * sequences_per_step][rank::processes]
        batch = torch.from_numpy(np.stack([stream[s : s + window] for s in chosen]).astype(np.int64)).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = compiled_nll(batch)
        loss.backward()
        if processes > 1:
            average_gradients_(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        step += 1
        recent.append(loss.detach())
        if rank == 0 and (step % validate_every == 0 or step == steps):
            row = {
                "step": step,
                "tokens": step * sequences_per_step * CONTEXT_TOKENS,
                "train_nats": round(torch.stack(recent).mean().item(), 4),
                "validation_nats": round(validation_loss(), 4),
                "learning_rate": schedule.get_last_lr()[0],
                "seconds": round(time.monotonic() - since, 1),
            }
            since, recent = time.monotonic(), []
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            if row["validation_nats"] < best:
                best = row["validation_nats"]
                # 16 bits: half of the bytes, and float16 keeps three more bits of each weight than bfloat16.
                half = AutoModelForCausalLM.from_config(config).half()
                half.load_state_dict(model.state_dict())
                half.save_pretrained(out)
                if out != POCKET:
                    tokenizer.save_pretrained(out)
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step,
                    "best": best,
                },
                latest.with_suffix(".partial"),
            )
            latest.with_suffix(".partial").replace(latest)


if __name__ == "__main__":
    app()
