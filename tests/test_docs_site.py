"""The documentation as a site: built without warnings, whole in itself, its tables and figures those of the results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import kronpress as kp
from kronpress.checkpoint import load_config
from kronpress.planning import make_plan
from kronpress.recipe import load_recipe, recipe_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "scripts"))
import docs_figures  # noqa: E402
import docs_tables  # noqa: E402

PAGES = sorted(DOCS.rglob("*.md"))
# What makes a browser ask for something, and where it says for what.
ASKED_BY = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "use": "href"}


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CI does: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


class Addresses(HTMLParser):
    """Where a page leads to, what it asks for by itself, and which places it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.asked_for: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.places |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ASKED_BY and ASKED_BY[tag] in given and given.get("rel") not in ("prev", "next", "canonical"):
            self.asked_for.append(given[ASKED_BY[tag]])


@cache
def read(page: Path) -> Addresses:
    return Addresses(page)


def test_every_link_and_place_of_the_site_is_there(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) == len(PAGES)
    for page in pages:
        for link in read(page).links:
            parts = urlsplit(link)
            assert not parts.scheme, f"{page.name} leads out of the site: {link}"
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file() or link in (".", ".."), f"{page.relative_to(site)}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in read(target).places, f"{page.relative_to(site)}: {link}"


def test_nothing_is_asked_of_a_network(site):
    for page in site.rglob("*.html"):
        for address in read(page).asked_for:
            assert not urlsplit(address).netloc, f"{page.name} asks for {address}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", text), sheet.name


def test_every_page_is_in_the_navigation_once():
    def pages(part):
        if isinstance(part, str):
            return [part]
        return [page for each in (part if isinstance(part, list) else part.values()) for page in pages(each)]

    class Loader(yaml.SafeLoader):
        """Of mkdocs.yml, whose own tags are functions."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    assert sorted(pages(config["nav"])) == sorted(map(name, PAGES))


# ---- tables and figures ----


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert docs_tables.rendered(text) == text, "run python scripts/docs_tables.py"


def test_every_table_is_on_one_page():
    found = [marked[2] for page in PAGES for marked in docs_tables.MARKED.finditer(page.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(docs_tables.TABLES)


def test_every_result_has_a_command_and_is_listed():
    page = (DOCS / "reproduce.md").read_text(encoding="utf-8")
    for path in docs_tables.RESULTS.glob("*.json"):
        assert len(re.findall(rf"^\| \[`{path.name}`\]\(\S+\) \| `\S+ \S+.*?` \|", page, re.MULTILINE)) == 1


@pytest.mark.parametrize("page", docs_figures.EXAMPLES)
def test_figures_show_the_results_as_they_are(page):
    assert docs_figures.digest_in(docs_figures.file_of(page)) == docs_figures.shown(page), (
        "run python scripts/docs_figures.py"
    )
    assert f"figures/{docs_figures.file_of(page).name}" in (DOCS / f"{page}.md").read_text(encoding="utf-8")


def test_a_figure_can_be_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_figures, "FOLDER", tmp_path)
    docs_figures.draw("methods/sums")
    drawn = tmp_path / "method-sums.svg"
    assert docs_figures.digest_in(drawn) == docs_figures.shown("methods/sums")


def test_every_figure_is_on_a_page():
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(figure.name in pages for figure in (DOCS / "figures").iterdir())


def test_every_method_has_a_page_and_every_recipe_is_on_one():
    assert docs_tables.PUBLISHED.keys() == docs_tables.OURS.keys() == docs_figures.EXAMPLES.keys()
    index = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    assert all(f"`{recipe}`" in index for recipe in recipe_names())
    for page in docs_tables.OURS:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        assert re.search(r"^    \S.* [=≈] |^    min ", text, re.MULTILINE), f"{page} has no equation"
        assert f"({page.removeprefix('methods/')}.md)" in index or f"(../{page}.md)" in index


@pytest.mark.parametrize("page", docs_tables.OURS)
def test_the_rows_of_a_method_are_found_in_each_result_that_there_is(page):
    """A name in a result that has changed would otherwise leave a line out unseen."""
    for source, pattern in docs_tables.OURS[page]:
        assert docs_tables.results(source) is None or docs_tables.measured(source, pattern), (source, pattern)


def test_the_least_rise_of_all_is_what_the_page_recommends():
    """Read from the file by another way than that of the script."""
    found = json.loads((docs_tables.RESULTS / "fit_one_shot_pocket.json").read_text(encoding="utf-8"))
    page = (DOCS / "which-recipe.md").read_text(encoding="utf-8")
    for size in found["sizes"]:
        rows = [row for row in found["rows"] if row.get("size") == size["name"]]
        least = min(rows, key=lambda row: row["rise_nats"]["test books"])
        line = f"| {size['num_params']:,} ({size['name']}) | {size['kept_of_mlp']:.3f} "
        assert f"{line}| `{least['recipe']}` {least['rise_nats']['test books']:+.4f} |" in page


# ---- figures in sentences ----


def test_what_the_faq_says_of_counts_is_what_plans_say():
    page = " ".join((DOCS / "faq.md").read_text(encoding="utf-8").split())
    gpt2 = load_config("gpt2")

    def plan(recipe: str, *changes: str) -> kp.Plan:
        return make_plan(gpt2, load_recipe(recipe, list(changes)))

    krony = plan("krony-81m")
    assert f"`krony-81m` has {krony.num_params:,}" in page
    assert f"{krony.num_params_dense:,} without its 24 MLP matrices" in page
    assert f"is {krony.num_params_dense - krony.num_params_targets_dense:,}" in page
    for recipe in ("tqcompressor", "kngpt2"):
        assert f"{plan(recipe).num_params:,}" in page
        assert f"{plan(recipe, 'head=tied').num_params:,}" in page
    layers = plan("krony-92m-4").layers.values()
    times = sum(each.flops_per_token for each in layers) / sum(2 * each.num_params_dense for each in layers)
    assert f"`krony-92m-4` needs {times:.2f} times those" in page
