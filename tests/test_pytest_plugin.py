"""The pytest plugin in real pytest runs: its fixtures, its reports, and what it leaves to others."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pair import processes_naming

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the inner run makes its directories: short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="migd-t-") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


def run(pytester: pytest.Pytester, source: str, private: Path) -> pytest.RunResult:
    """An inner run of this test module with the plugin and no other; nothing may be left of it."""
    pytester.makepyfile(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        result = pytester.runpytest_subprocess("-p", "migd.pytest_plugin", "-W", "error", timeout=100)
    assert processes_naming(str(private)) == []
    assert [path.name for path in private.iterdir() if path.name.startswith("migd-")] == []
    return result


def test_a_pair_of_ones_own(pytester: pytest.Pytester, private: Path) -> None:
    result = run(
        pytester,
        """
        def test_there_and_back(migd_pair):
            guest = migd_pair.guest("vm1", ram="8Mi")
            assert guest.alive
            assert migd_pair.migrate("vm1").check().wrong_pages == 0
            assert migd_pair.destination.guest("vm1").pid != guest.pid
            assert migd_pair.back("vm1", hints=False).check().hints == "off"
        """,
        private,
    )
    result.assert_outcomes(passed=1)
    assert "migd: " not in result.stdout.str()


def test_a_failed_test_shows_what_its_daemons_and_guests_said(
    pytester: pytest.Pytester, private: Path
) -> None:
    result = run(
        pytester,
        """
        import pytest

        def test_too_much(migd_pair):
            migd_pair.guest("vm1", ram="8Mi")
            migd_pair.migrate("vm1").check()
            assert migd_pair.destination.status().guests == []

        def test_of_something_else():
            assert False

        def test_expected(migd_shared_pair):
            pytest.skip("not today")
        """,
        private,
    )
    result.assert_outcomes(failed=2, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*migd: source daemon log*",
            "*guest vm1 attached: running*",
            "*migd: source guest-vm1 log*",
            "guest vm1 ready: 2048 pages, *",
            "*migd: destination daemon log*",
            "*guest vm1 attached: incoming*",
            "*migd: destination guest-vm1 (arrived) log*",
        ]
    )
    assert result.stdout.str().count("migd: source daemon log") == 1


def test_a_pair_that_the_session_shares(pytester: pytest.Pytester, private: Path) -> None:
    result = run(
        pytester,
        """
        import os, signal

        pids = []

        def test_first(migd_shared_pair):
            pids.append(migd_shared_pair.source.pid)
            migd_shared_pair.guest("vm1", ram="8Mi")
            migd_shared_pair.migrate("vm1").check()

        def test_second(migd_shared_pair):
            assert migd_shared_pair.source.pid == pids[-1]
            assert [daemon.status().guests for daemon in migd_shared_pair.daemons] == [[], []]
            migd_shared_pair.guest("vm1", ram="8Mi", workload="idle")
            os.kill(pids[-1], signal.SIGKILL)
            migd_shared_pair.source.process.wait()

        def test_third(migd_shared_pair):
            assert migd_shared_pair.source.pid != pids[-1]
            migd_shared_pair.guest("other", ram="8Mi", workload="idle")
            assert False
        """,
        private,
    )
    result.assert_outcomes(passed=2, failed=1)
    said = result.stdout.str()
    assert "guest other attached" in said
    assert "guest vm1 attached" not in said


def test_a_suite_configures_its_daemons(pytester: pytest.Pytester, private: Path) -> None:
    result = run(
        pytester,
        """
        import pytest

        @pytest.fixture(scope="session")
        def migd_config():
            return {"migration": {"streams": 3}, "limits": {"guest_s": 7.5}}

        def test_of_its_own(migd_pair):
            assert migd_pair.source.status().limits.guest_s == 7.5

        def test_of_the_session(migd_shared_pair):
            migd_shared_pair.guest("vm1", ram="8Mi", workload="idle")
            assert migd_shared_pair.migrate("vm1").check().streams == 3
        """,
        private,
    )
    result.assert_outcomes(passed=2)


def test_an_error_in_the_fixture_says_why(pytester: pytest.Pytester, private: Path) -> None:
    result = run(
        pytester,
        """
        import pytest

        @pytest.fixture(scope="session")
        def migd_config():
            return {"migration": {"streams": 0}}

        def test_never(migd_pair):
            pass
        """,
        private,
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ConfigError: config: migration.streams: *"])


def test_a_suite_that_does_not_use_it_does_not_notice_it(pytester: pytest.Pytester, private: Path) -> None:
    result = run(
        pytester,
        """
        import sys

        def test_imports():
            found = {name for name in sys.modules if name.split(".")[0] in ("migd", "numpy", "msgspec")}
            assert found == {"migd", "migd.pytest_plugin"}
        """,
        private,
    )
    result.assert_outcomes(passed=1)


def test_pytest_finds_it_where_migd_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"migd": "migd.pytest_plugin"}
