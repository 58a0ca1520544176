# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm record``: a VM's conversions into a file, for the simulator."""

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmp_upm.cli.control import Socket, Vm, read_views
from qmp_upm.errors import TraceError
from qmp_upm.paths import CONTROL_SOCKET

if TYPE_CHECKING:
    from qmp_upm.recording import Receiver

FILE_MODE = 0o600


def record(
    vm: Vm,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long; otherwise at Ctrl-C.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    socket: Socket = CONTROL_SOCKET,
) -> None:
    """Store every conversion of a VM, for 'qmp-upm simulate' and 'qmp-upm advise'.

    The file holds when and where in its memory the guest converted, and nothing of what it keeps
    there. It is whole whenever it ends: at Ctrl-C, SIGTERM, with the VM, or when the disk is full.
    """
    received, stopped = asyncio.run(_record(vm, output, seconds, force=force, socket=socket))
    typer.echo(
        f"{output}: {received.received} records, {received.lost} lost, "
        f"{output.stat().st_size} bytes" + ("" if stopped else "; the VM is gone")
    )


async def _record(
    vm: str, output: Path, seconds: float | None, *, force: bool, socket: Path
) -> tuple["Receiver", bool]:
    from qmp_upm.client import connect  # noqa: PLC0415 - 'plugin path' needs none of this
    from qmp_upm.recorder import record as follow  # noqa: PLC0415
    from qmp_upm.trace import TraceWriter  # noqa: PLC0415

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with connect(socket) as client:
        (view,) = read_views([await client.execute("query-vm", {"name": vm})])
        _create(output, force=force)
        with TraceWriter(
            output,
            vm=view.name,
            policy=view.policy,
            parameters=view.parameters,
            budget_bytes=view.budget_bytes,
        ) as writer:
            await client.execute("record-start", {"name": vm})
            typer.echo(f"recording {vm}, which is {view.state}; Ctrl-C ends it", err=True)
            timer = asyncio.create_task(_stop_after(seconds, stop))
            try:
                received = await follow(client, vm, writer, stop)
            finally:
                timer.cancel()
                await asyncio.gather(timer, return_exceptions=True)
    return received, stop.is_set()


def _create(path: Path, *, force: bool) -> None:
    """For its owner alone: the trace tells how the guest uses its memory."""
    flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | (0 if force else os.O_EXCL)
    try:
        os.close(os.open(path, flags, FILE_MODE))
    except FileExistsError as error:
        raise TraceError(
            f"{path} exists", hint="name another file, or overwrite it with --force"
        ) from error
    except OSError as error:
        raise TraceError(
            f"cannot write {path}: {error.strerror}", hint="name a file that this user may write"
        ) from error


async def _stop_after(seconds: float | None, stop: asyncio.Event) -> None:
    if seconds is not None:
        await asyncio.sleep(seconds)
        stop.set()
