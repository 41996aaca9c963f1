"""All targets by name."""

from __future__ import annotations

from tests.fuzz.target import Target
from tests.fuzz.targets.commands import Answers, Requests
from tests.fuzz.targets.files import Configurations, DeviceStates, FreeBitmaps, Histories, Journals
from tests.fuzz.targets.guest_control import FromGuest, ToGuest
from tests.fuzz.targets.hints import HintFrames, HintGuest, HintReceiver
from tests.fuzz.targets.replies import Replies
from tests.fuzz.targets.session import Session
from tests.fuzz.targets.wire import Frames, Placing

TARGETS: dict[str, type[Target]] = {
    "frames": Frames,
    "placing": Placing,
    "session": Session,
    "replies": Replies,
    "hint-frames": HintFrames,
    "hint-receiver": HintReceiver,
    "hint-guest": HintGuest,
    "from-guest": FromGuest,
    "to-guest": ToGuest,
    "requests": Requests,
    "answers": Answers,
    "journal": Journals,
    "history": Histories,
    "device-state": DeviceStates,
    "config": Configurations,
    "free-bitmap": FreeBitmaps,
}
