# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversions on their way to a trace: nothing is lost that is not counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_upm.errors import MessageError
from qmp_upm.events import Bounds, Publisher
from qmp_upm.recording import BOUNDS, CHUNK_RECORDS, Receiver, Sender
from qmp_upm.records import RECORD
from qmp_upm.trace import Block


def block(size: int, dropped: int = 0, first: int = 0) -> Block:
    """Records that are told apart by their time."""
    records = np.zeros(size, RECORD)
    records["time_ns"] = np.arange(first, first + size)
    return Block(records, dropped, first)


blocks = st.lists(
    st.tuples(st.integers(0, 2 * CHUNK_RECORDS), st.integers(0, 9), st.booleans()), max_size=8
)


@given(blocks, st.data())
def test_gaps_have_their_length(steps: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    """Dropped by the plugin, for want of room, or on the way: all of it is in the trace's drops."""
    sender, receiver, lost, sent, missing = Sender("vm"), Receiver(), 0, 0, 0
    wire: list[object] = []
    for size, dropped, has_room in steps:
        if has_room:
            wire += sender.chunks(block(size, dropped, sent), lost)
            lost = 0
        else:
            lost += size + dropped
        sent += size
        missing += dropped
    kept = [chunk for chunk in wire if data.draw(st.booleans(), "arrives")]
    read = [receiver.block(chunk) for chunk in [*kept, sender.last(lost)]]
    times = np.concatenate([part.records["time_ns"] for part in read])
    assert receiver.ended
    assert receiver.received == len(times)
    assert receiver.received + receiver.lost == sent + missing
    assert receiver.lost == sum(part.dropped for part in read)
    assert (np.diff(times) > 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"at": -1},
        {"at": 1},
        {"records": "AAAA"},
        {"records": "é"},
        {"now_ns": None},
        {"last": "perhaps"},
    ],
    ids=str,
)
def test_malformed_chunks_are_message_errors(change: dict[str, object]) -> None:
    """Also those that go back."""
    sender, receiver = Sender("vm"), Receiver()
    first, second = list(sender.chunks(block(CHUNK_RECORDS + 1), 0))
    receiver.block(first)
    with pytest.raises(MessageError) as caught:
        receiver.block({**second, **change})
    assert caught.value.hint


async def test_a_slow_subscriber_costs_a_bounded_memory() -> None:
    """Beyond its room everything is dropped and counted, for it and in the publisher's total."""
    publisher: Publisher[Block] = Publisher(BOUNDS)
    slow, closed = publisher.subscribe(), publisher.subscribe()
    closed.close()
    for _ in range(100):
        publisher.put(block(10_000, dropped=5))
    kept = BOUNDS.most // 10_001
    assert slow.dropped == publisher.dropped == (100 - kept) * 10_005
    slow.close()
    assert len([item async for item in slow]) == kept


async def test_room_comes_back() -> None:
    """What has been taken makes room for more."""
    publisher: Publisher[int] = Publisher(Bounds(most=2))
    reader = publisher.subscribe()
    for number in range(3):
        publisher.put(number)
    assert await anext(reader) == 0
    publisher.put(3)
    reader.close()
    assert [item async for item in reader] == [1, 3]
    assert publisher.dropped == reader.dropped == 1
