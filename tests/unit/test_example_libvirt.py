# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's examples against libvirt's schema."""

import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "libvirt"
SCHEMAS = Path("/usr/share/libvirt/schemas")
"""Of Debian's package libvirt-common."""

QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
DOMAINS = ["sev-snp", "tdx"]


def validate(domain: Path) -> subprocess.CompletedProcess[str]:
    """What xmllint says of a domain."""
    return subprocess.run(
        ["xmllint", "--noout", "--nonet", "--relaxng", SCHEMAS / "domain.rng", domain],
        capture_output=True,
        text=True,
        check=False,
    )


def schema_knows(kind: str) -> bool:
    """Whether this libvirt has that kind of <launchSecurity>: TDX came with 11.6."""
    tree = ET.parse(SCHEMAS / "domaincommon.rng")  # noqa: S314 - a file of the distribution's
    return any(
        value.text == kind for value in tree.iter("{http://relaxng.org/ns/structure/1.0}value")
    )


@pytest.mark.parametrize("kind", DOMAINS)
def test_domain_is_valid(kind: str, tmp_path: Path) -> None:
    """As it stands; for a libvirt without that kind of guest, without the element that says it."""
    domain = EXAMPLE / f"{kind}.xml"
    if not schema_knows(kind):
        refused = validate(domain)
        assert "element launchSecurity" in refused.stderr
        tree = ET.parse(domain)  # noqa: S314 - our own file
        tree.getroot().remove(tree.getroot().find("launchSecurity"))  # type: ignore[arg-type]
        domain = tmp_path / "domain.xml"
        tree.write(domain)
    result = validate(domain)
    assert result.returncode == 0, result.stderr


def test_a_misplaced_line_would_be_seen(tmp_path: Path) -> None:
    """The schema does look into <qemu:commandline>."""
    tree = ET.parse(EXAMPLE / "sev-snp.xml")  # noqa: S314 - our own file
    commandline = tree.getroot().find(f"{QEMU}commandline")
    assert commandline is not None
    ET.SubElement(commandline, f"{QEMU}preload", {"value": "x"})
    tree.write(tmp_path / "domain.xml")
    assert validate(tmp_path / "domain.xml").returncode != 0


@pytest.mark.parametrize("kind", DOMAINS)
def test_domains_hold_the_fragment(kind: str) -> None:
    """commandline.xml is in each, and the monitor is one that the daemon discovers."""
    fragment = ET.parse(EXAMPLE / "commandline.xml").getroot()  # noqa: S314 - our own file
    inside = ET.parse(EXAMPLE / f"{kind}.xml").getroot().find(f"{QEMU}commandline")  # noqa: S314
    assert inside is not None
    assert [(line.tag, line.attrib) for line in inside] == [
        (line.tag, line.attrib) for line in fragment
    ]
    where = inside[1].attrib["value"]
    assert where.startswith("unix:/run/libvirt/qemu/upm/guest.monitor,")
    tmpfiles = (ROOT / "examples" / "systemd" / "tmpfiles.conf").read_text(encoding="utf-8")
    assert "d /run/libvirt/qemu/upm 2770 " in tmpfiles
