"""The tables of the documentation that are made of committed results, written into its pages.

    python scripts/docs_tables.py

A page has `<!-- table: NAME -->` and `<!-- end of table -->`, and what is between them is replaced. No figure of ours
is written here: each is read from benchmarks/results. Figures of others are in PUBLISHED, with where they are from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
BOOKS, WIKI = "test books", "wiki.test.raw"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


# ---- what was measured ----


@dataclass(frozen=True)
class Measured:
    """One model of one result, beside the dense model of the same result; losses are means over tokens, in nats."""

    source: str
    name: str
    recipe: str | None
    rival: str | None
    size: str | None
    num_params: int
    num_bytes: int
    dense: dict[str, float]
    before: dict[str, float]
    after: dict[str, float] | None
    healing: str

    def rise(self, text: str = BOOKS, healed: bool = False) -> float:
        of = self.after if healed else self.before
        assert of is not None
        return of[text] - self.dense[text]

    @property
    def label(self) -> str:
        """The recipe that makes it, or what it is where there is none, or where much of the recipe was changed."""
        if self.source == "all_structures":
            return self.name.partition(": ")[2]
        return f"`{self.recipe}`" if self.recipe else {"blocks": "fewer blocks"}.get(self.rival or "", self.name)


def results(source: str) -> dict[str, Any] | None:
    """A committed result; None if it was not measured yet."""
    path = RESULTS / f"{source}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def measured(source: str, pattern: str = "") -> list[Measured]:
    """The models of a result whose names match, all but the dense one itself."""
    found = results(source)
    if found is None:
        return []
    settings = found.get("settings", {})
    dense = next(row for row in found["rows"] if row.get("rival") == "dense")
    objective = "distilled" if settings.get("distil") or source == "all_structures" else "language-model loss"

    def nats(figures: dict[str, Any] | None) -> dict[str, float] | None:
        return figures and {text: each["nll_mean_nats"] for text, each in figures.items()}

    return [
        Measured(
            source,
            row["name"],
            row.get("recipe") or _recipe_in(row["name"]),
            row.get("rival"),
            row.get("size") or (f"{row['kept']:g} of the MLPs" if "kept" in row else None),
            row["num_params"],
            row["bytes"],
            nats(dense["before"]) or {},
            nats(row["before"]) or {},
            nats(row.get("after")),
            f"{row['tokens']:,} tokens, {objective}" if "after" in row else "none",
        )
        for row in found["rows"]
        if row is not dense and "before" in row and re.search(pattern, row["name"])
    ]


def _recipe_in(name: str) -> str | None:
    """The recipe that a row of pocket_table.json names at its beginning."""
    found = re.match(r"krony-[\w-]+(?=,)", name)
    if found:
        return found[0]
    return "low-rank" if name.startswith("low rank") else None


# ---- a method's own line beside the published one ----

NOT_COMPARABLE = (
    "The two kinds of lines cannot be compared as figures: other models, other text, other training. Neither GPT-2's "
    "own weights nor a model of that size was at hand, so that no line of ours is of the published model."
)

# page: (model and text, size, figure, training, source). Marked "quoted": read in a third place, not in the paper.
PUBLISHED: dict[str, list[tuple[str, str, str, str, str]]] = {
    "krony-pt": [
        (
            "GPT-2 small, WikiText-103",
            f"{size:,}",
            f"perplexity {figure} (dense 29.16)",
            "about 36 billion tokens",
            source,
        )
        for size, figure, source in (
            (80_400_048, 41.06, "arXiv 2412.12351, 80M-2"),
            (81_972_576, 42.74, "the same, 81M"),
            (92_983_392, 40.78, "the same, 92M-4"),
            (96_128_304, 41.98, "the same, 96M, Van Loan"),
            (96_128_304, 38.22, "the same, 96M, pruning"),
        )
    ],
    "methods/tqcompressor": [
        (
            "GPT-2 small, WikiText-103",
            "119,933,764",
            "perplexity 40.61 (dense 29.16 in Krony-PT's table)",
            "about 280 million tokens, distilled",
            "arXiv 2401.16367",
        ),
        ("GPT-2 small, WikiText-2", "119,933,764", "perplexity 32.56 (24.67)", "the same", "the same"),
        ("GPT-2 small, LAMBADA as text", "119,933,764", "perplexity 65.68 (45.28)", "the same", "the same"),
        ("GPT-2 small, WikiText-103", "119M", "perplexity 40.28 (29.16)", "the same", "as arXiv 2412.12351 prints it"),
    ],
    "methods/kngpt2": [
        (
            "GPT-2 small, WikiText-103, fine-tuned on it",
            "about 83M without the head",
            "perplexity 20.5 (DistilGPT2 23.7)",
            "one epoch of a tenth of OpenWebText",
            "arXiv 2110.08152, quoted",
        ),
        (
            "GPT-2 small, GLUE, mean over its development sets",
            "the same",
            "79.25 (dense 79.81, DistilGPT2 76.8)",
            "the same",
            "arXiv 2110.08152, quoted",
        ),
        (
            "GPT-2 small, WikiText-103",
            "119M, unresolved",
            "perplexity 40.97 (29.16)",
            "the same",
            "as arXiv 2412.12351 prints it",
        ),
    ],
    "methods/low_rank": [
        ("Llama-1-7B, SVD-LLM", "0.8 kept", "perplexity 7.88 (dense 5.67)", "none", "re-run in arXiv 2408.09632"),
    ],
    "methods/procrustes": [
        (
            "OPT-125m",
            "19.6 % removed",
            "perplexity 36.08 (dense 27.65); not weighted by inputs 55.91",
            "none",
            "arXiv 2506.02818",
        ),
        ("Llama-2-7B", "15 % removed", "perplexity 6.54 (dense 5.47)", "none", "the same"),
        ("Llama-2-7B", "36 % removed", "perplexity 19.55 (dense 5.47)", "none", "the same"),
    ],
    "methods/monarch": [],
    "methods/blast": [
        ("GPT-2", "40 % fewer operations", "better than dense", "from scratch", "abstract of arXiv 2410.21262"),
        ("Llama-7B", "half", "the least loss of the structures tried there", "re-trained", "the same"),
    ],
    "methods/tensor_train": [
        (
            "GPT-2 small's geometry, WikiText-103",
            f"{size}M, rank {rank}",
            f"perplexity {figure} (dense 124.4M 17.55)",
            "from scratch",
            "arXiv 2306.02697, quoted",
        )
        for size, rank, figure in ((68.1, 16, 21.33), (71.8, 32, 21.06), (83.6, 64, 18.08), (107.7, 80, 17.61))
    ],
    "methods/tensorgpt": [
        (
            "an embedding alone",
            "up to 38.4 times fewer numbers",
            "3.31 times fewer were “better than the original” on its own measure",
            "none",
            "arXiv 2307.00526",
        ),
    ],
    "methods/joint_rank": [],
    "methods/modegpt": [
        ("Llama-2-7B, WikiText-2", "20 % removed", "perplexity 6.16 (SliceGPT 7.68)", "none", "arXiv 2408.09632"),
        ("Llama-2-7B, WikiText-2", "30 % removed", "perplexity 7.51 (SliceGPT 10.47)", "none", "the same"),
        ("Llama-1-7B", "0.8 kept", "perplexity 6.92 (dense 5.67; SVD-LLM 7.88)", "none", "the same"),
    ],
    "methods/sums": [],
    "methods/auto": [],
}

# page: the results and the rows in them that are of its method.
OURS: dict[str, list[tuple[str, str]]] = {
    "krony-pt": [
        ("pocket_table", r"^krony-(80m-2|81m|92m-4|96m), (van_loan|adaptive|prune \[1, 0\.1\])$"),
        ("structures_healed", r"^krony-96m: (van_loan|adaptive)$"),
    ],
    "methods/tqcompressor": [
        ("structures_healed", r"^tqcompressor: (in stages|at once)"),
        ("all_structures", "TQCompressor"),
    ],
    "methods/kngpt2": [("structures_healed", r"^kngpt2: (logits|its own)")],
    "methods/low_rank": [
        ("fit_one_shot_pocket", r"^krony-(81m|96m): (low-rank|svd-llm|asvd)$"),
        ("fit_one_shot_llama", r"^krony-(81m|96m): (low-rank|svd-llm|asvd)$"),
        ("fit_healed", r": (low-rank|svd-llm|asvd)$"),
        ("all_structures", r"(low rank \(SVD\)|ASVD|SVD-LLM)$"),
    ],
    "methods/procrustes": [("structures_one_shot", r"^procrustes: (as it is|not rotated)$")],
    "methods/monarch": [("all_structures", "Monarch")],
    "methods/blast": [("all_structures", "BLAST")],
    "methods/tensor_train": [("all_structures", "tensor train|cores")],
    "methods/tensorgpt": [],
    "methods/joint_rank": [("all_structures", "joint rank-k")],
    "methods/modegpt": [("all_structures", "MoDeGPT")],
    "methods/sums": [("all_structures", r"\+ low rank")],
    "methods/auto": [
        ("fit_one_shot_pocket", r"^krony-(81m|96m): auto"),
        ("fit_one_shot_llama", r"^krony-(81m|96m): auto"),
        ("fit_healed", ": auto"),
        ("structures_healed", r"^krony-96m: auto on blocks$"),
        ("all_structures", "auto of"),
    ],
}
TEACHERS = {"fit_one_shot_llama": "a Llama of 1.6M"}


def of_method(page: str) -> list[Measured]:
    return [each for source, pattern in OURS[page] for each in measured(source, pattern)]


def method_lines(page: str) -> Iterator[str]:
    """The published figures, and below them ours."""
    yield "| | model, text | size | figure | training | from |"
    yield "|---|---|---|---|---|---|"
    for model, size, figure, training, source in PUBLISHED[page]:
        yield f"| published | {model} | {size} | {figure} | {training} | {source} |"
    if not PUBLISHED[page]:
        yield "| published | | | no figure that could stand beside ours is known to us | | |"
    for each in of_method(page):
        after = "" if each.after is None else f" → {exp(each.after[BOOKS]):,.2f}"
        yield (
            f"| here | {TEACHERS.get(each.source, '`pocket`')}, test books: {each.name} | {each.num_params:,} "
            f"| perplexity {exp(each.before[BOOKS]):,.2f}{after} (dense {exp(each.dense[BOOKS]):,.2f}) "
            f"| {each.healing} | `{each.source}.json` |"
        )
    for row in embedding_energies() if page == "methods/tensorgpt" else []:
        yield (
            f"| here | embedding of `pocket`: {row['method']} | {row['kept']:.3f} kept "
            f"| energy {row['captured_energy']:.3f} (chance {row['chance']:.3f}) | none | `all_structures.json` |"
        )
    if not of_method(page) and not (page == "methods/tensorgpt" and embedding_energies()):
        yield "| here | `pocket`, test books | | not measured yet | | `all_structures.json`, when it is there |"
    yield ""
    if PUBLISHED[page]:
        yield NOT_COMPARABLE


def embedding_energies() -> list[dict[str, Any]]:
    found = results("all_structures")
    return [] if found is None else found["embedding"]


# ---- which recipe ----

SIZES = ("krony-67m", "krony-80m-2", "krony-81m", "krony-92m-4", "krony-96m", "0.75 of the MLPs")
DATA_FREE = ("low-rank", "krony-67m", "krony-80m-2", "krony-81m", "krony-92m-4", "krony-96m")
Limit = Callable[[Measured], bool]
LIMITS: dict[str, Limit] = {
    "any of the blocks' matrices": lambda each: True,
    "the MLPs alone": lambda each: each.rival is None and not each.name.endswith("on blocks"),
    "no text to calibrate on": lambda each: each.recipe in DATA_FREE or each.rival == "blocks",
    "one product, or a few, of fixed shape": lambda each: (each.recipe or "").startswith("krony-"),
}


def best(rows: list[Measured], healed: bool = False) -> str:
    """The label of the row with the smallest rise, and the rise; a dash if there is none."""
    if not rows:
        return "–"
    least = min(rows, key=lambda each: each.rise(healed=healed))
    return f"{least.label} {least.rise(healed=healed):+.4f}"


def which_size() -> Iterator[str]:
    """By size and by what may be done: the recipe with the smallest rise without healing."""
    yield f"| parameters of `pocket` | MLPs kept | {' | '.join(LIMITS)} |"
    yield "|---|---|" + "---|" * len(LIMITS)
    found = results("fit_one_shot_pocket")
    assert found is not None
    for size in found["sizes"]:
        rows = [each for each in measured("fit_one_shot_pocket") if each.size == size["name"]]
        cells = [best(list(filter(limit, rows))) for limit in LIMITS.values()]
        yield f"| {size['num_params']:,} ({size['name']}) | {size['kept_of_mlp']:.3f} | {' | '.join(cells)} |"


def which_healed() -> Iterator[str]:
    """The same after healing, at the sizes at which it was measured."""
    yield "| size | healing | best | next | of fixed shape | from |"
    yield "|---|---|---|---|---|---|"
    for source in ("fit_healed", "structures_healed", "all_structures"):
        rows = [each for each in measured(source) if each.after is not None]
        for size in dict.fromkeys(each.size for each in rows if each.size):
            of_size = sorted((each for each in rows if each.size == size), key=lambda each: each.rise(healed=True))
            others = [each for each in of_size if each.label != of_size[0].label]
            fixed = [each for each in of_size if (each.recipe or "") in (*DATA_FREE[1:], "tqcompressor", "kngpt2")]
            yield (
                f"| {of_size[0].num_params:,} ({size}) | {of_size[0].healing} | {best(of_size[:1], True)} "
                f"| {best(others[:1], True)} | {best(fixed, True)} | `{source}.json` |"
            )


def which_bytes() -> Iterator[str]:
    """Rounded dense weights beside the smallest models, by bytes."""
    yield "| | bytes | rise, test books | rise, WikiText-2 |"
    yield "|---|---|---|---|"
    rows = measured("fit_one_shot_pocket")
    rounded = [each for each in rows if each.rival in ("8-bit", "4-bit")]
    autos = [each for each in rows if each.name.endswith("auto on blocks")]
    for each in sorted([*rounded, *autos], key=lambda each: -each.num_bytes):
        label = each.name if each.rival else f"`auto`, {each.num_params:,} parameters in 16 bits"
        yield f"| {label} | {each.num_bytes:,} | {each.rise():+.4f} | {each.rise(WIKI):+.4f} |"


SPEEDS = {"model": "compressed", "int8": "dense, 8-bit"}


def which_speed() -> Iterator[str]:
    """Speed over the dense model in float32 on one thread."""
    found = results("end_to_end")
    assert found is not None
    yield "| GPT-2 small's geometry, float32, one thread | one token | prompt of 512 |"
    yield "|---|---|---|"
    for row in found["rows"]:
        if row["threads"] != 1:
            continue
        for model in row["benchmark"]["models"]:
            if model["dtype"] != "float32" or model["kind"] not in SPEEDS:
                continue
            comparison = model["measured"][0]["comparison"]
            ratios = [f"{comparison[kind]['spread']['median']:.2f} times" for kind in ("decode", "prefill")]
            yield f"| {row['variant']}: {SPEEDS[model['kind']]} | {' | '.join(ratios)} |"


def which_decision() -> Iterator[str]:
    """What to take when; every recipe named and every figure is read from the results."""

    def rows(source: str, *names: str) -> list[Measured]:
        found = {each.name: each for each in measured(source)}
        return [found[name] for name in names]

    def least(source: str, size: str, limit: Limit, healed: bool = False) -> Measured:
        of_size = [each for each in measured(source) if each.size == size and limit(each)]
        return min(of_size, key=lambda each: each.rise(healed=healed))

    half, quarter = "krony-96m", "krony-81m"
    anything, mlps, free, fixed = LIMITS.values()
    yield "| If | then | measured, rise in nats over the dense `pocket` on the test books |"
    yield "|---|---|---|"
    for words, limit in (
        ("you have text like that which the model will read, and any matrix of the blocks may change", anything),
        ("only the MLPs may change", mlps),
        ("you have no text at all", free),
        ("the structure has to be Krony-PT's", fixed),
    ):
        found = [least("fit_one_shot_pocket", size, limit) for size in (half, quarter)]
        labels = " or ".join(dict.fromkeys(each.label for each in found))
        figures = ", ".join(
            f"{each.rise():.4f} at {kept} ({each.name.split(': ')[1]})"
            for each, kept in zip(found, ("half of the MLPs' parameters", "a quarter"), strict=True)
        )
        yield f"| {words} | {labels} | {figures}; without healing |"
    healed = [least("structures_healed", size, anything, True) for size in ("tqcompressor", "kngpt2", half)]
    labels = " or ".join(dict.fromkeys(each.label for each in healed))
    figures = ", ".join(f"{each.rise(healed=True):.4f} at {each.num_params:,}" for each in healed)
    yield f"| you heal afterwards, by distillation | {labels} | {figures} parameters, after {healed[0].healing} |"
    [four] = rows("fit_one_shot_pocket", "dense, 4-bit")
    smaller = [each for each in measured("fit_one_shot_pocket") if each.num_bytes >= four.num_bytes and not each.rival]
    least_bytes = min(each.num_bytes for each in smaller)
    nearest = min((each for each in smaller if each.num_bytes <= 1.01 * least_bytes), key=Measured.rise)
    yield (
        f"| only bytes matter, and your runtime has 4-bit kernels | round the dense weights, not kronpress "
        f"| {four.rise():.4f} in {four.num_bytes:,} bytes; the nearest in bytes of ours, {nearest.label}, "
        f"{nearest.rise():.4f} in {nearest.num_bytes:,} |"
    )
    [fewer] = [each for each in measured("pocket_table") if each.rival == "blocks" and each.size == half]
    yield (
        f"| you want whole blocks gone | `--set rivals=[blocks]` measures it beside any recipe "
        f"| {fewer.rise():.4f} at {fewer.num_params:,} parameters, {fewer.rise(healed=True):.4f} "
        f"after {fewer.healing} |"
    )
    for words in (
        "the model has billions of parameters",
        "it will run on a GPU",
        "the text is code, or is not English",
    ):
        yield f"| {words} | measure: `kronpress sweep`, `kronpress compare` | nothing was measured |"


# ---- made again ----


def made_again() -> Iterator[str]:
    """For each committed result the command that makes it, and the pages that quote it."""
    usage = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("*.py")))
    pages = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    texts = {path: MARKED.sub("", path.read_text(encoding="utf-8")) for path in pages}
    yield "| result | command | named on |"
    yield "|---|---|---|"
    for path in sorted(RESULTS.glob("*.json")):
        recorded = json.loads(path.read_text(encoding="utf-8")).get("command")
        if isinstance(recorded, list):
            recorded = f"{' '.join(recorded)} > benchmarks/results/{path.name}"
        written = re.search(rf"^    ((?:OMP\S+ )?python benchmarks/.*results/{path.name})\b", usage, re.MULTILINE)
        alone = re.search(rf"^    (python benchmarks/{path.stem}\.py run)$", usage, re.MULTILINE)
        command = recorded or (written or alone or [None, None])[1]
        if command is None:
            raise SystemExit(f"{path.name}: no command is known that makes it")
        quoting = [
            f"[{page.relative_to(DOCS).with_suffix('')}]({page.relative_to(DOCS)})"
            if page.is_relative_to(DOCS)
            else f"[README](../{page.name})"
            for page, text in texts.items()
            if re.search(rf"\b{path.stem}(\.json|`)", text)
        ]
        yield f"| [`{path.name}`](../benchmarks/results/{path.name}) | `{command}` | {', '.join(quoting) or '–'} |"


# ---- into the pages ----

TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "which-decision": which_decision,
    "which-size": which_size,
    "which-healed": which_healed,
    "which-bytes": which_bytes,
    "which-speed": which_speed,
    "made-again": made_again,
    **{page.rpartition("/")[2]: (lambda page=page: method_lines(page)) for page in PUBLISHED},
}


def rendered(page: str) -> str:
    """The text of a page with its tables as the results have them now."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n" + "\n".join(TABLES[found[2]]()).rstrip() + f"\n\n{found[4]}"

    return MARKED.sub(table, page)


def main() -> None:
    for path in sorted(DOCS.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (new := rendered(page)) != page:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
