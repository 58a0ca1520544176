# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens on the host, for whoever follows it: bounded, and never in anybody's way."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Self, TypeVar

QUEUE_MOST = 1024
"""Items kept for a subscriber that is slow; more are dropped and counted."""

Item = TypeVar("Item")


class HostEventName(StrEnum):
    """The events."""

    VM_ADDED = "VM_ADDED"
    VM_REMOVED = "VM_REMOVED"
    VM_STATE = "VM_STATE"
    POLICY_CHANGED = "POLICY_CHANGED"
    BUDGET_CHANGED = "BUDGET_CHANGED"
    BUDGET_REACHED = "BUDGET_REACHED"
    POLICY_FELL_BACK = "POLICY_FELL_BACK"
    LEASE_EXPIRED = "LEASE_EXPIRED"
    CONFIG_RELOADED = "CONFIG_RELOADED"
    CONFIG_REJECTED = "CONFIG_REJECTED"


@dataclass(frozen=True)
class HostEvent:
    """One of them. ``vm``: its name, None if it concerns the host. ``data``: JSON values."""

    name: HostEventName
    vm: str | None
    data: Mapping[str, object] = field(default_factory=dict)


class Subscription(Generic[Item]):
    """An async iterator over what comes from now on, until closed."""

    def __init__(self, on_close: Callable[["Subscription[Item]"], None]) -> None:
        self._items: deque[Item] = deque()
        self._arrived = asyncio.Event()
        self._on_close = on_close
        self._closed = False
        self.dropped = 0

    def put(self, item: Item) -> None:
        """Queue one, or count it as dropped. Never waits."""
        if self._closed:
            return
        if len(self._items) >= QUEUE_MOST:
            self.dropped += 1
        else:
            self._items.append(item)
            self._arrived.set()

    def close(self) -> None:
        """End the iteration, after what is queued."""
        if not self._closed:
            self._closed = True
            self._arrived.set()
            self._on_close(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._items.popleft()


class Publisher(Generic[Item]):
    """Hands each item to all who have subscribed."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription[Item]] = set()

    def subscribe(self) -> Subscription[Item]:
        """From now on, until it is closed."""
        subscription: Subscription[Item] = Subscription(self._subscriptions.discard)
        self._subscriptions.add(subscription)
        return subscription

    def put(self, item: Item) -> None:
        """To all."""
        for subscription in self._subscriptions:
            subscription.put(item)

    def close(self) -> None:
        """End all subscriptions."""
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def __bool__(self) -> bool:
        return bool(self._subscriptions)
