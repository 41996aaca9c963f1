"""There is no TLS yet: nothing listens, or connects, beyond loopback unless it is told to, and says so."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from migd.errors import ConfigError
from migd.transport import tcp


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.9.9.9:7440", "[::1]:0", "localhost:7440"])
def test_loopback_needs_no_consent(listen: str, caplog: pytest.LogCaptureFixture) -> None:
    tcp.refuse_open_listener(listen, insecure_plaintext=False)
    assert caplog.records == []


@pytest.mark.parametrize("listen", ["0.0.0.0:7440", "[::]:7440", "192.0.2.1:7440", "[2001:db8::1]:7440"])
def test_beyond_loopback_is_refused(listen: str) -> None:
    with pytest.raises(
        ConfigError, match=r"in plaintext, unauthenticated; set destination\.insecure_plaintext"
    ) as error:
        tcp.refuse_open_listener(listen, insecure_plaintext=False)
    assert listen in str(error.value)


@pytest.mark.parametrize("listen", ["0.0.0.0:7440", "127.0.0.1:7440"])
def test_consent_is_warned_about_each_time(listen: str, caplog: pytest.LogCaptureFixture) -> None:
    tcp.refuse_open_listener(listen, insecure_plaintext=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert listen in record.getMessage()


def test_a_daemon_that_would_be_open_does_not_start() -> None:
    with tempfile.TemporaryDirectory(prefix="migd-t-") as directory:
        config = Path(directory) / "destination.toml"
        config.write_text('[destination]\nlisten = "0.0.0.0:0"\n')
        command = [
            sys.executable,
            "-m",
            "migd",
            "destination",
            "--config",
            str(config),
            "--runtime-dir",
            directory,
        ]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("migd: destination.listen: 0.0.0.0:0 can be reached from other hosts")
        assert ended.stderr.count("\n") == 1
        assert not (Path(directory) / "control.sock").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1"])
def test_a_source_connects_to_its_own_host(host: str) -> None:
    tcp.refuse_open_plaintext(host, "vm-host:7440")


@pytest.mark.parametrize("host", ["192.0.2.1", "10.0.0.1", "2001:db8::1", "fe80::1"])
def test_a_source_does_not_connect_to_another_host(host: str) -> None:
    with pytest.raises(ConfigError, match=r"vm-host:7440 is another host.*migration\.insecure_plaintext"):
        tcp.refuse_open_plaintext(host, "vm-host:7440")
