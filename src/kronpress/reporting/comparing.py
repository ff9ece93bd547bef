"""Runs beside one another: what may be compared at all, groups over seeds with their intervals, and Pareto fronts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from kronpress.errors import RequestError
from kronpress.reporting.charts import MEASURE
from kronpress.reporting.results import Model, final_model, models, protocol, read_results, short_names

CONFIDENCE = 0.95
# Of the dense model's loss from run to run: what devices and versions may do to the same weights.
SAME_NATS = 2e-3
COSTS = ("parameters", "bytes", "time per token")
# Of recipes: what names them, and what makes several runs one group.
_NOT_COMPARED = ("name", "description", "seed")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% interval; `low` and `high` are None for a single seed.

    Means and Student's intervals are of logarithms: both figures for which this is used are ratios or exponentials.
    """

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """
        >>> Estimate.of([2.0])
        Estimate(mean=2.0, low=None, high=None)
        >>> two = Estimate.of([2.0, 8.0])
        >>> round(two.mean, 6), two.low < two.mean < two.high
        (4.0, True)
        """
        if len(values) == 1:
            return cls(values[0], None, None)
        logs = [math.log(value) for value in values]
        spread = stats.t.ppf(0.5 + CONFIDENCE / 2, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
        return cls(*(math.exp(fmean(logs) + sign * spread) for sign in (0, -1, 1)))


@dataclass(frozen=True)
class Candidate:
    """One model of one run: what the recipe made, or a rival of it. `fields` are its recipe's, flat."""

    run: str
    name: str
    seed: int
    teacher: str
    fields: Mapping[str, str]
    model: Model
    texts: Mapping[str, str]  # the run's test texts, by the name that the comparison gives them


@dataclass(frozen=True)
class Group:
    """Candidates that differ in their seed alone. `time` is that of decoding a token, the dense model's being 1."""

    name: str
    runs: list[str]
    seeds: list[int]
    teacher: str
    fields: Mapping[str, str]
    num_params: float
    num_bytes: float
    time: Estimate | None
    perplexity: Mapping[str, Estimate]

    def cost(self, name: str) -> float | None:
        time = None if self.time is None else self.time.mean
        return {"parameters": self.num_params, "bytes": self.num_bytes, "time per token": time}[name]


@dataclass(frozen=True)
class Comparison:
    """Groups, the best on the first text first; `mixed` says what is not the same in all runs, in words.

    `fronts` has, by (cost, text), the names of those groups than which no other is better in both.
    `differences` are the recipes' fields that are not equal in all groups, with the value of each group.
    """

    texts: list[str]
    dense: list[Group]
    groups: list[Group]
    fronts: Mapping[tuple[str, str], list[str]]
    differences: Mapping[str, list[str]]
    mixed: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def compare(directories: Sequence[Path], allow_mixed: bool = False, with_rivals: bool = False) -> Comparison:
    """The runs of these directories beside one another.

    Args:
        allow_mixed: compare in spite of different teachers, texts or protocols; the comparison then names them.
        with_rivals: the rivals of each run take part as well.

    Raises:
        RequestError: no directory, one that is no run, one given twice, or runs that are not comparable.
        WorkError: a results.json is damaged.
    """
    if not directories:
        raise RequestError("a comparison of no runs was asked for: give run directories")
    resolved = [directory.resolve() for directory in directories]
    for number, directory in enumerate(resolved):
        if directory in resolved[:number]:
            raise RequestError(f"{str(directories[number])!r} is given twice")
    names = list(short_names(map(str, resolved)).values())
    runs = {name: read_results(directory) for name, directory in zip(names, directories, strict=True)}
    mixed = what_is_mixed(runs)
    if mixed and not allow_mixed:
        raise RequestError(
            f"these runs are not comparable: {'; '.join(mixed)}; --allow-mixed compares them all the same"
        )
    labels = short_names(text for results in runs.values() for text in results["rows"][0]["metrics"])
    by_protocol = any(len(protocols) > 1 for protocols in _protocols(runs).values())
    candidates, remarks = _once_each(
        each for name, results in runs.items() for each in _candidates(name, results, labels, by_protocol, with_rivals)
    )
    texts = list(dict.fromkeys(text for each in candidates for text in each.texts))
    groups = _named(_groups(candidates))
    groups.sort(key=lambda group: group.perplexity[texts[0]].mean if texts[0] in group.perplexity else math.inf)
    remarks += _what_differs_besides(runs)
    return Comparison(
        texts=texts,
        dense=_dense(runs, labels, by_protocol),
        groups=groups,
        fronts={(cost, text): pareto_front(groups, cost, text) for cost in COSTS for text in texts},
        differences=differences(groups),
        mixed=mixed,
        remarks=remarks,
    )


def pareto_front(groups: Iterable[Group], cost: str, text: str) -> list[str]:
    """The names of groups than which no other is cheaper or better without being worse in the other, cheap first."""
    points = sorted(
        (price, group.perplexity[text].mean, group.name)
        for group in groups
        if (price := group.cost(cost)) is not None and text in group.perplexity
    )
    front: list[tuple[float, float, str]] = []
    for point in points:
        if not front or point[1] < front[-1][1] or point[:2] == front[-1][:2]:
            front.append(point)
    return [name for *_, name in front]


# ---- what may be compared ----


def what_is_mixed(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In what respect the runs are not comparable, in words; empty if they are."""
    found = []
    teachers = _by_value({name: _teacher(results) for name, results in runs.items()})
    if len(teachers) > 1:
        found.append(f"teachers {_listed(teachers)}")
    protocols = _protocols(runs)
    missing = {text: [name for name in runs if text not in runs[name]["rows"][0]["metrics"]] for text in protocols}
    for text, names in missing.items():
        if names:
            found.append(f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} not measured on {text}")
    for text, values in protocols.items():
        if len(values) > 1:
            found.append(f"on {text} {_listed(values)}")
    if len(teachers) == 1:
        # The same name may stand for other weights.
        found += [_listed(losses) for losses in map(partial(_dense_losses, runs), protocols) if len(losses) > 1]
    return found


def _dense_losses(runs: Mapping[str, Mapping[str, Any]], text: str) -> dict[str, list[str]]:
    """The dense models' losses on the text, and the runs that measured them; one if all are as good as equal."""
    known = {name: results["rows"][0]["metrics"].get(text) for name, results in runs.items()}
    nats = {name: figures["nll_mean_nats"] for name, figures in known.items() if figures is not None}
    ways = {_way(runs[name], text, figures) for name, figures in known.items() if figures is not None}
    if len(ways) > 1 or max(nats.values()) - min(nats.values()) <= SAME_NATS * min(nats.values()):
        return {}
    return _by_value({name: f"a dense model of {each:.4f} nats on {text}" for name, each in nats.items()})


def _protocols(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """By text, the ways in which it was measured, and the runs that did so."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, results in runs.items():
        for text, figures in results["rows"][0]["metrics"].items():
            found.setdefault(text, {}).setdefault(_way(results, text, figures), []).append(name)
    return found


def _way(results: Mapping[str, Any], text: str, figures: Mapping[str, Any]) -> str:
    revision = results.get("data", {}).get(text)
    at = f" of revision {revision}" if revision else ""
    return f"{protocol(figures)}, {figures['num_tokens']:,} tokens{at}"


def _teacher(results: Mapping[str, Any]) -> str:
    model = results["model"]
    return f"{model['name']}{' at ' + model['revision'] if model.get('revision') else ''}"


def _by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return found


def _listed(values: Mapping[str, Sequence[str]]) -> str:
    return " and ".join(f"{value} ({', '.join(names)})" for value, names in values.items())


def _what_differs_besides(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    remarks = []
    for title, values in (
        ("Devices differ", {name: str(results.get("device", "unknown")) for name, results in runs.items()}),
        ("Versions differ", {name: _versions(results) for name, results in runs.items()}),
    ):
        if len(set(values.values())) > 1:
            remarks.append(
                f"{title}: {_listed(_by_value(values))}. Times are ratios to the dense model on the same device."
            )
    return remarks


def _versions(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in results.get("versions", {}).items()) or "unknown"


# ---- groups ----


def flat(fields: Any, prefix: str = "") -> dict[str, str]:
    """A recipe's fields by dotted name, each value as JSON has it.

    >>> flat({"budget": {"params": 5}, "targets": "mlp", "stages": [{"share": 1}]})
    {'budget.params': '5', 'targets': 'mlp', 'stages.0.share': '1'}
    """
    items: Iterable[tuple[Any, Any]]
    if isinstance(fields, Mapping) and fields:
        items = fields.items()
    elif isinstance(fields, list) and any(isinstance(each, Mapping) for each in fields):
        items = enumerate(fields)
    else:
        return {prefix: fields if isinstance(fields, str) else json.dumps(fields, ensure_ascii=False)}
    return {
        name: value
        for key, content in items
        for name, value in flat(content, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _candidates(
    run: str, results: Mapping[str, Any], labels: Mapping[str, str], by_protocol: bool, with_rivals: bool
) -> Iterable[Candidate]:
    found = models(results)
    texts = _texts(results, labels, by_protocol)
    seed, teacher = results.get("seed", results["recipe"].get("seed", 0)), _teacher(results)
    final = final_model(found)
    yield Candidate(run, results["recipe"]["name"], seed, teacher, flat(results["recipe"]), final, texts)
    if not with_rivals:
        return
    bases = dict.fromkeys(model.base for model in found if model.role == "rival")
    recipes = {rival["recipe"]["name"]: rival["recipe"] for rival in results.get("rivals", []) if "recipe" in rival}
    for base in bases:
        last = [model for model in found if model.role == "rival" and model.base == base][-1]
        fields = flat(recipes.get(base, {"rival": base, "healing": results["recipe"].get("healing", {})}))
        yield Candidate(run, last.name if base == "dense" else base, seed, teacher, fields, last, texts)


def _texts(results: Mapping[str, Any], labels: Mapping[str, str], by_protocol: bool) -> dict[str, str]:
    """By the name of the comparison, the name in these results."""
    metrics = results["rows"][0]["metrics"]
    return {
        f"{labels[text]}, {_way(results, text, metrics[text])}" if by_protocol else labels[text]: text
        for text in metrics
    }


def _key(candidate: Candidate) -> tuple[Any, ...]:
    fields = {name: value for name, value in candidate.fields.items() if name not in ("seed", "description")}
    return candidate.teacher, candidate.name, tuple(sorted(fields.items())), tuple(candidate.texts)


def _once_each(candidates: Iterable[Candidate]) -> tuple[list[Candidate], list[str]]:
    """Without those of equal recipe and seed, which are one measurement and not two; what was left out, in words."""
    known: dict[tuple[Any, ...], Candidate] = {}
    remarks = []
    for each in candidates:
        first = known.setdefault((*_key(each), each.seed), each)
        if first is not each and each.model.role == "main":
            remarks.append(f"{each.run} has the recipe and the seed of {first.run} and is left out.")
    return list(known.values()), remarks


def _groups(candidates: Sequence[Candidate]) -> list[Group]:
    by_key: dict[tuple[Any, ...], list[Candidate]] = {}
    for each in candidates:
        by_key.setdefault(_key(each), []).append(each)
    return [_group(members) for members in by_key.values()]


def _group(members: Sequence[Candidate]) -> Group:
    first = members[0]
    speedups = [each.model.speedup for each in members]
    known = [speedup for speedup in speedups if speedup is not None]
    return Group(
        name=first.name,
        runs=[each.run for each in members],
        seeds=[each.seed for each in members],
        teacher=first.teacher,
        fields=first.fields,
        num_params=fmean(each.model.num_params for each in members),
        num_bytes=fmean(each.model.num_bytes for each in members),
        time=Estimate.of([1 / speedup for speedup in known]) if len(known) == len(members) else None,
        perplexity={
            text: Estimate.of([each.model.metrics[each.texts[text]][MEASURE] for each in members])
            for text in first.texts
        },
    )


def _named(groups: Sequence[Group]) -> list[Group]:
    """With names that tell the groups apart: the recipe's, and the fields in which those of one name differ."""
    named = []
    for group in groups:
        alike = [other for other in groups if other.name == group.name]
        told = [
            f"{name.rpartition('.')[2]}={values[alike.index(group)]}" for name, values in differences(alike).items()
        ]
        if len({other.teacher for other in alike}) > 1:
            told.append(f"of {group.teacher}")
        parts = [group.name, f"({', '.join(told)})"] if told else [group.name]
        named.append(replace(group, name=" ".join(parts)))
    return _told_apart(named)


def _told_apart(groups: Sequence[Group]) -> list[Group]:
    """With their runs in the names where nothing else tells them apart: measured in different ways, say."""
    return [
        replace(group, name=f"{group.name} [{', '.join(group.runs)}]")
        if sum(other.name == group.name for other in groups) > 1
        else group
        for group in groups
    ]


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The recipes' fields that are not equal in all groups, with the value of each group; – where one has none."""
    names = dict.fromkeys(name for group in groups for name in group.fields)
    found = {name: [group.fields.get(name, "–") for group in groups] for name in names if name not in _NOT_COMPARED}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _dense(runs: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], by_protocol: bool) -> list[Group]:
    """The dense model of each teacher, measured in each way."""
    found: dict[tuple[Any, ...], Group] = {}
    for name, results in runs.items():
        model, texts = models(results)[0], _texts(results, labels, by_protocol)
        one = Candidate(name, "dense", 0, _teacher(results), {}, model, texts)
        found.setdefault(_key(one), _group([one]))
    if len(found) == 1:
        return list(found.values())
    return _told_apart([replace(group, name=f"dense {group.teacher}") for group in found.values()])
