"""Tables and figures of docs/spectrum.md are those of the committed result."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kronpress.spectrum import Spectrum, SpectrumRow, spectrum_of_weights

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "spectrum.md").read_text(encoding="utf-8")
WEIGHTS = ROOT.parent / "shared" / "data" / "gpt2_124m_attention" / "attention_layers_0_5_11.safetensors"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "gpt2_attention_spectrum", ROOT / "benchmarks" / "gpt2_attention_spectrum.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()
RESULTS = json.loads(script.RESULTS.read_text(encoding="utf-8"))
ROWS = Spectrum.model_validate(RESULTS["spectrum"]).rows
SHUFFLED = dict(zip([(row.name, row.right_shape) for row in ROWS], RESULTS["shuffled"], strict=True))
LOW_RANK = [row for row in ROWS if row.structure == "low_rank"]
KRONECKER = [row for row in ROWS if row.structure == "kronecker"]


def rows_of(role: str, *right_shapes: tuple[int, int]) -> list[SpectrumRow]:
    found = [row for row in KRONECKER if row.name.endswith(role) and row.right_shape in right_shapes]
    assert len(found) == 3 * len(right_shapes)
    return found


def span(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def most_above_chance(rows: list[SpectrumRow]) -> str:
    return f"{max(row.captured_energy - row.chance for row in rows):.3f}"


def said(sentence: str) -> bool:
    """Whether the page says so, wherever its lines break."""
    return sentence in " ".join(PAGE.split())


def test_the_tables_are_those_of_the_committed_result():
    assert script.render(RESULTS) in PAGE
    assert f"`{RESULTS['command']}`" in PAGE


def test_low_rank_captures_the_most_of_every_matrix():
    for best in LOW_RANK:
        others = [row.captured_energy for row in KRONECKER if row.name == best.name]
        assert len(others) == 7
        assert best.captured_energy > max(others)
    assert said(f"of every one of the six matrices**: {span([row.captured_energy for row in LOW_RANK])}, where")
    assert said(f"where {span([row.chance for row in LOW_RANK])} would be chance")


def test_one_thin_term_captures_what_it_would_of_a_random_matrix():
    thin = [row for role in ("c_attn", "c_proj") for row in rows_of(role, (1, 2), (2, 1))]
    assert said(f"captures {span([row.captured_energy for row in thin])}**: at most {most_above_chance(thin)} more")


def test_what_the_page_says_of_more_terms():
    small = [(1, 2), (2, 1), (2, 2), (4, 4), (4, 16), (16, 4)]
    assert said(f"at most {most_above_chance(rows_of('c_attn', *small))} above chance.")
    assert said(f"up to {most_above_chance(rows_of('c_proj', *small))} above chance, and")
    tall, balanced = rows_of("c_proj", (16, 4)), rows_of("c_attn", (48, 32))
    energies, shuffled = (
        [mean([row.captured_energy for row in rows]) for rows in (tall, balanced)],
        [mean([SHUFFLED[row.name, row.right_shape] for row in rows]) for rows in (tall, balanced)],
    )
    assert said(f"capture {energies[0]} in the mean, and {shuffled[0]} when rows and columns are shuffled")
    assert said(f"{energies[1]} in the mean, {shuffled[1]} shuffled, {balanced[0].chance:.3f} by chance.")
    assert said(f"low rank's {mean([row.captured_energy for row in LOW_RANK if 'c_attn' in row.name])}.")
    assert shuffled[0] >= energies[0]


def test_shuffling_leaves_low_rank_as_it_was_and_keeps_every_entry():
    for row in LOW_RANK:
        assert SHUFFLED[row.name, row.right_shape] == pytest.approx(row.captured_energy, abs=2e-6)
    weight = torch.arange(35.0).reshape(5, 7)
    shuffled = script.shuffle(weight)
    assert not torch.equal(shuffled, weight)
    torch.testing.assert_close(shuffled.flatten().sort().values, weight.flatten())
    torch.testing.assert_close(shuffled.sum(1).sort().values, weight.sum(1))
    torch.testing.assert_close(shuffled.sum(0).sort().values, weight.sum(0))


def test_the_figure_is_small_and_shown():
    assert script.FIGURE.stat().st_size < 100_000
    assert Image.open(script.FIGURE).size[0] >= 800
    assert f"]({script.FIGURE.relative_to(ROOT / 'docs')})" in PAGE


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the real GPT-2 attention weights (../shared/data) are not here")
def test_the_committed_figures_are_what_is_measured():
    name = "transformer.h.11.attn.c_proj"
    measured = spectrum_of_weights({name: load_file(WEIGHTS)[f"{name}.weight"].mT}, script.SHARE).rows
    committed = [row for row in ROWS if row.name == name]
    assert [row.model_dump(exclude={"captured_energy", "chance", "kept_fraction"}) for row in measured] == [
        row.model_dump(exclude={"captured_energy", "chance", "kept_fraction"}) for row in committed
    ]
    for field in ("captured_energy", "chance", "kept_fraction"):
        expected = [getattr(row, field) for row in committed]
        assert [getattr(row, field) for row in measured] == pytest.approx(expected, abs=2e-6)
