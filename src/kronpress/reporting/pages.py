"""A page as one file: template, style, script and the chart library in it, so that nothing is asked of any network."""

from __future__ import annotations

import base64
import gzip
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kronpress.version import __version__


def page(template: str, **content: Any) -> str:
    """The HTML document of a template; all that `content` holds is escaped."""
    return (
        _environment()
        .get_template(template)
        .render(
            **content,
            version=__version__,
            style=Markup(_text("style.css")),
            script=Markup(_text("page.js")),
            library=Markup(chart_library()),
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("kronpress.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(name: str) -> str:
    return (resources.files("kronpress.reporting") / "templates" / name).read_text(encoding="utf-8")


@cache
def chart_library() -> str:
    """plotly.js from its Python package, gzipped, in base64: a third of its size, and text that no page can break."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
