# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that a client may do to the plugin, at random, while a guest converts at random."""

import random
import time
from typing import Any

from tests.lab.direct import MIB, Direct
from tests.lab.inside import AREA, AREA_BYTES
from tests.lab.scenario import FLIPS

BUDGETS = (0, MIB, 8 * MIB, 64 * MIB)
"""Larger ones come later, so that what passes a smaller one shows in the peak."""


class Torture(Direct):
    """No daemon: this process is the plugin's client, and not a kind one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.random = random.Random(self.scenario.flips)  # noqa: S311 - repeatable, not secret
        self.budget = 0
        self.settled = True
        self.over_budget = 0
        self.done = 0.0
        self.commands: dict[str, int] = {}

    def begin(self) -> None:
        """Not eager, as it would be by itself."""
        self.disturb("configure")

    def query(self) -> dict[str, Any]:
        """The plugin's state; each look disturbs it as well."""
        query = super().query()
        made = sum(query["counters"][f"conversions-to-{c}"] for c in ("private", "shared"))
        self.done = made / (self.scenario.flips or FLIPS[self.scenario.workload])
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
            budget = pick(BUDGETS[: 2 + int(3 * self.done)])
            self.settled = self.settled and budget >= self.budget
            self.budget = budget
            self.configure(
                budget=budget,
                **{
                    "private": pick(("eager", "defer", "defer")),
                    "shared": pick(("eager", "defer", "defer")),
                    "lease-ms": pick((0, 0, 0, 20, 200, 2000)),
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

    def plugin_result(self) -> dict[str, Any]:
        """And what a look at its stale bytes found above the budget of the moment."""
        return super().plugin_result() | {
            "over_budget_bytes": self.over_budget,
            "disturbances": self.commands,
        }
