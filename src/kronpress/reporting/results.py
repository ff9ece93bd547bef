"""results.json as it is read for people: which row is which model, and how figures are written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronpress.errors import RequestError, WorkError

RESULTS_FORMAT = 1
RESULTS = "results.json"
HEALED = ", healed"
TRAINED = ", trained further"


@dataclass(frozen=True)
class Model:
    """One row of results.json. `role` is dense, main (what the recipe makes), stage (what an earlier stage made) or
    rival.

    `base` is its name before it was healed; `speed` what was measured of it then, None if nothing was.
    """

    name: str
    base: str
    role: str
    is_trained: bool
    num_params: int
    num_bytes: int
    flops_per_token: int
    metrics: Mapping[str, Mapping[str, Any]]
    continuation: str | None
    passage_nats: list[float | None] | None
    speed: Mapping[str, Any] | None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the dense model it decodes; 1 for that model, however much it was trained."""
        if self.base == "dense":
            return 1.0
        return None if self.speed is None else float(self.speed["speedup"]["median"])


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results.json, or of that in a run directory.

    Raises:
        RequestError: there is none, or it is something else.
        WorkError: it is damaged, or of a newer format.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise RequestError(f"{str(path)!r} is no run directory: it has no {RESULTS}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkError(f"{str(file)!r} is damaged: {error}") from error
    wanted = ("format_version", "rows", "recipe", "plan")
    if not isinstance(results, dict) or any(key not in results for key in wanted):
        raise RequestError(f"{str(file)!r} is not the {RESULTS} of a run: it needs {', '.join(wanted)}")
    if results["format_version"] > RESULTS_FORMAT:
        raise WorkError(
            f"{str(file)!r} has format version {results['format_version']}, newer than {RESULTS_FORMAT}, the newest "
            "that this version of kronpress reads: upgrade kronpress"
        )
    return results


def models(results: Mapping[str, Any]) -> list[Model]:
    """All rows, in their order: dense, what the recipe makes stage by stage, rivals."""
    recipe = results["recipe"]["name"]
    speeds = results.get("speeds", {})
    found: list[Model] = []
    for row in results["rows"]:
        base = row["name"].removesuffix(HEALED).removesuffix(TRAINED)
        if row["stage"] == "dense":
            role = "dense"
        elif base == recipe and not any(each.name == row["name"] for each in found):  # a rival may have its name
            role = "main"
        elif base.startswith(f"{recipe}, stage "):
            role = "stage"
        else:
            role = "rival"
        found.append(
            Model(
                name=row["name"],
                base=base,
                role=role,
                is_trained=row["stage"] in ("healed", "reconstructed"),
                num_params=row["num_params"],
                num_bytes=row["bytes"],
                flops_per_token=row["flops_per_token"],
                metrics=row["metrics"],
                continuation=row.get("continuation"),
                passage_nats=row.get("passage_nats"),
                speed=speeds.get(base),
            )
        )
    return found


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """By name, its last parts between slashes, as few as tell all of them apart; Hub ids keep both theirs.

    >>> short_names(["/texts/one.txt", "/texts/two.txt", "wikitext2"])
    {'/texts/one.txt': 'one.txt', '/texts/two.txt': 'two.txt', 'wikitext2': 'wikitext2'}
    >>> short_names(["a/x.txt", "b/x.txt", "owner/set"])
    {'a/x.txt': 'a/x.txt', 'b/x.txt': 'b/x.txt', 'owner/set': 'owner/set'}
    """
    full = list(dict.fromkeys(paths))
    short = {path: Path(path).name if Path(path).suffix or path.startswith(("/", ".")) else path for path in full}
    length = 1
    while len(set(short.values())) < len(full):
        length += 1
        short = {path: "/".join(Path(path).parts[-length:]) for path in full}
        if length > max(len(Path(path).parts) for path in full):
            return dict(zip(full, full, strict=True))
    return short


def final_model(found: Sequence[Model]) -> Model:
    """What was saved: the last of the recipe's own rows."""
    return [model for model in found if model.role in ("dense", "main")][-1]


def protocol(figures: Mapping[str, Any]) -> str:
    """How an evaluation was made, in words; figures are comparable only where they are equal."""
    stride = "" if figures["stride"] is None else f", stride {figures['stride']}"
    bos = ", BOS" if figures["bos"] else ""
    return f"protocol {figures['protocol']}, window {figures['window']}{stride}{bos}"


# ---- figures ----


def digits(figure: float | None, number: int = 3) -> str:
    """At least `number` significant digits, with commas; a dash for what is not known.

    >>> digits(0.74761), digits(61.243), digits(2620440), digits(None)
    ('0.748', '61.2', '2,620,440', '–')
    """
    if figure is None:
        return "–"
    if figure == 0 or not math.isfinite(figure):
        return f"{figure:g}"
    return f"{figure:,.{max(0, number - 1 - math.floor(math.log10(abs(figure))))}f}"


def millions(count: int) -> str:
    """A count in thousands, millions or billions.

    >>> millions(2_620_440), millions(812)
    ('2.62 million', '812')
    """
    for size, name in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if count >= size:
            return f"{digits(count / size)}{name}"
    return str(count)


def megabytes(num_bytes: int) -> str:
    """
    >>> megabytes(5_240_880)
    '5.24 MB'
    """
    if num_bytes >= 10**9:
        return f"{digits(num_bytes / 1e9)} GB"
    return f"{digits(num_bytes / 1e6)} MB"


def sizes(spec: Mapping[str, Any]) -> str:
    """
    >>> sizes({"right_shape": [1, 2], "num_terms": 3})
    'right_shape 1×2, num_terms 3'
    """
    return ", ".join(f"{field} {_size(value)}" for field, value in spec.items())


def _size(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({sizes(value)})"
    if isinstance(value, list | tuple):
        return "×".join(map(str, value)) if all(isinstance(each, int) for each in value) else f"[{len(value)}]"
    return str(value)
