"""The import table of docs/architecture.md against the real imports of migd.

::

    { bench cli demo report pytest_plugin versus } -> { api daemon doctor lab leftovers qemu }
        -> { control guest transport source destination }
        -> migration -> { ledger wire } -> ram -> { config host metrics log }
        -> { limits sizes tasks } -> errors

A module imports its own package and anything further right; packages inside one brace do not import each
other. A package or module that does not exist yet simply is not there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS: list[set[str]] = [
    {"__main__"},
    {"bench", "cli", "demo", "report", "pytest_plugin", "versus"},
    {"api", "daemon", "doctor", "lab", "leftovers", "qemu"},
    {"control", "guest", "transport", "source", "destination"},
    {"migration"},
    {"ledger", "wire"},
    {"ram"},
    {"config", "host", "metrics", "log"},
    {"limits", "sizes", "tasks"},
    {"errors"},
]
BESIDE = {
    "cli": {"demo", "report", "versus"},
    "demo": {"cli", "report", "versus"},
    "versus": {"bench", "report"},
}
"""The demo stands beside the command line and may import anything."""

NEVER: dict[str, set[str]] = {
    **{pure: {"asyncio", "socket", "threading"} for pure in ("ledger", "wire", "ram", "migration")},
    "source": {"socket"},
    "destination": {"socket"},
}
Import = tuple[Path, int, str]


def package_of(module: str) -> str:
    """``migd.ram.block`` -> ``ram``; ``migd`` itself -> the empty name."""
    return [*module.split("."), ""][1]


def imports() -> Iterator[Import]:
    """Every module any file of migd names in an import, wherever in the file it stands."""
    for path in sorted((ROOT / "migd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield path, node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: a relative import"
                assert node.module is not None
                if node.module == "migd":
                    for alias in node.names:
                        yield path, node.lineno, f"migd.{alias.name}"
                else:
                    yield path, node.lineno, node.module


def owner(path: Path) -> str:
    """The package, or top-level module, a file belongs to."""
    return path.relative_to(ROOT / "migd").with_suffix("").parts[0]


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or importer == "__init__" or imported in BESIDE.get(importer, ()):
        return True
    # What is not in the table is reported by a test of its own.
    level = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    return level.get(importer, -1) < level.get(imported, len(LAYERS))


def version_only(imported: str) -> bool:
    """``migd.__version__`` and the like: the package itself, which imports nothing."""
    return package_of(imported).startswith("__") and package_of(imported) != "__main__"


IMPORTS = list(imports())


def test_every_package_has_its_place_in_the_table() -> None:
    known = set().union(*LAYERS) | {"__init__"}
    found = {owner(path) for path in (ROOT / "migd").rglob("*.py")}
    assert found <= known, f"not in the table: {sorted(found - known)}"


def test_imports_go_to_the_right_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {owner(path)} imports {module}"
        for path, line, module in IMPORTS
        if module.split(".")[0] == "migd"
        and package_of(module)
        and not version_only(module)
        and not may_import(owner(path), package_of(module))
    ]
    assert not wrong, "\n".join(wrong)


def test_pure_packages_do_not_touch_the_loop_sockets_or_threads() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {owner(path)} imports {module}"
        for path, line, module in IMPORTS
        if module.split(".")[0] in NEVER.get(owner(path), ())
    ]
    assert not wrong, "\n".join(wrong)


def test_migd_itself_imports_nothing_of_its_packages() -> None:
    assert not [
        module for path, _, module in IMPORTS if owner(path) == "__init__" and module.startswith("migd")
    ]


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("cli", "ram", True), ("cli", "demo", True), ("demo", "cli", True), ("daemon", "source", True),
        ("source", "ledger", True), ("guest", "errors", True), ("ram", "ram", True),
        ("__main__", "cli", True),
        ("ram", "ledger", False), ("source", "destination", False), ("guest", "transport", False),
        ("ledger", "migration", False), ("wire", "ram", True), ("ram", "wire", False),
        ("errors", "log", False),
        ("demo", "api", True), ("bench", "api", True), ("api", "control", True), ("api", "daemon", False),
        ("daemon", "cli", False),
        ("source", "daemon", False), ("daemon", "demo", False), ("log", "config", False),
    ],
)  # fmt: skip
def test_the_table_says_what_the_picture_says(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed
