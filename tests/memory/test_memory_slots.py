"""Which node holds a key: the shared table under concurrency."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from memory.pools import Registers
from virgo.errors import PoolFull
from virgo.limits import MEMORY_SLOTS, GiB
from virgo.memory.slots import REGISTER, Slots


def made(registers: Registers, local: int, rooms: dict[int, int] | None = None) -> Slots:
    engine: Any = SimpleNamespace(registers=registers)
    return Slots(engine, local, lambda: rooms or {1: GiB, 2: GiB, 3: GiB})


def test_many_writers_share_one_change() -> None:
    """A hundred writers of new slots that wait together cost a handful of engine writes."""

    async def main() -> None:
        registers = Registers()
        slots = made(registers, 1)
        await asyncio.gather(*(slots.assign([slot]) for slot in range(0, 1000, 10)))
        assert all(slots.table[slot] == 1 for slot in range(0, 1000, 10))
        assert registers.writes <= 2

    asyncio.run(main())


def test_nodes_agree_whoever_is_first() -> None:
    """Three nodes assign the same slots at once: all end up with the same table, and nothing moves."""

    async def main() -> None:
        registers = Registers()
        nodes = [made(registers, number) for number in (1, 2, 3)]

        async def assign(slots: Slots, seed: int) -> None:
            before: dict[int, int] = {}
            for step in range(20):
                slot = (seed * 7 + step * 13) % 50
                await slots.assign([slot, (slot + 1) % 50])
                for known, number in before.items():
                    assert slots.table[known] == number
                before = {index: number for index, number in enumerate(slots.table) if number}

        await asyncio.gather(*(assign(slots, seed) for seed, slots in enumerate(nodes)))
        for slots in nodes:
            await slots.refresh()
        assert nodes[0].table == nodes[1].table == nodes[2].table

    asyncio.run(main())


def test_a_miss_has_looked_since_the_question() -> None:
    """A slot assigned elsewhere before the question is seen, though a read was under way already."""

    async def main() -> None:
        registers = Registers()
        reader, writer = made(registers, 1), made(registers, 2)
        early = asyncio.create_task(reader.look_up([5]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the early read has taken its answer
        await writer.assign([5])
        await reader.look_up([5])
        assert reader.table[5] == 2
        await early

    asyncio.run(main())


def test_known_slots_cost_nothing() -> None:
    """What is assigned is never looked up again."""

    async def main() -> None:
        registers = Registers()
        slots = made(registers, 1)
        await slots.assign([1, 2])
        reads = registers.reads
        await slots.look_up([1, 2])
        await slots.assign([2])
        assert registers.reads == reads

    asyncio.run(main())


def test_questions_that_wait_together_share_a_read() -> None:
    """A hundred misses at once cost two reads, not a hundred."""

    async def main() -> None:
        registers = Registers()
        slots = made(registers, 1)
        await asyncio.gather(*(slots.look_up([slot]) for slot in range(100)))
        assert registers.reads <= 2

    asyncio.run(main())


def test_no_room_anywhere_is_told_to_each_and_mended_by_room() -> None:
    """With all nodes full every writer gets PoolFull; later ones are not held up by it."""

    async def main() -> None:
        registers = Registers()
        rooms = {1: 0, 2: 0}
        slots = made(registers, 1, rooms)
        outcomes = await asyncio.gather(*(slots.assign([slot]) for slot in range(3)), return_exceptions=True)
        assert all(isinstance(outcome, PoolFull) for outcome in outcomes)
        rooms[2] = GiB
        await slots.assign([7])
        assert slots.table[7] == 2
        assert slots.table[:MEMORY_SLOTS].count(0) == MEMORY_SLOTS - 1
        assert REGISTER in registers.values

    asyncio.run(main())
