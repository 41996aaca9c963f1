"""The pytest plugin: real daemons as fixtures, and their logs in the report of a test that failed.

``migd_pair`` gives a test two daemons of its own; ``migd_shared_pair`` the two of the session, which saves
about a second a test, without the guests of the test before. Both are a ``migd.api.DaemonPair``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # a suite that does not use the fixtures shall not pay for what they import
    from migd.api import DaemonPair, Tables

Sections = list[tuple[str, str]]
_SECTIONS = pytest.StashKey[Callable[[], Sections]]()


@pytest.fixture(scope="session")
def migd_config() -> Tables | None:
    """The configuration of every daemon; a suite that wants another overrides this fixture."""
    return None


@pytest.fixture
def migd_pair(request: pytest.FixtureRequest, migd_config: Tables | None) -> Iterator[DaemonPair]:
    """Two daemons of this test alone, each in a directory of its own; ended with their guests."""
    from migd.api import start_pair

    with start_pair(migd_config) as pair:
        request.node.stash[_SECTIONS] = _new_words(pair)
        yield pair


@pytest.fixture
def migd_shared_pair(request: pytest.FixtureRequest, _migd_shared: _Shared) -> Iterator[DaemonPair]:
    """Two daemons that all tests of the session share, without a guest; guests end with the test."""
    pair = _migd_shared.pair()
    request.node.stash[_SECTIONS] = _new_words(pair)
    yield pair
    if pair.alive:  # else it is ended as a whole
        pair.end_guests()


@pytest.fixture(scope="session")
def _migd_shared(migd_config: Tables | None) -> Iterator[_Shared]:
    with ExitStack() as owned:
        yield _Shared(owned, migd_config)


class _Shared:
    """The pair of a session, started when it is first asked for, and anew when a test has ended a daemon."""

    def __init__(self, owned: ExitStack, config: Tables | None) -> None:
        self._owned = owned
        self._config = config
        self._pair: DaemonPair | None = None

    def pair(self) -> DaemonPair:
        from migd.api import start_pair

        if self._pair is None or not self._pair.alive:
            self._owned.close()
            self._pair = self._owned.enter_context(start_pair(self._config))
        return self._pair


def _new_words(pair: DaemonPair) -> Callable[[], Sections]:
    """What is in the logs behind what is in them now: the earlier words are of earlier tests."""
    before = {name: len(text) for name, text in pair.logs()}
    return lambda: [(f"migd: {name} log", text[before.get(name, 0) :]) for name, text in pair.logs()]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what its daemons and guests have said."""
    report = yield
    sections = item.stash.get(_SECTIONS, None)
    if sections is not None and report.failed:
        report.sections += [(name, text) for name, text in sections() if text]
    return report
