"""Which tests are for which fault; ``tests/e2e/test_fault_table.py`` looks that each of them exists."""

from __future__ import annotations

from tests.support.markdown import table

KILL = "tests/e2e/test_kill.py::test_a_kill_loses_no_guest_and_makes_no_second"
INTERRUPTION = "tests/e2e/test_interruptions.py::test_an_interruption_loses_no_guest_and_makes_no_second"
CONNECTION = "tests/e2e/test_faults.py::test_a_connection_that_is_treated_badly"
_BAD = "tests/e2e/test_bad_input.py"
_HINTS = "tests/guest_daemon/test_hint_receiver.py"
_SHORT = "tests/e2e/test_shortages.py"
_CANCEL = "tests/e2e/test_cancel.py"
_SESSIONS = "tests/sessions/test_sessions.py"

NOT_BUILT = "TLS is not built: plaintext, on loopback or with consent"

COVERED: dict[str, tuple[str, ...]] = {
    "kill -9 of the source, the destination, or both, either one back first": (KILL,),
    "kill -9 of the guest, at the source or at the destination": (
        KILL,
        f"{_SESSIONS}::test_a_guest_that_dies_ends_the_attempt",
        f"{_SESSIONS}::test_a_guest_that_dies_on_arrival_leaves_the_other",
    ),
    "SIGSTOP of a peer, and SIGCONT": (INTERRUPTION,),
    "RST": (KILL, CONNECTION, "tests/transport/test_channel.py::test_a_reset_is_peer_lost"),
    "FIN in mid-frame": (
        CONNECTION,
        f"{_BAD}::test_a_stream_that_ends_before_its_end",
        "tests/transport/test_link.py::test_the_end_inside_a_frame_is_an_error",
        "tests/wire/test_framing.py::test_a_connection_cut_anywhere_inside_a_frame_is_not_at_a_boundary",
    ),
    "black hole": (INTERRUPTION, CONNECTION, "tests/transport/test_link.py::test_silence_is_a_lost_peer"),
    "half-open": (CONNECTION,),
    "1-byte dribble": (
        CONNECTION,
        "tests/transport/test_link.py::test_a_frame_in_single_bytes_and_several_frames_at_once",
    ),
    "bit flips": (
        CONNECTION,
        f"{_BAD}::test_a_record_that_breaks_the_protocol_ends_the_migration",
        "tests/wire/test_framing.py::test_every_flipped_bit_of_header_and_metadata_is_noticed",
    ),
    "duplicate, drop, swap": (
        CONNECTION,
        "tests/wire/test_framing.py::test_a_lost_frame_and_a_repeated_frame_show",
    ),
    "one stream 100 times slower": (CONNECTION,),
    "a stream that never connects": (CONNECTION, f"{_BAD}::test_streams_that_never_connect"),
    "an extra stream, a wrong token": (f"{_BAD}::test_a_stream_that_does_not_belong",),
    "a source that stops inside a frame": (
        f"{_BAD}::test_a_source_that_stops_inside_a_frame_is_not_waited_for",
    ),
    "shared memory full before": (
        f"{_BAD}::test_a_guest_larger_than_the_destination_has_room_for",
        "tests/guest_daemon/test_link_registry.py::test_more_ram_than_there_is_is_not_promised",
    ),
    "shared memory full during": (f"{_SHORT}::test_shared_memory_that_fills_up_while_a_guest_arrives",),
    "no descriptor left (EMFILE)": (
        f"{_SHORT}::test_no_descriptor_left",
        "tests/guest_daemon/test_link_registry.py::test_no_descriptors_left_at_any_step_of_attaching",
    ),
    "hint channel cut at every byte": (f"{_HINTS}::test_the_end_of_the_channel_at_any_byte",),
    "hint channel: garbage": (
        f"{_HINTS}::test_garbage_is_skipped_and_counted",
        f"{_HINTS}::test_garbage_without_end_closes_the_channel",
        f"{_HINTS}::test_a_thousand_mutated_answers_raise_nothing_and_hint_nothing_outside",
        f"{_SESSIONS}::test_a_hint_channel_that_is_of_no_use_delays_nothing",
    ),
    "hint channel: floods": (
        f"{_HINTS}::test_valid_frames_without_end_are_a_flood",
        f"{_HINTS}::test_a_flood_of_bitmaps_is_measured_by_what_they_unpack_to",
    ),
    "hint channel: silence": (f"{_HINTS}::test_a_silent_guest_costs_the_time_it_is_given_and_no_more",),
    "hint channel: wrong epochs": (
        f"{_HINTS}::test_another_epoch_is_for_the_ledger_to_refuse_and_does_not_end_the_answer",
        f"{_SESSIONS}::test_a_hint_after_the_pause_is_stale",
    ),
    "cancel at every phase": (
        f"{_CANCEL}::test_after_a_cancel_the_guest_runs_on_and_can_be_migrated",
        f"{_SESSIONS}::test_a_cancel_in_any_phase_before_go",
    ),
    "cancel twice": (f"{_CANCEL}::test_a_second_cancel_changes_nothing",),
    "cancel after it is done": (f"{_CANCEL}::test_after_go_it_is_too_late",),
    "double start": (
        f"{_SHORT}::test_a_guest_that_is_asked_to_leave_twice_at_once",
        f"{_BAD}::test_a_daemon_is_started_twice",
    ),
    "version mismatch": (
        f"{_BAD}::test_a_source_of_a_later_version",
        "tests/e2e/test_mixed_versions.py::test_a_destination_of_versions_that_do_not_meet",
        "tests/e2e/test_mixed_versions.py::test_a_source_of_versions_that_do_not_meet",
    ),
    "page size or RAM size mismatch": (
        f"{_BAD}::test_an_offer_that_does_not_fit",
        f"{_BAD}::test_a_guest_that_lies_when_it_attaches",
    ),
    "network lost and back": (INTERRUPTION,),
    "slow destination, memory flat": (
        f"{_SHORT}::test_a_slow_network_costs_time_and_no_memory",
        "tests/transport/test_link.py::test_a_reader_that_does_not_keep_up_stops_the_sender",
    ),
    "a writer that outruns the network": (
        "tests/e2e/test_migrate.py::test_a_writer_that_outruns_the_limit_is_given_up_and_moves_when_forced",
        "tests/migration/test_convergence.py::test_every_run_comes_to_an_end_and_a_pause_is_long_only_by_force",
    ),
    "random corrupt streams": (
        "tests/wire/test_framing.py::test_a_damaged_stream_gives_frames_or_a_protocol_error_and_nothing_else",
    ),
    "start and cancel storms": (f"{_SHORT}::test_a_storm_of_starts_and_cancels",),
    "journal directory full": (
        f"{_SESSIONS}::test_a_journal_that_cannot_be_written_before_go",
        f"{_SESSIONS}::test_a_journal_that_cannot_be_written_before_ready",
        "tests/migration/test_journal.py::test_a_full_disk",
    ),
}
"""Tests by their file and name, the sweeps over every phase first."""

MISSING: dict[str, str] = {
    "wrong, expired or no certificate": NOT_BUILT,
    "TLS 1.2": NOT_BUILT,
    "plaintext to a TLS port": NOT_BUILT,
}
"""Why no test is for a fault."""


def markdown() -> str:
    """The table of docs/proof.md."""
    rows = [
        *((fault, "<br>".join(f"`{test}`" for test in tests)) for fault, tests in COVERED.items()),
        *((fault, f"- ({why})") for fault, why in MISSING.items()),
    ]
    return table(("fault", "tests"), rows)
