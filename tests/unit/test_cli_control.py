# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line as a client of the daemon: what it asks, what it prints, how it fails."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qmp_upm import cli
from qmp_upm.cli import app
from qmp_upm.client import ask
from qmp_upm.control import ControlServer
from qmp_upm.errors import ControlError
from qmp_upm.events import HostEvent, HostEventName
from qmp_upm.protocol import Copy
from qmp_upm.stats import State, Trouble

PROGRAM = Path(sys.executable).with_name("qmp-upm")


async def run(server: ControlServer, *arguments: str, code: int = 0) -> str:
    """What a command prints, in 80 columns."""
    result = await asyncio.to_thread(
        CliRunner().invoke,
        app,
        [*arguments, "--socket", str(server.path)],
        env={"COLUMNS": "80", "TERM": "dumb"},
    )
    if isinstance(result.exception, ControlError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


async def test_status(server: ControlServer) -> None:
    """A line for each VM, within 80 columns."""
    lines = (await run(server, "status")).splitlines()
    assert lines[0].split() == [
        *("NAME", "STATE", "POLICY", "BUDGET", "PRIVATE", "SHARED", "CONV", "REUSED", "REUSE"),
    ]
    assert " ".join(lines[1].split()) == "db attached lazy 256 MiB 4 KiB 8 KiB 2.0k 4 KiB 25 %"
    assert max(map(len, lines)) <= 80


async def test_status_says_what_is_wrong(server: ControlServer, host: Any) -> None:
    """Troubles stand below the table, and nothing in them acts on the terminal."""
    trouble = Trouble(error="taken \x1b[2J\x9b[bold]", hint="give it\nanother")
    host.views["web"] = host.views["web"].model_copy(
        update={"state": State.BUSY, "trouble": trouble, "fallen_back": "it raised"}
    )
    text = await run(server, "status")
    assert "web: taken \ufffd[2J\ufffd[bold]; hint: give it\ufffdanother" in text
    assert "web: the policy was replaced by eager: it raised" in text
    assert "\x1b" not in text


async def test_status_without_vms(server: ControlServer, host: Any) -> None:
    """None is no error."""
    host.views = {}
    assert "no VM" in await run(server, "status")


async def test_show(server: ControlServer) -> None:
    """Everything of one VM, and where its settings are from."""
    text = await run(server, "show", "db")
    assert "lazy (max_age = 10.0)" in text
    assert "half below 1.02 µs, 99 % below 1.02 µs" in text
    assert "1, 8 KiB (age 1)" in text
    assert "config.toml [defaults]" in text


async def test_json_is_what_the_daemon_said(server: ControlServer) -> None:
    """--json passes the daemon's answers on."""
    vms = await asyncio.to_thread(ask, server.path, "query-vms")
    assert json.loads(await run(server, "status", "--json")) == vms
    shown = json.loads(await run(server, "show", "db", "--json"))
    assert shown.pop("settings")[0]["key"] == "budget"
    assert shown == vms[0]
    names = {p["name"] for p in json.loads(await run(server, "policies", "--json"))}
    assert {"eager", "lazy", "batched"} <= names
    assert json.loads(await run(server, "flush", "db", "--json")) == {"bytes": 12288}


async def test_policies(server: ControlServer) -> None:
    """Each with its parameters and their defaults."""
    assert "max_age = 10.0" in await run(server, "policies")


async def test_changes(server: ControlServer, host: Any) -> None:
    """What the operator writes is what the host is asked."""
    policy = ("set-policy", "db", "lazy", "max_age=5 s", "high=0.8", "list=[1, 2]")
    assert await run(server, *policy) == "db: policy lazy\n"
    assert await run(server, "set-budget", "db", "64 MiB") == "db: budget 64 MiB\n"
    said = await run(server, "set-budget", "db", "2 TiB")
    assert said == "db: budget 512 MiB of its own 2.0 TiB: its part of [host] budget\n"
    await run(server, "set-budget", "db", "default")
    assert await run(server, "flush", "db", "--copy", "shared") == "db: 12 KiB given back\n"
    assert host.asked == [
        ("set_policy", "db", "lazy", {"max_age": "5 s", "high": "0.8", "list": [1, 2]}),
        ("set_budget", "db", 64 << 20),
        ("set_budget", "db", 2 << 40),
        ("set_budget", "db", None),
        ("flush", "db", Copy.SHARED),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("set-policy", "db", "lazy", "max_age"),
        ("set-policy", "db", "lazy", "=5"),
        ("set-policy", "db", "lazy", "x=[1"),
        ("set-budget", "db", "64 MB"),
        ("set-budget", "db", "1.5 B"),
        ("flush", "db", "--copy", "both"),
        ("show",),
        ("top", "--once", "--count", "2"),
        ("top", "--interval", "0"),
        ("events", "--count", "0"),
    ],
)
async def test_wrong_usage_is_exit_code_2(
    server: ControlServer, host: Any, arguments: tuple[str, ...]
) -> None:
    """The daemon is not asked."""
    await run(server, *arguments, code=2)
    assert host.asked == []


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("show", "x"), "there is no VM 'x'", "known: db, web"),
        (("flush", "web"), "web is not attached", "wait"),
        (("set-policy", "db", "greedy"), "there is no policy 'greedy'", "installed: lazy"),
        pytest.param(("reload",), "internal error", "see the log", marks=pytest.mark.traceback),
    ],
)
async def test_refusals_come_with_the_daemon_s_hint(
    server: ControlServer, arguments: tuple[str, ...], message: str, hint: str
) -> None:
    """What the daemon refuses is a ControlError."""
    with pytest.raises(ControlError) as caught:
        await run(server, *arguments)
    assert (caught.value.message, caught.value.hint) == (message, hint)


async def test_a_daemon_of_another_release(server: ControlServer, host: Any) -> None:
    """What can't be read is said to be that, also when only a field is missing."""
    host.vms = lambda: [{"name": "db"}]
    with pytest.raises(ControlError, match="another release"):
        await run(server, "status")


async def test_too_many_clients(server: ControlServer) -> None:
    """The daemon's reason reaches the operator."""
    others = [await asyncio.open_unix_connection(server.path) for _ in range(4)]
    for reader, _ in others:
        await reader.readline()
    with pytest.raises(ControlError, match="there are 4 clients"):
        await run(server, "status")
    for _, writer in others:
        writer.close()
        await writer.wait_closed()


def _nobody(path: Path) -> None:
    pass


def _left_over(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


@pytest.mark.parametrize("make", [_nobody, _left_over])
def test_no_daemon(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Exit code 1, one message and one hint, no traceback."""
    make(tmp_path / "c.sock")
    result = subprocess.run(
        [PROGRAM, "status", "--socket", tmp_path / "c.sock"],
        capture_output=True,
        text=True,
        check=False,
    )
    message, hint = result.stderr.splitlines()
    assert result.returncode == 1
    assert "no daemon runs at" in message
    assert hint.startswith("hint: ")


async def test_what_is_no_daemon_is_told_apart(tmp_path: Path) -> None:
    """A socket that greets with something else."""

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp\r\n")
        writer.close()
        await writer.wait_closed()

    other = await asyncio.start_unix_server(greet, tmp_path / "c.sock")
    with pytest.raises(ControlError, match="no control socket"):
        await asyncio.to_thread(ask, tmp_path / "c.sock", "query-vms")
    other.close()
    await other.wait_closed()


async def test_a_daemon_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that accepts and says nothing is given up."""
    monkeypatch.setattr("qmp_upm.client.CONNECT_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(tmp_path / "c.sock"))
        hung.listen()
        with pytest.raises(ControlError, match="does not answer"):
            await asyncio.to_thread(ask, tmp_path / "c.sock", "query-vms")


async def test_a_command_that_hangs(
    server: ControlServer, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command is given up as well, and a daemon that ends in the middle of one is noticed."""
    host.gate.clear()
    flush = ("flush", {"name": "db"})
    with monkeypatch.context() as patch:
        patch.setattr("qmp_upm.client.EXECUTE_SECONDS", 0.05)
        with pytest.raises(ControlError, match="did not answer flush"):
            await asyncio.to_thread(ask, server.path, *flush)
    waiting = asyncio.create_task(asyncio.to_thread(ask, server.path, *flush))
    async with asyncio.timeout(20):
        while len(host.asked) < 2:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
        await server.stop()
        with pytest.raises(ControlError, match="closed the connection"):
            await waiting


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["lines", "json"])
async def test_events(server: ControlServer, host: Any, options: tuple[str, ...]) -> None:
    """A line for each event; with --json QMP's own."""
    seen = asyncio.create_task(run(server, "events", "--count", "2", *options))
    async with asyncio.timeout(20):
        while not host.events:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
        host.events.put(HostEvent(HostEventName.BUDGET_REACHED, "db\x1b", {"budget_bytes": 5}))
        host.events.put(HostEvent(HostEventName.CONFIG_RELOADED, None))
        lines = (await seen).splitlines()
    assert len(lines) == 2
    assert "\x1b" not in lines[0]
    if options:
        assert json.loads(lines[0])["data"] == {"vm": "db\x1b", "budget_bytes": 5}
    else:
        assert lines[0].split()[2:] == ["BUDGET_REACHED", "db\\u001b", "budget_bytes=5"]
        assert lines[1].endswith("  CONFIG_RELOADED")


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """What is started hears SIGINT, even if this was started as a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
@pytest.mark.parametrize("command", ["events", "top"])
async def test_interrupt_ends_it_well(server: ControlServer, host: Any, command: str) -> None:
    """Ctrl-C is how these end: exit code 0, and nothing on stderr."""
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *(command, "--socket", server.path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ, PYTHONUNBUFFERED="1"),
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            if command == "events":
                while not host.events:  # noqa: ASYNC110 - there is no event for it
                    await asyncio.sleep(0.01)
                host.events.put(HostEvent(HostEventName.VM_ADDED, "db"))
            assert await process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """Shells are told how to complete, and commands and choices complete."""
    # Or typer looks for the shell that runs the tests, which may be none that it knows.
    env = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run(
        [PROGRAM, "--show-completion", shell], capture_output=True, text=True, check=False, env=env
    )
    assert (script.returncode, script.stderr) == (0, "")
    assert "_QMP_UPM_COMPLETE" in script.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("set-", ["set-policy", "set-budget"]),
        ("show ", ["db", "web"]),
        ("flush d", ["db"]),
        ("flush db --copy ", ["private", "shared"]),
        ("set-policy db la", ["lazy"]),
    ],
)
async def test_completion_knows_the_words(
    server: ControlServer, words: str, found: list[str]
) -> None:
    """Commands, choices, policies, and the VMs of the daemon, as bash asks for them."""
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(
            os.environ,
            QMP_UPM_SOCKET=str(server.path),
            _QMP_UPM_COMPLETE="complete_bash",
            COMP_WORDS=f"qmp-upm {words}",
            COMP_CWORD=str(len(f"{words}x".split())),
        ),
    )
    async with asyncio.timeout(30):
        out, errors = await process.communicate()
    assert (out.decode().split(), errors) == (found, b"")


def test_a_qemus_words_do_not_act_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that a QEMU has written is printed without its control characters."""

    def fail() -> None:
        raise ControlError("\x1b]0;pwned\x07 all is well\r\n#", hint="\x1b[2J")

    monkeypatch.setattr("qmp_upm.cli.app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert all(c.isprintable() or c == "\n" for c in said)
    assert said.count("\n") == 2
