# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon: the host's VMs, and what is around them, until a signal."""

import asyncio
import resource
import signal
from contextlib import AsyncExitStack, closing

import structlog

from qmp_upm import memory
from qmp_upm.config import Config
from qmp_upm.control import ControlServer
from qmp_upm.errors import ConfigError
from qmp_upm.exporter import Exporter
from qmp_upm.exposition import pages
from qmp_upm.host import Host
from qmp_upm.looplag import LoopLag
from qmp_upm.notify import Notifier, notifier
from qmp_upm.pressure import PressureFiles
from qmp_upm.stats import State

TELEMETRY_SECONDS = 0.5
"""How long the disk may take with the last lines, when the VMs have been left."""

log = structlog.get_logger()


class _Signals:
    """What the process is told: to stop, and to reload."""

    def __init__(self, host: Host, manager: Notifier) -> None:
        self.stop = asyncio.Event()
        self._host = host
        self._manager = manager
        self._reloads: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_hangup(self) -> None:
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        self._manager.reloading()
        try:
            await self._host.reload()
        except ConfigError:
            pass  # the host has logged it, and goes on as it was
        except Exception:
            log.exception("reload-died", hint="report this; restart the daemon to be sure")
        finally:  # systemd waits for it, whatever has happened
            self._manager.ready(_status(self._host))


def _status(host: Host) -> str:
    states = [session.state for session in host.sessions]
    return f"{states.count(State.ATTACHED)} of {len(states)} VMs attached"


async def _serve(config: Config, files: PressureFiles, manager: Notifier) -> None:
    host = Host(config, files=files)
    lag = LoopLag()
    signals = _Signals(host, manager)
    async with AsyncExitStack() as stack:
        exporter = Exporter(pages(host, lag, lambda: host.ready))
        stack.push_async_callback(exporter.close)
        await exporter.start(config.metrics.listen)
        control = ControlServer(config.control.socket, host, group=config.control.group)
        stack.push_async_callback(control.stop)
        await control.start()
        host.telemetry.start()
        stack.push_async_callback(host.telemetry.close, TELEMETRY_SECONDS)
        host.start()
        tasks = [
            asyncio.create_task(host.run()),
            asyncio.create_task(lag.run(lambda s: manager.beat(s, lambda: _status(host)))),
            asyncio.create_task(host.supervisor.keep("memory", memory.collect_regularly)),
            asyncio.create_task(signals.stop.wait()),
        ]
        manager.ready(_status(host))
        log.info("started", vms=len(config.static), metrics_port=exporter.port)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        manager.stopping()
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
    log.info("stopped")


def serve(config: Config, files: PressureFiles) -> None:
    """Serve until SIGTERM or SIGINT.

    ConfigError if telemetry has nowhere to go, ControlError if another daemon serves the socket.
    """
    try:
        config.telemetry.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"telemetry.directory: {error}", hint="name a directory that this user may write"
        ) from error
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    memory.settle()
    with closing(notifier()) as manager:
        asyncio.run(_serve(config, files, manager))
