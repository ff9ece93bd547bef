"""What every command shows: lines that fit, figures that are whole, no colours where none are wanted, clean JSON."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import re
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table

from kronpress import cli, doctor
from kronpress.report import fit_, wrapped

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HEALING = "--set healing.max_steps=2 --set healing.sequences_per_step=2 --set healing.sequence_length=16"
DATA = "--set healing.data=text.txt --set evaluation.data=text.txt"
RUN = f"run half.yaml --set model=dense {DATA} {HEALING} --resume"
# The smallest work of each command; with --resume only the first of several calls does it.
COMMANDS = {
    "recipes": "recipes",
    "recipe": "recipes auto",
    "plan": "plan gpt2 --recipe tqcompressor",
    "spectrum": "plan dense --recipe half.yaml --spectrum",
    "compress": "compress dense --recipe half.yaml --out compressed --overwrite",
    "heal": f"heal small --teacher dense --data text.txt --out healed --overwrite {HEALING}",
    "eval": "eval small --data text.txt --data a/folder/whose/name/is/long/and-a-text-in-it.txt",
    "bench": "bench small --against dense --rounds 2 --no-memory --prompt-tokens 16 --new-tokens 4 --explain",
    "export": "export small --out exported --overwrite",
    "push": "push small someone/small --dry-run",
    "run": f"{RUN} --out one",
    "demo": "demo --out demo",
    "report": "report one --out page.html",
    "compare": "compare one two --with-rivals",
    "sweep": f"sweep half.yaml --set model=dense {DATA} {HEALING} --over seed=0,1 --resume --out swept",
    "doctor": "doctor",
    "chat": "chat small --prompt He --max-new-tokens 8",
}
# A request of each that cannot be carried out.
REFUSED = {
    "recipes": "recipes nothing",
    "plan": "plan dense --recipe nothing",
    "compress": "compress dense --recipe nothing --out new",
    "heal": "heal small --teacher dense --data none.txt --out new",
    "eval": "eval small --data none.txt",
    "bench": "bench small --rivals nothing",
    "export": "export small --format nothing --out new",
    "push": "push small not/a/name --dry-run",
    "run": "run nothing --out new",
    "demo": "demo --set nothing=1 --out new",
    "report": "report dense",
    "compare": "compare dense",
    "sweep": "sweep half.yaml --over nothing=1 --out new",
    "doctor": "doctor --nothing",
    "chat": "chat small --prompt He --temperature -1",
}


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, list[bytes]]]:
    """A pseudo terminal to write to, and what has arrived there once it is closed."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    got: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(master, 65536):
                got.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(slave, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
            yield file, got
    finally:
        reader.join()
        os.close(master)


@pytest.fixture
def call(places, monkeypatch) -> Callable[..., Ended]:
    """command, columns, whether to a terminal -> what came of it, the output as text."""

    def start(command: str, columns: int, to_terminal: bool = False) -> Ended:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(cli, "out_console", cli.make_console())
        monkeypatch.setattr(cli, "err_console", cli.make_console(stderr=True))
        if not to_terminal:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(command.split())
            return Ended(code, out.getvalue(), err.getvalue())
        with (
            terminal(columns) as (out_file, got),
            terminal(columns) as (err_file, got_err),
            contextlib.redirect_stdout(out_file),
            contextlib.redirect_stderr(err_file),
        ):
            monkeypatch.setattr(cli, "out_console", cli.make_console())
            monkeypatch.setattr(cli, "err_console", cli.make_console(stderr=True))
            code = cli.main(command.split())
        texts = [b"".join(each).decode().replace("\r\n", "\n") for each in (got, got_err)]
        return Ended(code, *texts)

    return start


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, save_tiny_checkpoint, tiny_text) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    save_tiny_checkpoint(tiny_model("gpt2"), folder / "dense")
    long = folder / "a" / "folder" / "whose" / "name" / "is" / "long"
    long.mkdir(parents=True)
    for path in (folder / "text.txt", long / "and-a-text-in-it.txt"):
        path.write_text(tiny_text, encoding="utf-8")
    (folder / "half.yaml").write_text(
        "{name: half, structure: kronecker, targets: mlp, spec: {right_shape: [1, 2], num_terms: 1}}"
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in (
            "compress dense --recipe half.yaml --out small",
            f"{RUN} --out one",
            f"{RUN} --set rivals=[low-rank,8-bit] --set seed=1 --out two",
        ):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                assert cli.main(command.split()) == 0
    finally:
        os.chdir(before)
    return folder


@functools.cache
def diagnosis() -> doctor.Diagnosis:
    return doctor.diagnose()


@pytest.fixture
def places(folder, monkeypatch) -> None:
    """The current folder is that of the work; what takes long is done once, or was done before."""
    monkeypatch.chdir(folder)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(cli, "diagnose", lambda thorough, progress: diagnosis())
    run = cli.run_pipeline

    def of_demo(recipe, out, **options):
        if recipe.name != "krony-96m":
            return run(recipe, out, **options)
        return json.loads((folder / "two" / "results.json").read_text(encoding="utf-8"))

    monkeypatch.setattr(cli, "run_pipeline", of_demo)


def too_long(text: str, columns: int) -> list[str]:
    """Lines of more columns, but for those that a path makes so long."""
    lines = ESCAPE.sub("", text).splitlines()
    return [line for line in lines if cell_len(line.rstrip()) > columns and not re.search(r"\S/\S{12,}", line)]


def test_every_command_is_shown_and_refused_here():
    assert {command.split()[0] for command in COMMANDS.values()} == set(cli.COMMANDS)
    assert set(REFUSED) == set(cli.COMMANDS)


@pytest.mark.parametrize(("columns", "to_terminal", "no_color"), [(80, False, ""), (60, True, "1"), (80, True, "")])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_lines_fit_and_colours_are_for_terminals(call, monkeypatch, command, columns, to_terminal, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    ended = call(command, columns, to_terminal)
    assert ended.code == 0, ended.err
    assert ended.out.strip()
    # Where there is little room tables may be wider rather than cut figures.
    assert too_long(ended.out + ended.err, max(columns, 80)) == []
    assert "…" not in ended.out.replace("[ONE|…]", "")
    if not to_terminal or no_color:
        assert not re.search("\x1b\\[[0-9;]*m", ended.out + ended.err)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits(call, command):
    ended = call(f"{command} --help", 60)
    assert ended.code == 0
    assert too_long(ended.out, 60) == []


def test_a_terminal_has_styles(call):
    """Without this the law about colours would hold of a console that never has any."""
    assert ESCAPE.search(call("plan gpt2 --recipe krony-96m", 80, True).out)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_json_has_standard_output_for_itself(call, command):
    ended = call(f"{command} --json", 60, command.startswith("plan"))
    assert ended.code == 0, ended.err
    json.loads(ended.out)
    assert "\x1b" not in ended.out


@pytest.mark.parametrize("command", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_one_document_as_well(call, command):
    ended = call(f"{command} --json", 80)
    document = json.loads(ended.out)
    assert set(document) == {"error", "exit_code"}
    assert (ended.code, document["exit_code"]) == (2, 2)
    assert ended.err.splitlines()[-1] == f"kronpress: error: {document['error']}"
    assert call(command, 80).out == ""


def test_a_failure_after_the_document_leaves_one_document(call, monkeypatch):
    def fail() -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(cli, "leave", fail)
    ended = call("recipes --json", 80)
    assert ended.code == 1
    assert "the disk is full" in json.loads(ended.out)["error"]


def test_an_error_is_wrapped_on_a_terminal_alone(call):
    command = "plan dense --recipe nothing"
    one, several = call(command, 60), call(command, 60, True)
    assert len(one.err.splitlines()) == 1
    assert too_long(several.err, 60) == []
    assert several.err.split() == one.err.split()


# ---- the laws of what is printed ----

words = st.lists(st.sampled_from(["a", "word", "'/a b/c d'", "漢字", "  ", "it's", "/x/y", "longer-than-others"]))


@settings(deadline=None)
@given(words, st.integers(0, 4), st.integers(8, 40))
def test_wrapping_keeps_every_word(parts, indent, width):
    text = " " * indent + " ".join(parts)
    lines = wrapped(text, width).split("\n")
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    for line in lines:
        # A line is longer only for one word, which may be a path with blanks.
        assert cell_len(line) <= width or len(re.sub(r"'/a b/c d'", "path", line).split()) == 1
    assert all("'/a b/c d'" in text or "'" not in line for line in lines if "b/c" in line)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("ab cd", min_size=1, max_size=40), st.integers(0, 10**15)), min_size=1, max_size=4))
def test_a_table_shows_every_word_and_figure_whole(rows):
    table = Table(box=SIMPLE_HEAD)
    for column in ("text", "number", "fraction"):
        table.add_column(column, justify="right" if column != "text" else "left")
    for text, number in rows:
        table.add_row(text, f"{number:,}", f"{number / 7:.4f}")
    fit_(table, 40)
    out = io.StringIO()
    cli.Console(file=out, width=40, soft_wrap=True).print(table)
    shown = set(out.getvalue().split())
    for text, number in rows:
        assert {*text.split(), f"{number:,}", f"{number / 7:.4f}"} <= shown
