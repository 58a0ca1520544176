#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Installs what the set-up needs and this Debian lacks; if not root, prints the lines to run.
set -eu

QEMU_LEAST=9.1
wanted='flex bison libelf-dev libssl-dev bc cpio xz-utils busybox-static linux-source-6.12
    systemd libvirt-common libxml2-utils prometheus'
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
backports=/etc/apt/sources.list.d/qmp-upm-backports.sources

have() {
    dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed'
}

at_least() {
    [ -n "$1" ] && dpkg --compare-versions "${1#*:}" ge "$QEMU_LEAST"
}

qemu_installed() {
    qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p'
}

# The newest QEMU that apt offers, and the suite that it is in if apt must be told.
qemu_offered() {
    apt-cache madison qemu-system-x86 | awk -F ' *[|] *' '{print $2}' | sort -Vr | head -n 1
}

# Whether apt knows them all; Debian 12 has some in its backports only.
offered() {
    for package; do
        [ -n "$(apt-cache madison "$package")" ] || return 1
    done
}

# The mirror that this release's packages come from.
mirror() {
    apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
        awk -v codename="$1" '$2 == codename && $3 == "main" {print $1; exit}'
}

enable_backports() {
    # shellcheck disable=SC1091
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    uri=$(mirror "$codename")
    [ -n "$uri" ] || {
        echo "No apt source for $codename found; install QEMU $QEMU_LEAST or newer by hand." >&2
        exit 1
    }
    {
        printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\n' "$uri" "$codename"
        [ ! -e "$keyring" ] || printf 'Signed-By: %s\n' "$keyring"
    } > "$work/sources"
    if [ "$(id -u)" = 0 ]; then
        cp "$work/sources" "$backports"
    else
        printf 'sudo tee %s <<END\n' "$backports"
        cat "$work/sources"
        printf 'END\n'
    fi
    suite=$codename-backports
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
missing=
for package in $wanted; do
    have "$package" || missing="$missing $package"
done
"${PYTHON:-python3}" -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
at_least "$(qemu_installed)" || qemu_missing=yes
[ -n "$missing${qemu_missing:-}" ] || exit 0

command -v apt-get >/dev/null || {
    echo "Not a Debian system. Install: QEMU $QEMU_LEAST or newer for x86-64,$missing" >&2
    exit 1
}
root=$( [ "$(id -u)" = 0 ] && echo yes || echo no )
export DEBIAN_FRONTEND=noninteractive
install='apt-get install -y --no-install-recommends'
suite=
if [ "$root" = yes ]; then
    echo "Installing what is missing:$missing ${qemu_missing:+qemu-system-x86}"
    apt-get update -q
else
    echo 'Some packages are missing. Run this, then try again:'
fi
# shellcheck disable=SC2086
if { [ -n "${qemu_missing:-}" ] && ! at_least "$(qemu_offered)"; } || ! offered $missing; then
    enable_backports
    [ "$root" = no ] || apt-get update -q
elif [ -n "${qemu_missing:-}" ]; then
    # Offered, but perhaps by a suite that apt does not take packages from unasked.
    suite=$(apt-cache madison qemu-system-x86 | sort -t'|' -k2,2Vr |
        awk -F ' *[|] *' 'NR == 1 {split($3, where, " "); sub("/.*", "", where[2]); print where[2]}')
fi
run() {
    if [ "$root" = yes ]; then
        "$@"
    else
        echo "sudo $*"
    fi
}
[ "$root" = yes ] || echo 'sudo apt-get update'
# shellcheck disable=SC2086
[ -z "$missing" ] || run $install $missing
# shellcheck disable=SC2086
[ -z "${qemu_missing:-}" ] || run $install ${suite:+-t $suite} qemu-system-x86
[ "$root" = yes ]
