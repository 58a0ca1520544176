# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon: a supervised task for each VM, until a signal."""

import asyncio
import signal
import time
from contextlib import closing

import structlog

from qmp_upm.config import Config
from qmp_upm.control import ControlServer
from qmp_upm.errors import ConfigError
from qmp_upm.exporter import Exporter
from qmp_upm.exposition import pages
from qmp_upm.host import Host
from qmp_upm.looplag import LoopLag
from qmp_upm.notify import Notifier, notifier
from qmp_upm.stats import State
from qmp_upm.vm import Session

RESTART_SECONDS = 5.0
TELEMETRY_SECONDS = 2.0
"""How long the disk may take with the last lines."""

log = structlog.get_logger()


async def _supervise(session: Session) -> None:
    """A session that dies of a defect is seen, and begun again; the others go on."""
    while True:
        try:
            await session.run()
        except Exception:
            log.exception("session-died", vm=session.name, hint="report this; it is tried again")
        await asyncio.sleep(RESTART_SECONDS)


def _status(host: Host) -> str:
    states = [session.state for session in host.sessions]
    return f"{states.count(State.ATTACHED)} of {len(states)} VMs attached"


async def _serve(config: Config, manager: Notifier) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    host = Host(config, time.time())
    lag = LoopLag()
    exporter = Exporter(pages(host, lag, lambda: True))
    await exporter.start(config.metrics.listen)
    control = ControlServer(config.control.socket, host)
    await control.start()
    host.telemetry.start()
    sessions = [asyncio.create_task(_supervise(session)) for session in host.sessions]
    beating = asyncio.create_task(lag.run(lambda s: manager.beat(s, lambda: _status(host))))
    manager.ready(_status(host))
    log.info("started", vms=len(sessions), metrics_port=exporter.port)
    await stop.wait()
    manager.stopping()
    await control.stop()
    for task in (*sessions, beating):
        task.cancel()
    await asyncio.gather(*sessions, beating, return_exceptions=True)
    await exporter.close()
    await host.telemetry.close(TELEMETRY_SECONDS)
    log.info("stopped")


def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    ConfigError if telemetry has nowhere to go, ControlError if another daemon serves the socket.
    """
    try:
        config.telemetry.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"telemetry.directory: {error}", hint="name a directory that this user may write"
        ) from error
    with closing(notifier()) as manager:
        asyncio.run(_serve(config, manager))
