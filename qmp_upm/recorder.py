# SPDX-License-Identifier: GPL-2.0-or-later
"""``record`` from the daemon's client's side: events into a trace, until told to stop."""

import asyncio

import aiofiles.os

from qmp_upm.client import ControlClient
from qmp_upm.errors import ControlError
from qmp_upm.recording import EVENT, Receiver
from qmp_upm.trace import TraceWriter

LAST_SECONDS = 30.0
"""How long the daemon may take to send what it still has, once it was told to stop."""


async def record(
    client: ControlClient, vm: str, writer: TraceWriter, stop: asyncio.Event
) -> Receiver:
    """Write the VM's conversions, after record-start, until ``stop`` is set or the VM is gone.

    Returns what was received and lost. ControlError if the daemon ends, or does not finish;
    TraceError if the file can't be written. What has been written is whole in either case.
    """
    receiver = Receiver()
    try:
        async with asyncio.timeout(None) as deadline:
            stopping = asyncio.create_task(_stop(client, vm, stop, deadline))
            try:
                await _write(client, vm, writer, receiver)
            finally:
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)
    except TimeoutError as error:
        raise ControlError(
            f"the daemon did not end the recording within {LAST_SECONDS:.0f} s",
            hint="the trace is whole up to there; look at the daemon's log",
        ) from error
    return receiver


async def _stop(
    client: ControlClient, vm: str, stop: asyncio.Event, deadline: asyncio.Timeout
) -> None:
    await stop.wait()
    deadline.reschedule(asyncio.get_running_loop().time() + LAST_SECONDS)
    # An error says that it has just ended by itself: then its last chunk is on its way.
    await client.execute("record-stop", {"name": vm})


async def _write(client: ControlClient, vm: str, writer: TraceWriter, receiver: Receiver) -> None:
    write = aiofiles.os.wrap(writer.write)  # a slow disk must not keep us from listening
    async for event in client.events():
        if event["event"] != EVENT or event["data"].get("vm") != vm:
            continue
        block = receiver.block(event["data"])
        if len(block.records) or block.dropped:
            await write(block.records, block.now_ns, block.dropped)
        if receiver.ended:
            return
