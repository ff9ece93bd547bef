"""A comparison ranks what is comparable, over seeds, and refuses the rest; its fronts are those of their definition."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from kronpress import cli
from kronpress.errors import RequestError
from kronpress.reporting import compare, comparison_json, comparison_terminal, write_comparison
from kronpress.reporting.comparing import COSTS, Estimate, Group, pareto_front
from kronpress.reporting.results import digits

ROOT = Path(__file__).parents[1]
DEMO = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))


def made_run(
    directory: Path,
    *,
    name: str = "krony-96m",
    seed: int = 0,
    nats: float = 4.0,
    num_params: int = 2_000_000,
    speedup: float | None = 2.0,
    texts: tuple[str, ...] = ("one", "two"),
    **changes: Any,
) -> Path:
    """A run directory whose results are the demo's with these figures; `changes` are of the recipe's healing."""
    results = copy.deepcopy(DEMO)
    results["seed"] = results["recipe"]["seed"] = seed
    results["recipe"]["healing"].update(changes)
    results["rows"] = results["rows"][:3]
    results["rivals"] = []
    results["data"] = dict.fromkeys(texts)
    for row in results["rows"]:
        row["name"] = row["name"].replace(results["recipe"]["name"], name)
        figures = next(iter(row["metrics"].values()))
        own = 3.5 if row["stage"] == "dense" else nats
        row["metrics"] = {
            text: {**figures, "nll_mean_nats": own + number, "perplexity": math.exp(own + number)}
            for number, text in enumerate(texts)
        }
        if row["stage"] != "dense":
            row["num_params"], row["bytes"] = num_params, 2 * num_params
    results["recipe"]["name"] = name
    spread = {"median": speedup, "first_quartile": speedup, "third_quartile": speedup}
    results["speeds"] = {} if speedup is None else {name: {"speedup": spread}}
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return directory


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Three seeds of one recipe, two of another, one of a third: the second is best, the third smallest and fastest."""
    made = [made_run(tmp_path / f"a{seed}", seed=seed, nats=4.0 + 0.1 * seed) for seed in range(3)]
    made += [made_run(tmp_path / f"b{seed}", seed=seed, nats=3.8, learning_rate=0.5) for seed in range(2)]
    return [*made, made_run(tmp_path / "c", name="small", nats=5.0, num_params=1_000_000, speedup=3.0)]


def test_runs_that_differ_in_their_seed_alone_are_one_line(runs):
    comparison = compare(runs)
    assert [(group.name, group.runs, group.seeds) for group in comparison.groups] == [
        ("krony-96m (learning_rate=0.5)", ["b0", "b1"], [0, 1]),
        ("krony-96m (learning_rate=0.001)", ["a0", "a1", "a2"], [0, 1, 2]),
        ("small", ["c"], [0]),
    ]
    assert comparison.differences == {"healing.learning_rate": ["0.5", "0.001", "0.001"]}
    assert (comparison.mixed, comparison.texts) == ([], ["one", "two"])


def test_intervals_are_students_of_the_losses(runs):
    (group,) = [group for group in compare(runs).groups if len(group.seeds) == 3]
    nats = [4.0, 4.1, 4.2]
    low, high = stats.t.interval(0.95, 2, loc=4.1, scale=stats.sem(nats))
    found = group.perplexity["one"]
    assert [math.log(each) for each in (found.mean, found.low, found.high)] == pytest.approx([4.1, low, high])
    single = compare(runs).groups[-1].perplexity["one"]
    assert (single.mean, single.low, single.high) == (pytest.approx(math.exp(5.0)), None, None)


def test_the_fronts_of_the_runs(runs):
    best, other, small = (group.name for group in compare(runs).groups)
    for text in ("one", "two"):
        for cost in COSTS:
            assert compare(runs).fronts[cost, text] == [small, best]
    assert other not in compare(runs).fronts["bytes", "one"]


POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=8)


def group_of(name: str, num_params: float, perplexity: float) -> Group:
    estimate = {"x": Estimate(perplexity, None, None)}
    return Group(name, ["r"], [0], "t", {}, num_params, 2 * num_params, None, estimate)


@given(points=POINTS)
def test_a_front_is_what_nothing_dominates(points):
    groups = [group_of(str(number), *point) for number, point in enumerate(points)]

    def is_dominated(point: tuple[int, int]) -> bool:
        return any(o[0] <= point[0] and o[1] <= point[1] and o != point for o in points)

    expected = {group.name for group, point in zip(groups, points, strict=True) if not is_dominated(point)}
    front = pareto_front(groups, "bytes", "x")
    assert set(front) == expected and len(front) == len(expected)
    assert [points[int(name)][0] for name in front] == sorted(points[int(name)][0] for name in front)
    assert pareto_front(groups, "time per token", "x") == pareto_front(groups, "bytes", "other") == []


@given(values=st.lists(st.floats(0.01, 100), min_size=2, max_size=6), factor=st.floats(0.1, 10))
def test_an_estimate_scales_with_its_values(values, factor):
    estimate, scaled = Estimate.of(values), Estimate.of([factor * value for value in values])
    assert estimate.low <= estimate.mean * (1 + 1e-12) and estimate.mean <= estimate.high * (1 + 1e-12)
    assert [scaled.mean, scaled.low, scaled.high] == pytest.approx(
        [factor * each for each in (estimate.mean, estimate.low, estimate.high)]
    )


# ---- what is not comparable ----


def changed(directory: Path, change: Any) -> Path:
    path = directory / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    change(results)
    path.write_text(json.dumps(results), encoding="utf-8")
    return directory


def each_figure(results: dict[str, Any], **changes: Any) -> None:
    for row in results["rows"]:
        for figures in row["metrics"].values():
            figures.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["model"].update(name="other"), r"teachers pocket \(a\) and other \(b\)"),
        (lambda r: r["model"].update(revision="abc"), r"teachers pocket \(a\) and pocket at abc \(b\)"),
        (lambda r: each_figure(r, stride=7), r"on one protocol window, window 256, stride 256.*stride 7"),
        (lambda r: each_figure(r, num_tokens=7), r"on one .* 7 tokens"),
        (lambda r: r["data"].update(two="abc"), r"on two .* of revision abc"),
        (lambda r: [row["metrics"].pop("two") for row in r["rows"]], "b was not measured on two"),
        (
            lambda r: r["rows"][0]["metrics"]["one"].update(nll_mean_nats=3.6),
            r"dense model of 3\.5000 nats on one \(a\) and a dense model of 3\.6000 nats",
        ),
    ],
)
def test_mixed_runs_are_refused_unless_that_is_wanted_and_then_named(tmp_path, change, message):
    runs = [made_run(tmp_path / "a"), changed(made_run(tmp_path / "b", nats=3.9, learning_rate=0.5), change)]
    with pytest.raises(RequestError, match=f"not comparable: .*{message}.*--allow-mixed"):
        compare(runs)
    comparison = compare(runs, allow_mixed=True)
    assert len(comparison.groups) == 2
    names = [group.name for group in [*comparison.dense, *comparison.groups]]
    assert len(names) == len(set(names))
    for path in write_comparison(comparison, tmp_path / "out"):
        if path.suffix != ".csv":
            words = path.read_text(encoding="utf-8").replace("&#39;", "'")
            assert all(each in words for each in comparison.mixed), path


def test_the_same_run_twice_and_no_run_are_refused(runs, tmp_path):
    with pytest.raises(RequestError, match="is given twice"):
        compare([runs[0], runs[1], runs[0]])
    with pytest.raises(RequestError, match="no runs"):
        compare([])
    with pytest.raises(RequestError, match="is no run directory"):
        compare([runs[0], tmp_path])


def test_a_repeated_measurement_does_not_narrow_an_interval(runs, tmp_path):
    again = made_run(tmp_path / "again", seed=1, nats=4.1)
    comparison = compare([*runs, again])
    assert [group.perplexity for group in comparison.groups] == [group.perplexity for group in compare(runs).groups]
    assert comparison.remarks == ["again has the recipe and the seed of a1 and is left out."]


def test_other_devices_and_versions_are_remarked(tmp_path):
    runs = [made_run(tmp_path / "a"), changed(made_run(tmp_path / "b", seed=1), lambda r: r.update(device="abacus"))]
    (remark,) = compare(runs).remarks
    assert "Devices differ" in remark and "abacus (b)" in remark


def test_a_time_that_a_seed_lacks_is_not_known(tmp_path):
    runs = [made_run(tmp_path / "a"), made_run(tmp_path / "b", seed=1, speedup=None)]
    (group,) = compare(runs).groups
    assert group.time is None


def test_rivals_take_part_if_they_are_to(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(DEMO), encoding="utf-8")
    assert [group.name for group in compare([tmp_path / "run"]).groups] == ["krony-96m"]
    names = {group.name for group in compare([tmp_path / "run"], with_rivals=True).groups}
    assert names == {"krony-96m", "low-rank", "dense, 8-bit", "dense, 4-bit"}


# ---- documents ----


def test_all_documents_say_the_same(runs, tmp_path):
    comparison = compare(runs)
    html, markdown, table, document = (
        path.read_text(encoding="utf-8") for path in write_comparison(comparison, tmp_path)
    )
    assert json.loads(document) == json.loads(json.dumps(comparison_json(comparison)))
    lines = list(csv.DictReader(io.StringIO(table)))
    assert [line["rank"] for line in lines] == ["", "1", "2", "3"]
    for line, group in zip(lines[1:], comparison.groups, strict=True):
        assert line["recipe"] == group.name
        assert float(line["perplexity two"]) == group.perplexity["two"].mean
        assert float(line["time_per_token"]) == group.time.mean
        assert [line[f"front {cost} one"] for cost in COSTS] == [
            str(int(group.name in comparison.fronts[cost, "one"])) for cost in COSTS
        ]
        for text in (html, markdown):
            assert group.name in text
            assert digits(group.perplexity["one"].mean) in text
            assert f"{group.num_params:,.0f}" in text
    assert "healing.learning_rate" in html and "healing.learning_rate" in markdown


def test_the_terminals_tables_fit(runs):
    for table in comparison_terminal(compare(runs)):
        console = Console(width=80, file=io.StringIO(), highlight=False)
        console.print(table)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_the_command_prints_one_document_and_writes_four(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["compare", *map(str, runs), "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert {path.name for path in out.iterdir()} == {f"comparison.{kind}" for kind in ("html", "md", "csv", "json")}
    assert cli.main(["compare", *map(str, runs)]) == 0
    assert "on one" in capsys.readouterr().out
