"""Open pages as a person would: screenshots wide and narrow, light and dark, and what Chromium and axe find wrong.

    python scripts/look_at_report.py kronpress-demo/report.html --out looks

It needs the extra `browser`, and a Chromium on the PATH. It ends with 1 if a page says something on the console, asks
for anything of any network, is wider than the screen, or has accessibility findings that axe calls serious or critical.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZES = {"wide": (1440, 900), "narrow": (390, 844)}
THEMES = ("light", "dark")
SERIOUS = ("serious", "critical")


def find_chromium() -> str | None:
    """The browser on the PATH; None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@dataclass
class Watched:
    """A page and what it did since it was opened."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked_for: list[str] = field(default_factory=list)

    def findings(self) -> list[str]:
        """What axe finds serious, one line for each rule, with the first place."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [
            f"{each['id']}, {each['impact']}, {len(each['nodes'])} places: {each['help']}, {each['nodes'][0]['html']}"[
                :300
            ]
            for each in found
            if each["impact"] in SERIOUS
        ]

    def overflow(self) -> int:
        """How many pixels the page is wider than the screen."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, path: Path, size: str = "wide", theme: str = "light") -> Iterator[Watched]:
    """The file in a new window of that size and system theme, once its charts are drawn."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
    watched = Watched(context.new_page())
    watched.page.on("console", lambda message: watched.said.append(f"{message.type}: {message.text}"))
    watched.page.on("pageerror", lambda error: watched.said.append(f"error: {error}"))
    address = path.resolve().as_uri()

    def note(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            watched.asked_for.append(request.url)

    watched.page.on("request", note)
    try:
        watched.page.goto(address)
        watched.page.wait_for_selector("html[data-ready]", timeout=30_000)
        yield watched
    finally:
        context.close()


def look(browser: Any, path: Path, out: Path) -> list[str]:
    """Take all pictures of one page; what is wrong with it, in words."""
    wrong = []
    for size in SIZES:
        for theme in THEMES:
            with opened(browser, path, size, theme) as watched:
                watched.page.wait_for_timeout(300)
                watched.page.screenshot(path=out / f"{path.stem}-{size}-{theme}.png", full_page=True)
                faults = [*watched.said, *(f"asked for {url}" for url in watched.asked_for), *watched.findings()]
                if watched.overflow() > 0:
                    faults.append(f"{watched.overflow()} pixels wider than the screen")
                wrong += [f"{path.name}, {size}, {theme}: {fault}" for fault in faults]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("looks"))
    arguments = parser.parse_args()
    if find_chromium() is None:
        print("there is no Chromium on the PATH", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        wrong = [fault for path in arguments.pages for fault in look(browser, path, arguments.out)]
    print("\n".join(wrong) or "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
