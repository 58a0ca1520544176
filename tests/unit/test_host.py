# SPDX-License-Identifier: GPL-2.0-or-later
"""A host with several VMs: found, named, reloaded, given their parts of the budget, and left."""

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from qmp_upm.errors import ConfigError, UnavailableError, UnknownVmError
from qmp_upm.events import HostEvent, HostEventName
from qmp_upm.pressure import PressureFiles
from qmp_upm.protocol import Copy
from qmp_upm.stats import State
from qmp_upm.vm import Session
from tests.unit.hosts import FAST, KEEP, hosting, states, write
from tests.unit.sessions import MIB, PAGE, fake_vm, until


async def test_vms_come_restart_and_go(tmp_path: Path) -> None:
    """Before the daemon, after it, again under the same socket, and for good."""
    file = write(tmp_path, FAST)
    early, late = tmp_path / "vms" / "early.monitor", tmp_path / "vms" / "late.monitor"
    async with fake_vm(name="one").listening(early), hosting(file) as host:
        events = host.subscribe()
        await until(lambda: states(host) == {"one": "attached"})
        (tmp_path / "vms" / "no-socket.monitor").write_text("")
        async with fake_vm(name="two").listening(late):
            await until(lambda: states(host) == {"one": "attached", "two": "attached"})
        await until(lambda: states(host) == {"one": "attached"})
        async with fake_vm(name="two").listening(late):
            await until(lambda: states(host) == {"one": "attached", "two": "attached"})
        await until(lambda: list(states(host)) == ["one"])
        with pytest.raises(UnknownVmError) as caught:
            host.vm("two")
        assert "one" in caught.value.hint
        left = {HostEventName.VM_ADDED: 2, HostEventName.VM_REMOVED: 2}
        async with asyncio.timeout(20):  # a VM is out of the list before it has been left
            async for event in events:
                if event.vm == "two" and event.name in left:
                    left[event.name] -= 1
                if not any(left.values()):
                    break
        events.close()


async def test_names_are_not_trusted(tmp_path: Path) -> None:
    """By name, else UUID, else socket; made usable, and never the name of another VM."""
    file = write(tmp_path, f'{FAST}\n[vms.boss]\nsocket = "{tmp_path}/boss"\n')
    uuid = "11111111-2222-3333-4444-555555555555"
    made = {
        "a": fake_vm(name="../../etc/pass wd"),
        "b": fake_vm(name="", uuid=uuid),
        "c": fake_vm(name="\u0001"),
        "d": fake_vm(name="boss"),
        "e": fake_vm(name="web"),
        "f": fake_vm(name="web"),
        "g": fake_vm(name="n" * 4000),
    }
    async with contextlib.AsyncExitStack() as stack:
        for stem, peer in made.items():
            await stack.enter_async_context(peer.listening(tmp_path / "vms" / f"{stem}.monitor"))
        await stack.enter_async_context(fake_vm(name="x").listening(tmp_path / "boss"))
        host = await stack.enter_async_context(hosting(file))
        await until(lambda: list(states(host).values()).count("attached") == 8)
        names = {Path(view.socket).stem: view.name for view in host.vms()}
        assert names.pop("e") != names.pop("f")
        assert names == {
            "a": "../../etc/pass wd",
            "b": uuid,
            "c": "c",
            "d": "boss-d",
            "g": "n" * 128,
            "boss": "boss",
        }
        assert host.vm(uuid).uuid == uuid


async def test_tables_apply_by_the_name_that_qemu_says(tmp_path: Path) -> None:
    """Groups and single VMs, also when they are discovered."""
    text = FAST + '[vms.g]\nmatch = ["w*"]\nbudget = "1 MiB"\n[vms.web]\nlease = "9 s"\n'
    file = write(tmp_path, text)
    async with (
        fake_vm(name="web").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"web": "attached"})
        assert (peer.plugin.ledger.budget, peer.plugin.worker.lease_ms) == (MIB, 9000)
        sources = {setting.key: setting.source for setting in host.config_of("web")}
        assert "[vms.g]" in sources["budget"]
        assert "[vms.web]" in sources["lease"]


async def test_reload_swaps_live(tmp_path: Path) -> None:
    """Policies change and ledgers stay; VMs that are no longer named are left, new ones served."""
    one, two, three = (f'[vms.{n}]\nsocket = "{tmp_path}/{n}"\n' for n in ("one", "two", "three"))
    async with contextlib.AsyncExitStack() as stack:
        peers = {
            name: await stack.enter_async_context(fake_vm(name="x").listening(tmp_path / name))
            for name in ("one", "two", "three")
        }
        host = await stack.enter_async_context(
            hosting(write(tmp_path, FAST + one + KEEP + two + KEEP))
        )
        await until(lambda: states(host) == {"one": "attached", "two": "attached"})
        for name in ("one", "two"):
            peers[name].plugin.convert(1, 0, PAGE, to_private=True)
        await until(lambda: all(view.stale_bytes[Copy.SHARED] for view in host.vms()))
        write(tmp_path, FAST + one + 'policy = { name = "lazy", max_age = "1 h" }\n' + three)
        await host.reload()
        await until(lambda: states(host) == {"one": "attached", "three": "attached"})
        assert host.vm("one").policy == "lazy"
        assert peers["one"].plugin.ledger.stale(Copy.SHARED) == PAGE
        assert peers["one"].connections == 1
        await until(lambda: peers["two"].plugin.ledger.stale(Copy.SHARED) == 0)
        assert host.reload_state.successful


async def test_bad_file_changes_nothing(tmp_path: Path) -> None:
    """And is seen: by whoever reloads, by the metrics, and by whoever follows events."""
    file = write(tmp_path, FAST)
    async with hosting(file) as host:
        events = host.subscribe()
        config = host.config
        write(tmp_path, "[host]\nbugdet = 1\n")
        with pytest.raises(ConfigError, match=r"config\.toml:6: host\.bugdet"):
            await host.reload()
        assert host.config is config
        assert not host.reload_state.successful
        assert "bugdet" in str(host.reload_state.error)
        write(tmp_path, FAST)
        await host.reload()
        assert host.reload_state.error is None
        events.close()
        assert [event.name async for event in events] == [
            HostEventName.CONFIG_REJECTED,
            HostEventName.CONFIG_RELOADED,
        ]


async def test_command_holds_until_the_configuration_changes(tmp_path: Path) -> None:
    """set-policy and set-budget show as the source of what applies."""
    file = write(tmp_path, FAST)
    async with (
        fake_vm(name="web").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"web": "attached"})
        await host.set_policy("web", "lazy", {"max_age": "1 h"})
        await host.set_budget("web", MIB)
        assert (host.vm("web").parameters, peer.plugin.ledger.budget) == ({"max_age": "1 h"}, MIB)
        with pytest.raises(ConfigError, match="max_aeg"):
            await host.set_policy("web", "lazy", {"max_aeg": 1})
        with pytest.raises(ConfigError):
            await host.set_budget("web", -1)
        await host.reload()
        sources = {setting.key: setting.source for setting in host.config_of("web")}
        assert sources["policy"] == "command set-policy"
        assert sources["budget"] == "command set-budget"
        write(tmp_path, FAST + "[defaults]\n" + KEEP)
        await host.reload()
        assert host.vm("web").policy == "eager"
        assert peer.plugin.ledger.budget == MIB
        await host.set_budget("web", None)
        assert peer.plugin.ledger.budget == 256 * MIB


async def test_flush_by_name(tmp_path: Path) -> None:
    """What the plugin gave back; a VM that is not there says why."""
    file = write(tmp_path, FAST + "[defaults]\n" + KEEP + f'[vms.off]\nsocket = "{tmp_path}/off"\n')
    async with (
        fake_vm(name="web").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file) as host,
    ):
        await until(lambda: states(host).get("web") == "attached")
        peer.plugin.convert(1, 0, 4 * PAGE, to_private=True)
        assert await host.flush("web") == 4 * PAGE
        await until(lambda: states(host)["off"] == "backoff")
        with pytest.raises(UnavailableError):
            await host.flush("off")


async def test_host_budget_is_divided_and_never_exceeded(tmp_path: Path) -> None:
    """By weight, as VMs come and go; what all plugins may hold together is watched throughout."""
    total = 8 * MIB
    file = write(
        tmp_path,
        f'{FAST}\nbudget = "8 MiB"\n[defaults]\nlease = "0.5 s"\n{KEEP}'
        '[vms.big]\nweight = 200\n[vms.small]\nbudget = "1 MiB"\n',
    )
    peers = {}

    def divided(**wanted_mib: float) -> bool:
        found = {name: peer.plugin.ledger.budget for name, peer in peers.items()}
        assert sum(found.values()) <= total
        assert sum(p.plugin.ledger.stale(c) for p in peers.values() for c in Copy) <= total
        return all(abs(found[n] - mib * MIB) <= 2 * PAGE for n, mib in wanted_mib.items())

    async with hosting(file) as host, contextlib.AsyncExitStack() as stack:
        for name, parts in (
            ("big", {"big": 8}),
            ("other", {"big": 16 / 3, "other": 8 / 3}),
            ("small", {"big": 14 / 3, "other": 7 / 3, "small": 1}),
        ):
            peers[name] = fake_vm(name=name)
            socket = tmp_path / "vms" / f"{name}.monitor"
            await stack.enter_async_context(peers[name].listening(socket))
            await until(lambda parts=parts: divided(**parts))
            peers[name].plugin.convert(1, 0, 32 * MIB, to_private=True)
        await peers.pop("big").hang_up()
        (tmp_path / "vms" / "big.monitor").unlink()
        await until(lambda: divided(other=7, small=1))
        assert {v.name: v.budget_bytes for v in host.vms()} == {"other": 7 * MIB, "small": MIB}
        write(tmp_path, FAST + '[vms.small]\nbudget = "1 MiB"\n')
        await host.reload()
        await until(lambda: peers["other"].plugin.ledger.budget == 256 * MIB)


@pytest.mark.traceback
async def test_session_that_dies_is_seen_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of ours in one session costs that VM a moment, and nobody else anything."""
    monkeypatch.setattr("qmp_upm.supervision.RESTART_SECONDS", 0.01)
    deaths = iter([True, True])
    run = Session.run

    async def dies(session: Session) -> None:
        if session.socket.endswith("a.monitor") and next(deaths, False):
            raise ZeroDivisionError
        await run(session)

    monkeypatch.setattr(Session, "run", dies)
    file = write(tmp_path, FAST)
    async with (
        fake_vm(name="a").listening(tmp_path / "vms" / "a.monitor"),
        fake_vm(name="b").listening(tmp_path / "vms" / "b.monitor"),
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"a": "attached", "b": "attached"})
        assert host.supervisor.deaths == {"session": 2}
        assert host.ready


async def test_counters_go_on_when_a_vm_is_back(tmp_path: Path) -> None:
    """Even if it had been gone for long enough to be removed."""
    file = write(tmp_path, FAST + "[defaults]\n" + KEEP)
    async with hosting(file) as host:
        for boot in (1, 2):
            async with fake_vm(name="web").listening(tmp_path / "vms" / "a.monitor") as peer:
                await until(lambda: states(host) == {"web": "attached"})
                peer.plugin.convert(1, 0, PAGE, to_private=True)
                await host.flush("web")
                flushed = host.vm("web").stats.discarded_bytes[Copy.SHARED]
                assert flushed == {"flush": boot * PAGE}
            await until(lambda: not states(host))


async def test_pressure_reaches_the_policy(tmp_path: Path) -> None:
    """The host's and the cgroup's, of VMs that hold something; and the policy is asked again."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "pressure").mkdir(parents=True)
    (proc / "pressure" / "memory").write_text("some avg10=12.50 avg60=0.00 total=1\n")
    files = PressureFiles(proc, cgroup)
    file = write(tmp_path, FAST + "[defaults]\n" + KEEP)
    async with (
        fake_vm(name="web").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file, files) as host,
    ):
        await until(lambda: states(host) == {"web": "attached"})
        (session,) = host.sessions
        own = proc / str(session.peer.process)
        own.mkdir()
        (own / "cgroup").write_text("1:name=systemd:/old\n0::/machine.slice/web/libvirt/emulator\n")
        group = cgroup / "machine.slice" / "web"
        (group / "libvirt" / "emulator").mkdir(parents=True)
        (group / "memory.max").write_text("max\n")
        (group / "memory.current").write_text("4096\n")
        assert session.guest.pressure.host_some_percent == 0
        decisions = session.guest.stats.decisions
        peer.plugin.convert(1, 0, PAGE, to_private=True)
        await until(lambda: session.guest.pressure.cgroup_memory_bytes == 4096)
        assert session.guest.pressure.host_some_percent == 12.5
        await until(lambda: session.guest.stats.decisions > decisions + 1)


async def test_hundreds_are_left_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All VMs are found, served, and left fail-safe together, the silent ones by their lease."""
    monkeypatch.setattr("qmp_upm.serving.LEAVE_SECONDS", 20)
    monkeypatch.setattr("qmp_upm.roster.LEAVE_SECONDS", 20)
    file = write(tmp_path, FAST + "[defaults]\n" + KEEP)
    peers = [fake_vm(name=f"vm-{number}") for number in range(200)]
    async with contextlib.AsyncExitStack() as stack:
        for peer in peers:
            socket = tmp_path / "vms" / f"{peer.name}.monitor"
            await stack.enter_async_context(peer.listening(socket))
        async with hosting(file) as host:
            await until(lambda: list(states(host).values()).count("attached") == 200)
            for peer in peers:
                peer.plugin.convert(1, 0, PAGE, to_private=True)
            await until(lambda: sum(v.stale_bytes[Copy.SHARED] for v in host.vms()) == 200 * PAGE)
        assert not any(any(peer.plugin.ledger.deferring.values()) for peer in peers)
        await until(lambda: not any(peer.plugin.ledger.stale(Copy.SHARED) for peer in peers))


async def test_events_are_bounded_for_who_does_not_read(tmp_path: Path) -> None:
    """A subscriber that sleeps loses events, and is told how many."""
    async with hosting(write(tmp_path, FAST)) as host:
        events = host.subscribe()
        for _ in range(2000):
            host.events.put(HostEvent(HostEventName.VM_STATE, "x"))
        events.close()
        assert len([event async for event in events]) + events.dropped == 2000
        assert events.dropped == 976


async def test_states_are_told(tmp_path: Path) -> None:
    """In the order in which they were."""
    async with fake_vm(name="a").listening(tmp_path / "vms.sock"):
        file = write(tmp_path, f'{FAST}[vms.a]\nsocket = "{tmp_path}/vms.sock"\n')
        async with hosting(file) as host:
            events = host.subscribe()
            await until(lambda: states(host) == {"a": State.ATTACHED})
            events.close()
            told = [e.data["state"] async for e in events if e.name is HostEventName.VM_STATE]
    assert told == ["attached"]


async def test_a_killed_qemus_socket_is_a_vm_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is left, and nobody listens; one that starts there again is served again."""
    monkeypatch.setattr("qmp_upm.host.DESERTED_SECONDS", 0.3)
    file, path = write(tmp_path, FAST), tmp_path / "vms" / "a.monitor"
    async with hosting(file) as host:
        async with fake_vm(name="a").listening(path):
            await until(lambda: states(host) == {"a": "attached"})
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        await until(lambda: list(states(host).values()) == ["backoff"])
        await until(lambda: not states(host))
        await asyncio.sleep(0.1)
        assert not states(host)
        async with fake_vm(name="a").listening(path):
            await until(lambda: states(host) == {"a": "attached"})


async def test_what_a_killed_qemu_converted_is_counted(tmp_path: Path) -> None:
    """All that was read, though its plugin was never asked again; and the next boot flips nothing.

    Metrics, followed conversions and telemetry agree to the unit.
    """
    file = write(tmp_path, FAST + "[defaults]\n" + KEEP)
    async with hosting(file) as host:
        for boot in range(3):
            async with fake_vm(name="web").listening(tmp_path / "vms" / "a.monitor") as peer:
                await until(lambda: states(host) == {"web": "attached"})
                for page in range(5):
                    peer.plugin.convert(1, 2 * page * PAGE, PAGE, to_private=True)
                read = 5 * (boot + 1)
                await until(lambda wanted=read: host.vm("web").stats.followed_conversions == wanted)
                assert sum(host.vm("web").stats.conversions.values()) == read
                asked = peer.counts["x-upm-query"]
            await until(lambda: states(host) != {"web": "attached"})
            assert peer.counts["x-upm-query"] == asked
        await until(lambda: not states(host))
        async with fake_vm(name="web").listening(tmp_path / "vms" / "a.monitor"):
            await until(lambda: states(host) == {"web": "attached"})
            stats = host.vm("web").stats
            assert stats.conversions == {Copy.PRIVATE: 15, Copy.SHARED: 0}
            assert stats.converted_bytes == {Copy.PRIVATE: 15 * PAGE, Copy.SHARED: 0}
            assert stats.flips == 0


async def test_set_budget_says_what_applies(tmp_path: Path) -> None:
    """Above its part of the host's budget a VM gets its part, and the answer says so."""
    file = write(tmp_path, FAST + 'budget = "8 MiB"\n[defaults]\n' + KEEP)
    async with (
        fake_vm(name="a").listening(tmp_path / "vms" / "a.monitor"),
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"a": "attached"})
        answer = await host.set_budget("a", 1 << 41)
        assert answer == {"budget": 8 * MIB, "own": 1 << 41}
        answer = await host.set_budget("a", 2 * MIB)
        assert answer == {"budget": 2 * MIB, "own": 2 * MIB}
        assert host.vm("a").budget_bytes == 2 * MIB
