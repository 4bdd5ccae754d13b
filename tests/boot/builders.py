"""Disks that other tools make, as their manuals show, with what must be said of each.

`python3 -m unittest tests.boot.builders`, as root; BOOT_CASE is the name of the only tool.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Sequence

from tests.boot.container import mirror, write
from tests.boot.disk import mounted
from tests.boot.host import attempt, command, new_directory, note, skip_if, which
from tests.boot.in_a_vm import VMTest
from tests.boot.recipes import RECIPES
from tests.boot.rehearsals import CORRECTLY, ONLY, UNTOLD
from tests.plain.harness import INSTALLER, ROOT

# What both tools use, for a kernel without the device mapper; and what grub-mkconfig needs of udev.
KPARTX = """\
#!/bin/sh
set -eu
for disk; do :; done # the last argument
mkdir -p /dev/mapper /dev/disk/by-partuuid
case $1 in
-a*)
    loop=$(losetup --find --show --partscan "$disk")
    partx --update "$loop"
    for part in "$loop"p*; do
        ln -s "$part" /dev/mapper/
        uuid=$(partx --show --noheadings --output UUID "$part")
        ln -sf "$part" "/dev/disk/by-partuuid/$uuid"
        echo "add map ${part##*/} (0:0): 0 0 linear $loop 0"
    done
    ;;
-d*)
    for loop in $(losetup --noheadings --output NAME --associated "$disk"); do
        find /dev/mapper /dev/disk/by-partuuid -lname "${loop}p*" -delete
        losetup --detach "$loop"
    done
    ;;
esac
"""
# All that a tool mounts goes when it ends, however it ends.
ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec")
PREPARE = """\
mkdir -p /dev/mapper
mount -t tmpfs tmpfs /dev/mapper
echo 252 device-mapper >misc
mount --bind misc /proc/misc
PATH=$PWD:$PATH
exec """

# The example of vmdb2's manual, with this release, Python and D-Bus.
VMDB2 = """\
steps:
  - {mkimg: "{{ output }}", size: 4G}
  - {mklabel: msdos, device: "{{ output }}"}
  - {mkpart: primary, device: "{{ output }}", start: 0%, end: 100%, tag: /}
  - {kpartx: "{{ output }}"}
  - {mkfs: ext4, partition: /}
  - {mount: /}
  - {debootstrap: bookworm, mirror: MIRROR, target: /}
  - {apt: install, packages: [linux-image-amd64, python3, dbus], tag: /}
  - {fstab: /}
  - {grub: bios, tag: /}
"""
# The hook of grml-debootstrap.
POST_SCRIPT = f"""\
#!/bin/sh -e
DESTDIR=$MNTPOINT '{INSTALLER}'
mkdir -p "$MNTPOINT/etc/default/grub.d"
echo 'GRUB_CMDLINE_LINUX="console=ttyS0"' >"$MNTPOINT/etc/default/grub.d/azure.cfg"
"""
GRML = """\
env DEBOOTSTRAP=mmdebstrap grml-debootstrap --vmfile --target disk --vmsize 3G --force \
    --nopassword --hostname golden-image --release bookworm --mirror $MIRROR --mntpoint $PWD/mnt \
    --nopackages --debopt --include=python3 --post-scripts hooks"""

GRUB = "etc/default/grub boot/grub/grub.cfg"


class Builder(NamedTuple):
    """A tool, what must be said of its disk at first, and the remedy that this names."""

    name: str
    line: str  # of shell, which makes "disk"
    problems: Sequence[str]  # of tests.check: a pattern for each
    status: int  # of tests.rehearse
    says: Sequence[str]
    remedy: str  # in shell, in the root of the disk


BUILDERS = [
    Builder(
        "vmdb2",
        "vmdb2 example.vmdb --output disk",
        [
            "azure-provisioning.service: missing, .*: run install.sh",
            "no DHCP client is enabled and configured",
            "/etc/machine-id: would be shared",
            "/var/lib/dbus/machine-id: would be shared",
            "/boot/grub/grub.cfg: without console=ttyS0",
        ],
        1,
        [
            r"generation 1 \(it can boot by BIOS",
            r"\? +asks DHCP .* its console says nothing: set console=ttyS0, try again\n",
            "\nIt will not provision, or not correctly.\n",
        ],
        f"'{ROOT / RECIPES}/generalize.sh' .; sed -i 's/net.ifnames=0/& console=ttyS0/' {GRUB}",
    ),
    Builder(
        "grml-debootstrap",
        GRML,
        [],
        3,
        [r"\? +asks DHCP .* may name eth0, .* here: add net.ifnames=0", f"\n{UNTOLD}\n"],
        f"sed -i 's/console=ttyS0/& net.ifnames=0/' {GRUB} etc/default/grub.d/azure.cfg",
    ),
]


class BuildersTest(VMTest):
    @classmethod
    def setUpClass(cls) -> None:
        skip_if([builder.name for builder in BUILDERS if which(builder.name) is None])
        super().setUpClass()

    def build(self, builder: Builder) -> Path:
        """Run a tool; return its disk."""
        directory = new_directory()
        write(directory, "kpartx", KPARTX, 0o755)
        write(directory, "example.vmdb", VMDB2.replace("MIRROR", mirror()[0]))
        write(directory, "hooks/azure", POST_SCRIPT, 0o755)
        started = time.monotonic()
        try:
            command(*ISOLATED, PREPARE + builder.line, cwd=directory, MIRROR=mirror()[0])
        finally:
            command(directory / "kpartx", "-d", directory / "disk")
        note(f"{builder.name}: built in {time.monotonic() - started:.0f} s")
        return directory / "disk"

    def check(self, disk: Path, problems: Sequence[str]) -> None:
        """What tests.check says of the tree of DISK."""
        with mounted(disk) as root:
            done = attempt(sys.executable, "-m", "tests.check", root, cwd=ROOT)
        lines = done.stdout.splitlines() if done.returncode else []
        self.assertEqual(len(lines), len(problems), done.stdout)
        for line, pattern in zip(lines, problems):
            self.assertRegex(line, pattern)

    def rehearse(self, disk: Path, status: int, says: Sequence[str]) -> None:
        started = time.monotonic()
        done = attempt(sys.executable, "-m", "tests.rehearse", disk, cwd=ROOT)
        note(f"{time.monotonic() - started:.0f} s\n{done.stdout}")
        self.assertEqual(done.returncode, status, done.stdout)
        for pattern in says:
            self.assertRegex(done.stdout, pattern)

    def build_and_rehearse(self, builder: Builder) -> None:
        disk = self.build(builder)
        self.check(disk, builder.problems)
        self.rehearse(disk, builder.status, builder.says)
        with mounted(disk) as root:
            command("sh", "-ec", builder.remedy, cwd=root)
        self.check(disk, [])
        self.rehearse(disk, 0, [f"\n{CORRECTLY}\n"])

    def test_each_disk_gets_its_verdict_and_the_remedy_that_it_names_makes_it_sound(self) -> None:
        builders = [builder for builder in BUILDERS if ONLY in (None, builder.name)]
        self.assertTrue(builders, f"BOOT_CASE={ONLY}")
        with ThreadPoolExecutor(2) as pool:
            results = [pool.submit(self.build_and_rehearse, builder) for builder in builders]
        for builder, result in zip(builders, results):
            with self.subTest(builder.name):
                result.result()
