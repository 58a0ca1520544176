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


@dataclass(frozen=True)
class Bounds(Generic[Item]):
    """What waits for one subscriber weighs ``most``; what has no room counts as ``dropped``."""

    weigh: Callable[[Item], int] = lambda _: 1
    count: Callable[[Item], int] = lambda _: 1
    most: int = QUEUE_MOST


class Subscription(Generic[Item]):
    """An async iterator over what comes from now on, until closed."""

    def __init__(
        self, on_close: Callable[["Subscription[Item]"], None], bounds: Bounds[Item]
    ) -> None:
        self._items: deque[Item] = deque()
        self._arrived = asyncio.Event()
        self._on_close = on_close
        self._bounds = bounds
        self._room = bounds.most
        self._closed = False
        self.dropped = 0

    def put(self, item: Item) -> int:
        """Queue one, or drop it: returns what was dropped. Never waits."""
        if self._closed:
            return 0
        weight = self._bounds.weigh(item)
        if weight > self._room:
            dropped = self._bounds.count(item)
            self.dropped += dropped
            return dropped
        self._room -= weight
        self._items.append(item)
        self._arrived.set()
        return 0

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
        item = self._items.popleft()
        self._room += self._bounds.weigh(item)
        return item


class Publisher(Generic[Item]):
    """Hands each item to all who have subscribed. ``dropped`` is of all of them, for good."""

    def __init__(self, bounds: Bounds[Item] | None = None) -> None:
        self._subscriptions: set[Subscription[Item]] = set()
        self._bounds: Bounds[Item] = bounds or Bounds()
        self.dropped = 0

    def subscribe(self) -> Subscription[Item]:
        """From now on, until it is closed."""
        subscription: Subscription[Item] = Subscription(self._subscriptions.discard, self._bounds)
        self._subscriptions.add(subscription)
        return subscription

    def put(self, item: Item) -> None:
        """To all."""
        for subscription in self._subscriptions:
            self.dropped += subscription.put(item)

    def close(self) -> None:
        """End all subscriptions."""
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def __bool__(self) -> bool:
        return bool(self._subscriptions)
