"""What mkdocs cannot do by itself: pages link to files of the repository that are outside of docs/.

Such a link works where the repository is looked at. In the site the file is put beside the pages, under `repository/`,
as text, so that a browser shows it and nothing is asked of a network. mkdocs calls the two functions by their names.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(?=[)#])")
# What browsers show as it is; other files become text.
SHOWN = (".json", ".png", ".svg", ".txt")


def place_outside(page: str, target: str) -> str | None:
    """Where a link of a page, such as methods/sums.md, leads outside of docs/; None if it stays within."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def in_site(path: str) -> str:
    return f"repository/{path}" if path.endswith(SHOWN) else f"repository/{path}.txt"


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = place_outside(page.src_uri, target)
            if path is not None and (root / path).is_file() and files.get_file_from_path(in_site(path)) is None:
                files.append(File.generated(config, in_site(path), content=(root / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def moved(link: re.Match[str]) -> str:
        path = place_outside(page.file.src_uri, link[1])
        return (
            link[1] if path is None else posixpath.relpath(in_site(path), posixpath.dirname(page.file.src_uri) or ".")
        )

    return LINK.sub(moved, markdown)
