"""Mutations of JSON lines and of TOML: as trees, as text, and as bytes that are neither."""

from __future__ import annotations

from random import Random

import msgspec

from tests.fuzz import mutation

_JSON_PARTS = (
    b'"\\ud800"', b'"\\ud83d\\ude00"', b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b"[" * 2000,
    b'{"a":' * 2000, b"1e999", b"-0", b"9" * 40, b"9" * 5000, b"0.1e-400", b"NaN", b"Infinity", b"null",
    b"true", b'"', b"\\", b"\n", b"\r\n", b"{}", b'{"type":"', b'"version":"\\ud800"', b",", b":",
    b" " * 3000, b"\xef\xbb\xbf",
)  # fmt: skip
_TOML_PARTS = (
    b"[", b"]", b"[[", b"=", b"'''", b'"""', b'"\\U00110000"', b'"\\ud800"', b"\xff", b"\0", b"#",
    b"\r", b"[" * 2000, b"a." * 2000, b"{a=" * 800, b"9" * 5000, b"0x" + b"f" * 400,
    b"1979-05-27T07:32:00Z", b"9999-99-99", b"inf", b"-nan", b"1e400", b"true", b"daemon.ram = 1\n",
    b"[limits]\n", b"ping_s = 1e400\n", b'max_bandwidth = "1e999G"\n',
    b'max_bandwidth = "unlimited/s"\n', b"max_bandwidth = 1" + b"0" * 5000 + b"\n",
    b'max_bandwidth = "' + b"9" * 5000 + b'"\n', b"limits = 3\n", b"[daemon.ram.x]\n",
)  # fmt: skip


def json_mutated(data: bytes, other: bytes, chance: Random) -> bytes:
    """One line or several of JSON, wrong in some way, or right and different."""
    lines = data.splitlines(keepends=True)
    if len(lines) > 1 and chance.random() < 0.15:
        return b"".join(mutation.reordered(lines, chance))
    if not lines or chance.random() < 0.3:
        return mutation.mangled(data, other, chance)
    at = chance.randrange(len(lines))
    lines[at] = _line_mutated(lines[at], chance)
    return b"".join(lines)


def _line_mutated(line: bytes, chance: Random) -> bytes:
    if chance.random() < 0.35:
        return _with_part(line, chance.choice(_JSON_PARTS), chance)
    end = b"\n" if line.endswith(b"\n") else b""
    try:
        tree = msgspec.json.decode(line)
        for _ in range(chance.choice((1, 1, 2))):
            tree = mutation.grown(tree, chance)
        return msgspec.json.encode(tree) + end
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError):
        return mutation.mangled(line, b"", chance)


def toml_mutated(data: bytes, other: bytes, chance: Random) -> bytes:
    """A configuration with lines missing, doubled or moved, other values, or bytes that are no TOML."""
    choice = chance.random()
    if choice < 0.15:
        return mutation.mangled(data, other, chance)
    if choice < 0.45:
        return _with_part(data, chance.choice(_TOML_PARTS), chance)
    lines = data.splitlines(keepends=True)
    if choice < 0.6 or not lines:
        return b"".join(mutation.reordered(lines, chance))
    at = chance.randrange(len(lines))
    key, equals, _ = lines[at].removeprefix(b"# ").partition(b"=")
    value = chance.choice(
        (*_TOML_PARTS, b"%d" % mutation.number(chance), b'"x"', b"-1", b"0", b"1.5", b"[]", b"{}")
    )
    return b"".join((*lines[:at], key, equals or b"=", value, b"\n", *lines[at + 1 :]))


def _with_part(data: bytes, part: bytes, chance: Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + part + data[at + chance.choice((0, 0, 1, 5)) :]
