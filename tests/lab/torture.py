# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that a client may do to the plugin, at random, while a guest converts at random."""

import random
import time
from typing import Any

from tests.lab.inside import AREA, AREA_BYTES, Run, wait_until

MIB = 1 << 20
CONVERSION_MOST = 2 * MIB
BUDGETS = (0, MIB, 8 * MIB, 64 * MIB)
DRAIN_SECONDS = 30.0


class Torture(Run):
    """No daemon: this process is the plugin's client, and not a kind one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.random = random.Random(self.scenario.flips)  # noqa: S311 - repeatable, not secret
        self.budget = 0
        self.settled = True
        self.over_budget = 0
        self.commands: dict[str, int] = {}

    def query(self) -> dict[str, Any]:
        """The plugin's state; each look disturbs it as well."""
        query = super().query()
        stale = query["stale"]["private"] + query["stale"]["shared"]
        self.settled = self.settled or stale <= self.budget
        if self.settled:
            self.over_budget = max(self.over_budget, stale - self.budget)
        self.disturb(self.random.choice(("discard", "discard", "all", "configure", "read", "wait")))
        return query

    def disturb(self, what: str) -> None:
        """One command."""
        self.commands[what] = self.commands.get(what, 0) + 1
        pick = self.random.choice
        if what == "discard":
            ranges = [self._range() for _ in range(self.random.randint(1, 64))]
            self._discard(copy=pick(("private", "shared", "both")), ranges=ranges)
        elif what == "all":
            self._discard(copy=pick(("private", "shared", "both")), all=True)
        elif what == "configure":
            budget = pick(BUDGETS)
            self.settled = self.settled and budget >= self.budget
            self.budget = budget
            self.monitor.cmd(
                "x-upm-configure",
                **{
                    "private": pick(("eager", "defer", "defer")),
                    "shared": pick(("eager", "defer", "defer")),
                    "budget": budget,
                    "lease-ms": pick((0, 20, 200, 2000)),
                    "on-lease-expiry": pick(("eager", "eager", "keep")),
                    "notify-ms": pick((0, 1, 50)),
                },
            )
        elif what == "read":
            self.monitor.cmd("x-upm-read", cursor=0, max=4096)
        else:
            time.sleep(self.random.uniform(0, 0.3))

    def _range(self) -> list[int]:
        first = self.random.randrange(AREA_BYTES // 4096)
        pages = self.random.randint(1, 1024)
        pages = min(pages, AREA_BYTES // 4096 - first)
        return [1, AREA + first * 4096, pages * 4096]

    def _discard(self, **arguments: Any) -> None:
        reply = self.monitor.cmd_obj(
            {"execute": "x-upm-discard", "arguments": {"id": 1, **arguments}}
        )
        if "error" in reply and "busy" not in reply["error"]["desc"]:
            raise RuntimeError(f"x-upm-discard: {reply}")

    def result(self) -> dict[str, Any]:
        """The guest's work under disturbance; then a drain, and what is left."""
        self.start_qemu()
        self.disturb("configure")
        guest = self.guest()
        self.monitor.cmd(
            "x-upm-configure", **{"private": "eager", "shared": "eager", "lease-ms": 0}
        )
        wait_until(lambda: not sum(self._stale_now()), DRAIN_SECONDS)
        final = self.monitor.cmd("x-upm-query")
        counters = final["counters"]
        return {
            "name": self.scenario.name,
            "vcpus": self.scenario.vcpus,
            "qemu_version": "{major}.{minor}.{micro}".format(
                **self.monitor.cmd("query-version")["qemu"]
            ),
            "vm_kind": final["vm-kind"],
            "guest_conversions": guest["conversions"],
            "plugin_conversions": sum(
                counters[f"conversions-to-{c}"] for c in ("private", "shared")
            ),
            "data_errors": guest["errors"],
            "qemu_alive": self.qemu.poll() is None,
            "over_budget_bytes": self.over_budget,
            "conversion_most_bytes": CONVERSION_MOST,
            "final_stale_bytes": sum(self._stale_now()),
            "shared_live_bytes": self.live_shared(guest),
            "shared_allocated_bytes": self.shared_bytes(),
            "disturbances": self.commands,
            "counters": counters,
        }

    def _stale_now(self) -> tuple[int, int]:
        stale = self.monitor.cmd("x-upm-query")["stale"]
        return stale["private"], stale["shared"]
