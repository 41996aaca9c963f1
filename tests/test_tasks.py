"""guarded, together, Runner: results, whose failure surfaces, cancellation, and that no task is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from migd.errors import first_cause
from migd.tasks import Runner, guarded, together


class Failure(Exception):
    """What a test lets fail."""


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """After each test, only its own task is there."""
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}


class Watched:
    """A coroutine that notes how it ended."""

    def __init__(self) -> None:
        self.ended = ""
        self.began = asyncio.Event()

    async def forever(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise

    async def stubborn(self) -> None:
        """Takes its time to end, and awaits meanwhile."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            for _ in range(5):
                await asyncio.sleep(0)
            self.ended = "in the end"
            raise


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail(error: BaseException, turns: int = 1) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
    raise error


async def stop() -> None:
    await asyncio.sleep(0)


# -- guarded --------------------------------------------------------------------------------------------


async def test_the_result_of_the_work() -> None:
    assert await guarded(give(7)) == 7
    guard = Watched()
    assert await guarded(give(7), guard.forever()) == 7
    assert guard.ended == "cancelled"


async def test_a_guard_is_awaited_to_its_end() -> None:
    guard = Watched()
    assert await guarded(give(7), guard.stubborn()) == 7
    assert guard.ended == "in the end"


async def test_a_guard_that_returns_guards_no_more() -> None:
    guard = Watched()
    assert await guarded(give(7), stop(), guard.forever()) == 7


async def test_a_guard_that_fails_ends_the_work_and_is_what_is_raised() -> None:
    work, guard, failure = Watched(), Watched(), Failure("guard")
    with pytest.raises(Failure) as error:
        await guarded(work.stubborn(), guard.forever(), fail(failure))
    assert error.value is failure
    assert (work.ended, guard.ended) == ("in the end", "cancelled")


async def test_work_that_fails_ends_its_guards() -> None:
    guard, failure = Watched(), Failure("work")
    with pytest.raises(Failure) as error:
        await guarded(fail(failure), guard.forever())
    assert error.value is failure
    assert guard.ended == "cancelled"


async def test_the_first_of_two_failures_is_raised() -> None:
    with pytest.raises(Failure, match="first"):
        await guarded(fail(Failure("second"), 2), fail(Failure("first"), 1))

    async def fail_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise Failure("second")

    with pytest.raises(Failure, match="first"):
        await guarded(fail_when_cancelled(), fail(Failure("first")))


async def test_guarded_within_guarded_raises_the_bare_error() -> None:
    with pytest.raises(Failure, match="deep"):
        await guarded(guarded(Watched().forever(), fail(Failure("deep"))), Watched().forever())
    with pytest.raises(Failure, match="deep"):
        await guarded(Watched().forever(), guarded(Watched().forever(), fail(Failure("deep"))))


async def test_cancelling_cancels_all_of_it() -> None:
    work, guard = Watched(), Watched()
    task = asyncio.create_task(guarded(work.forever(), guard.forever()))
    await work.began.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert (work.ended, guard.ended) == ("cancelled", "cancelled")


async def test_a_time_out_around_it_is_a_time_out() -> None:
    work = Watched()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await guarded(work.forever(), Watched().forever())
    assert work.ended == "cancelled"


async def test_work_that_is_cancelled_from_inside_is_cancelled() -> None:
    async def give_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await guarded(give_up(), Watched().forever())


# -- together -------------------------------------------------------------------------------------------


async def test_the_results_of_all_in_their_order() -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert await together(after(3), after(0), after(1)) == [3, 0, 1]
    assert await together() == []


async def test_the_first_of_several_that_fails_ends_the_others_and_comes_out_bare() -> None:
    other = Watched()

    async def fail() -> None:
        await other.began.wait()
        raise Failure

    with pytest.raises(Failure):
        await together(other.forever(), fail())
    assert other.ended == "cancelled"


async def test_cancelling_what_runs_together_cancels_each() -> None:
    both = Watched(), Watched()
    task = asyncio.create_task(together(*(watched.forever() for watched in both)))
    for watched in both:
        await watched.began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [watched.ended for watched in both] == ["cancelled", "cancelled"]


# -- Runner ----------------------------------------------------------------------------------------------


async def test_a_runner_that_is_stopped() -> None:
    work = Watched()
    runner = Runner(work.forever())
    await work.began.wait()
    await runner.stop()
    assert work.ended == "cancelled"
    await runner.failure()
    await runner.stop()


async def test_a_runner_that_is_stopped_before_it_began() -> None:
    await Runner(Watched().forever()).stop()


async def test_stop_waits_for_the_end() -> None:
    work = Watched()
    runner = Runner(work.stubborn())
    await asyncio.sleep(0)
    await runner.stop()
    assert work.ended == "in the end"


async def test_a_runner_that_returned() -> None:
    runner = Runner(stop())
    await runner.failure()
    await runner.stop()


async def test_a_runner_that_failed_says_so_to_everybody_who_asks() -> None:
    runner = Runner(fail(Failure("work")))
    for _ in range(2):
        with pytest.raises(Failure, match="work"):
            await runner.failure()
    await runner.stop()


async def test_a_failure_nobody_asked_for_is_not_reported_as_forgotten() -> None:
    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: said.append(context))
    runner = Runner(fail(Failure("work")))
    for _ in range(3):
        await asyncio.sleep(0)
    await runner.stop()
    del runner
    assert said == []


async def test_a_failure_in_groups_comes_out_bare() -> None:
    async def in_a_group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail(Failure("work")))

    runner = Runner(in_a_group())
    with pytest.raises(Failure, match="work"):
        await runner.failure()
    await runner.stop()


async def test_whoever_stops_watching_does_not_stop_the_work() -> None:
    work = Watched()
    runner = Runner(work.forever())
    watching = asyncio.create_task(runner.failure())
    await work.began.wait()
    watching.cancel()
    await asyncio.wait({watching})
    assert watching.cancelled()
    assert work.ended == ""
    assert await guarded(give(1), runner.failure()) == 1
    assert work.ended == ""
    await runner.stop()


async def test_a_runner_guards_other_work() -> None:
    runner, work = Runner(fail(Failure("lost"), 3)), Watched()
    with pytest.raises(Failure, match="lost"):
        await guarded(work.forever(), runner.failure())
    assert work.ended == "cancelled"
    await runner.stop()


def test_the_first_cause_of_nested_groups() -> None:
    failure = Failure()
    inner = ExceptionGroup("inner", [failure, ValueError()])
    assert first_cause(ExceptionGroup("outer", [inner, KeyError()])) is failure
    assert first_cause(failure) is failure
