"""What the guest expects of its free pages: nothing of them is skipped without a contract (R12)."""

from __future__ import annotations

import pytest

from tests.support.vm import route
from tests.support.vm_site import Lab

pytestmark = pytest.mark.timeout(300)

_NO_CONTRACT = "the guest declared no free-page contract"


@pytest.mark.parametrize("word", ["migd.agent=off", "page_poison=1"])
def test_a_guest_without_agent_or_with_poisoned_pages_is_sent_whole(lab: Lab, word: str) -> None:
    with route(hint_first_s=0.5) as road:
        journey = road.journey("vm1", lab.recipe(append=(word,))).boot()
        journey.litter()
        leg = journey.begin()
        result = leg.arrive(hints=_NO_CONTRACT)
        assert leg.compared is not None
        assert (result.skipped_free_pages, leg.compared.left) == (0, 0)
