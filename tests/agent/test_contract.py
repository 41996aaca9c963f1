"""What the kernel's command line, configuration and log say about the content of free pages (R12)."""

from __future__ import annotations

import pytest

from migd.guest import agent

OFF = "mem auto-init: stack:off, heap alloc:off, heap free:off"
ON = "mem auto-init: stack:all(zero), heap alloc:on, heap free:on"
PRECEDENCE = (
    "mem auto-init: CONFIG_PAGE_POISONING is on, will take precedence over init_on_alloc and init_on_free"
)

PLAIN = """\
# CONFIG_INIT_ON_FREE_DEFAULT_ON is not set
# CONFIG_DEBUG_PAGEALLOC is not set
# CONFIG_PAGE_POISONING is not set
"""
DEFAULT_ON = "CONFIG_INIT_ON_FREE_DEFAULT_ON=y\n"
POISONING = "# CONFIG_INIT_ON_FREE_DEFAULT_ON is not set\nCONFIG_PAGE_POISONING=y\n"
OLD_NO_SANITY = "CONFIG_PAGE_POISONING=y\nCONFIG_PAGE_POISONING_NO_SANITY=y\n"
OLD_ZERO = "CONFIG_PAGE_POISONING=y\nCONFIG_PAGE_POISONING_ZERO=y\n"
DEBUG = "CONFIG_DEBUG_PAGEALLOC=y\n# CONFIG_DEBUG_PAGEALLOC_ENABLE_DEFAULT is not set\n"
DEBUG_ON = "CONFIG_DEBUG_PAGEALLOC=y\nCONFIG_DEBUG_PAGEALLOC_ENABLE_DEFAULT=y\n"
UNKNOWN = ""

TABLE: list[tuple[int, str, str, str]] = [
    # Zeros: the log knows best, then the command line, then the configuration; else zero is expected.
    (agent.ANYTHING, "quiet", PLAIN, OFF),
    (agent.ANYTHING, "quiet", UNKNOWN, OFF),
    (agent.ZERO, "quiet", PLAIN, ON),
    (agent.ZERO, "init_on_free=0", PLAIN, ON),
    (agent.ANYTHING, "init_on_free=1", DEFAULT_ON, OFF),
    (agent.ANYTHING, "quiet", PLAIN, UNKNOWN),
    (agent.ZERO, "quiet", DEFAULT_ON, UNKNOWN),
    (agent.ZERO, "quiet", UNKNOWN, UNKNOWN),
    (agent.ZERO, "", "CONFIG_X=y", "mem auto-init: clearing system memory may take some time..."),
    (agent.ZERO, "init_on_free=1", PLAIN, UNKNOWN),
    (agent.ZERO, "init_on_free=on", UNKNOWN, UNKNOWN),
    (agent.ZERO, "init-on-free=Y", PLAIN, UNKNOWN),
    (agent.ANYTHING, "init_on_free=0", DEFAULT_ON, UNKNOWN),
    (agent.ANYTHING, "init_on_free=off", UNKNOWN, UNKNOWN),
    (agent.ANYTHING, "init_on_free=1 quiet init_on_free=n", PLAIN, UNKNOWN),
    (agent.ZERO, "init_on_free=0 quiet init_on_free=1", PLAIN, UNKNOWN),
    (agent.ZERO, "init_on_free=1 init_on_free=maybe init_on_free", PLAIN, UNKNOWN),
    (agent.ANYTHING, "quiet -- init_on_free=1", PLAIN, UNKNOWN),
    (agent.ANYTHING, "xinit_on_free=1 init_on_free_=1 init_on_alloc=1", PLAIN, UNKNOWN),
    (agent.ANYTHING, 'dyndbg="x init_on_free=1 y"', PLAIN, UNKNOWN),
    (agent.ZERO, 'dyndbg="x y" "init_on_free=1"', PLAIN, UNKNOWN),
    # Poison: none, wherever it may be.
    (agent.NONE, "page_poison=1", POISONING, OFF),
    (agent.NONE, "page_poison=on", UNKNOWN, OFF),
    (agent.NONE, "page_poison=y init_on_free=1", POISONING, ON),
    (agent.NONE, "page-poison=Y", POISONING, UNKNOWN),
    (agent.NONE, "page_poison=0 page_poison=1", POISONING, OFF),
    (agent.ANYTHING, "page_poison=1 page_poison=0", POISONING, OFF),
    (agent.ANYTHING, "page_poison=off", POISONING, OFF),
    (agent.ANYTHING, "page_poison", POISONING, OFF),
    (agent.ANYTHING, "quiet", POISONING, OFF),
    (agent.ANYTHING, "page_poison=1", PLAIN, OFF),
    (agent.NONE, "init_on_free=1", UNKNOWN, PRECEDENCE + "\n" + OFF),
    (agent.NONE, "page_poison=1", OLD_NO_SANITY, UNKNOWN),
    (agent.ZERO, "page_poison=1", OLD_ZERO, UNKNOWN),
    (agent.ZERO, "page_poison=1", OLD_ZERO, OFF),
    (agent.ANYTHING, "", OLD_ZERO, OFF),
    # Page allocator debugging: the same.
    (agent.NONE, "debug_pagealloc=on", DEBUG, OFF),
    (agent.NONE, "debug_pagealloc=1", UNKNOWN, OFF),
    (agent.NONE, "", DEBUG_ON, OFF),
    (agent.ANYTHING, "debug_pagealloc=off", DEBUG_ON, OFF),
    (agent.ANYTHING, "", DEBUG, OFF),
    (agent.ANYTHING, "debug_pagealloc=on", PLAIN, OFF),
    (agent.NONE, "debug_pagealloc=on page_poison=1", DEBUG + OLD_ZERO, OFF),
]


@pytest.mark.parametrize(("contract", "cmdline", "config", "log"), TABLE)
def test_the_contract(contract: int, cmdline: str, config: str, log: str) -> None:
    verdict = agent.judge(cmdline + "\n", config, log)
    assert verdict.contract == contract, verdict.why
    assert verdict.why


@pytest.mark.parametrize(
    ("cmdline", "config", "log", "witness"),
    [
        ("init_on_free=1", PLAIN, OFF, "log"),
        ("init_on_free=1", PLAIN, UNKNOWN, "command line"),
        ("", PLAIN, UNKNOWN, "configuration"),
        ("", UNKNOWN, UNKNOWN, "nothing"),
        ("page_poison=1", UNKNOWN, UNKNOWN, "page_poison"),
        ("debug_pagealloc=on", UNKNOWN, UNKNOWN, "debug_pagealloc"),
    ],
)
def test_the_reason_names_its_witness(cmdline: str, config: str, log: str, witness: str) -> None:
    assert witness in agent.judge(cmdline, config, log).why


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("1", True), ("y", True), ("Y", True), ("yes", True), ("t", True), ("on", True), ("On", True),
        ("0", False), ("n", False), ("No", False), ("off", False), ("OFF", False),
        ("", None), ("o", None), ("2", None), ("maybe", None), ("enable", None),
    ],
)  # fmt: skip
def test_a_switch_is_read_as_the_kernel_reads_it(value: str, meaning: bool | None) -> None:
    """kstrtobool looks at the first letter, or two; what it does not know leaves the switch as it was."""
    assert agent.switched(f"a=1 x={value}", "x") is meaning
    for earlier in (True, False):
        assert agent.switched(f"x={earlier:d} x={value}", "x") is (earlier if meaning is None else meaning)
    assert agent.switched(f'x="{value}"', "x") is meaning


def test_this_kernel_is_judged() -> None:
    verdict = agent.judge_this_kernel()
    assert verdict.contract in (agent.NONE, agent.ANYTHING, agent.ZERO)
    assert verdict.why
