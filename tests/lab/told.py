# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon says of a VM: on its control socket, through the CLI, and to Prometheus."""

import json
import subprocess
import sys
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from qemu.qmp.legacy import QEMUMonitorProtocol

SCRAPE_SECONDS = 60.0


class Told:
    """Asks the daemon behind ``control`` of ``vm``; ``log`` is the daemon's."""

    def __init__(self, vm: str, control: str, log: Path) -> None:
        self._vm, self._control, self._log = vm, control, log
        self._client: QEMUMonitorProtocol | None = None

    def view(self) -> dict[str, Any]:
        """The answer to query-vm."""
        if self._client is None:
            self._client = QEMUMonitorProtocol(self._control)
            self._client.connect(negotiate=True)
        answer: dict[str, Any] = self._client.cmd("query-vm", name=self._vm)
        return answer

    def is_done(self, plugin: Mapping[str, Any]) -> bool:
        """Whether the daemon has read all that the plugin has counted, and no discard is left.

        It reads, decides and strikes off its own ledger what is to go at once, so that a discard
        under way is stale to the plugin alone.
        """
        view, counters = self.view(), plugin["counters"]
        made = sum(counters[f"conversions-to-{copy}"] for copy in ("private", "shared"))
        return bool(
            view["stats"]["followed_conversions"] == made
            and all(plugin["stale"][copy] == size for copy, size in view["stale_bytes"].items())
        )

    def has_counted(self, counters: Mapping[str, int]) -> bool:
        """Whether the daemon has these counters of the plugin; it asks for them now and then."""
        seen = self.view()["stats"]["plugin_counters"]
        return all(seen[name] == counters[name] for name in counters if "-bytes" in name)

    def everything(self) -> dict[str, Any]:
        """What a client of the control socket, a user of the CLI and Prometheus are told."""
        program = str(Path(sys.executable).with_name("qmp-upm"))
        shown = subprocess.run(
            [program, "show", self._vm, "--json", "--socket", self._control],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        return {"control": self.view(), "cli": json.loads(shown), "metrics": self._scrape()}

    def close(self) -> None:
        """While the daemon is still there."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _scrape(self) -> str:
        lines = map(json.loads, self._log.read_text(encoding="utf-8").splitlines())
        port = next(line["metrics_port"] for line in lines if line["event"] == "started")
        client = HTTPConnection("127.0.0.1", port, timeout=SCRAPE_SECONDS)
        client.request("GET", "/metrics")
        text = client.getresponse().read().decode()
        client.close()
        return text
