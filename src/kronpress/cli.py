"""The command line: arguments in, one call each, tables or one JSON document out."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import datasets
import typer
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from kronpress import chat as chatting
from kronpress.benchmark import DEFAULT_NEW_TOKENS, DEFAULT_ROUNDS, RIVALS, benchmark
from kronpress.checkpoint import (
    attached_plan,
    base_of,
    check_writable,
    load_config,
    load_model,
    save_checkpoint,
    story_of,
)
from kronpress.doctor import diagnose
from kronpress.errors import RequestError, Terminated, WorkError, unknown_name
from kronpress.evaluation import LONGEST_DEFAULT_WINDOW, PROTOCOLS, check_vocabulary, evaluate
from kronpress.export import FORMATS, export_checkpoint
from kronpress.families import GEOMETRIES
from kronpress.harness import find_tasks, run_tasks
from kronpress.healing import first_windows, heal_, num_tokens_read, reconstruct_blocks_
from kronpress.hub import Upload, check_repo_id, check_token, plan_upload
from kronpress.hub import push as push_upload
from kronpress.model_card import Story, plan_fields, step, training
from kronpress.pipeline import (
    Messages,
    calibrated,
    compress_stages_,
    healing_folder,
    planned_memory,
    validation_tokens,
    within_context,
)
from kronpress.pipeline import run as run_pipeline
from kronpress.pipeline import sweep as sweep_runs
from kronpress.planning import make_plan
from kronpress.processes import from_main, in_main, is_main, join, leave, num_processes, process_number, wait_for_all
from kronpress.recipe import POCKET, dump_recipe, load_recipe, recipe_names
from kronpress.report import (
    answer_columns,
    answer_figures,
    benchmark_tables,
    block_line,
    doctor_tables,
    evaluation_tables,
    fit_,
    healing_line,
    layers_table,
    plan_tables,
    results_table,
    tasks_table,
    wrapped,
)
from kronpress.reporting import Comparison, comparison_json, comparison_terminal, write_comparison, write_report
from kronpress.reporting import compare as compare_runs
from kronpress.spectrum import check_plot_path, plot_spectrum, spectrum, spectrum_tables
from kronpress.streaming import compress_streaming
from kronpress.tokens import load_running_text, load_train_data

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make a pretrained transformer language model smaller and faster with Kronecker products.",
    epilog="Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 143 stopped by SIGTERM after saving. "
    "--debug shows the traceback of an error.",
)


def make_console(stderr: bool = False) -> Console:
    """Names and texts may hold square brackets, so nothing printed is markup. With NO_COLOR nothing is bold either."""
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(
        stderr=stderr,
        highlight=False,
        soft_wrap=True,
        markup=False,
        emoji=False,
        color_system=None if plain else "auto",
    )


out_console, err_console = make_console(), make_console(stderr=True)
# What --json prints: one document, when all is done.
_documents: list[Any] = []

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or `pocket`, the bundled model")]
Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="a compressed checkpoint, or a run directory")]
RecipeOption = Annotated[str, typer.Option("--recipe", help="built-in recipe or YAML file")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="change a recipe field")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="folder to write")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace what is in the output folder")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="go on with what was interrupted, or start it")]
AcceptOption = Annotated[
    bool, typer.Option("--accept-changes", help="with --resume, go on with the rates and weights as they are now")
]
MixedOption = Annotated[
    bool, typer.Option("--allow-mixed", help="compare runs of different teachers, texts or protocols, and say so")
]
PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO_ID", help="send the checkpoint to this repository of the Hub"),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="of the repository, if it is not there yet")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")]


def _say(text: str) -> None:
    if is_main():
        err_console.print(wrapped(text, err_console.width))


def _tell(text: str) -> None:
    out_console.print(wrapped(text, out_console.width))


def _print_table(table: Table) -> None:
    fit_(table, out_console.width)
    out_console.print(table)


DEFAULT_HEALING_TOKENS = 1_000_000
# Of `chat` on a terminal.
LEAST_WIDTH_OF_COLUMNS, FRAMES_PER_SECOND = 50, 12
MESSAGES = Messages(stage=_say, healing=lambda row: _say(healing_line(row)))


def _print_json(document: Any) -> None:
    """Print it as the one document of --json, when the command is done and nothing has failed."""
    _documents[:] = [document]


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="recipe to print")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the built-in recipes, or print one."""
    if as_json:
        shown = [load_recipe(each).model_dump(mode="json") for each in ([name] if name else recipe_names())]
        _print_json(shown[0] if name else shown)
        return
    if name is not None:
        print(dump_recipe(load_recipe(name)), end="")
        return
    listed = Table.grid(padding=(0, 2))
    for each in recipe_names():
        listed.add_row(each, load_recipe(each).description)
    _print_table(listed)


@app.command()
def plan(
    model: Model,
    recipe: RecipeOption,
    changes: SetOption = None,
    with_spectrum: Annotated[
        bool,
        typer.Option("--spectrum", help="also show what each structure captures of the weights at equal parameters"),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw the spectrum into a .png, .svg or .pdf file")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what would be replaced by what; sizes and FLOPs; touches no weight.

    MODEL may also be a bare geometry, such as gpt2, gpt2-medium or llama-2-7b. --spectrum, and a recipe whose
    allocation is measured, need the model's weights; where the recipe fits to real inputs they are calibrated first.
    Of a recipe of stages the plan is that of the last, and the spectrum of what all stages target.
    """
    if plot is not None:
        if not with_spectrum:
            raise RequestError(f"--plot {str(plot)!r} draws the spectrum: give --spectrum as well")
        check_plot_path(plot)
    resolved = load_recipe(recipe, changes, model)
    measured = None
    if resolved.allocation != "uniform" or with_spectrum:
        if model in GEOMETRIES:
            reason = (
                "--spectrum needs weights, and moments if the recipe fits to inputs"
                if with_spectrum
                else f"recipe {resolved.name!r} measures its allocation"
            )
            raise RequestError(f"{reason}: {model!r} by name alone has no weights")
        loaded = load_model(model, resolved.revision)
        resolved = within_context(resolved, loaded.model.config)
        at_once = resolved.in_one_stage
        moments, _ = calibrated(at_once, loaded, _say)
        made = make_plan(loaded.model, resolved, moments)
        if with_spectrum:
            measured = spectrum(
                loaded.model, at_once, moments, lambda name, done, total: _say(f"  {done + 1}/{total} {name}")
            )
    else:
        config = load_config(model, resolved.revision)
        resolved = within_context(resolved, config)
        made = make_plan(config, resolved)
        expected = None if as_json else planned_memory(config, made, resolved)
        if expected is not None:
            _say(f"healing takes about {expected}")
    if measured is not None and plot is not None:
        plot_spectrum(measured, plot)
    if as_json:
        document = made.model_dump(mode="json")
        if measured is not None:
            document["spectrum"] = measured.model_dump(mode="json")
        _print_json(document)
        return
    for table in plan_tables(made):
        _print_table(table)
    if measured is None:
        return
    for table in spectrum_tables(measured):
        out_console.print()
        _print_table(table)
    if moments is None:
        _tell(f"recipe {resolved.name!r} is not calibrated: --set weighting.metric=input adds the energy of outputs")
    if plot is not None:
        out_console.print(f"plot: {plot}")


@app.command()
def compress(
    model: Model,
    recipe: RecipeOption,
    out: OutOption,
    calibration: Annotated[
        list[str] | None, typer.Option(help="text to calibrate on, in place of the recipe's calibration.data")
    ] = None,
    changes: SetOption = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="layer by layer from the files of MODEL, which need not fit into memory")
    ] = False,
    overwrite: OverwriteOption = False,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fit and replace, without training, and write the checkpoint.

    With --streaming MODEL is a local folder of safetensors, and the recipe one that fits weights alone. Interrupted,
    the same command goes on after the last layer that was done.
    """
    join()
    from_main(lambda: check_writable(out, overwrite))
    from_main(lambda: _check_push(push_to_hub, private))
    calibrated_on = [f"calibration.data={json.dumps(calibration)}"] if calibration else []
    resolved = load_recipe(recipe, [*(changes or []), *calibrated_on], model)
    if calibration and all(part.weighting.metric == "none" for part in resolved.parts):
        raise RequestError(
            f"--calibration: recipe {resolved.name!r} fits the weights alone; set weighting.metric=input"
        )

    def progress(name: str, done: int, total: int) -> None:
        _say(f"  {done + 1}/{total} {name}")

    def story() -> Story:
        carried_out = resolved.model_dump(mode="json", exclude={"reconstruction", "healing", "evaluation", "rivals"})
        taken = step("compress", _command(), recipe=carried_out, seed=resolved.seed)
        return Story(base=base_of(model, resolved.revision), steps=[taken], plan=plan_fields(made))

    if streaming:
        if resolved.weighting.metric != "none":
            raise RequestError(f"--streaming: recipe {resolved.name!r} is calibrated, which needs the model in memory")
        made = make_plan(load_config(model, resolved.revision), resolved)
        if num_processes() > 1:
            raise RequestError(f"--streaming: works in one process, and there are {num_processes()}")
        layers = compress_streaming(model, made, out, progress=progress, overwrite=overwrite, story=story)
    else:
        loaded = load_model(model, resolved.revision)
        resolved = within_context(resolved, loaded.model.config)
        made, layers = compress_stages_(loaded, resolved, _say, progress)
        if is_main():
            save_checkpoint(loaded.model, loaded.tokenizer, out, dtype=loaded.dtype, overwrite=overwrite, story=story)
        wait_for_all()
        if not is_main():
            return
    if as_json:
        reports = {name: report.model_dump(mode="json") for name, report in layers.items()}
        _print_json({"out": str(out), "plan": made.model_dump(mode="json"), "layers": reports})
    else:
        _print_table(layers_table(layers))
        _print_table(plan_tables(made)[0])
        out_console.print(f"checkpoint: {out}")
    _push(out, push_to_hub, private)


@app.command()
def heal(
    directory: Checkpoint,
    teacher: Annotated[str, typer.Option(help="the dense model to learn from")],
    data: Annotated[list[str], typer.Option(help="built-in set, Hub data set id, or .txt, .jsonl, .parquet file")],
    out: OutOption,
    changes: SetOption = None,
    resume: ResumeOption = False,
    accept_changes: AcceptOption = False,
    overwrite: OverwriteOption = False,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a compressed checkpoint by distillation from its teacher, and write the healed one.

    Without --set healing.max_steps=N or healing.tokens=N it trains on one million tokens. With --set
    reconstruction.steps=N each block first learns alone to give what the teacher's gives. With --set
    healing.save_steps=N, and on SIGTERM, training checkpoints are kept beside DIR, from which --resume goes on.
    """
    join()
    from_main(lambda: check_writable(out, overwrite))
    from_main(lambda: _check_push(push_to_hub, private))
    for change in changes or []:
        if not change.startswith(("healing.", "reconstruction.", "seed=")) or change.startswith("healing.data"):
            raise RequestError(f"--set {change!r}: heal takes healing.* but data, reconstruction.*, and seed")
    healing: dict[str, Any] = {"data": data, "distillation_weight": 1.0, "language_model_weight": 0.0}
    if teacher != POCKET:
        limit = load_config(str(directory)).get_text_config().max_position_embeddings
        healing["sequence_length"] = min(limit, LONGEST_DEFAULT_WINDOW)
        if not any(change.startswith(("healing.max_steps=", "healing.tokens=")) for change in changes or []):
            healing["tokens"] = DEFAULT_HEALING_TOKENS
    resolved = load_recipe({"model": teacher, "healing": healing}, changes)
    num_tokens = num_tokens_read(resolved.healing, resolved.reconstruction)
    student, dense = load_model(str(directory)), load_model(teacher, resolved.revision)
    check_vocabulary(student.model, student.tokenizer)
    known = story_of(str(directory))
    tokens = load_train_data(student.tokenizer, resolved.healing.data, num_tokens, resolved.healing.sequence_length)
    validation = validation_tokens(student.tokenizer, resolved.healing)
    with in_main(lambda: healing_folder(out, resume, overwrite)) as work:
        by_blocks = None
        if resolved.reconstruction.steps:
            by_blocks = reconstruct_blocks_(
                student.model,
                dense.model,
                first_windows(tokens, resolved.healing.sequence_length, resolved.seed, resolved.reconstruction.windows),
                resolved.reconstruction,
                seed=resolved.seed,
                work_dir=work,
                resume=resume,
                progress=lambda report: _say(block_line(report)),
                messages=_say,
            )
        log = heal_(
            student.model,
            dense.model,
            tokens,
            resolved.healing,
            seed=resolved.seed,
            work_dir=work,
            resume=resume,
            accept_changes=accept_changes,
            validation_tokens=validation,
            progress=MESSAGES.healing,
            messages=_say,
        )
        if by_blocks is not None:  # whose tokens are healing's too
            log = log.model_copy(update={"tokens": log.tokens + by_blocks.tokens})

        def story() -> Story:
            before, compressed = known or Story(base=base_of(teacher, resolved.revision)), attached_plan(student.model)
            trained = training(resolved, log.num_steps, log.tokens)
            taken = step("heal", _command(), seed=resolved.seed, training=trained)
            plan = None if compressed is None else plan_fields(compressed)
            return before.after(taken).model_copy(update={"plan": plan})

        if is_main():
            save_checkpoint(
                student.model, student.tokenizer, out, dtype=student.dtype, overwrite=overwrite, story=story
            )
    if not is_main():
        return
    if as_json:
        document = {"out": str(out), "reconstruction": None, "healing": log.model_dump(mode="json")}
        if by_blocks is not None:
            document["reconstruction"] = by_blocks.model_dump(mode="json")
        _print_json(document)
    else:
        out_console.print(f"healed on {log.tokens:,} tokens in {log.seconds:.0f} s\ncheckpoint: {out}")
    _push(out, push_to_hub, private)


@app.command("eval")
def evaluate_command(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(help="built-in set, Hub data set id, or local file; `bundled` if neither it nor --tasks is given"),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="T", help="task of lm-evaluation-harness, or a .yaml file or folder of tasks"),
    ] = None,
    protocol: Annotated[str, typer.Option(help=f"how --data is measured: {', '.join(PROTOCOLS)}")] = "window",
    window: Annotated[
        int | None,
        typer.Option(help="tokens of context; if not given 1024 for krony, else the model's limit, at most 2048"),
    ] = None,
    stride: Annotated[int | None, typer.Option(help="tokens from window to window; the window if not given")] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="begin with BOS; if not given, as the protocol has it"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity and bits per byte on test text, or run benchmark tasks."""
    if tasks and not data and (protocol, window, stride, bos) != ("window", None, None, None):
        raise RequestError("--protocol, --window, --stride and --bos say how --data is measured, and none is given")
    texts = [load_running_text(name, "test") for name in data or ([] if tasks else ["bundled"])]
    found = find_tasks(tasks) if tasks else None
    loaded = load_model(model)
    metrics = {
        text.name: {
            **evaluate(loaded.model, loaded.tokenizer, text.documents, protocol, window, stride, bos).to_json(),
            "data_revision": text.revision,
        }
        for text in texts
    }
    with contextlib.redirect_stdout(sys.stderr):  # tasks may print
        task_results = run_tasks(loaded.model, loaded.tokenizer, found) if found else {}
    if as_json:
        _print_json({"model": model, "revision": loaded.revision, "metrics": metrics, "tasks": task_results})
        return
    for table in evaluation_tables(model, metrics):
        _print_table(table)
    if task_results:
        _print_table(tasks_table(model, task_results))


@app.command()
def bench(
    model: Model,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL2", help="the model to compare with, the dense one for instance")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N,N,…", help="sequences at once")] = "1",
    prompt_tokens: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="tokens of the prefill; 128, or what the context allows, if not given"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="tokens to decode")] = DEFAULT_NEW_TOKENS,
    dtype: Annotated[
        str, typer.Option(metavar="T,T,…", help="computed in: float32 or bfloat16, whatever is stored")
    ] = "float32",
    rivals: Annotated[
        str | None, typer.Option(metavar="R,R,…", help=f"to measure beside them: {', '.join(RIVALS)}")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="from the configuration alone; MODEL may be a bare geometry")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(help="with --random-weights: measure what it makes of MODEL against dense MODEL")
    ] = None,
    changes: SetOption = None,
    dense_cache: Annotated[
        str, typer.Option(metavar="on|off", help="whether structured layers may keep dense weights, where that pays")
    ] = "off",
    compiled: Annotated[bool, typer.Option("--compile", help="compile whole blocks, of all but the rivals")] = False,
    with_ways: Annotated[
        bool, typer.Option("--explain", help="also show which way each structured layer goes, and why")
    ] = False,
    rounds: Annotated[int, typer.Option(help="how often everything is measured")] = DEFAULT_ROUNDS,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch chooses if not given")] = None,
    memory: Annotated[bool, typer.Option(help="measure memory too, each model in a process of its own")] = True,
    as_json: JsonOption = False,
) -> None:
    """Measure tokens per second at prefill and decode, and peak memory, of models in turns.

    Every batch size is measured with every prompt length, and every model in every dtype. Beside each ratio stands the
    bound: what it would be if only weights were read (decode), or only multiplied by (prefill).
    """
    if changes and recipe is None:
        raise RequestError(f"--set {changes[0]!r} changes a recipe, and none is given: give --recipe")
    if dense_cache not in ("on", "off"):
        raise unknown_name("--dense-cache", dense_cache, ("on", "off"))
    result = benchmark(
        model,
        against,
        batch_sizes=_integers("--batch-size", batch_size),
        prompt_tokens=None if prompt_tokens is None else _integers("--prompt-tokens", prompt_tokens),
        new_tokens=new_tokens,
        dtypes=_words(dtype),
        rivals=_words(rivals or ""),
        random_weights=random_weights,
        recipe=None if recipe is None else load_recipe(recipe, changes, model),
        dense_cache=dense_cache == "on",
        compiled=compiled,
        with_ways=with_ways,
        rounds=rounds,
        threads=threads,
        memory=memory,
        progress=_say,
    )
    if as_json:
        _print_json(result.model_dump(mode="json"))
        return
    for table in benchmark_tables(result):
        _print_table(table)


def _words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]


def _integers(option: str, given: str) -> list[int]:
    try:
        return [int(word) for word in given.split(",")]
    except ValueError as error:
        raise RequestError(f"{option} {given!r}: must be whole numbers with commas between them, as in 1,4") from error


@app.command()
def export(
    directory: Checkpoint,
    out: OutOption,
    format: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items()))
    ] = "dense",
    overwrite: OverwriteOption = False,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a compressed checkpoint in another format."""
    _check_push(push_to_hub, private)
    export_checkpoint(str(directory), format, out, overwrite=overwrite, say=_say, command=_command())
    if as_json:
        _print_json({"out": str(out), "format": format})
    else:
        out_console.print(f"{format} checkpoint: {out}")
    _push(out, push_to_hub, private)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a checkpoint of any format, or a run directory")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME of the repository on the Hub")],
    private: PrivateOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list what would be sent, and send nothing; needs no token, no network")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Send a checkpoint with its model card to a repository of the Hugging Face Hub.

    The repository is made if it is not there. The card's lines that load the model are given the repository's name.
    """
    upload = plan_upload(directory, repo_id, private)
    if not dry_run:
        push_upload(upload)
    if as_json:
        _print_json({**upload.to_json(), "dry_run": dry_run})
        return
    _show_upload(upload, dry_run)


def _check_push(repo_id: str | None, private: bool) -> None:
    """Refuse what cannot be sent to the Hub before the work that makes it."""
    if repo_id is None:
        if private:
            raise RequestError("--private says of what kind the repository of --push-to-hub is, and none is given")
        return
    check_repo_id(repo_id)
    check_token()


def _push(out: Path, repo_id: str | None, private: bool) -> None:
    if repo_id is not None and is_main():
        _say(f"sending {out} to {repo_id}")
        upload = plan_upload(out, repo_id, private)
        push_upload(upload)
        _say(f"sent to {upload.url}")


def _show_upload(upload: Upload, is_dry_run: bool) -> None:
    for name, size in upload.files.items():
        out_console.print(f"{size:>15,}  {name}")
    out_console.print(f"{sum(upload.files.values()):>15,}  bytes in {len(upload.files)} files of {upload.folder}")
    kind = "private" if upload.private else "public"
    if is_dry_run:
        out_console.print(f"would go to {upload.url}, made {kind} if it is not there; nothing was sent")
    else:
        out_console.print(f"sent to {upload.url}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="built-in recipe or YAML file")],
    out: OutOption,
    changes: SetOption = None,
    resume: ResumeOption = False,
    accept_changes: AcceptOption = False,
    overwrite: OverwriteOption = False,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress, heal, measure and save: everything a recipe says, in one run directory."""
    join()
    from_main(lambda: _check_push(push_to_hub, private))
    results = run_pipeline(
        load_recipe(recipe, changes),
        out,
        resume=resume,
        accept_changes=accept_changes,
        overwrite=overwrite,
        messages=MESSAGES,
        command=_command(),
    )
    _show(results, out, as_json)
    _push(out, push_to_hub, private)


# Krony-PT heals by language-model loss; distillation from the dense model does better on the validation books.
DEMO_CHANGES = ["healing.distillation_weight=1", "healing.language_model_weight=0", "rivals=[low-rank, 8-bit, 4-bit]"]


@app.command()
def demo(
    out: OutOption = Path("kronpress-demo"),
    changes: SetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """The main job on the bundled model: krony-96m beside low rank at the same count, offline, in minutes."""
    recipe = load_recipe("krony-96m", [*DEMO_CHANGES, *(changes or [])], POCKET)
    results = run_pipeline(recipe, out, overwrite=overwrite, messages=MESSAGES, command=_command())
    _show(results, out, as_json)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a run directory, or its results.json")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="page to write; report.html in DIR if not given")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the page of a run anew from its results.json: one file, no network."""
    written = write_report(directory, out)
    if as_json:
        _print_json({"out": str(written)})
    else:
        out_console.print(f"report: {written}")


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="run directories")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="write comparison.html, .md, .csv and .json there")
    ] = None,
    allow_mixed: MixedOption = False,
    with_rivals: Annotated[
        bool, typer.Option("--with-rivals", help="the rivals of each run take part as well")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Rank runs, with intervals over seeds, Pareto fronts, and what differs between their recipes.

    Runs of different teachers, texts or protocols are refused. Runs that differ in their seed alone are one line.
    """
    comparison = compare_runs(directories, allow_mixed, with_rivals)
    if out is not None:
        for path in write_comparison(comparison, out):
            _say(f"comparison: {path}")
    _show_comparison(comparison, as_json)


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="built-in recipe or YAML file")],
    over: Annotated[
        list[str], typer.Option(metavar="PATH=V,V,…", help="a recipe field and its values; several make a grid")
    ],
    out: OutOption,
    changes: SetOption = None,
    resume: ResumeOption = False,
    allow_mixed: MixedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe with every combination of some fields' values, and compare the runs.

    Each run has a folder of its own in DIR. With --resume finished ones are left as they are, and values may be added.
    """
    comparison = sweep_runs(
        recipe,
        over,
        out,
        changes=changes or [],
        resume=resume,
        allow_mixed=allow_mixed,
        messages=MESSAGES,
        command=_command(),
    )
    _show_comparison(comparison, as_json)


def _show_comparison(comparison: Comparison, as_json: bool) -> None:
    if as_json:
        _print_json(comparison_json(comparison))
        return
    for line in [*comparison.mixed, *comparison.remarks]:
        _tell(line)
    for table in comparison_terminal(comparison):
        _print_table(table)


@app.command()
def doctor(
    thorough: Annotated[
        bool, typer.Option("--thorough", help="also compile a function with torch.compile, some ten seconds")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Say what is installed, what the machine has, and which fast paths are on; if not, why, and what would help.

    Everything is tried on something small. Nothing is downloaded. The exit code is 1 if something needed is broken.
    """
    found = diagnose(thorough, _say)
    if as_json:
        _print_json({"broken": found.broken, **found.model_dump(mode="json")})
    else:
        for table in doctor_tables(found):
            _print_table(table)
    for problem in found.broken:
        _say(f"kronpress: broken: {problem}")
    if not found.broken and not as_json:
        _tell("everything that is needed works")
    return 1 if found.broken else 0


@app.command()
def chat(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL2", help="the model beside it; what MODEL was made from, if it says so"),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="answer this and end; if not given, prompts are asked for")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="of each answer")] = chatting.DEFAULT_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time")] = 0.0,
    seed: Annotated[int, typer.Option(help="of what is drawn, the same for both")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt with a compressed model and the dense one beside it, with the speed and memory of each.

    They answer one after the other, so that neither slows the other down. An empty line, Ctrl-D or Ctrl-C ends.
    """
    settings = chatting.Settings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    settings.check()
    if prompt is None and as_json:
        raise RequestError("--json gives one document for one prompt: give --prompt")
    if prompt is not None:
        chatting.check_prompt(prompt)
    names = [against or chatting.made_from(model), model]
    speakers = []
    for name in names:
        _say(f"loading {name}")
        speakers.append(chatting.speaker(name))
    for each in speakers if prompt is not None else ():  # both, before one of them takes its time
        chatting.prompt_ids(each, prompt or "")
    if as_json:
        answers = [chatting.answer(each, prompt or "", settings) for each in speakers]
        document = {"prompt": prompt, **settings.model_dump(), "same_tokens": chatting.share_tokens(*speakers)}
        _print_json({**document, "answers": [each.model_dump(mode="json") for each in answers]})
        return
    for line in chatting.header(*speakers):
        _tell(line)
    if prompt is not None:
        _answer(speakers, prompt, settings)
        return
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while given := _asked_for():
            try:
                _answer(speakers, given, settings)
            except RequestError as error:
                _say(f"kronpress: error: {error}")
    out_console.print()


def _asked_for() -> str:
    """The next prompt; empty at an empty line or the end of the input."""
    return (input("\n> ") if sys.stdin.isatty() else sys.stdin.readline()).strip()


def _answer(speakers: list[chatting.Speaker], prompt: str, settings: chatting.Settings) -> None:
    """Both answers: in two columns as they come on a terminal that is wide enough, else one below the other."""
    labels = chatting.labels(*speakers)
    texts = ["" for _ in speakers]
    answers: list[chatting.Answer] = []
    width = out_console.width
    if not out_console.is_terminal or out_console.is_dumb_terminal or width < LEAST_WIDTH_OF_COLUMNS:
        for each, label in zip(speakers, labels, strict=True):
            answer = chatting.answer(each, prompt, settings)
            out_console.print(f"\n{label}")
            text = Text(chatting.printable(answer.text.strip("\n")))
            out_console.print(Padding(text, (0, 0, 0, 2), expand=False), soft_wrap=False)
            for line in answer_figures(answer):
                _tell(f"  {line}")
        return
    with Live(console=out_console, auto_refresh=False) as live:
        drawn = 0.0

        def show(is_due: bool) -> None:
            nonlocal drawn
            if is_due or time.monotonic() - drawn > 1 / FRAMES_PER_SECOND:
                live.update(answer_columns(labels, texts, answers, width), refresh=True)
                drawn = time.monotonic()

        for number, each in enumerate(speakers):

            def shown(text: str, number: int = number) -> None:
                texts[number] = text
                show(False)

            answers.append(chatting.answer(each, prompt, settings, shown))
            texts[number] = answers[number].text
            show(True)


def _command() -> list[str]:
    return ["kronpress", *sys.argv[1:]]


def _show(results: dict[str, Any], out: Path, as_json: bool) -> None:
    if not is_main():
        return
    if as_json:
        _print_json(results)
        return
    _print_table(results_table(results))
    for row in results["rows"]:
        out_console.print(f"{row['name']}:")
        out_console.print(Padding(Text(repr(row["continuation"])), (0, 0, 1, 2), expand=False), soft_wrap=False)
    out_console.print(f"checkpoint: {out / 'model'}\nall figures: {out / 'results.json'}\nTo load it:\n")
    print("    import kronpress")
    print("    from transformers import AutoModelForCausalLM")
    print(f"    model = AutoModelForCausalLM.from_pretrained({str(out / 'model')!r})")


COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]

# Wrong options and missing arguments; typer carries its own copy of click, so the class has no public name.
_UsageError: Any = typer.BadParameter.__base__


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code and the sentence for an error."""
    if isinstance(error, _UsageError):
        return 2, error.format_message()
    if isinstance(error, RequestError):
        return 2, str(error)
    if isinstance(error, Terminated):
        return 143, str(error)
    if isinstance(error, WorkError):
        return 1, str(error)
    return 1, f"unexpected {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code instead of raising."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    as_json = "--json" in arguments
    _documents.clear()
    # A document has standard output for itself: whatever else is said there goes to standard error.
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
            raise unknown_name("command", arguments[0], COMMANDS)
        with aside:
            ended = app(arguments or ["--help"], prog_name="kronpress", standalone_mode=False)
        if ended in (None, 0, 1):  # 1 of a doctor, who has said it all
            leave()
            for document in _documents:
                _write_json(document)
            return ended or 0
        code, message = 130, "interrupted"  # what typer makes of a keyboard interrupt
    except Exception as error:
        code, message = _explain(error)
        if debug:
            traceback.print_exc()
    which = f" in process {process_number()} of {num_processes()}" if num_processes() > 1 else ""
    said = f"kronpress: error{which}: {message}"
    # For programs one line.
    print(wrapped(said, err_console.width) if err_console.is_terminal else said, file=sys.stderr)
    if as_json and is_main():
        _write_json({"error": message, "exit_code": code})
    return code


def _write_json(document: Any) -> None:
    print(json.dumps(document, indent=1, ensure_ascii=False))
