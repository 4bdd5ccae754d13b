"""Disks that boot by themselves, with their own boot loader and kernel, made from an image's tree.

The partitions and file systems are written into a file: only building the tree needs root.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Iterator, Sequence

from tests.boot.container import image, mirror
from tests.boot.host import CACHE, command, new_directory, which

# The command that is missing, and its package in Debian.
DISK_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "sfdisk": "fdisk",
    "syslinux": "syslinux",  # generation 1
}
MBR_CODE = Path("/usr/lib/syslinux/mbr/mbr.bin")  # syslinux-common
EFI_LOADERS = "usr/lib/systemd/boot/efi/systemd-boot*.efi"  # in the tree: systemd-boot-efi

DISK_PACKAGES = ("systemd", "systemd-sysv", "dbus", "libpam-systemd", "iproute2")
KERNEL_PACKAGES = ("linux-image-cloud-amd64", "systemd-boot-efi")
ARM_PACKAGES = ("linux-image-cloud-arm64", "systemd-boot-efi", "python3")

MIB = 1024 * 1024  # bytes
DISK_SIZE = 1024  # MiB, most of it a hole
BOOT_START, ROOT_START = 1, 64  # MiB
ROOT_SIZE = DISK_SIZE - ROOT_START - 1  # MiB; the last one is for the second copy of a GPT

# The kernel's messages go to the serial port, which is Azure's boot diagnostics.
# Under emulation on a busy machine, the check of the timer can end in a panic.
PARAMETERS = "console=ttyS0 no_timer_check"

# systemd-networkd for Azure's interface and QEMU's.
NETWORK_FILE = "[Match]\nDriver=hv_netvsc virtio_net\n\n[Network]\nDHCP=ipv4\n"


def arm_image() -> Path:
    """The directory of an image for Arm64, built once, in minutes."""
    directory = CACHE / "arm64"
    if not directory.exists():
        include = f"--include={','.join([*DISK_PACKAGES, *ARM_PACKAGES])}"
        unfinished = new_directory()
        options = ("--quiet", "--variant=minbase", "--architectures=arm64", include)
        command("mmdebstrap", *options, "bookworm", unfinished, *mirror())
        unfinished.rename(directory)
    return directory


def missing_tools() -> Sequence[str]:
    """What building a disk needs and this machine does not have."""
    absent = [f"{tool} ({package})" for tool, package in DISK_TOOLS.items() if which(tool) is None]
    return absent if MBR_CODE.exists() else [*absent, f"{MBR_CODE} (syslinux-common)"]


class Tree:
    """A copy of an image's tree, to be changed and then made into disks.

    PACKAGES is added to the kernel, systemd and D-Bus; each set of packages is built once. The
    kernel is bookworm's in any SUITE: under emulation trixie's crashes in half of the boots.
    """

    def __init__(
        self, directory: Path, packages: Sequence[str] = ("python3",), suite: str = "bookworm"
    ) -> None:
        self.directory = directory
        self.root = directory / "root"
        directory.mkdir(parents=True, exist_ok=True)
        kernel = KERNEL_PACKAGES if suite == "bookworm" else ("kmod", "udev")
        if packages == ARM_PACKAGES:
            original = arm_image()
        else:
            original = image("disk", suite, [*DISK_PACKAGES, *kernel, *packages])
        command("cp", "--archive", "--reflink=auto", original, self.root)
        if suite != "bookworm":
            other = image("disk", "bookworm", [*DISK_PACKAGES, *KERNEL_PACKAGES, "python3"])
            for part in ("boot", "vmlinuz", "initrd.img", "usr/lib/modules"):
                command("cp", "--archive", "--no-target-directory", other / part, self.root / part)
        # of the kernel, beside its root
        self.parameters = "console=ttyAMA0" if packages == ARM_PACKAGES else PARAMETERS
        self.write("etc/hostname", "golden-image\n")
        self.write("etc/machine-id", "")
        self.write("etc/fstab", "")

    def write(self, path: str, text: str) -> None:
        """Write a file of the image."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def systemctl(self, *words: str) -> None:
        """Enable, disable or mask units of the image."""
        command("systemctl", f"--root={self.root}", "--quiet", *words)

    def use_networkd(self, configuration: str = NETWORK_FILE) -> None:
        """Have systemd-networkd configure the network."""
        self.write("etc/systemd/network/10-azure.network", configuration)
        self.systemctl("enable", "systemd-networkd.service")

    def disk(self, generation: int = 1, mode: str = "rw") -> Path:
        """Make a disk of the tree as it is; MODE is how the kernel mounts the root: rw or ro."""
        disk = self.directory / f"generation-{generation}.raw"
        with open(str(disk), "wb") as file:
            file.truncate(DISK_SIZE * MIB)
        make_bootable = make_bios_disk if generation == 1 else make_efi_disk
        make_bootable(disk, self.root, f"root=LABEL=root {mode} {self.parameters}")
        offset = f"offset={ROOT_START * MIB}"
        options = ("-q", "-F", "-t", "ext4", "-L", "root", "-E", offset, "-d", self.root)
        command("mke2fs", *options, disk, f"{ROOT_SIZE}M")
        return disk

    def remove(self) -> None:
        shutil.rmtree(str(self.directory), ignore_errors=True)


@contextlib.contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    """The root of DISK, which is its last partition, to be changed."""
    table = json.loads(command("sfdisk", "--json", disk))["partitiontable"]
    offset = table["partitions"][-1]["start"] * 512
    root = new_directory() / "root"
    root.mkdir()
    command("mount", "-o", f"loop,offset={offset}", disk, root)
    try:
        yield root
    finally:
        command("umount", root)


def partition(disk: Path, label: str, boot: str) -> None:
    """Give DISK a partition of kind BOOT, with an empty FAT, and one for the root."""
    size = ROOT_START - BOOT_START
    table = f"label: {label}\nstart={BOOT_START}MiB, size={size}MiB, {boot}\nsize={ROOT_SIZE}MiB\n"
    command("sh", "-c", 'printf %s "$1" | sfdisk --quiet "$2"', "sh", table, disk)
    start = BOOT_START * MIB // 512  # sectors
    command("mkfs.vfat", "-F", 16, f"--offset={start}", "-h", start, disk, size * 1024)


def mtools(tool: str, disk: Path, *words: object) -> None:
    """Use a tool of mtools on the boot partition of DISK."""
    # It would refuse a geometry that is not a multiple of whole tracks.
    command(tool, "-i", f"{disk}@@{BOOT_START}M", *words, MTOOLS_SKIP_CHECK=1)


def make_bios_disk(disk: Path, root: Path, command_line: str) -> None:
    """Generation 1: syslinux, in an active partition."""
    partition(disk, "dos", "type=c, bootable")
    configuration = disk.with_name("syslinux.cfg")
    configuration.write_text(f"DEFAULT vmlinuz initrd=initrd.img {command_line}\n")
    for file in (configuration, root / "vmlinuz", root / "initrd.img"):
        mtools("mcopy", disk, file.resolve(), f"::{file.name}")
    command("syslinux", "--install", f"--offset={BOOT_START * MIB}", disk)
    with open(str(disk), "r+b") as sectors:
        sectors.write(MBR_CODE.read_bytes())


def make_efi_disk(disk: Path, root: Path, command_line: str) -> None:
    """Generation 2: systemd-boot, where every firmware looks for a boot loader."""
    partition(disk, "gpt", "type=uefi")
    (loader,) = root.glob(EFI_LOADERS)
    entry = disk.with_name("entry")
    entry.write_text(f"linux /vmlinuz\ninitrd /initrd.img\noptions {command_line}\n")
    mtools("mmd", disk, "::EFI", "::EFI/BOOT", "::loader", "::loader/entries")
    for file, place in (
        (root / "vmlinuz", "vmlinuz"),
        (root / "initrd.img", "initrd.img"),
        (entry, "loader/entries/azure.conf"),
        (loader, loader.name.upper().replace("SYSTEMD-BOOT", "EFI/BOOT/BOOT")),
    ):
        mtools("mcopy", disk, file.resolve(), f"::{place}")
