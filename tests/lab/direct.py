# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest without a daemon: this process is the plugin's only client, or there is no plugin."""

from typing import Any

from tests.lab.inside import Run, wait_until

MIB = 1 << 20
CONVERSION_MOST = 2 * MIB
"""The longest range that the guest converts at once."""
BUDGET = 256 * MIB
"""As much as the guest has: where all is deferred, nothing is left out for want of room."""
DRAIN_SECONDS = 30.0
COPIES = ("private", "shared")


class Direct(Run):
    """Policy ``direct-eager``: as the plugin is without a client; ``direct-defer``: it keeps all.

    ``kept_*`` is what was held when the guest had done its work, ``final_*`` after a drain.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.budget_most = 0
        self.peak_over_budget = 0

    def begin(self) -> None:
        """Before the guest's first instruction."""
        if self.scenario.policy == "direct-defer":
            self.configure(private="defer", shared="defer", budget=BUDGET)

    def configure(self, **settings: Any) -> None:
        """Have the plugin do this from now on."""
        # Raised before the plugin has it: what becomes stale meanwhile is allowed.
        self.budget_most = max(self.budget_most, settings.get("budget", 0))
        self.monitor.cmd("x-upm-configure", **settings)

    def query(self) -> dict[str, Any]:
        """The plugin's state; its peak is held against the largest budget that there was so far."""
        query = super().query()
        peak = query["stale"]["peak"]
        self.peak_over_budget = max(self.peak_over_budget, peak - self.budget_most)
        return query

    def drain(self) -> None:
        """Have the plugin give back everything."""
        self.configure(private="eager", shared="eager", **{"lease-ms": 0})
        wait_until(lambda: not any(self.held().values()), DRAIN_SECONDS)

    def held(self) -> dict[str, int]:
        """Stale bytes by copy."""
        stale = super().query()["stale"]
        return {copy: stale[copy] for copy in COPIES}

    def result(self) -> dict[str, Any]:
        """The guest's work, and what is left of it."""
        self.start_qemu()
        if self.scenario.plugin:
            self.begin()
        guest = self.guest()
        result: dict[str, Any] = {
            "name": self.scenario.name,
            "policy": self.scenario.policy,
            "workload": self.scenario.workload,
            "vcpus": self.scenario.vcpus,
            "plugin": self.scenario.plugin,
            "qemu_version": "{major}.{minor}.{micro}".format(
                **self.monitor.cmd("query-version")["qemu"]
            ),
            "guest_conversions": guest["conversions"],
            "data_errors": guest["errors"],
            "shared_live_bytes": self.live_shared(guest),
            "kept_shared_bytes": self.shared_bytes(),
        }
        if self.scenario.plugin:
            result |= self.plugin_result()
        return result | {
            "qemu_alive": self.qemu.poll() is None,
            "shared_allocated_bytes": self.shared_bytes(),
        }

    def plugin_result(self) -> dict[str, Any]:
        """What the plugin says, before and after a drain."""
        kept = self.held()
        self.drain()
        final = super().query()
        counters = final["counters"]
        self.peak_over_budget = max(
            self.peak_over_budget, final["stale"]["peak"] - self.budget_most
        )
        return {
            "vm_kind": final["vm-kind"],
            "plugin_conversions": sum(counters[f"conversions-to-{copy}"] for copy in COPIES),
            "kept_stale_bytes": kept,
            "peak_stale_bytes": final["stale"]["peak"],
            "budget_most_bytes": self.budget_most,
            "peak_over_budget_bytes": self.peak_over_budget,
            "conversion_most_bytes": CONVERSION_MOST,
            "final_stale_bytes": sum(final["stale"][copy] for copy in COPIES),
            "counters": counters,
        }
