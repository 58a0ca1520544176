# SPDX-License-Identifier: GPL-2.0-or-later
"""What else of the host matters: memory pressure, control groups, and what confines QEMU."""

import stat
from collections.abc import Iterator
from pathlib import Path

from qmp_upm.doctor.check import Check, Places, Status, read_text
from qmp_upm.errors import InstallError
from qmp_upm.plugin import plugin_path

PLUGIN = "qmp-upm.so"
MONITORS = Path("libvirt/qemu/upm")
"""Below /run: where the examples put the monitors of libvirt's guests."""


def check_host(places: Places) -> Iterator[Check]:
    """One finding each."""
    yield _pressure(places)
    yield _cgroup(places)
    yield _apparmor(places)
    yield _selinux(places)
    yield _monitors(places)


def _pressure(places: Places) -> Check:
    if read_text(places.proc / "pressure" / "memory"):
        return Check("pressure", Status.OK, "the kernel tells its memory pressure (PSI)")
    return Check(
        "pressure",
        Status.WARN,
        f"{places.proc}/pressure/memory can't be read: policies see no pressure",
        "CONFIG_PSI, and psi=1 on the kernel's command line",
    )


def _cgroup(places: Places) -> Check:
    controllers = read_text(places.cgroup / "cgroup.controllers")
    if controllers is None:
        return Check(
            "cgroup",
            Status.WARN,
            f"no cgroup v2 at {places.cgroup}: the pressure of a single VM is not seen",
            "systemd.unified_cgroup_hierarchy=1 on the kernel's command line",
        )
    if "memory" not in controllers.split():
        return Check(
            "cgroup",
            Status.WARN,
            "cgroup v2 without its memory controller",
            "take cgroup_disable=memory off the kernel's command line",
        )
    return Check("cgroup", Status.OK, "cgroup v2 with its memory controller")


def _apparmor(places: Places) -> Check:
    """Whether libvirt's profile lets QEMU map the plugin and make its monitor."""
    if read_text(places.sys / "module" / "apparmor" / "parameters" / "enabled") != "Y":
        return Check("apparmor", Status.OK, "not in use")
    profiles = places.etc / "apparmor.d"
    if not (profiles / "abstractions" / "libvirt-qemu").exists():
        return Check("apparmor", Status.OK, "no profile of libvirt's guests")
    found = [path for place in places.modules if (path := place / PLUGIN).is_file()]
    if not found:
        return Check(
            "apparmor",
            Status.WARN,
            f"no {PLUGIN} in QEMU's module directory, from which alone libvirt's guests may map it",
            _install(places),
        )
    if not _is_ours(found[0]):
        return Check(
            "apparmor",
            Status.WARN,
            f"{found[0]} is not the plugin of this release",
            _install(places),
        )
    local = read_text(profiles / "local" / "abstractions" / "libvirt-qemu") or ""
    if str(MONITORS) not in local:
        return Check(
            "apparmor",
            Status.WARN,
            "libvirt's guests may not make a monitor for the daemon",
            f"'/{{var/,}}run/{MONITORS}/*.monitor rw,' in "
            f"{profiles}/local/abstractions/libvirt-qemu",
        )
    return Check("apparmor", Status.OK, f"libvirt's guests may map {found[0]}")


def _install(places: Places) -> str:
    where = next((place for place in places.modules if place.is_dir()), places.modules[0])
    return f'install -m 644 "$(qmp-upm plugin path)" {where}/'


def _is_ours(path: Path) -> bool:
    try:
        return path.read_bytes() == plugin_path().read_bytes()
    except (OSError, InstallError):
        return False


def _selinux(places: Places) -> Check:
    if read_text(places.sys / "fs" / "selinux" / "enforce") != "1":
        return Check("selinux", Status.OK, "does not enforce")
    return Check(
        "selinux",
        Status.WARN,
        "enforces: libvirt's guests change domain as they start, and ignore LD_PRELOAD",
        "allow virtd_t svirt_t:process noatsecure; see examples/libvirt",
    )


def _monitors(places: Places) -> Check:
    """The directory of the second monitors: who connects must be let in by its group."""
    directory = places.run / MONITORS
    try:
        mode = directory.stat().st_mode
    except OSError:
        return Check(
            "monitors",
            Status.UNKNOWN,
            f"no {directory}",
            "for libvirt's guests: examples/systemd/tmpfiles.conf makes it",
        )
    if mode & (stat.S_ISGID | stat.S_IWGRP) == stat.S_ISGID | stat.S_IWGRP:
        return Check("monitors", Status.OK, f"{directory} hands its group on")
    return Check(
        "monitors",
        Status.WARN,
        f"{directory} has mode {stat.S_IMODE(mode):o}: the daemon may not reach what is made there",
        f"chmod 2770 {directory}, and the daemon's group; see examples/systemd/tmpfiles.conf",
    )
