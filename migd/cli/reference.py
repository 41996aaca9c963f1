"""What each configuration key means, and a configuration as TOML: both from the docstrings of ``Config``.

The shipped files, ``migd config show`` and docs/configuration.md all come from here.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
from msgspec.inspect import (
    BoolType,
    FloatType,
    IntType,
    LiteralType,
    Metadata,
    StrType,
    Type,
    VarTupleType,
    type_info,
)

from migd.config import TABLES, Config
from migd.sizes import bandwidth_text

_COLUMNS = 110

ROLES = {
    "serve": "A daemon with both roles: guests leave from it, arrive at it, and move on.",
    "source": "A source daemon: it holds the RAM of guests and sends them away.",
    "destination": "A destination daemon: it takes guests in and starts them.",
}
"""What a daemon of each role is."""

TABLES_OF = {
    "serve": ("daemon", "destination", "migration", "limits"),
    "source": ("daemon", "migration", "limits"),
    "destination": ("daemon", "destination", "limits"),
}
"""The tables that mean anything to a daemon of each role."""


@dataclass(frozen=True)
class Key:
    """One key of a configuration file."""

    table: str
    name: str
    values: str
    """What it may be, in words."""
    default: object
    meaning: str
    bandwidth: bool

    @property
    def path(self) -> str:
        return f"{self.table}.{self.name}"

    def value_in(self, config: Config) -> object:
        return getattr(getattr(config, self.table), self.name)

    def toml(self, value: object) -> str:
        """A value of this key as a file would say it."""
        if self.bandwidth and isinstance(value, int) and value:
            return f'"{bandwidth_text(value)}"'
        return _toml(value)


def keys(table: str) -> Iterator[Key]:
    """The keys of a table, in the order of its struct."""
    struct = TABLES[table]
    words, types = _docstrings(struct), get_type_hints(struct)
    for field in type_info(struct).fields:  # type: ignore[attr-defined]
        values = (
            _words(get_args(types[field.name]))
            if isinstance(field.type, LiteralType)
            else _values(field.type)
        )
        yield Key(table, field.name, values, field.default, words[field.name], _is_bandwidth(field.type))


def table_meaning(table: str) -> str:
    """What a table is about."""
    return " ".join((TABLES[table].__doc__ or "").split())


def as_toml(config: Config, role: str) -> str:
    """A configuration file with every key that means anything to a daemon of this role, each explained."""
    head = (
        f"{ROLES[role]} `migd {role} --config FILE`. Every key stands here with what it means; one that is "
        f"left out has its default. An unknown or ill-typed key is an error that names it."
    )
    return "\n".join([_comment(head), *(_table_toml(config, table) for table in TABLES_OF[role])])


def _table_toml(config: Config, table: str) -> str:
    head = f"{_comment(table_meaning(table))}[{table}]\n"
    return head + "".join(
        f"{_comment(key.meaning)}{key.name} = {key.toml(key.value_in(config))}\n" for key in keys(table)
    )


def changed(config: Config) -> list[Key]:
    """The keys whose values are not their defaults."""
    return [key for table in TABLES for key in keys(table) if key.value_in(config) != key.default]


def _comment(text: str) -> str:
    return (
        textwrap.fill(
            text,
            _COLUMNS,
            initial_indent="# ",
            subsequent_indent="# ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        + "\n"
    )


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return msgspec.json.encode(value).decode()  # every JSON string is a TOML string
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case _:
            return str(value)


# -- from the structs -----------------------------------------------------------------------------------


def _docstrings(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The string behind each field, in one line. Those who add a key without one learn it from a test."""
    module = ast.parse(Path(inspect.getfile(struct)).read_text("utf-8"))
    body = next(
        node.body
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef) and node.name == struct.__name__
    )
    found = dict.fromkeys(struct.__struct_fields__, "")
    for field, words in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(words, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(words.value)).split())
    return found


def _is_bandwidth(kind: Type) -> bool:
    return isinstance(kind, Metadata) and (kind.extra or {}).get("quantity") == "bandwidth"


def _values(kind: Type) -> str:
    """A type in words."""
    if _is_bandwidth(kind):
        return 'bytes per second, like 500000000 or "500M"; 0 or "unlimited"'
    match kind:
        case BoolType():
            return "true or false"
        case IntType(ge=low, le=high):
            return _range("integer", low, high)
        case FloatType(gt=above, ge=low, le=high):
            return _range("number", low if low is not None else above, high, above=low is None)
        case VarTupleType():
            return "list of strings"
        case StrType():
            return "string"
    raise TypeError(f"a configuration key of type {kind}: say here how to put it into words")


def _words(values: tuple[str, ...]) -> str:
    """Choices, in the order in which the code has them: msgspec sorts them."""
    *rest, last = (f'"{value}"' for value in values)
    return f"{', '.join(rest)} or {last}"


def _range(noun: str, low: float | None, high: float | None, *, above: bool = False) -> str:
    least = f"above {low:g}" if above else f"from {low:g}"
    return f"{noun} {least}" + (f" to {high:g}" if high is not None else "")
