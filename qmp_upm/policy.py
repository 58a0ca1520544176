# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract between the daemon and a policy, for ours and anybody's.

A policy is pure: it sees a batch of conversions, the ledger, the time and the host's memory
pressure, and returns which copies to keep and which to discard now. It does no I/O, reads no clock,
and starts nothing. It is found by its entry point in the group ``qmp_upm.policies``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from qmp_upm.digest import Returns
from qmp_upm.errors import ConfigError, PolicyError
from qmp_upm.pages import PageSet, Runs
from qmp_upm.protocol import Copy
from qmp_upm.records import Record, Records, make_records

GROUP = "qmp_upm.policies"


class Parameters(BaseModel):
    """Base of a policy's parameters. Unknown ones are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LedgerView(Protocol):
    """What a policy may ask of the ledger. Page sets that it gets are its own."""

    budget_bytes: int

    @property
    def stale_bytes(self) -> int:
        """Bytes of both copies that are stale."""

    def stale(self, copy: Copy) -> PageSet:
        """The stale pages of one copy."""

    def entered(self, copy: Copy) -> Runs:
        """Of one copy, what the last batch left stale: merged runs, in order."""

    def returns(self) -> Returns:
        """Runs that flipped back in the last batch, and after how long: rows of RETURN.

        Also those whose old copy had been discarded. Of very many, a sample with its weight.
        """

    def oldest_ns(self, copy: Copy) -> int | None:
        """When the oldest stale copy became so; None if there is none."""

    def older_than(self, copy: Copy, time_ns: int, within: PageSet | None = None) -> PageSet:
        """Pages that have been stale since ``time_ns`` or longer, of all or of those ``within``."""

    def oldest(self, size: int) -> Mapping[Copy, PageSet]:
        """The oldest stale pages of both copies, ``size`` bytes or all."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Conversions in their order; empty when only time has passed.

    ``records`` is an array of ``qmp_upm.records.RECORD``, a row each, for work in bulk; iterating
    gives one Record after the other, for code that can afford it. ``dropped`` counts records that
    were lost before these. The ledger is right all the same.
    """

    records: Records = field(default_factory=make_records)
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return (Record._make(row) for row in self.records.tolist())


@dataclass(frozen=True)
class Pressure:
    """How short of memory the host and the VM's cgroup are. 0 or None where it is not known.

    ``…_percent``: share of the last ten seconds in which some task (``some``) or all tasks
    (``full``) waited for memory. Source: ``avg10`` of /proc/pressure/memory, and of the cgroup's
    memory.pressure. ``cgroup_memory_bytes`` of at most ``cgroup_limit_bytes``: memory.current and
    memory.max, None without a limit.
    """

    host_some_percent: float = 0.0
    host_full_percent: float = 0.0
    cgroup_some_percent: float = 0.0
    cgroup_full_percent: float = 0.0
    cgroup_memory_bytes: int | None = None
    cgroup_limit_bytes: int | None = None

    @property
    def some_percent(self) -> float:
        """The host's or the cgroup's, whichever is more."""
        return max(self.host_some_percent, self.cgroup_some_percent)


@dataclass(frozen=True)
class Measured:
    """What the VM's discards have taken on this host so far, as the plugin measures its own.

    ``calls``: hole punches, of 512 pages at most; ``pages`` in all of them; ``seconds`` in all of
    them, to a third, since the plugin counts by powers of two. QEMU's own are not among them.
    """

    calls: int
    pages: int
    seconds: float


@dataclass(frozen=True)
class Discard:
    """Stale pages of one copy to give back, and the reason in a word for the log."""

    copy: Copy
    pages: PageSet
    reason: str


@dataclass(frozen=True)
class Decision:
    """``defer``: copies to keep at conversions from now on. ``discards``: to give back now.

    ``wake_at_ns``: when to be asked again if no conversion comes before; None: only then.
    ``hold_bytes``: the most to hold from now on, if that is less than the budget; a conversion that
    would pass it is not deferred, and what is held beyond it is given back. None: the budget alone.
    """

    defer: frozenset[Copy] = frozenset()
    discards: tuple[Discard, ...] = ()
    wake_at_ns: int | None = None
    hold_bytes: int | None = None


class Policy(ABC):
    """A policy for one VM, made from its validated parameters."""

    Parameters: ClassVar[type[Parameters]] = Parameters

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters

    @abstractmethod
    def decide(self, batch: Batch, ledger: LedgerView, now_ns: int, pressure: Pressure) -> Decision:
        """What to keep and what to discard. ``now_ns`` is the clock of the records and ages."""

    def attached(self, ledger: LedgerView, now_ns: int) -> None:  # noqa: B027 - need not care
        """The ledger has just been read: the VM is there, or the daemon had lost track of it."""

    def forgotten(self, regions: frozenset[int]) -> None:  # noqa: B027
        """These regions are gone with all their pages; whatever is known of them can go, too."""

    def measured(self, discards: Measured) -> None:  # noqa: B027
        """What discards cost here: all so far, told again every few seconds as they are made."""

    def detached(self) -> None:  # noqa: B027
        """The VM is gone, or the daemon leaves it."""

    def swapped(self, previous: "Policy") -> None:  # noqa: B027
        """This policy takes over from another, in mid-course and with the same ledger."""


@dataclass(frozen=True)
class PolicyFactory:
    """A policy with validated parameters; each call makes one for another VM.

    What the parameters were read from, such as a file of prices, is not read again. Two are equal
    if they make the same.
    """

    name: str
    kind: type[Policy]
    parameters: Parameters

    def __call__(self) -> Policy:
        """A new one. It is anybody's code that runs here."""
        return self.kind(self.parameters)


def find_policy(name: str, parameters: Mapping[str, object]) -> PolicyFactory:
    """The installed policy of this name with these parameters.

    Raises ConfigError that names the known policies, or the parameter and what is wrong with it.
    """
    installed = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in installed:
        raise ConfigError(
            f"there is no policy {name!r}",
            hint=f"installed policies: {', '.join(sorted(installed))}",
        )
    entry = installed[name]
    try:
        policy = entry.load()
    except Exception as error:
        raise ConfigError(
            f"the policy {name!r} ({entry.value}) can't be loaded: {error!r}",
            hint="this is for its author to mend; choose another meanwhile",
        ) from error
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ConfigError(
            f"the policy {name!r} ({entry.value}) is not a qmp_upm.policy.Policy",
            hint="this is for its author to mend; choose another meanwhile",
        )
    return PolicyFactory(name, policy, _validate(name, policy.Parameters, parameters))


def _validate(name: str, model: type[Parameters], parameters: Mapping[str, object]) -> Parameters:
    try:
        return model.model_validate(parameters)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(model.model_fields)
        raise ConfigError(
            f"policy {name!r}: {key}: {first['msg']}"
            if key
            else f"policy {name!r}: {first['msg']}",
            hint=f"its parameters: {known or 'none'}",
        ) from error
    except Exception as error:
        raise ConfigError(
            f"policy {name!r}: its parameters can't be read: {error!r}",
            hint="this is for its author to mend; choose another meanwhile",
        ) from error


def make_policy(name: str, parameters: Mapping[str, object]) -> Policy:
    """One of these, at once. ConfigError as for `find_policy`; what it raises itself, too."""
    return find_policy(name, parameters)()


def checked(decision: object) -> Decision:
    """``decision`` if it is one, whole; otherwise PolicyError."""
    parts: list[tuple[Any, type]] = []
    if isinstance(decision, Decision):
        parts = [(copy, Copy) for copy in decision.defer]
        parts += [(discard, Discard) for discard in decision.discards]
        parts += [(getattr(d, "copy", None), Copy) for d in decision.discards]
        parts += [(getattr(d, "pages", None), PageSet) for d in decision.discards]
        parts += [(getattr(d, "reason", None), str) for d in decision.discards]
        for number in (decision.wake_at_ns, decision.hold_bytes):
            parts.append((0 if number is None else number, int))
    if (
        not isinstance(decision, Decision)
        or not all(isinstance(part, kind) for part, kind in parts)
        or (decision.hold_bytes or 0) < 0
    ):
        raise PolicyError(
            f"the policy returned {type(decision).__name__}, or parts that are no decision",
            hint="decide() returns a qmp_upm.policy.Decision",
        )
    return decision
