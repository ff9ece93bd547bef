"""docs/your-own-structure.md is what it says: its file, outside the package, works from the plan to the export."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples.matrices import normal
from transformers import AutoModelForCausalLM, PreTrainedModel

import kronpress as kp
from kronpress import cli
from kronpress.export import self_contained
from kronpress.matrices import STRUCTURES
from kronpress.matrices.metric import Metric

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-own-structure.md").read_text(encoding="utf-8")
NAME = "block_diagonal"
FILE, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's file."""
    (tmp_path / f"{NAME}.py").write_text(FILE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def registered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same folder, current and on the path; what the file registers is taken off afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    STRUCTURES.pop(NAME, None)
    sys.modules.pop(NAME, None)


def test_the_page_plans_fits_heals_saves_and_loads(registered: Path) -> None:
    names: dict[str, Any] = {}
    exec(USE, names)
    plan, student, again = names["plan"], names["student"], names["again"]
    assert {layer.structure for layer in plan.layers.values()} == {NAME}
    assert plan.num_params == sum(parameter.numel() for parameter in again.parameters())
    assert all(layer.relative_output_error < 1 for layer in names["report"].values())
    x = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x).logits, student.eval()(x).logits, rtol=0, atol=0)
        torch.testing.assert_close(kp.to_dense(again)(x).logits, again(x).logits, rtol=1e-4, atol=1e-3)


def test_a_checkpoint_whose_structure_is_not_registered_is_refused(
    registered: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    __import__(NAME)
    recipe = kp.load_recipe({"targets": "mlp", "structure": NAME, "spec": {"blocks": 2}})
    model = tiny_model("gpt2")
    kp.compress_(model, kp.make_plan(model, recipe))
    model.save_pretrained("small")
    del STRUCTURES[NAME]
    said = f"unknown structure '{NAME}'.*import first the file that puts one of your own into"
    with pytest.raises(kp.WorkError, match=said):
        AutoModelForCausalLM.from_pretrained("small")
    with pytest.raises(kp.WorkError, match=said):
        kp.load_model("small")
    with pytest.raises(kp.RequestError, match=f"unknown structure '{NAME}'"):
        kp.load_recipe({"structure": NAME})


def test_the_command_line_and_auto_know_it(registered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    __import__(NAME)
    Path("mine.yaml").write_text(f"{{name: mine, targets: mlp, structure: {NAME}, budget: {{kept_of_targets: 0.25}}}}")
    assert cli.main(["plan", "gpt2", "--recipe", "mine.yaml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {layer["spec"]["blocks"] for layer in plan["layers"].values()} == {4}
    recipe = {"structure": "auto", "candidates": [NAME], "allocation": "measured", "weighting": {"metric": "input"}}
    assert kp.load_recipe(recipe).candidates == [NAME]


def test_its_fit_to_inputs_is_nearest_where_it_says_so(registered: Path) -> None:
    structure = __import__(NAME).BlockDiagonal
    weight, spec = normal(0, 6, 8), structure.Spec(blocks=2)
    x, g = normal(1, 30, 8), normal(2, 2, 9, 3)
    metric = Metric(x.mT @ x, torch.block_diag(*(g.mT @ g)))
    factor = structure.fit(weight, spec, metric)["weight"].requires_grad_()
    difference = weight - structure.expand({"weight": factor})
    loss = torch.trace(metric.output @ difference @ metric.input @ difference.mT)
    (gradient,) = torch.autograd.grad(loss, factor)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-4 * loss.item())


def test_a_self_contained_export_takes_its_code_along(registered: Path) -> None:
    structure = __import__(NAME).BlockDiagonal
    text = self_contained.runtime_source([NAME], "GPT2LMHeadModel")
    assert NAME not in [line.split()[1] for line in text.splitlines() if line.startswith(("from ", "import "))]
    namespace: dict[str, Any] = {"__name__": "runtime"}
    exec(compile(text, "runtime.py", "exec"), namespace)
    taken = namespace["STRUCTURES"][NAME]
    factors, x = {"weight": normal(0, 2, 3, 4)}, normal(1, 5, 8)
    torch.testing.assert_close(taken.multiply(factors, x), structure.multiply(factors, x), rtol=0, atol=0)


def test_it_obeys_the_laws(folder: Path, fresh_python: Callable[..., Any]) -> None:
    (command,) = re.findall(r"^pytest (.*)$", PAGE, re.MULTILINE)
    arguments = command.replace("tests/contract", str(ROOT / "tests" / "contract")).split()
    ran = fresh_python("-m", "pytest", "-p", "no:cacheprovider", *arguments, PYTHONPATH=str(folder))
    assert ran.returncode == 0, ran.stdout
    assert int(re.findall(r"(\d+) passed", ran.stdout)[0]) >= 20
