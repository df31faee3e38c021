"""What a call writes, given to its caller as it comes, for asyncio; see `follow`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from virgo.cpu.apart import Apart, Hand
from virgo.cpu.calls import Task
from virgo.cpu.follow import Reading, Write
from virgo.cpu.messages import Outcome, arrived
from virgo.cpu.seen import Written
from virgo.errors import VirgoError, from_line
from virgo.limits import COLLECT_WAIT_S, OUTPUT_LOOK_S, OUTPUT_LOOK_S_MAX, REQUEST_DEADLINE_S
from virgo.wire.call import AsyncRunner, Call, as_text


async def run_followed(
    runner: AsyncRunner,
    look: Callable[[str, int], Awaitable[Written]],
    task: Task,
    write: Write,
    arguments: bytes | Apart,
    hand: Hand,
) -> Outcome:
    """Run a call through a node; its outcome, when all that it has written is handed on.

    Args:
        runner: connections to the node.
        look: what a call has written, from an offset on.
        task, arguments: the call.
        write: takes what it writes.
        hand: takes the arguments to the node.

    Raises:
        VirgoError: it has no outcome; or what writing raises, or CancelledError: then it is stopped.
    """
    mailbox = os.urandom(12).hex()
    verb = "CPU.CALL.SUBMIT" if task.trusted else "CPU.INVOKE.SUBMIT"
    place = hand.place() if task.trusted else None
    request = (verb, mailbox, task.options(mailbox, place), task.function, hand.carry(arguments))
    known_as = await runner.run(Call(request, as_text, REQUEST_DEADLINE_S))
    outcome = asyncio.get_running_loop().create_task(_collected(runner, mailbox))
    reading, look_s = Reading(write), OUTPUT_LOOK_S
    try:
        while True:
            ended = outcome.done()  # looked at first: what is there then is all
            before = reading.offset
            while True:
                try:
                    written = await look(known_as, reading.offset)
                except VirgoError:  # it has written nothing, or nodes do not answer: its outcome says more
                    break
                if not reading.take(written):
                    break
            if ended:
                return arrived(outcome.result(), place)
            look_s = OUTPUT_LOOK_S if reading.offset > before else min(2 * look_s, OUTPUT_LOOK_S_MAX)
            await asyncio.wait([outcome], timeout=look_s)
    finally:
        outcome.cancel()  # who does not collect any more has his calls cancelled


async def _collected(runner: AsyncRunner, mailbox: str) -> bytes:
    """The outcome of the one call of a mailbox. Raises what the node says."""
    found: list[bytes] = []
    while not found:
        found = await runner.run(Call(("CPU.COLLECT", mailbox), list, COLLECT_WAIT_S + REQUEST_DEADLINE_S))
    _key, error, outcome = found
    if error:
        raise from_line(error.decode("utf-8", "replace"))
    return outcome
