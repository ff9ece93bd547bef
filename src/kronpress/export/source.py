"""The text of functions of this package, with all that they use of it, as part of a module that needs no kronpress.

A self-contained checkpoint takes the product of each structure along in this way: there is one implementation of it,
and a new structure has nothing to write.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Collection, Iterable
from types import FunctionType, ModuleType
from typing import Any

from kronpress.matrices import STRUCTURES, StructuredMatrix

PACKAGE = __name__.partition(".")[0]


def source_of(methods: Iterable[tuple[type[StructuredMatrix], str]]) -> str:
    """Imports, constants, functions and classes: these methods, and what they use, word for word.

    A structure in the text has no base, and only the methods that are used, inherited ones among them; any other class
    is whole. Annotations stand as they are, for a module that does not evaluate them.

    >>> from kronpress.matrices import LowRank
    >>> print(*source_of([(LowRank, "rows")]).strip().splitlines(), sep=chr(10))
    class LowRank:
        @classmethod
        def rows(cls, factors: Factors, indices: Tensor) -> Tensor:
            return factors["weight"][indices].squeeze(-1) @ factors["right"]

    Raises:
        TypeError: a function uses what cannot be written down in this way, or two things of one name.
    """
    imports: set[str] = set()
    todo: list[tuple[type | ModuleType, str]] = list(methods)
    # A structure may stand in a user's own module.
    inside = {PACKAGE, *(holder.__module__.partition(".")[0] for holder, _ in todo if isinstance(holder, type))}
    found: dict[tuple[type | ModuleType, str], tuple[int, str]] = {}  # the line at which it stands, and its text
    while todo:
        holder, name = todo.pop()
        if (holder, name) in found:
            continue
        value = inspect.getattr_static(holder, name)
        definition = inspect.unwrap(getattr(value, "__func__", value))
        if not isinstance(definition, type | FunctionType):
            found[holder, name] = 0, f"{name} = {_literal(value, name)}\n"
            continue
        lines, first = inspect.getsourcelines(definition)
        text = textwrap.dedent("".join(lines))
        found[holder, name] = first, text
        home = sys.modules[definition.__module__]
        for used, attribute in _used_names(text):
            if used == "cls" and attribute is not None and isinstance(holder, type):
                todo.append((holder, attribute))
            elif used in vars(home):
                other = vars(home)[used]
                if other is STRUCTURES:
                    continue  # the module that takes the text has one, with the structures it needs
                if _is_outside(other, inside):
                    imports.add(_import(other, used))
                elif isinstance(other, type) and issubclass(other, StructuredMatrix):
                    if attribute is None:
                        raise TypeError(f"{definition.__qualname__} uses the structure {used} as a whole")
                    todo.append((other, attribute))
                else:
                    todo.append((home, used))

    classes: dict[type, list[str]] = {}
    rest: dict[str, str] = {}
    for (holder, name), (_, text) in sorted(found.items(), key=lambda each: (each[0][0].__name__, *each[1])):
        if isinstance(holder, type):
            classes.setdefault(holder, []).append(text)
        elif rest.setdefault(name, text) != text:
            raise TypeError(f"two functions or constants are called {name}: one file cannot hold both")
    if len({each.__name__ for each in classes}) < len(classes):
        raise TypeError("two classes have the same name: one file cannot hold both")
    # Constants stand first: a default value of an argument is read when its function is defined.
    constants = [text for text in rest.values() if not text.startswith(("def ", "class ", "@"))]
    definitions = [text for text in rest.values() if text not in constants]
    bodies = [
        f"class {each.__name__}:\n" + textwrap.indent("\n".join(texts), "    ") for each, texts in classes.items()
    ]
    return "\n\n".join(["".join(f"{line}\n" for line in sorted(imports)), "".join(constants), *definitions, *bodies])


def _used_names(text: str) -> set[tuple[str, str | None]]:
    """(name, the attribute that is taken of it or None) for each name that the function reads and does not bind."""
    names: set[tuple[str, str | None]] = set()
    bound: set[str] = set()

    def visit(node: ast.AST) -> None:
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                names.add((name, attribute))
                return
            case ast.Name(id=name, ctx=ast.Load()):
                names.add((name, None))
            case ast.Name(id=name):
                bound.add(name)
            case ast.arg(arg=name) if name != "cls":
                bound.add(name)
        for field, child in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                for each in child if isinstance(child, list) else [child]:
                    if isinstance(each, ast.AST):
                        visit(each)

    visit(ast.parse(text))
    return {(name, attribute) for name, attribute in names if name not in bound}


def _is_outside(value: Any, inside: Collection[str]) -> bool:
    """Whether a value of a module's namespace is a module, class or function of a package that is not `inside`."""
    if isinstance(value, ModuleType):
        return True
    return hasattr(value, "__name__") and value.__module__.partition(".")[0] not in inside


def _import(value: Any, name: str) -> str:
    if isinstance(value, ModuleType):
        if value.__name__.partition(".")[0] == PACKAGE:
            raise TypeError(f"the module {value.__name__} is used as a whole")
        line, own_name = f"import {value.__name__}", value.__name__
    else:
        line, own_name = f"from {value.__module__} import {value.__name__}", value.__name__
    return line if name == own_name else f"{line} as {name}"


def _literal(value: Any, name: str) -> str:
    try:
        is_literal = ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        is_literal = False
    if not is_literal:
        raise TypeError(f"{name} is a {type(value).__name__}, which cannot be written down")
    return repr(value)
