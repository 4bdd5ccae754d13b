"""Whole images, built and rehearsed, with what tests.rehearse must say of each.

`python3 -m unittest tests.boot.rehearsals` builds the images as root and rehearses them as nobody;
BOOT_CASE is the name of the only one to run.
"""

import contextlib
import os
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence, Tuple

from tests.boot.container import add_service
from tests.boot.disk import (
    ARM_PACKAGES,
    BOOT_START,
    DISK_SIZE,
    ROOT_START,
    Tree,
    mtools,
    partition,
)
from tests.boot.host import attempt, command, new_directory, note
from tests.boot.in_a_vm import VMTest
from tests.boot.trees import REHEARSED
from tests.plain.harness import INSTALLER, ROOT, SCRIPT
from tests.rehearse import VHD_HEADING, verdict
from tests.vm import MIB, find_setup, inspect

ONLY = os.environ.get("BOOT_CASE")

# The system's Python, since another one may be in a directory that nobody can read.
REHEARSE = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"),
    *("/usr/bin/python3", "-B", "-m", "tests.rehearse"),
]
CLOUD_INIT_PACKAGES = ("python3", "cloud-init", "ifupdown", "isc-dhcp-client")
IFUPDOWN = ("python3", "ifupdown", "isc-dhcp-client")
EXTENSIONS_PACKAGES = (*IFUPDOWN, "waagent")
WAAGENT_PACKAGES = (*EXTENSIONS_PACKAGES, "eject", "openssh-server")


def install_project(tree: Tree) -> None:
    command(INSTALLER, DESTDIR=tree.root)


def no_dhcp_client(tree: Tree) -> None:
    install_project(tree)
    tree.parameters += " net.ifnames=0"


def sound(tree: Tree) -> None:
    """A sound image, which tries to reach the machine that runs QEMU, where somebody listens."""
    tree.use_networkd()
    install_project(tree)
    add_service(tree.root, "curious", "exec 3<>/dev/tcp/168.0.0.2/$(cat /port); echo connected: $?")


def bound_to_mac_address(tree: Tree) -> None:
    # the address of a VM that is gone
    tree.use_networkd("[Match]\nMACAddress=00:22:48:12:34:56\n\n[Network]\nDHCP=yes\n")
    install_project(tree)


def bound_to_ens3(tree: Tree) -> None:
    tree.use_networkd("[Match]\nName=ens3\n\n[Network]\nDHCP=yes\n")
    install_project(tree)


def use_eth0(tree: Tree) -> None:
    tree.write("etc/network/interfaces.d/azure", "allow-hotplug eth0\niface eth0 inet dhcp\n")


def names_eth0(tree: Tree) -> None:
    use_eth0(tree)
    install_project(tree)


def names_eth0_and_has_it(tree: Tree) -> None:
    names_eth0(tree)
    tree.parameters += " net.ifnames=0"


def not_enabled(tree: Tree) -> None:
    tree.use_networkd()
    command(INSTALLER, "--no-enable", DESTDIR=tree.root)


def read_only(tree: Tree) -> None:
    sound(tree)
    # Its own services need these to be writable.
    tree.write("etc/fstab", "tmpfs /tmp tmpfs\ntmpfs /var/tmp tmpfs\n")


def python_minimal(tree: Tree) -> None:
    sound(tree)
    names = ("python3", "python3.11", "libpython3-stdlib", "libpython3.11-stdlib")
    command("chroot", tree.root, "dpkg", "--purge", "--force-depends", *names)


def panics(tree: Tree) -> None:
    sound(tree)
    add_service(tree.root, "panic", "sleep 5; echo c >/proc/sysrq-trigger")


def reboots_once(tree: Tree) -> None:
    sound(tree)
    add_service(tree.root, "once", "[ -e /done ] || { : >/done; systemctl --force reboot; }")


def names_vda(tree: Tree) -> None:
    sound(tree)
    tree.write("etc/fstab", "/dev/vda2 / ext4 defaults 0 1\n/dev/vda1 /boot vfat defaults 0 2\n")


def no_nvme_driver(tree: Tree) -> None:
    sound(tree)
    tree.parameters += " initcall_blacklist=nvme_init"


def silent(tree: Tree) -> None:
    sound(tree)
    tree.parameters = "console=tty0 no_timer_check"


def cloud_init(tree: Tree) -> None:
    tree.write("etc/cloud/cloud.cfg.d/90-azure.cfg", "datasource_list: [ Azure ]\n")


def waagent(tree: Tree, provisioning: str = "waagent") -> None:
    use_eth0(tree)
    tree.parameters += " net.ifnames=0"
    setting = f"s/^Provisioning.Agent=.*/Provisioning.Agent={provisioning}/"
    command("sed", "-i", setting, tree.root / "etc/waagent.conf")


def extensions(tree: Tree) -> None:
    waagent(tree, "disabled")
    install_project(tree)


def two_agents(tree: Tree) -> None:
    cloud_init(tree)
    install_project(tree)


CORRECTLY = "It will provision."
INCORRECTLY = "It will provision, but not correctly."
NOT = "It will not provision."
UNTOLD = "It could not be told whether it will provision."
STATUS = {CORRECTLY: 0, INCORRECTLY: 1, NOT: 1, UNTOLD: 3}


class Case(NamedTuple):
    prepare: Callable[[Tree], None]
    says: Sequence[str]  # patterns; those of the checks that are not ok begin with FAIL or \\?
    result: str = CORRECTLY
    packages: Sequence[str] = ("python3",)
    generation: int = 1
    mode: str = "rw"  # of the root
    format: str = "raw"  # of qemu-img, and its options
    options: Sequence[str] = ()


# The longest come first.
CASES = [
    Case(
        sound,
        [r"generation 2 \(it can boot by EFI on aarch64\)"],
        packages=ARM_PACKAGES,
        generation=2,
    ),
    Case(  # as Azure's own images are
        cloud_init,
        ["is the only agent +cloud-init"],
        packages=(*CLOUD_INIT_PACKAGES, "waagent", "eject", "openssh-server"),
    ),
    Case(
        waagent,
        ["takes the computer name .* from the provisioning DVD", "the only agent +walinuxagent"],
        packages=WAAGENT_PACKAGES,
    ),
    Case(
        extensions,
        ["is the only agent +custom-provisioning"],
        packages=EXTENSIONS_PACKAGES,
    ),
    Case(
        two_agents,
        ["FAIL +is the only agent +2 agents talk to Azure: cloud-init, custom-provisioning"],
        INCORRECTLY,
        packages=CLOUD_INIT_PACKAGES,
    ),
    Case(
        names_eth0_and_has_it,
        ["asks DHCP .*, on eth0\n", "restart ifup@eth0.service"],
        packages=IFUPDOWN,
    ),
    Case(
        read_only,
        ["FAIL +silent after a reboot +it reported Ready again: the unit was not disabled"],
        INCORRECTLY,
        mode="ro",
    ),
    Case(
        sound,
        ["-> 503", "-> 410", "takes the computer name +web000000"],
        generation=2,
        options=["--faults", "--name=web"],
    ),
    Case(
        sound,
        [
            r"vpc, 1,024.0 MiB\ngeneration 1 \(it can boot by BIOS\); ",
            "DHCP +REQUEST rehearsal000001",
            "networkctl reconfigure ens3",
            "asks DHCP .*, on ens3\n",
            "takes the computer name +rehearsal000000, from /metadata/instance",
            "is the only agent +custom-provisioning",
            "Linux version",
            "/dev/tcp/168.0.0.2/.*: Connection refused",
        ],
        format="vpc -o subformat=fixed,force_size",
    ),
    Case(silent, ["FAIL +speaks on the console .* console=ttyS0,"], INCORRECTLY, generation=2),
    Case(
        no_nvme_driver,
        ["FAIL +second VM is the same +asks DHCP: .* it is the disk driver: .* NVMe"],
        NOT,
        generation=2,
    ),
    Case(
        bound_to_ens3,
        ["FAIL +second VM .* it is the interface: .* VM 1's, ens3, .* here it is ens18, and eth0"],
        NOT,
    ),
    Case(reboots_once, ["VM +reset"]),
    Case(names_vda, ["FAIL +second VM .* names a disk by /dev/vda, which is another"], NOT),
    Case(panics, ["FAIL +stays up +Kernel panic.* sysrq"], INCORRECTLY),
    Case(names_eth0, [r"\? +asks DHCP .* eth0, .* ens3 here: add net.ifn"], UNTOLD, IFUPDOWN),
    Case(bound_to_mac_address, ["vhdx, ", r"\? +asks DHCP .* MAC address"], UNTOLD, format="vhdx"),
    Case(no_dhcp_client, ["FAIL +asks DHCP +no DHCP request .* no DHCP client"], NOT),
    Case(
        not_enabled,
        ["FAIL +reaches Azure +it asks DHCP but sends no request .*: its unit is not enabled"],
        NOT,
    ),
    Case(
        python_minimal,
        [
            "qcow2, ",
            "FAIL +reaches Azure +it asks DHCP but sends no request .* see its console",
            "From its console:(.|\n)*ModuleNotFoundError",
        ],
        NOT,
        format="qcow2",
    ),
]


class RehearsalTest(VMTest):
    @contextlib.contextmanager
    def unvisited_port(self) -> Iterator[int]:
        """A port of this machine to which nobody may connect meanwhile."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.settimeout(0)
            yield listener.getsockname()[1]
            with self.assertRaises(BlockingIOError):
                listener.accept()

    def setUp(self) -> None:
        super().setUp()
        shutil.copytree(str(ROOT / "tests"), str(self.directory / "tests"))
        shutil.copy(str(SCRIPT), str(self.directory))

    def rehearse(self, image: Path, *options: str, **environment: Any) -> Tuple[int, str]:
        """Rehearse IMAGE as nobody; return the status, and the VMs' console and the output."""
        console = new_directory() / "console"
        console.touch()
        console.chmod(0o666)
        words = (*options, f"--console={console}", image)
        done = attempt(*REHEARSE, *words, cwd=self.directory, **environment)
        return done.returncode, console.read_text(encoding="utf-8") + done.stdout

    def build_and_rehearse(self, case: Case, port: int) -> Tuple[int, str]:
        tree = Tree(new_directory(), case.packages)
        tree.write("port", str(port))
        case.prepare(tree)
        expected = REHEARSED.get(case.prepare.__name__)  # where both can see the same
        if expected is not None:
            done = attempt("python3", "-m", "tests.check", tree.root, cwd=ROOT)
            self.assertEqual(done.returncode, int(expected != r"\A\Z"), done.stdout)
            if done.returncode:
                self.assertRegex(done.stdout, expected)
        raw, image = tree.disk(case.generation, case.mode), tree.directory / "image"
        command("qemu-img", "convert", "-f", "raw", "-O", *case.format.split(), raw, image)
        raw.unlink()
        image.chmod(0o444)
        started = time.monotonic()
        result = self.rehearse(image, *case.options)
        note(f"{case.prepare.__name__}: {time.monotonic() - started:.0f} s\n{result[1]}")
        tree.remove()
        return result

    def check(self, case: Case, status: int, output: str) -> None:
        self.assertEqual(status, STATUS[case.result], output)
        self.assertIn(f"\n{case.result}\n", output)
        states = re.findall(r"(?m)^  (ok|FAIL|\?|-) ", output)
        self.assertEqual(len(states), 11, output)
        for state, pattern in (("FAIL", "FAIL"), ("?", "\\?")):
            expected = sum(said.startswith(pattern) for said in case.says)
            self.assertEqual(states.count(state), expected, output)
        for pattern in case.says:
            self.assertRegex(output, pattern)
        if case.result in (NOT, UNTOLD):
            self.assertIn("\nFrom its console:\n  | ", output)
        if case.result == CORRECTLY:
            self.assertNotIn("-", states, output)

    def test_each_image_gets_its_verdict(self) -> None:
        cases = [case for case in CASES if ONLY in (None, case.prepare.__name__)]
        self.assertTrue(cases, f"BOOT_CASE={ONLY}")
        self.assertLessEqual(set(REHEARSED), {case.prepare.__name__ for case in CASES})
        with self.unvisited_port() as port, ThreadPoolExecutor(3) as pool:
            results = [pool.submit(self.build_and_rehearse, case, port) for case in cases]
            for case, result in zip(cases, results):
                with self.subTest(case.prepare.__name__):
                    self.check(case, *result.result())

    def test_too_little_time_or_space_is_not_the_fault_of_the_image(self) -> None:
        tree = Tree(self.directory / "sound")
        sound(tree)
        image = tree.disk()
        status, output = self.rehearse(image, "--timeout=9")
        self.assertEqual(status, 3, output)
        self.assertRegex(output, r"\? +asks DHCP .* still booting .*: raise --timeout")
        small = self.directory / "small"
        small.mkdir()
        command("mount", "-t", "tmpfs", "-o", "size=3M,mode=1777", "tmpfs", small)
        self.addCleanup(command, "umount", small)
        status, output = self.rehearse(image, TMPDIR=small)
        self.assertEqual(status, 2, output)
        self.assertRegex(output, f"error: No space left on device: .*{small}")
        self.assertEqual(list(small.iterdir()), [])

    def test_image_that_is_more_than_a_file_is_refused_and_not_followed(self) -> None:
        text, secret = self.directory / "image, of text", self.directory / "secret"
        text.write_text("not a disk\n" * 100)
        secret.write_text("root:secret\n" * 100)
        with self.unvisited_port() as port:
            for name in (str(secret), f"nbd://127.0.0.1:{port}/x", os.devnull):
                image = self.directory / "backed.qcow2"
                options = ("-u", "-F", "raw", "-b", name)
                command("qemu-img", "create", "-f", "qcow2", *options, image, "1M")
                status, output = self.rehearse(image)
                self.assertEqual(status, 2)
                self.assertRegex(output, "flatten it first: qemu-img convert")
                self.assertNotIn("secret:", output)
        status, output = self.rehearse(text)
        self.assertEqual(status, 2)
        self.assertRegex(
            output, r"\A.*: nothing to boot: the first sector .* no boot signature.*\n\Z"
        )

    def test_commands_that_it_prints_make_a_vhd_that_azure_takes(self) -> None:
        raw = self.directory / "odd.raw"
        with open(str(raw), "wb") as file:
            file.truncate(33 * MIB + 5 * 4096)
        command("sh", "-c", f"echo 'label: gpt\nsize=31MiB, type=uefi' | sfdisk --quiet {raw}")
        for format in ("vpc", "vpc -o subformat=fixed", "qcow2", "raw"):
            with self.subTest(format):
                image = self.directory / "odd"
                command("qemu-img", "convert", "-f", "raw", "-O", *format.split(), raw, image)
                status, lines = verdict(inspect(image), [])
                commands = [line[2:] for line in lines[lines.index(VHD_HEADING) + 1 : -2]]
                command("sh", "-e", "-c", "\n".join(commands), cwd=self.directory)
                made = inspect(self.directory / "disk.vhd")
                self.assertEqual((made.format, made.obstacle, made.size), ("vpc", "", 34 * MIB))
                command("truncate", "--size=-512", self.directory / "disk.vhd")
                command("sfdisk", "--verify", self.directory / "disk.vhd")
                second_gpt = (self.directory / "disk.vhd").read_bytes()[-512:]
                self.assertTrue(second_gpt.startswith(b"EFI PART"))
                self.assertEqual(status, int("vpc" in format))

    def test_generation_is_what_the_disk_can_boot_as(self) -> None:
        image, loader = self.directory / "disk", self.directory / "loader"
        loader.write_text("a loader")
        start, size = BOOT_START * MIB // 512, (ROOT_START - BOOT_START) * 1024
        for label, bits, cluster, name, expected in (
            ("gpt", 12, 64, "BOOTX64.EFI", (2, "x86_64")),
            ("gpt", 16, 4, "BOOTAA64.EFI", (2, "aarch64")),
            ("gpt", 32, 1, "GRUBX64.EFI", (2, "x86_64")),  # it can boot as neither
            ("dos", 32, 1, "BOOTX64.EFI", (2, "x86_64")),
        ):
            with open(str(image), "wb") as file:
                file.truncate(DISK_SIZE * MIB)
            partition(image, label, "type=uefi")
            options = ("-F", bits, "-s", cluster, f"--offset={start}", "-h", start)
            command("mkfs.vfat", *options, image, size)
            mtools("mmd", image, "::EFI", "::EFI/BOOT")
            mtools("mcopy", image, loader, f"::EFI/BOOT/{name}")
            setup, how = find_setup(inspect(image), 0)
            self.assertEqual((setup.generation, setup.architecture), expected)
            self.assertEqual("neither EFI nor BIOS" in how, "GRUB" in name)

    def test_vhd_has_the_size_that_its_footer_states(self) -> None:
        """QEMU would go by the geometry, which cannot express every size."""
        image = self.directory / "footer.vhd"
        command("qemu-img", "create", "-f", "vpc", "-o", "subformat=fixed,force_size", image, "33M")
        footer = bytearray(image.read_bytes()[-512:])
        footer[28:32] = b"vpc "  # the creator: one of those whose geometry QEMU trusts
        footer[56:60] = bytes([993 >> 8, 993 & 255, 4, 17])  # cylinders, heads, sectors
        footer[64:68] = bytes(4)  # the checksum, which is of all but itself
        footer[64:68] = (~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big")
        image.write_bytes(image.read_bytes()[:-512] + footer)
        self.assertEqual(inspect(image).size, 33 * 1024 * 1024)
        by_geometry = command("qemu-img", "info", "-f", "vpc", "--output=json", image)
        self.assertNotIn(f"{33 << 20},", by_geometry)
