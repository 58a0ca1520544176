# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own launch code under the plugin: `python -m tests.lab launch --kind sev-snp|tdx`.

Real: a stock QEMU with its launch, its resets, its memory backends and its conversions; the
guest_memfds; the plugin; the daemon of one of the runs. What a real launch has and this has not:

- a processor or firmware that encrypts, validates or refuses a page: launch.c takes all, and the
  measurement is its own hash, not SNP's digest nor TDX's MRTD;
- memory attributes, but in the lab (see launch_real.py): the ioctl that sets them succeeds and
  changes nothing, so that no page is ever unmapped from the guest;
- a guest: virtual processors never run, firmware is a pattern, and those who convert are threads
  that call QEMU's kvm_convert_memory();
- the time that it takes: so much for each 32 pages, longer than an answer needs, so that whatever
  discards in between is seen.

A TDX guest is first launched while QEMU starts, before a monitor answers: its disturbed launches
are those of the resets. QEMU resets confidential guests from version 11 on.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.lab import image, newest
from tests.lab.build import LabError, say
from tests.lab.disturber import DISTURBANCES, MODES, Disturber, await_discards, configure
from tests.lab.inside import wait_until
from tests.lab.launched import (
    DAEMON,
    MIB,
    HangError,
    Launched,
    Pages,
    Setup,
    page_numbers,
)
from tests.lab.machine import plugin_file

RESETS, RESETTING_QEMU = 10, 11
LAUNCHED = (min(at for at, _, _ in image.SNP_PAGES), 0x20000)
"""Where SNP's metadata pages are, and TDX's sections but for the firmware: address and bytes."""
REWRITTEN = page_numbers([(image.CPUID_PAGE, image.PAGE), (image.HASHES_PAGE, image.PAGE)])
"""QEMU writes them itself at each launch, whether the plugin has them in its ledger or not."""
ELSEWHERE, ELSEWHERE_BYTES = 16 * MIB, 64 * image.PAGE
KEPT_SHARED = 64 * MIB
AROUND = (
    (0x800000, 2 * MIB),
    (image.HASHES_PAGE - image.PAGE, 0x12000),
    (image.CPUID_PAGE, 3 * image.PAGE),
    (image.FIRMWARE, image.FIRMWARE_BYTES),
)
"""Ranges that begin before pages of the launch and cover them, or lie within them."""
ROUNDS, SLOT_UPDATES = 200, 40
PAM_SHARED = ("o /4 0xcf8 0x80000090", "o /1 0xcfd 0x33")
PAM_PRIVATE = ("o /4 0xcf8 0x80000090", "o /1 0xcfd 0x00")


@dataclass
class Outcome:
    """One QEMU from its first launch to the last; pages allocated after each reset."""

    name: str
    launches: list[dict[str, Any]] = field(default_factory=list)
    allocated: list[Pages] = field(default_factory=list)
    stale: list[Pages] = field(default_factory=list)
    stale_before_reset: list[dict[str, int]] = field(default_factory=list)
    asked: int = 0
    stuck: int = 0

    def asked_for(self, disturbance: str) -> int:
        """How often during a launch, if the run was disturbed in this way."""
        return self.asked if self.name.endswith(disturbance) else 0


def make_stale(guest: Launched, number: int) -> None:
    """Shares and takes back what the launch uses, and RAM elsewhere; leaves some RAM shared.

    Under ``defer`` the shared copies of the former and the private ones of the latter are stale.
    """
    guest.flip(image.FIRMWARE, image.FIRMWARE_BYTES, "sp")
    for gpa, size in (LAUNCHED, (ELSEWHERE + number * MIB, ELSEWHERE_BYTES)):
        guest.use(gpa, size)
        guest.flip(gpa, size, "p")
    guest.use(KEPT_SHARED + number * MIB, ELSEWHERE_BYTES)


def crowd(guest: Launched) -> int:
    """Threads convert around the launch's pages while memory slots are updated: how many hang.

    The main thread counts, too: it waits for all that are inside an ioctl before it updates a slot.
    """
    for gpa, size in AROUND:
        guest.start_flipping(gpa, size, "sp", ROUNDS)
    hung = 0
    try:
        for number in range(SLOT_UPDATES):
            for line in PAM_PRIVATE if number % 2 else PAM_SHARED:
                guest.main.cmd("human-monitor-command", **{"command-line": line})
    except TimeoutError:
        hung = 1
    state: dict[str, int] = {}

    def over() -> bool:
        state.update(guest.side.cmd("x-test-flipping"))
        return not state["running"]

    wait_until(over, 1 if hung else guest.setup.patience_seconds)
    if state["failed"]:
        raise LabError(f"{state['failed']} conversions failed")
    return state["running"] + hung


def picture(guest: Launched) -> tuple[Pages, Pages]:
    """The shared file's allocated pages and the ledger's, of one moment: no discard in between."""
    while True:
        before = guest.stale()
        allocated = guest.allocated()
        if guest.stale() == before:
            return allocated, before


@contextlib.contextmanager
def noting_hangs(outcome: Outcome) -> Iterator[None]:
    """A run in which somebody waits for ever ends there; what it has shown until then counts."""
    try:
        yield
    except HangError as error:
        say(str(error))
        outcome.stuck = error.threads


def run_stock(guest: Launched, resets: int) -> Outcome:
    """Without the plugin: what the others are compared with."""
    outcome = Outcome("stock", [guest.launch("cont", 0)])
    for number in range(1, resets + 1):
        make_stale(guest, number)
        outcome.launches.append(guest.launch("system_reset", number))
        outcome.allocated.append(guest.allocated())
    outcome.stuck = crowd(guest)
    return outcome


def run_disturbed(
    mode: str, disturbance: str, guest: Launched, resets: int, outcome: Outcome
) -> Outcome:
    """Under the plugin in one mode, with somebody who disturbs each launch."""
    with noting_hangs(outcome):
        for number in range(resets + 1):
            configure(guest, mode)
            prepare(guest, number, outcome)
            with Disturber(guest, disturbance) as disturber:
                outcome.launches.append(guest.launch(command(number), number))
            outcome.asked += disturber.asked
            look(guest, number, outcome)
            if disturbance == "flush":
                await_discards(guest)
        configure(guest, mode)
        outcome.stuck = crowd(guest)
    return outcome


def command(number: int) -> str:
    """What makes QEMU launch; the first launch of TDX is over by then."""
    return "system_reset" if number else "cont"


def prepare(guest: Launched, number: int, outcome: Outcome) -> None:
    """Before a reset."""
    if number:
        make_stale(guest, number)
        outcome.stale_before_reset.append(guest.main.cmd("x-upm-query")["stale"])


def look(guest: Launched, number: int, outcome: Outcome) -> None:
    """After a reset."""
    if number:
        allocated, stale = picture(guest)
        outcome.allocated.append(allocated)
        outcome.stale.append(stale)


@contextlib.contextmanager
def daemon(guest: Launched) -> Iterator[Path]:
    """A daemon that gives back what is older than a moment; its telemetry."""
    config = guest.folder / "config.toml"
    config.write_text(
        f'[telemetry]\ndirectory = "{guest.folder}"\n'
        f'[control]\nsocket = "{guest.folder}/control"\n[metrics]\nlisten = "127.0.0.1:0"\n'
        f'[vms.launch]\nsocket = "{guest.folder}/{DAEMON}"\nbudget = "1 GiB"\nlease = "5 s"\n'
        'notify = "10 ms"\npolicy = { name = "lazy", max_age = "50 ms", pressure = 100 }\n',
        encoding="utf-8",
    )
    program = Path(sys.executable).with_name("qmp-upm")
    with (guest.folder / "daemon.log").open("wb") as log:
        process = subprocess.Popen([program, "run", "--config", config], stderr=log)
    try:
        guest.wait(lambda: bool(guest.main.cmd("x-upm-query")["lease"]["ms"]), "the daemon")
        yield guest.folder / "launch.jsonl"
    finally:
        process.terminate()
        process.wait()


def run_with_daemon(guest: Launched, resets: int, outcome: Outcome) -> Outcome:
    """Under a real daemon, which discards what has just become stale while QEMU launches again."""
    with daemon(guest) as telemetry, noting_hangs(outcome):
        for number in range(resets + 1):
            prepare(guest, number, outcome)
            outcome.launches.append(guest.launch(command(number), number))
            look(guest, number, outcome)
        outcome.stuck = crowd(guest)
    lines = map(json.loads, telemetry.read_text(encoding="utf-8").splitlines())
    decided = [line["mono_ns"] for line in lines if line["event"] == "decision"]
    outcome.asked = sum(
        launch["begin_ns"] < at < launch["end_ns"] for launch in outcome.launches for at in decided
    )
    return outcome


def measurements(outcome: Outcome) -> list[str]:
    """One for each launch."""
    return [launch["measurement"] for launch in outcome.launches]


def ledger_is_true(outcome: Outcome, stock: Outcome) -> bool:
    """Whether after each reset the file holds what stock QEMU's does, and the ledger, to the page.

    What QEMU wrote itself may be in both, and may have been discarded since.
    """
    return all(
        held - REWRITTEN == (live | stale) - REWRITTEN
        for held, live, stale in zip(
            outcome.allocated, stock.allocated, outcome.stale, strict=False
        )
    )


def described(outcome: Outcome, stock: Outcome) -> dict[str, Any]:
    """A row of the result; ``zero_pages``: the most that a launch read more of than stock's did.

    A run that somebody's waiting has ended has fewer launches, and so is not equal.
    """
    both = list(zip(outcome.launches, stock.launches, strict=False))
    return {
        "name": outcome.name,
        "measurement_equal": measurements(outcome) == measurements(stock),
        "launches": len(outcome.launches),
        "different_launches": [
            number
            for number, (mine, theirs) in enumerate(both)
            if mine["measurement"] != theirs["measurement"]
        ],
        "zero_pages": max(
            (mine["zero_pages"] - theirs["zero_pages"] for mine, theirs in both), default=0
        ),
        "discards_during_launch": outcome.asked_for("flush"),
        "budgets_lowered_during_launch": outcome.asked_for("budget"),
        "leases_run_out": outcome.asked_for("lease"),
        "least_stale_before_reset": {
            copy: min((stale[copy] for stale in outcome.stale_before_reset), default=0)
            for copy in ("private", "shared")
        },
        "most_stale_pages_after_reset": max(map(len, outcome.stale), default=0),
        "ledger_is_true": ledger_is_true(outcome, stock),
        "stuck_threads": outcome.stuck,
    }


def launch(
    kind: str, qemu_root: str = "", plugin: Path | None = None, only: str = ""
) -> dict[str, Any]:
    """All modes, each with each disturbance; and with a daemon.

    ``qemu_root``: an unpacked system whose QEMU to use. ``plugin``: another one than installed.
    ``only``: of the runs, those whose names begin like that. Raises LabError where QEMU can't
    launch such a guest.
    """
    return compare(Setup(kind, program_of(qemu_root)), plugin or Path(plugin_file()), only, RESETS)


def program_of(qemu_root: str) -> tuple[str, ...]:
    """The command of an unpacked system's QEMU; of this system's if that is empty."""
    return tuple(newest.program(Path(qemu_root))) if qemu_root else ("qemu-system-x86_64",)


def compare(setup: Setup, plugin: Path, only: str, most_resets: int) -> dict[str, Any]:
    """Runs with the plugin against one without."""
    version = newest.version(list(setup.program))
    resets = most_resets if int(version.split(".")[0]) >= RESETTING_QEMU else 0
    outcomes = []
    with tempfile.TemporaryDirectory() as work:
        with Launched(setup, Path(work) / "stock", None) as guest:
            stock = run_stock(guest, resets)
        for number, (name, run) in enumerate(runs().items()):
            if name.startswith(only):
                say(name)
                with Launched(setup, Path(work) / str(number), plugin) as guest:
                    outcomes.append(run(guest, resets, Outcome(name)))
    rows = [described(outcome, stock) for outcome in outcomes]
    return {
        "kind": setup.kind,
        "qemu_version": version,
        "attributes": "real" if setup.real_attributes else "answered by the test",
        "launches": sum(row["launches"] for row in rows),
        "measurement_equal": all(row["measurement_equal"] for row in rows),
        "resets": resets,
        "resets_reason": ""
        if resets
        else f"QEMU resets confidential guests from version {RESETTING_QEMU} on",
        "ledger_is_true": all(row["ledger_is_true"] for row in rows),
        "stuck_threads": stock.stuck + sum(row["stuck_threads"] for row in rows),
        "discards_during_launch": sum(row["discards_during_launch"] for row in rows),
        "runs": rows,
    }


def runs() -> dict[str, Callable[[Launched, int, Outcome], Outcome]]:
    """Each mode with each disturbance, and the daemon's."""
    found: dict[str, Callable[[Launched, int, Outcome], Outcome]] = {
        f"{mode}, {disturbance}": partial(run_disturbed, mode, disturbance)
        for mode in MODES
        for disturbance in DISTURBANCES
    }
    return found | {f"{DAEMON}, flush": run_with_daemon}


def is_sound(result: dict[str, Any]) -> bool:
    """Whether the plugin changed nothing about any launch, leaked nothing and held up nobody."""
    return bool(
        result["measurement_equal"] and result["ledger_is_true"] and not result["stuck_threads"]
    )
