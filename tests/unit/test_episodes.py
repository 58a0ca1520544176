# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole episodes through the host: what goes wrong also ends, and then all is as it was.

The VMs are fakes of `qmp_upm.testing`. That the daemon's picture of each is the plugin's ledger at
the end, `tests.truth` sees; here also that the daemon comes to it by itself, in its own time.
"""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from qmp_upm.errors import UnavailableError
from qmp_upm.host import Host
from qmp_upm.picture import Held, digest_of
from qmp_upm.pressure import PressureFiles
from qmp_upm.protocol import Copy
from qmp_upm.testing import Delay, FakeVm
from qmp_upm.vm import Session
from tests.unit.hosts import FAST, KEEP, hosting, states, write
from tests.unit.sessions import MIB, PAGE, fake_vm, until

SOON = '[defaults]\nnotify = "1 ms"\nlease = "2 s"\n'


def flip(peer: FakeVm, pages: int, at: int = 0) -> None:
    """The guest makes single pages private, which leaves their shared copies."""
    for page in range(at, at + 2 * pages, 2):
        peer.plugin.convert(1, page * PAGE, PAGE, to_private=True)


def held(peer: FakeVm) -> int:
    """Bytes that the plugin keeps."""
    return sum(peer.plugin.ledger.stale(copy) for copy in Copy)


def shown(host: Host) -> int:
    """Bytes that the daemon says the one VM holds."""
    (view,) = host.vms()
    return sum(view.stale_bytes.values())


async def test_budget_down_and_eager_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the plugin gives back by itself is no longer shown, with nobody asking for a look."""
    monkeypatch.setattr("qmp_upm.refresh.REFRESH_SECONDS", 0.1)
    file = write(tmp_path, FAST + SOON + KEEP)
    async with (
        fake_vm(name="db").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"db": "attached"})
        flip(peer, 64)
        await until(lambda: shown(host) == 64 * PAGE)
        await host.set_budget("db", 8 * PAGE)
        await until(lambda: shown(host) == held(peer) == 8 * PAGE)
        await host.set_policy("db", "eager", {})
        await until(lambda: shown(host) == held(peer) == 0)


async def test_a_guest_that_resets_leaves_no_ghosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU closes its backings and makes new ones: what is shown does not add up over boots."""
    monkeypatch.setattr("qmp_upm.refresh.REFRESH_SECONDS", 0.05)
    monkeypatch.setattr("qmp_upm.refresh.HOLDING_SECONDS", 0.1)
    file = write(tmp_path, FAST + SOON + KEEP)
    async with (
        fake_vm(name="db").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"db": "attached"})
        ledger, region = peer.plugin.ledger, 1
        for _ in range(4):
            peer.plugin.convert(region, 0, 16 * PAGE, to_private=True)
            await until(lambda: shown(host) == held(peer) == 16 * PAGE)
            ledger.close_region(region)
            region = ledger.open_region("ram", 64 * MIB)
            await until(lambda: shown(host) == 0)  # the guest is quiet: nothing tells of it
        assert peer.connections == 1


async def test_a_region_that_goes_while_the_ledger_is_read(tmp_path: Path) -> None:
    """Between the list of regions and the reading of one, which is then read again."""
    peer = fake_vm(name="db")
    peer.plugin.ledger.open_region("more", MIB)
    ask = peer.plugin.__call__

    def handle(command: str, arguments: dict[str, object]) -> object:
        if command == "x-upm-stale" and 2 in peer.plugin.ledger.regions:
            peer.plugin.ledger.close_region(2)
        return ask(command, arguments) if command.startswith("x-") else known(command, arguments)

    known, peer.handler = peer.handler, handle
    file = write(tmp_path, FAST + SOON + KEEP)
    async with peer.listening(tmp_path / "vms" / "a.monitor"), hosting(file) as host:
        await until(lambda: states(host) == {"db": "attached"})
        assert peer.connections == 1


async def test_discards_that_fail_are_made_when_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be given back is shown, and is given back by age once the disk is well."""
    monkeypatch.setattr("qmp_upm.refresh.REFRESH_SECONDS", 0.1)
    file = write(tmp_path, FAST + SOON + 'policy = { name = "lazy", max_age = "0.1 s" }\n')
    async with (
        fake_vm(name="db").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"db": "attached"})
        peer.plugin.ledger.failing = "Input/output error"
        flip(peer, 64)
        await until(lambda: host.vm("db").stats.failed_discards > 2)
        await until(lambda: shown(host) == held(peer) == 64 * PAGE)
        peer.plugin.ledger.failing = None
        await until(lambda: shown(host) == held(peer) == 0)
        assert host.vm("db").stats.failed_discards < 20


@pytest.mark.parametrize("policy", ['"lazy", max_age = "0.2 s"', '"batched", max_delay = "0.2 s"'])
async def test_a_flush_of_one_copy_leaves_a_plan_for_the_other(tmp_path: Path, policy: str) -> None:
    """Its flush reads the conversion before the doorbell rings; the guest is quiet from then on."""
    file = write(tmp_path, FAST + SOON + f"policy = {{ name = {policy} }}\n")
    async with (
        fake_vm(name="db").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"db": "attached"})
        for page in range(8):
            peer.plugin.convert(1, page * PAGE, PAGE, to_private=True)
            await host.flush("db", Copy.PRIVATE)
            await until(lambda: held(peer) == 0)


@pytest.fixture
def files(tmp_path: Path) -> PressureFiles:
    """A host without pressure."""
    (tmp_path / "proc" / "pressure").mkdir(parents=True)
    return PressureFiles(tmp_path / "proc", tmp_path / "cgroup")


@pytest.mark.parametrize("policy", ['"lazy"', '"adaptive"'])
async def test_pressure_ends(tmp_path: Path, files: PressureFiles, policy: str) -> None:
    """Up: all is given back and nothing kept. Down: copies are kept as before."""
    some = files.proc / "pressure" / "memory"

    async def guest_works(until_it_is: bool) -> None:
        async with asyncio.timeout(20):
            at = 0
            while any(peer.plugin.ledger.deferring.values()) is not until_it_is:
                at = (at + 1) % 1000
                flip(peer, 1, 2 * at)
                await asyncio.sleep(0.002)

    file = write(tmp_path, FAST + SOON + f"policy = {{ name = {policy} }}\n")
    async with (
        fake_vm(name="db").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file, files) as host,
    ):
        await until(lambda: states(host) == {"db": "attached"})
        for _ in range(2):
            some.write_text("some avg10=0.00 avg60=0.00 total=1\n")
            await guest_works(until_it_is=True)
            some.write_text("some avg10=50.00 avg60=0.00 total=1\n")
            await guest_works(until_it_is=False)
            await until(lambda: held(peer) == 0)
        some.write_text("some avg10=0.00 avg60=0.00 total=1\n")
        await guest_works(until_it_is=True)


async def test_a_vm_that_is_gone_holds_nothing_after_its_lease(tmp_path: Path) -> None:
    """It is shown with what it held while the plugin may keep that, and with nothing then."""
    text = f'{FAST}[vms.db]\nsocket = "{tmp_path}/db"\nnotify = "1 ms"\nlease = "0.5 s"\n{KEEP}'
    async with hosting(write(tmp_path, text)) as host:
        async with fake_vm(name="db").listening(tmp_path / "db") as peer:
            await until(lambda: states(host) == {"db": "attached"})
            flip(peer, 8)
            await until(lambda: shown(host) == 8 * PAGE)
        await until(lambda: states(host) == {"db": "backoff"})
        assert shown(host) == 8 * PAGE
        await until(lambda: shown(host) == 0)


async def test_a_slow_vm_gives_up_its_part_when_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer for each answer than others wait for it, and yet a new VM gets a part."""
    monkeypatch.setattr("qmp_upm.budget.ASK_SECONDS", 0.1)
    file = write(tmp_path, f'{FAST}budget = "8 MiB"\n{SOON}{KEEP}')
    slow = fake_vm(lambda what: Delay(0.4) if what == "x-upm-configure" else None, name="slow")
    new = fake_vm(name="new")

    def parts() -> tuple[int, int]:
        found = slow.plugin.ledger.budget, new.plugin.ledger.budget
        assert sum(found) <= 8 * MIB
        return found

    async with slow.listening(tmp_path / "vms" / "slow.monitor"), hosting(file) as host:
        await until(lambda: parts() == (8 * MIB, 0))
        async with new.listening(tmp_path / "vms" / "new.monitor"):
            await until(lambda: parts() == (4 * MIB, 4 * MIB))
            await until(lambda: {v.budget_bytes for v in host.vms()} == {4 * MIB})


async def test_who_asks_a_vm_that_is_left_is_answered(tmp_path: Path) -> None:
    """A command that waits while its VM is taken out of the configuration gets an error, no end."""
    file = write(tmp_path, f'{FAST}[vms.db]\nsocket = "{tmp_path}/db"\n')
    held_up = asyncio.Event()

    async def slow(_session: Session) -> None:
        held_up.set()
        await asyncio.sleep(3600)

    async with hosting(file) as host:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "_attempt", slow)
            write(tmp_path, f'{FAST}[vms.db]\nsocket = "{tmp_path}/other"\n')
            await host.reload()
            await held_up.wait()
            asked = asyncio.create_task(host.set_budget("db", MIB))
            await asyncio.sleep(0)
            write(tmp_path, FAST)
            await host.reload()
            with pytest.raises(UnavailableError, match="db is left"):
                await asked
        assert states(host) == {}


async def test_a_table_comes_and_goes_over_a_vm_that_a_glob_finds(tmp_path: Path) -> None:
    """The VM is served all the while: by the table's name with its settings, and by its own."""
    socket = tmp_path / "vms" / "a.monitor"
    table = f'[vms.db]\nsocket = "{socket}"\nbudget = "7 MiB"\n'
    file = write(tmp_path, FAST)
    async with fake_vm(name="web").listening(socket) as peer, hosting(file) as host:
        for _ in range(2):
            await until(lambda: states(host) == {"web": "attached"})
            assert peer.plugin.ledger.budget == 256 * MIB
            write(tmp_path, FAST + table)
            await host.reload()
            await until(lambda: states(host) == {"db": "attached"})
            assert peer.plugin.ledger.budget == 7 * MIB
            await peer.hang_up()
            await until(lambda: peer.connections % 3 == 0)
            await until(lambda: states(host) == {"db": "attached"})
            assert peer.plugin.ledger.budget == 7 * MIB
            write(tmp_path, FAST)
            await host.reload()


async def test_a_table_takes_its_name_from_a_vm_that_was_found(tmp_path: Path) -> None:
    """The other gets another name at once, keeps it when it is back, and nobody is lost."""
    found = tmp_path / "vms" / "x.monitor"
    table = f'[vms.db]\nsocket = "{tmp_path}/db"\n'
    file = write(tmp_path, FAST)
    async with (
        fake_vm(name="db").listening(found) as peer,
        fake_vm(name="anything").listening(tmp_path / "db"),
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"db": "attached"})
        write(tmp_path, FAST + table)
        await host.reload()
        both = {"db": "attached", "db-x": "attached"}
        await until(lambda: states(host) == both)
        assert host.vm("db").socket == f"{tmp_path}/db"
        await peer.hang_up()
        await until(lambda: peer.connections > 2)
        await until(lambda: states(host) == both)
        write(tmp_path, FAST + '[defaults]\nbudget = "1 MiB"\n')
        await host.reload()
        assert host.reload_state.successful
        await until(lambda: list(states(host).values()) == ["attached"])
        await until(lambda: peer.plugin.ledger.budget == MIB)


async def test_a_vm_that_a_table_named_as_it_is_called_is_not_left(tmp_path: Path) -> None:
    """Table or glob, the name and the socket are the same: it stays attached through reloads."""
    socket = tmp_path / "vms" / "a.monitor"
    file = write(tmp_path, FAST)
    async with fake_vm(name="db").listening(socket) as peer, hosting(file) as host:
        await until(lambda: states(host) == {"db": "attached"})
        for text in (f'{FAST}[vms.db]\nsocket = "{socket}"\nbudget = "7 MiB"\n', FAST):
            write(tmp_path, text)
            await host.reload()
            assert states(host) == {"db": "attached"}
            assert host.vm("db").budget_bytes == (7 if "7" in text else 256) * MIB
        await asyncio.sleep(0.05)
        assert (states(host), peer.connections) == ({"db": "attached"}, 1)


async def test_what_a_reload_can_not_change_is_not_shown(tmp_path: Path) -> None:
    """The daemon has no other socket or directory than before, whatever the file says now."""
    async with hosting(write(tmp_path, FAST)) as host:
        write(tmp_path, FAST + '[metrics]\nlisten = "127.0.0.1:1"\n')
        before = host.config.metrics
        for _ in range(2):
            with capture_logs() as logs:
                await host.reload()
            assert [log["table"] for log in logs if log["event"] == "not-reloaded"] == ["metrics"]
            assert host.config.metrics == before


async def test_a_recording_ends_with_its_vm(tmp_path: Path) -> None:
    """Gone for good, or another one on the same socket: what was recorded is whole, and no more."""
    file = write(tmp_path, f'{FAST}{SOON}{KEEP}[vms.on]\nsocket = "{tmp_path}/on"\n')
    names = {"a": "vms/a.monitor", "on": "on"}
    async with hosting(file) as host:
        for boot, (name, path) in enumerate(names.items()):
            async with fake_vm(name="a").listening(tmp_path / path) as peer:
                await until(lambda name=name: states(host).get(name) == "attached")
                recorded = host.record(name)
                flip(peer, 3)
                await until(lambda name=name: host.vm(name).stats.followed_conversions == 3)
            if boot:
                uuid = "00000001-0000-4000-8000-000000000000"
                async with fake_vm(uuid=uuid).listening(tmp_path / path):
                    await until(lambda wanted=uuid: host.vm("on").uuid == wanted)
            async with asyncio.timeout(20):
                blocks = [block async for block in recorded]
            assert sum(len(block.records) for block in blocks) == 3


async def test_the_picture_can_be_compared(tmp_path: Path) -> None:
    """By copy and region, bytes and runs, with a digest that the plugin's own ranges give, too."""
    file = write(tmp_path, FAST + SOON + KEEP)
    async with (
        fake_vm(name="db").listening(tmp_path / "vms" / "a.monitor") as peer,
        hosting(file) as host,
    ):
        await until(lambda: states(host) == {"db": "attached"})
        assert host.held_by("db") == []
        flip(peer, 5)
        await until(lambda: shown(host) == 5 * PAGE)
        asked = {"copy": "shared", "region": 1, "cursor": 0, "max": 100}
        ranges = np.array(peer.plugin("x-upm-stale", asked)["ranges"])
        digest = digest_of(ranges[:, 0], ranges[:, 1])
        assert host.held_by("db") == [Held(Copy.SHARED, 1, 5 * PAGE, 5, digest)]
        flip(peer, 1, 100)
        await until(lambda: shown(host) == 6 * PAGE)
        assert host.held_by("db")[0].digest != digest
