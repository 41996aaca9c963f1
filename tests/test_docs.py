"""The documents against the code: tables and bytes in them are generated, names in them exist.

Between ``<!-- generated: NAME -->`` and ``<!-- end -->`` a document says what ``GENERATED[NAME]`` says;
``python -m tests.test_docs`` writes it there, and the files in configs/.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migd import errors
from migd.cli import reference
from migd.cli.main import main
from migd.config import TABLES, Config, load
from migd.guest import hints
from migd.guest.hints import Hello, HintFrame, Ranges, Request
from migd.migration import decision
from migd.migration.journal import Mark
from migd.migration.state import DESTINATION_TRANSITIONS, SOURCE_TRANSITIONS
from migd.wire import messages, protocol
from migd.wire.framing import FrameEncoder
from migd.wire.protocol import FrameType
from tests import test_layers
from tests.kills import faults
from tests.proof import campaign
from tests.proof import table as mutants
from tests.proof.mutants import MUTANTS
from tests.support import schema
from tests.support.markdown import cell, table
from tests.verification import table as verification

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEDGER = "migd/ledger/ledger.py"
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

# -- what is generated ----------------------------------------------------------------------------------


def fenced(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"


def transitions(states: dict[Any, frozenset[Any]]) -> str:
    order = list(states)
    rows = (
        (f"`{state}`", ", ".join(f"`{after}`" for after in sorted(reached, key=order.index)) or "(end)")
        for state, reached in states.items()
    )
    return table(("state", "may become"), rows)


def layers() -> str:
    """The literal block of the test that holds the table."""
    assert test_layers.__doc__ is not None
    block = test_layers.__doc__.split("::\n", 1)[1].split("\n\nA module", 1)[0]
    return fenced("\n".join(line.removeprefix("    ") for line in block.splitlines()))


def specification(module: Any) -> str:
    """A module's docstring behind its first paragraph: tables as literal blocks, the rest as it is."""
    paragraphs = module.__doc__.replace("``", "`").split("\n\n")[1:]
    out = []
    for text in paragraphs:
        if text.startswith("    "):
            out.append(fenced("\n".join(line.removeprefix("    ") for line in text.splitlines())))
        elif text.strip() != "::":
            out.append(text.strip().removesuffix("::") + (":" if text.endswith("::") else "") + "\n")
    return "\n".join(out)


def annotated(data: bytes, fields: Iterable[tuple[int, str]]) -> str:
    """Bytes in hexadecimal, a field a line; the last field takes the rest."""
    lines, at = [], 0
    for size, meaning in fields:
        part = data[at : at + size] if size else data[at:]
        at += len(part)
        chunks = [part[i : i + 16].hex(" ") for i in range(0, len(part), 16)]
        lines += [f"{chunk:<49}{meaning if i == 0 else ''}".rstrip() for i, chunk in enumerate(chunks)]
    assert at == len(data)
    return "\n".join(lines)


def hint_example() -> str:
    header = [(4, "magic"), (1, "type"), (1, "zero"), (2, "zero"), (4, "body length"), (8, "epoch"),
              (4, "CRC-32 of the body"), (4, "CRC-32 of the 24 bytes before")]  # fmt: skip
    hello = [(2, "version"), (1, "contract"), (1, "strength"), (4, "page bytes"), (8, "pages")]
    ranges = [(8, "start"), (8, "length"), (8, "start"), (8, "length")]
    parts: list[tuple[HintFrame, list[tuple[int, str]]]] = [
        (Hello(contract=1, strength=1, page_bytes=4096, pages=262144), [*header, *hello]),
        (Request(epoch=7), header),
        (Ranges(7, ((0x1000, 0x3000), (0x10000, 0x100000))), [*header, *ranges]),
    ]
    return fenced(
        "\n\n".join(f"{frame}\n{annotated(hints.encode(frame), fields)}" for frame, fields in parts)
    )


def wire_example() -> str:
    header = [(4, "magic"), (1, "framing version"), (1, "type"), (1, "codec"), (1, "zero"), (8, "sequence"),
              (4, "count: pages"), (4, "runs"), (4, "metadata bytes"), (4, "payload bytes"),
              (16, "digest of the 32 bytes before and the metadata")]  # fmt: skip
    encoder = FrameEncoder()
    free = encoder.runs(FrameType.FREE, [(16, 20), (32, 33)])
    go = encoder.message(messages.Go(migration="0123456789abcdef" * 2))
    runs = [(4, "first page"), (4, "pages"), (4, "first page"), (4, "pages")]
    return fenced(
        f"FREE, first frame of its stream: pages 16..19 and 32\n{annotated(free, [*header, *runs])}\n\n"
        f"GO, the second frame\n{annotated(go, [*header, (0, 'MessagePack')])}"
    )


def frame_types() -> str:
    rows = []
    for kind in FrameType:
        message = getattr(messages, kind.name.capitalize(), None)
        said = ", ".join(f"`{name}`" for name in message.__struct_fields__) if message else "(no message)"
        rows.append((str(int(kind)), kind.name, said))
    return table(("type", "name", "fields of its message"), rows)


def json_commands() -> str:
    rows = (
        (f"`migd {name}`", ", ".join(kind.__name__ for kind in kinds))
        for name, kinds in schema.COMMANDS.items()
    )
    return table(("command", "prints"), rows)


def exit_codes() -> str:
    """The errors with their own names only where a code has one of its own."""
    return table(("code", "meaning"), ((str(code), meaning) for code, meaning in errors.EXIT_CODES.items()))


def error_tree() -> str:
    """The literal block of the module that holds it."""
    assert errors.__doc__ is not None
    block = errors.__doc__.split("::\n\n", 1)[1].split("\n\n``migd``", 1)[0]
    return fenced("\n".join(line.removeprefix("    ") for line in block.splitlines()))


def python_api() -> str:
    return table(("name", "what"), ((f"`{cell(name)}`", cell(what)) for name, what in schema.reference()))


def fields(rows: Iterable[tuple[str, str, str]]) -> str:
    return table(("name", "type", "meaning"), ((f"`{name}`", kind, cell(said)) for name, kind, said in rows))


def document(kind: type[msgspec.Struct]) -> str:
    said = " ".join((inspect.getdoc(kind) or "").replace("``", "`").split())
    return f"### {kind.__name__}\n\n{said}\n\n{fields(schema.columns(kind))}"


def limits() -> str:
    return table(
        ("key", "default"), ((f"`{name}`", f"{value:g} s") for name, value in _defaults(Config().limits))
    )


def marks() -> str:
    """What a daemon that was started again does by the last record of its own journal."""
    return table(
        ("last record", "source: found paused", "destination: found loaded", "found running", "found paused",
         "GO is answered"),
        (
            (
                f"`{last}`" if last is not None else "(none)",
                decision.paused_at_source(last),
                decision.incoming_at_destination(last),
                "await-verdict" if decision.awaits_verdict(last) else "-",
                decision.paused_at_destination(last) if last is not None else "-",
                decision.go_at_destination(last),
            )
            for last in (None, *Mark)
        ),
    )  # fmt: skip


def configuration_keys() -> str:
    return "\n".join(
        f"### [{name}]\n\n{reference.table_meaning(name)}\n\n"
        + table(
            ("key", "value", "default", "meaning"),
            (
                (f"`{key.name}`", key.values, f"`{key.toml(key.default)}`", key.meaning)
                for key in reference.keys(name)
            ),
        )
        for name in TABLES
    )


def _defaults(struct: msgspec.Struct) -> list[tuple[str, Any]]:
    return [(name, getattr(struct, name)) for name in struct.__struct_fields__]


GENERATED: dict[str, Callable[[], str]] = {
    "import-table": layers,
    "source-states": lambda: transitions(SOURCE_TRANSITIONS),
    "destination-states": lambda: transitions(DESTINATION_TRANSITIONS),
    "hint-specification": lambda: specification(hints),
    "hint-example": hint_example,
    "wire-specification": lambda: specification(protocol),
    "wire-types": frame_types,
    "wire-example": wire_example,
    "hand-over-marks": marks,
    "limits": limits,
    "configuration-keys": configuration_keys,
    "json-commands": json_commands,
    "exit-codes": exit_codes,
    "errors": error_tree,
    "python-api": python_api,
    "migrate-options": lambda: fields(schema.options()),
    "documents": lambda: "\n".join(map(document, schema.every_struct())),
    "proof-figures": campaign.table,
    "mutants": lambda: mutants.table(MUTANTS),
    "planted-bugs": verification.planted_bugs,
    "unseen-writes": verification.writes,
    "faults": faults.markdown,
}


def regenerated(text: str) -> str:
    return BLOCK.sub(lambda found: found[1] + GENERATED[found[2]]() + found[4], text)


# -- generated parts, and names -------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_generated_parts_say_what_the_code_says(path: Path) -> None:
    text = path.read_text()
    assert text == regenerated(text), "run `python -m tests.test_docs` and look at what changed"


def test_every_generated_part_has_its_place() -> None:
    used = [name for path in DOCUMENTS for _, name, *_ in BLOCK.findall(path.read_text())]
    assert set(used) == set(GENERATED)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_documents_exist(path: Path) -> None:
    named = set(re.findall(r"(?<![/\w])(?:migd|tests|docs|configs|scripts)/[\w/.-]*\w", path.read_text()))
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tests_named_in_documents_exist(path: Path) -> None:
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"(?<!def )\btest_\w+\b(?!\.py)", path.read_text()))
    missing = [name for name in sorted(named) if f"def {name}(" not in tests]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_functions_named_with_their_file_are_in_it(path: Path) -> None:
    """Names in backquotes before ``in `migd/x.py` `` or ``of the ledger``."""
    place = r"((?:`\w+`(?:, | and )?)+) (?:in `(migd/[\w/]+\.py)`|of the ledger)"
    missing = [
        f"{name} in {file or LEDGER}"
        for names, file in re.findall(place, path.read_text())
        for name in re.findall(r"\w+", names.replace(" and ", " "))
        if not re.search(rf"(?:def|class) {name}\b|self\.{name} = ", (ROOT / (file or LEDGER)).read_text())
    ]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGS], ids=lambda path: path.name)
def test_documents_hold_no_paths_of_one_machine(path: Path) -> None:
    assert re.findall(r"/(?:work|root|home|tmp/v)\b[\w/]*", path.read_text()) == []


def test_every_rule_and_promise_is_in_the_safety_document() -> None:
    text = (ROOT / "docs" / "safety.md").read_text()
    rows = re.findall(r"^\| ([RG]\d+) \|", text, re.MULTILINE)
    assert rows == [*(f"G{number}" for number in range(1, 7)), *(f"R{number}" for number in range(1, 21))]


def test_every_exit_code_is_explained_and_has_an_error() -> None:
    codes = {error.exit_code for error in vars(errors).values() if _is_error(error)}
    assert set(errors.EXIT_CODES) == {0, *codes}
    assert {errors.of_exit_code(code, "why").exit_code for code in codes} == codes


def _is_error(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, errors.MigdError)


def test_the_readme_names_every_command_and_promise() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in main.commands if f"migd {name}" not in text] == []
    assert [number for number in range(1, 7) if f"| G{number} |" not in text] == []


# -- configuration files --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_files_load_and_hold_the_defaults(path: Path) -> None:
    assert load(path) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_files_are_what_the_code_says_of_each_key(path: Path) -> None:
    """One source for these, `migd config show` and docs/configuration.md: the docstrings of the keys."""
    text = reference.as_toml(Config(), path.stem)
    assert path.read_text() == text, "run `python -m tests.test_docs` and look at what changed"


@pytest.mark.parametrize("name", TABLES)
def test_every_key_has_words_that_say_what_it_means(name: str) -> None:
    assert reference.table_meaning(name)
    assert [key.path for key in reference.keys(name) if not key.meaning.endswith(".")] == []


def test_every_key_stands_in_a_configuration_file_with_a_comment() -> None:
    found = set()
    for path in CONFIGS:
        tables = tomllib.loads(path.read_text())
        found |= {(name, key) for name, keys in tables.items() for key in keys}
    known = {(name, key) for name, keys in _defaults(Config()) for key in keys.__struct_fields__}
    assert found == known


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_tables_of_a_configuration_file_have_no_key_twice_or_without_words(path: Path) -> None:
    words = False
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            words = True
        elif not line:
            words = False
        elif not line.startswith("["):
            assert words, f"{line}: no comment above it"


def regenerate() -> None:
    """Write everything that is generated."""
    for place in DOCUMENTS:
        place.write_text(regenerated(place.read_text()))
    for place in CONFIGS:
        place.write_text(reference.as_toml(Config(), place.stem))


if __name__ == "__main__":
    regenerate()
