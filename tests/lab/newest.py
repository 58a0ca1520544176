# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMU of Debian's newest suite, unpacked with its libraries into the user's cache.

Taken with apt, from the mirror that this Debian's own packages come from, into folders of its own:
nothing is installed, and apt's state is as before. Needs no root.
"""

import fcntl
import platform
import subprocess
import tempfile
from pathlib import Path

from tests.lab.build import LabError, cache, run, say

SUITES = ("sid", "testing")
"""Where to look, in this order: a package may be missing from the first for a while."""
LEAST = "1:11.1"
"""QEMU that makes TDX guests, and launches a confidential guest again at a reset."""
PACKAGE = "qemu-system-x86"
KEYRINGS = tuple(Path(f"/usr/share/keyrings/debian-archive-keyring.{e}") for e in ("pgp", "gpg"))
LIBRARIES = "usr/lib/x86_64-linux-gnu"


def root() -> Path:
    """The folder with the unpacked system: fetched the first time, about 45 MB; remove it to renew.

    Raises LabError if apt offers no such QEMU.
    """
    with (cache() / "qemu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return next(cache().glob("qemu-[0-9]*"), None) or _fetch()


def program(tree: Path) -> list[str]:
    """The command that starts the QEMU of an unpacked system on this one, without a chroot."""
    libraries = tree / LIBRARIES
    return [
        str(tree / "lib64/ld-linux-x86-64.so.2"),
        *("--library-path", f"{libraries}:{libraries}/systemd"),
        str(tree / "usr/bin/qemu-system-x86_64"),
        *("-L", str(tree / "usr/share/qemu"), "-L", str(tree / "usr/share/seabios")),
    ]


def version(command: list[str]) -> str:
    """QEMU's version, as ``11.1.3``."""
    told = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True)
    return told.stdout.split()[3]


def _fetch() -> Path:
    problem = "no suite was asked"
    for suite in SUITES:
        with tempfile.TemporaryDirectory(dir=cache()) as work:
            try:
                name = _unpack(suite, Path(work))
            except LabError as error:
                problem = str(error)
                continue
            target = cache() / f"qemu-{name}"
            (Path(work) / "root").replace(target)
            return target
    raise LabError(f"QEMU {LEAST.partition(':')[2]} or newer is not to be had: {problem}")


def _unpack(suite: str, work: Path) -> str:
    """Fetches and unpacks below ``work``; QEMU's version without Debian's epoch."""
    apt = ["-c", str(_configuration(suite, work))]
    run(["apt-get", *apt, "update", "-q"], f"apt-get update for Debian's {suite}")
    told = subprocess.run(
        ["apt-cache", *apt, "show", "--no-all-versions", PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    offered = next((li.split()[1] for li in told.splitlines() if li.startswith("Version: ")), "")
    newer = ["dpkg", "--compare-versions", offered, "ge", LEAST]
    if not offered or subprocess.run(newer, check=False).returncode:
        raise LabError(f"Debian's {suite} has {PACKAGE} {offered or 'not at all'}")
    say(f"Fetching QEMU {offered} from Debian's {suite}: 45 MB, once; later runs find it unpacked.")
    run(["apt-get", *apt, "install", "-q", "-y", "--download-only", PACKAGE], "apt-get install")
    tree = work / "root"
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "run", "tmp"):
        (tree / name).mkdir()
    for package in sorted((work / "cache/archives").glob("*.deb")):
        run(["dpkg-deb", "-x", str(package), str(tree)], f"unpacking {package.name}")
    return offered.partition(":")[2] or offered


def _configuration(suite: str, work: Path) -> Path:
    """A configuration for apt, with a state, a cache and sources of its own below ``work``."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()
    keyring = next((path for path in KEYRINGS if path.exists()), None)
    if keyring is None:
        raise LabError("debian-archive-keyring is missing\nhint: apt-get install it")
    (work / "debian.sources").write_text(
        f"Types: deb\nURIs: {_mirror()}\nSuites: {suite}\nComponents: main\nSigned-By: {keyring}\n",
        encoding="utf-8",
    )
    # As root, apt would fetch as a user who can't write into root's cache.
    settings = {
        "Dir::State": work / "state",
        "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": work / "debian.sources",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Architecture": "amd64",
        "APT::Default-Release": "",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    cleared = ("APT::Architectures", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success")
    file = work / "apt.conf"
    file.write_text(
        "".join(f"#clear {name};\n" for name in cleared)
        + "".join(f'{name} "{value}";\n' for name, value in settings.items()),
        encoding="utf-8",
    )
    return file


def _mirror() -> str:
    """Where this release's own packages come from."""
    try:
        release = platform.freedesktop_os_release()
        lines = subprocess.run(
            [
                *("apt-get", "indextargets", "--no-release-info"),
                *("--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise LabError(f"not a Debian system with apt: {error}") from error
    suites = {release.get("VERSION_CODENAME"), "stable", "testing", "unstable", "sid"}
    for uri, suite, component in (line.split() for line in lines):
        if suite in suites and component == "main":
            return uri
    raise LabError("apt has no source for this Debian's own packages")
