"""The schema of ``--json`` against a stored copy: nothing that scripts rely on changes unnoticed.

``tests/data/schema-N.json`` has each document's fields with their types. A new field goes into the copy with
``python -m tests.test_schema``; one that goes, or changes its type, makes the schema N + 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from migd.cli.main import main
from migd.migration.stats import SCHEMA
from tests.support import schema

COPY = Path(__file__).resolve().parent / "data" / f"schema-{SCHEMA}.json"

Schema = dict[str, dict[str, str]]


def present() -> Schema:
    return {
        kind.__name__: {name: shape for name, shape, _ in schema.columns(kind)}
        for kind in schema.every_struct()
    }


def stored() -> Schema:
    found: Schema = json.loads(COPY.read_text())
    return found


def broken(before: Schema, now: Schema) -> list[str]:
    """What a script that was written for ``before`` would trip over."""
    return [
        f"{document}.{name}: was {shape}, is {now.get(document, {}).get(name, 'gone')}"
        for document, fields in before.items()
        for name, shape in fields.items()
        if now.get(document, {}).get(name) != shape
    ]


def test_nothing_that_scripts_rely_on_has_changed() -> None:
    assert broken(stored(), present()) == [], f"this makes it schema {SCHEMA + 1}: see docs/api.md, Versions"


def test_the_copy_has_every_field() -> None:
    assert stored() == present(), "new fields: `python -m tests.test_schema` adds them to the copy"


def test_a_changed_or_missing_field_is_noticed() -> None:
    before = {"A": {"x": "integer", "y": "string"}, "B": {"z": "null"}}
    assert broken(before, {**before, "A": {**before["A"], "new": "string"}}) == []
    assert broken(before, {"A": {"x": "number"}, "B": {"z": "null"}}) == [
        "A.x: was integer, is number",
        "A.y: was string, is gone",
    ]
    assert broken(before, {"A": before["A"]}) == ["B.z: was null, is gone"]


def commands_with_json(group: click.Group, before: str = "") -> Iterator[str]:
    """By name; a group whose commands all print the same by its own."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group) and name not in schema.COMMANDS:
            yield from commands_with_json(command, f"{before}{name} ")
        elif name in schema.COMMANDS or any(option.name == "as_json" for option in command.params):
            yield before + name


def test_every_command_with_json_has_its_documents() -> None:
    assert sorted(commands_with_json(main)) == sorted(schema.COMMANDS)


def test_every_document_says_its_schema() -> None:
    without = [
        kind.__name__
        for kinds in schema.COMMANDS.values()
        for kind in kinds
        if {name: shape for name, shape, _ in schema.columns(kind)}.get("schema") != "integer"
    ]
    assert without == []


def test_every_field_is_explained() -> None:
    """In its row, or by its name in the words above the table."""
    silent = [
        f"{kind.__name__}.{name}"
        for kind in schema.every_struct()
        for name, _, meaning in schema.columns(kind)
        if not meaning and f"``{name}``" not in (kind.__doc__ or "")
    ]
    assert silent == [], "write a docstring below them"


if __name__ == "__main__":
    if COPY.exists() and (trouble := broken(stored(), present())):
        raise SystemExit("\n".join(["not written: schema would have to grow", *trouble]))
    COPY.write_text(json.dumps(present(), indent=1) + "\n")
