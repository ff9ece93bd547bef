"""Open pages of the documentation's site as a person would: pictures, and what Chromium and axe find wrong.

    python scripts/look_at_docs.py site/index.html site/tutorial.html --out looks

The counterpart of look_at_report.py for `make docs`; it needs the same, and ends with 1 for the same faults. Asking for
files of the site itself is none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from look_at_report import SIZES, THEMES, Watched, chromium, find_chromium


@contextmanager
def opened(browser: Any, page: Path, size: str, theme: str) -> Iterator[Watched]:
    """The page in a new window of that size and system theme; what it asks for outside of its site is noted."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
    watched = Watched(context.new_page())
    watched.page.on("console", lambda message: watched.said.append(f"{message.type}: {message.text}"))
    watched.page.on("pageerror", lambda error: watched.said.append(f"error: {error}"))

    def note(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            watched.asked_for.append(request.url)

    watched.page.on("request", note)
    try:
        watched.page.goto(page.resolve().as_uri())
        watched.page.wait_for_timeout(300)
        yield watched
    finally:
        context.close()


def look(browser: Any, page: Path, out: Path) -> list[str]:
    """Take all pictures of one page; what is wrong with it, in words."""
    wrong = []
    for size in SIZES:
        for theme in THEMES:
            with opened(browser, page, size, theme) as watched:
                watched.page.screenshot(path=out / f"{page.stem}-{size}-{theme}.png", full_page=True)
                faults = [*watched.said, *(f"asked for {url}" for url in watched.asked_for), *watched.findings()]
                if watched.overflow() > 0:
                    faults.append(f"{watched.overflow()} pixels wider than the screen")
                wrong += [f"{page.name}, {size}, {theme}: {fault}" for fault in faults]
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
        wrong = [fault for page in arguments.pages for fault in look(browser, page, arguments.out)]
    print("\n".join(wrong) or "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
