"""What a script may rely on, read from the code: the documents of ``--json``, the events, the Python API.

Names and types come from the structs themselves, meanings from the docstrings below their fields.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import get_args, get_type_hints

import msgspec
from msgspec import inspect as shapes

from migd import api
from migd.api.daemon import MigrateOptions
from migd.cli.clean import Cleaning
from migd.cli.config import ConfigCheck, ConfigDocument
from migd.cli.doctor import Diagnosis
from migd.config import MigrationConfig
from migd.control import commands, documents
from migd.control.events import Event
from migd.demo import Comparison
from migd.migration.stats import Arrival, Result

Structs = tuple[type[msgspec.Struct], ...]

EVENTS: Structs = get_args(Event)

COMMANDS: dict[str, Structs] = {
    "migrate": (Result, documents.BegunDocument),
    "attach": (Result, Arrival),
    "wait": (Result, Arrival),
    "resolve": (Result, documents.DoneDocument),
    "cancel": (documents.DoneDocument,),
    "set": (documents.DoneDocument,),
    "status": (documents.StatusDocument,),
    "list": (documents.ListDocument,),
    "history": (documents.HistoryDocument,),
    "events": EVENTS,
    "doctor": (Diagnosis,),
    "config check": (ConfigCheck,),
    "config show": (ConfigDocument,),
    "clean": (Cleaning,),
    "demo": (Comparison,),
}
"""Every command with ``--json``, and which documents it prints; each may print ErrorDocument instead."""


GLOSSARY = {
    "schema": "Of this document: see Versions.",
    "migration": "Its id, 32 hexadecimal digits.",
    "guest": "Its name.",
    "name": "Of the guest.",
    "pid": "Of the process.",
    "ram_bytes": "All of its RAM.",
    "ram_pages": "All pages of 4096 bytes.",
    "total_pages": "All pages of 4096 bytes.",
    "direction": "Whether it leaves from this daemon, or comes in.",
    "error": "Why, in words; empty on success.",
    "exit_code": "See Exit codes.",
    "state": "See States in architecture.md.",
    "states": "All that it went through, in order.",
    "outcome": "How it ended.",
    "live": "False: the guest is paused during the transfer.",
    "runtime_dir": "Of the daemon.",
    "daemon": "Its role: serve, source or destination.",
    "role": "serve, source or destination.",
    "version": "Of migd.",
    "iteration": "Its figures.",
    "check": "What was looked at.",
    "found": "What was found.",
    "meaning": "What that means, unless all is well.",
    "remedy": "What to do about it, unless all is well.",
    "findings": "One for each thing looked at.",
    "level": "How bad it is.",
    "kind": "What it is.",
    "removable": "Whether it may go.",
    "dry_run": "Nothing was removed.",
    "removed": "What went, or would go.",
    "kept": "What stays.",
    "record": "Its result.",
    "daemons": "Every one that answers.",
    "ratios": "The first run divided by the second.",
    "guests": "Those attached there.",
    "migrations": "Those it knows of.",
    "seconds": "How long it took.",
    "sent_pages": "Pages whose content was sent.",
    "resent_pages": "Of these, pages that had been sent before.",
    "zero_pages": "Pages that are zero, of which no content was sent.",
    "free_records": "Pages that were sent and then freed, so that they had to be made zero again.",
    "wire_bytes": "Bytes sent, all streams together.",
}
"""What names mean that mean the same everywhere; a docstring below a field says more."""


def every_struct() -> list[type[msgspec.Struct]]:
    """All that can stand anywhere in a document, in the order of COMMANDS."""
    found: dict[type[msgspec.Struct], None] = {}
    waiting = [*dict.fromkeys(kind for kinds in COMMANDS.values() for kind in kinds), documents.ErrorDocument]
    while waiting:
        kind = waiting.pop(0)
        if kind not in found:
            found[kind] = None
            waiting[:0] = [inner for field in _fields(kind) for inner in _structs_in(field.type)]
    return list(found)


def columns(kind: type[msgspec.Struct]) -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of each field; the tag, which is no field to msgspec, first."""
    meanings = GLOSSARY | dict(_meanings(*reversed(kind.__mro__)))
    config = kind.__struct_config__
    if config.tag_field is not None:
        yield config.tag_field, f'"{config.tag}"', "Always this."
    for field in _fields(kind):
        yield field.encode_name, type_text(field.type), meanings.get(field.name, "")


def type_text(shape: shapes.Type) -> str:
    """A type in the words of JSON."""
    match shape:
        case shapes.IntType():
            return "integer"
        case shapes.FloatType():
            return "number"
        case shapes.BoolType():
            return "boolean"
        case shapes.StrType():
            return "string"
        case shapes.NoneType():
            return "null"
        case shapes.ListType(item_type=item) | shapes.VarTupleType(item_type=item):
            return f"list of {type_text(item)}"
        case shapes.LiteralType(values=values):
            return " or ".join(f'"{value}"' for value in values)
        case shapes.EnumType(cls=kind):
            return " or ".join(f'"{member.value}"' for member in kind)
        case shapes.StructType(cls=kind):
            return kind.__name__
        case shapes.UnionType(types=types):
            return " or ".join(map(type_text, types))
    raise AssertionError(f"no words for {shape}")


def options() -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of what ``migrate`` takes; what it does not explain, the configuration does."""
    explained = dict(_meanings(MigrationConfig, commands.Migrate))
    known = get_type_hints(MigrateOptions)
    for name, kind, _ in columns(commands.Migrate):
        if name in known:
            yield name, kind, explained.get(name, GLOSSARY.get(name, ""))


def reference() -> Iterator[tuple[str, str]]:
    """Signature and meaning of each public function, class, property and method of ``migd.api``."""
    for name in api.__all__:
        thing = getattr(api, name)
        if inspect.isclass(thing):
            yield f"class {name}", _first_words(thing)
            yield from _members(name, thing)
        elif inspect.isfunction(thing):
            yield f"{name}{_signature(thing)}", _first_words(thing)


def _members(owner: str, kind: type) -> Iterator[tuple[str, str]]:
    for name, meaning in _meanings(kind):
        yield f"{owner}.{name}", meaning
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"{owner}.{name}", _first_words(member)
        elif inspect.isfunction(member):
            yield f"{owner}.{name}{_signature(member)}", _first_words(member)


def _signature(function: Callable[..., object]) -> str:
    """As in the code: annotations are strings there, so ``str(signature)`` would quote them."""
    found = inspect.signature(function)
    words = []
    for name, parameter in found.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            words.append(f"**{name}")
        elif name != "self":
            default = "" if parameter.default is parameter.empty else f" = {_quoted(parameter.default)}"
            words.append(f"{name}: {parameter.annotation}{default}")
    return f"({', '.join(words)}) -> {found.return_annotation}"


def _quoted(value: object) -> str:
    return repr(value).replace("'", '"')


def _first_words(thing: object) -> str:
    """The docstring's first paragraph, in one line."""
    return _one_line((inspect.getdoc(thing) or "").split("\n\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _fields(kind: type[msgspec.Struct]) -> Iterable[shapes.Field]:
    shape = shapes.type_info(kind)
    assert isinstance(shape, shapes.StructType)
    return shape.fields


def _structs_in(shape: shapes.Type) -> Iterator[type[msgspec.Struct]]:
    match shape:
        case shapes.StructType(cls=kind):
            yield kind
        case shapes.ListType(item_type=item) | shapes.VarTupleType(item_type=item):
            yield from _structs_in(item)
        case shapes.UnionType(types=types):
            for one in types:
                yield from _structs_in(one)


def _meanings(*kinds: type) -> Iterator[tuple[str, str]]:
    """Fields with the docstring that stands below each."""
    for base in kinds:
        if base.__module__.partition(".")[0] != "migd":
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str() as text)),
                ):
                    yield name, _one_line(text)
