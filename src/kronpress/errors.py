"""The two ways in which kronpress refuses: the request was wrong, or the work failed.

The command line turns them into exit codes 2 and 1, or 143 where the work was told to stop. Messages are one sentence
that names the thing, what was given, and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RequestError(ValueError):
    """The request cannot be carried out as it stands: a wrong name, field, shape, budget or path."""


class WorkError(RuntimeError):
    """The request was sound but the work failed: damaged weights, an unreachable Hub, a loss that is not finite."""


class Terminated(WorkError):
    """SIGTERM came, and what was done is saved; the command line's exit code is 143."""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> RequestError:
    """A RequestError for a name that does not exist, with the nearest valid names.

    >>> print(unknown_name("recipe", "krony96m", ["krony-96m", "low-rank"]))
    unknown recipe 'krony96m': did you mean 'krony-96m'? Allowed: krony-96m, low-rank
    """
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return RequestError(f"unknown {kind} {name!r}: {hint}Allowed: {', '.join(allowed)}")
