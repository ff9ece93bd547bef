"""Every block of code in the documentation says how it is kept true, and is.

A comment stands before each fence of README.md and docs/: `run` (here, in order, in one folder for each page), `parse:
why` (names, options, recipe fields and imports exist), `recipe` (its fields are valid), `tested: FILE` (by another
test), and `text` for what is no code. Commands within sentences are parsed too.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import typer
import yaml
from accelerate.commands.launch import launch_command_parser

import kronpress
from kronpress import cli
from kronpress.evaluation import PROTOCOLS
from kronpress.export import FORMATS
from kronpress.pipeline.sweeping import grid_runs
from kronpress.recipe import load_recipe, recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = ("run", "parse", "recipe", "tested", "text")
FENCED = re.compile(
    r"(?:^<!-- (?P<kind>[\w]+)(?:: (?P<why>[^\n]*?))? -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Block:
    page: Path
    kind: str | None
    why: str
    language: str
    code: str

    @property
    def lines(self) -> list[str]:
        """The commands, without the words that explain them behind two spaces."""
        return [re.split(r"  +", line)[0] for line in self.code.splitlines() if line.strip()]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    whole = re.search(r"^<!-- all blocks tested: (.*?) -->$", text, re.MULTILINE)
    return [
        Block(
            page,
            "tested" if whole else found["kind"],
            whole[1] if whole else found["why"] or "",
            found["language"],
            found["code"],
        )
        for found in FENCED.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def name(of: Path | Block) -> str:
    return str((of if isinstance(of, Path) else of.page).relative_to(ROOT))


def of_kind(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds]


def test_every_fence_is_found():
    for page in PAGES:
        assert len(re.findall("^```", page.read_text(encoding="utf-8"), re.MULTILINE)) == 2 * len(blocks_of(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_how_it_is_kept_true(page):
    for block in blocks_of(page):
        assert block.kind in KINDS, f"{name(page)}: no comment, or an unknown one, before\n{block.code}"
        assert bool(block.why) == (block.kind in ("parse", "tested")), block.code
        for path in re.findall(r"tests/\w+\.py", block.why):
            assert (ROOT / path).is_file()
        if block.kind == "tested":
            test = (ROOT / block.why).read_text(encoding="utf-8")
            assert page.name in test
        if block.kind == "text":
            assert not re.search(r"^(kronpress|make|pip|torchrun)\b", block.code, re.MULTILINE), block.code
        if block.kind == "recipe":
            assert block.language == "yaml"


# ---- what is run ----


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in of_kind("run")), ids=name)
def test_blocks_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.kind != "run":
            continue
        if block.language == "python":
            exec(compile(block.code, name(page), "exec"), names)
            continue
        for line in block.lines:
            words = shlex.split(line)
            if words[0] == "kronpress":
                assert cli.main(words[1:]) == 0, (line, capsys.readouterr().err)
            else:
                subprocess.run(["bash", "-ec", line], check=True)


# ---- what is parsed ----

# Where a page leaves something open, and what is put there so that the rest can be checked.
OPEN = {"MODEL": "pocket", "R": "low-rank", "NAME": "krony-96m", "D": "bundled", "T": "lambada_openai", "FILE": "a.svg"}


def parse(line: str, folder: Path, *, whole: bool = True) -> None:
    """Raises if the command, an option, its value, a field of the recipe or a file that is named does not exist."""
    alternatives = re.search(r"(?<= )\w[\w-]*(?:\|[\w-]+)+", line)
    if alternatives:
        for each in alternatives[0].split("|"):
            parse(line.replace(alternatives[0], each), folder, whole=whole)
        return
    words = [OPEN.get(word, word.replace("=MODEL", "=pocket")) for word in shlex.split(line.split(" > ")[0])]
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words.pop(0)
    match words:
        case ["kronpress", *arguments]:
            parse_kronpress(arguments, folder, whole)
        case ["torchrun", *arguments]:
            parse_launched(torch.distributed.run.get_args_parser().parse_args(arguments), folder)
        case ["accelerate", "launch", *arguments]:
            parse_launched(launch_command_parser().parse_args(arguments), folder)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert targets
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), line
        case ["python", script, *arguments]:
            parse_script(script, arguments)
        case ["pip", "install", *arguments]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for extra in re.findall(r"\[(\w+)\]", " ".join(arguments)):
                assert extra in extras["optional-dependencies"], line
        case _:
            raise AssertionError(f"nobody knows how to check {line!r}")


def parse_kronpress(arguments: list[str], folder: Path, whole: bool) -> None:
    if "--debug" in arguments:
        arguments = [argument for argument in arguments if argument != "--debug"]
    command, *rest = arguments
    assert command in COMMANDS, f"no command {command!r}"
    try:
        given = COMMANDS[command].make_context(command, rest).params
    except Exception as error:
        if not whole and (type(error).__name__ == "MissingParameter" or "requires an argument" in str(error)):
            return
        raise
    assert given.get("format", "dense") in FORMATS
    assert given.get("protocol", "window") in PROTOCOLS
    recipe, changes = given.get("recipe"), list(given.get("changes") or [])
    if command == "heal":
        recipe = "low-rank"
    if command == "recipes":
        recipe = given["name"]
    if recipe is None:
        assert not changes or command == "demo"
        recipe = "krony-96m" if changes else None
    if recipe is not None and recipe not in recipe_names():
        assert recipe.endswith(".yaml"), f"no recipe {recipe!r}"
        if not (folder / recipe).is_file():
            return
        recipe = str(folder / recipe)
    if recipe is not None:
        model = given.get("model") if isinstance(given.get("model"), str) else None
        if command == "sweep":
            grid_runs(recipe, given["over"], changes)
        else:
            load_recipe(recipe, changes, model)


def parse_launched(given: Any, folder: Path) -> None:
    assert given.module
    assert given.training_script == "kronpress"
    parse_kronpress(given.training_script_args, folder, whole=True)


def parse_script(script: str, arguments: list[str]) -> None:
    source = (ROOT / script).read_text(encoding="utf-8")
    for module in re.findall(r"^from (\w+) import", source, re.MULTILINE):  # options that several scripts have
        if (shared := (ROOT / script).with_name(f"{module}.py")).is_file():
            source += shared.read_text(encoding="utf-8")
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in source or re.search(rf"\b{argument[2:].replace('-', '_')}\b", source), (script, argument)
    if arguments and re.fullmatch(r"[a-z][a-z-]*", arguments[0]):
        assert re.search(rf"(def {arguments[0].replace('-', '_')}\(|\"{arguments[0]}\")", source), (
            script,
            arguments[0],
        )


def parse_python(code: str) -> None:
    """Raises if it is no Python, or takes something from kronpress that is not there."""
    aliases = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name.partition(".")[0] == "kronpress":
                    importlib.import_module(each.name)
                    aliases |= {each.asname or each.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kronpress":
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, each.name) for each in node.names), ast.unparse(node)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in {*aliases, "kp"}:
            assert hasattr(kronpress, node.attr), ast.unparse(node)


@pytest.fixture
def recipes_of(tmp_path):
    """A folder with those recipes of a page that have names."""

    def written(page: Path) -> Path:
        for block in blocks_of(page):
            if block.kind == "recipe" and "name" in (fields := yaml.safe_load(block.code)):
                (tmp_path / f"{fields['name']}.yaml").write_text(block.code, encoding="utf-8")
        return tmp_path

    return written


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in of_kind("parse", "recipe")), ids=name)
def test_what_cannot_be_run_exists(page, recipes_of):
    folder = recipes_of(page)
    for block in blocks_of(page):
        if block.kind == "recipe":
            fields = yaml.safe_load(block.code)
            load_recipe(fields if "name" in fields else {"targets": "mlp", "structure": "low_rank", **fields})
        if block.kind == "parse" and block.language == "python":
            parse_python(block.code)
        elif block.kind == "parse":
            for line in block.lines:
                parse(line, folder)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_within_sentences_exist(page, recipes_of):
    folder = recipes_of(page)
    prose = FENCED.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`((?:kronpress|make|torchrun|accelerate|python|pip) [^`]+)`", prose):
        line = " ".join(span.split())
        is_launcher_alone = line.startswith(("torchrun", "accelerate")) and " -m " not in line
        if "…" not in line and "..." not in line and not line.startswith("python -c") and not is_launcher_alone:
            parse(line, folder, whole=False)


@pytest.mark.parametrize(
    "line",
    [
        "kronpress compres pocket --recipe low-rank --out small",
        "kronpress compress pocket --recipe low-rank --no-such-option --out small",
        "kronpress compress pocket --recipe krony96m --out small",
        "kronpress compress pocket --recipe low-rank --set budget.prams=1 --out small",
        "kronpress export small --format dense|onyx --out dense",
        "kronpress bench pocket --rounds many",
        "kronpress sweep low-rank --over healing.learning_rat=1,2 --out runs",
        "torchrun --nproc-per-noodle 2 -m kronpress run low-rank --out run",
        "make nothing-like-that",
        "python benchmarks/end_to_end.py walk",
        "python benchmarks/end_to_end.py run --no-such-option 1",
        "pip install 'kronpress[nothing]'",
        "ls",
    ],
)
def test_what_does_not_exist_is_found(line, tmp_path):
    with pytest.raises((Exception, SystemExit)):
        parse(line, tmp_path)


@pytest.mark.parametrize(
    "code", ["import kronpress as kp\nkp.compres_(model)", "from kronpress.recipe import Recipee", "a b"]
)
def test_names_that_do_not_exist_are_found(code):
    with pytest.raises((AssertionError, SyntaxError)):
        parse_python(code)
