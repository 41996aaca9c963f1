"""The recordings can be renewed, by real migrations, and have nothing of the machine in them."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import seeds
from tests.fuzz.record import record
from tests.support.pair import ROOT


def test_recording_anew_gives_as_many_recordings_of_everything(tmp_path: Path) -> None:
    new = tmp_path / "new"
    record(new)
    kept = {path.name for path in seeds.SEEDS.iterdir()} - {seeds.REGRESSIONS.name}
    assert {path.name for path in new.iterdir()} == kept
    for directory in new.iterdir():
        assert all(path.stat().st_size for path in directory.iterdir())
        assert any(directory.iterdir()), f"nothing was recorded of {directory.name}"


def test_what_is_kept_names_no_place_of_a_machine() -> None:
    for path in seeds.SEEDS.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for place in (str(ROOT), str(Path.home()), "/migd-sou-", "/migd-des-"):
                assert place.encode() not in data, f"{path.name} names {place}"
