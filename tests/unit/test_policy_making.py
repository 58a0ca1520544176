# SPDX-License-Identifier: GPL-2.0-or-later
"""Making a policy is contained as its decisions are: what it does hurts its own VM only.

Real: the host, its sessions and the file of prices. Simulated: QEMU with the plugin, and the
entry points of third parties' policies.
"""

import asyncio
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from qmp_upm.configfile import read_config
from qmp_upm.daemon import _Signals
from qmp_upm.errors import ConfigError
from qmp_upm.host import Host
from qmp_upm.metrics import VM_FAMILIES
from qmp_upm.policy import Batch, Decision, Parameters, Policy, find_policy
from tests.unit.hosts import FAST, hosting, states, write
from tests.unit.sessions import fake_vm, until

PRICES = (
    "[prices]\nconversion = {}\ndiscard_call = 1e-6\ndiscard_page = 1e-6\nrefault_page = 1e-6\n"
)


class Moody(Policy):
    """Can't be made but for the first time; leaves the process, or raises what can't be shown."""

    made = 0

    class Parameters(Parameters):
        """``leave``: how it fails."""

        leave: bool = False

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        Moody.made += 1
        if parameters.leave:
            sys.exit(3)
        if Moody.made > 1:
            raise Unspeakable

    def decide(self, *_: object) -> Decision:
        """To keep nothing."""
        return Decision()


class Unspeakable(Exception):  # noqa: N818 - it is a person's, not ours
    """Its text raises, too."""

    def __repr__(self) -> str:
        raise ZeroDivisionError


class Careless(Policy):
    """Its parameters raise what pydantic does not wrap."""

    class Parameters(Parameters):
        """None."""

        @classmethod
        def model_validate(cls, *_: Any, **__: Any) -> Any:
            """Raises."""
            raise KeyError("careless")

    def decide(self, batch: Batch, *_: object) -> Decision:  # noqa: ARG002 - the contract's
        """To keep nothing."""
        return Decision()


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own, and a third party's."""
    monkeypatch.setitem(sys.modules, "third", sys.modules[__name__])
    monkeypatch.setattr(Moody, "made", 0)
    more = [
        EntryPoint("moody", "third:Moody", "qmp_upm.policies"),
        EntryPoint("careless", "third:Careless", "qmp_upm.policies"),
        EntryPoint("broken", "no_such_module:Policy", "qmp_upm.policies"),
    ]
    ours = list(entry_points(group="qmp_upm.policies"))
    monkeypatch.setattr("qmp_upm.policy.entry_points", lambda **_: ours + more)


def policy(text: str) -> str:
    """A configuration's default policy."""
    return f"{FAST}\n[defaults]\npolicy = {{ {text} }}\n"


async def test_a_file_of_prices_that_goes_harms_nobody(tmp_path: Path) -> None:
    """They are read with the configuration: a VM that comes later has them, the host goes on."""
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES.format(1e-6))
    file = write(tmp_path, policy(f'name = "adaptive", prices = "{prices}"'))
    async with fake_vm(name="a").listening(tmp_path / "vms" / "a.monitor"), hosting(file) as host:
        await until(lambda: states(host) == {"a": "attached"})
        prices.unlink()
        async with fake_vm(name="b").listening(tmp_path / "vms" / "b.monitor"):
            await until(lambda: states(host) == {"a": "attached", "b": "attached"})
            assert [view.fallen_back for view in host.vms()] == [None, None]
            with capture_logs(), pytest.raises(ConfigError):
                await host.reload()
            prices.write_text(PRICES.format(5e-6))
            await host.reload()
            made = [session.guest.policy._policy for session in host.sessions]
            assert [one.parameters.prices.conversion for one in made if one] == [5e-6, 5e-6]


@pytest.mark.parametrize("leave", ["false", "true"])
async def test_a_policy_that_cant_be_made_is_its_vms_state(tmp_path: Path, leave: str) -> None:
    """That VM has eager, and says why in its state and its metric; nothing else dies."""
    file = write(tmp_path, policy(f'name = "moody", leave = {leave}'))
    with capture_logs() as logged:
        async with (
            fake_vm(name="a").listening(tmp_path / "vms" / "a.monitor"),
            hosting(file) as host,
        ):
            await until(lambda: states(host) == {"a": "attached"})
            async with fake_vm(name="b").listening(tmp_path / "vms" / "b.monitor"):
                await until(lambda: states(host) == {"a": "attached", "b": "attached"})
                view = host.vm("b")
            assert not host.supervisor.deaths
    assert view.fallen_back == ("SystemExit(3)" if leave == "true" else "Unspeakable")
    [fallen] = [one for one in VM_FAMILIES if one.name == "policy_fallen_back"]
    assert fallen.read(view) == 1.0
    assert ("fallback", "b") in [(line["event"], line.get("vm")) for line in logged]


async def test_a_reload_to_a_policy_that_cant_be_made(tmp_path: Path) -> None:
    """The VM does not go on with a policy that the configuration no longer names."""
    file = write(tmp_path, policy('name = "lazy"'))
    with capture_logs():
        async with (
            fake_vm(name="a").listening(tmp_path / "vms" / "a.monitor") as peer,
            hosting(file) as host,
        ):
            await until(lambda: any(peer.plugin.ledger.deferring.values()))
            write(tmp_path, policy('name = "moody", leave = true'))
            await host.reload()
            await until(lambda: not any(peer.plugin.ledger.deferring.values()))
            view = host.vm("a")
            assert (view.policy, "SystemExit" in str(view.fallen_back)) == ("moody", True)
            write(tmp_path, policy('name = "lazy"'))
            await host.reload()
            await until(lambda: any(peer.plugin.ledger.deferring.values()))
            assert host.vm("a").fallen_back is None


@pytest.mark.parametrize(("name", "text"), [("broken", "no_such_module"), ("careless", "careless")])
def test_what_cant_be_loaded_is_an_error_of_the_configuration(
    name: str, text: str, tmp_path: Path
) -> None:
    """With its line and a hint, not a traceback."""
    with pytest.raises(ConfigError, match=text):
        find_policy(name, {})
    config, problems = read_config(write(tmp_path, policy(f'name = "{name}"')))
    assert config is None
    assert [(one.key, one.line is not None) for one in problems] == [("defaults.policy", True)]


@pytest.mark.traceback
async def test_a_hangup_ends_with_ready_whatever_happened() -> None:
    """The service manager waits for it."""
    said: list[str] = []

    class Manager:
        def reloading(self) -> None:
            said.append("reloading")

        def ready(self, _status: str) -> None:
            said.append("ready")

    class Broken(Host):
        def __init__(self) -> None:
            """Nothing of a host."""

        @property
        def sessions(self) -> tuple[()]:
            """None."""
            return ()

        async def reload(self) -> None:
            raise ZeroDivisionError

    signals: Any = _Signals.__new__(_Signals)
    signals._host, signals._manager = Broken(), Manager()
    with capture_logs() as logged:
        await asyncio.create_task(signals._reload())
    assert said == ["reloading", "ready"]
    assert [line["event"] for line in logged] == ["reload-died"]
