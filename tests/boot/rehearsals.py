"""Whole images, built and rehearsed, with what tests.rehearse must say of each.

`python3 -m unittest tests.boot.rehearsals` builds the images as root and rehearses them as nobody;
BOOT_CASE is the name of the only one to run.
"""

import os
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple, Sequence, Tuple

from tests.boot.container import add_service
from tests.boot.disk import Tree
from tests.boot.host import attempt, command, new_directory
from tests.boot.in_a_vm import VMTest
from tests.plain.harness import INSTALLER, ROOT, SCRIPT
from tests.vm import inspect

ONLY = os.environ.get("BOOT_CASE")

# The system's Python, since another one may be in a directory that nobody can read.
REHEARSE = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"),
    *("/usr/bin/python3", "-B", "-m", "tests.rehearse"),
]
CLOUD_INIT = ("python3", "cloud-init", "ifupdown", "isc-dhcp-client")


def install(tree: Tree) -> None:
    command(INSTALLER, DESTDIR=tree.root)


def sound(tree: Tree) -> None:
    """A sound image, which tries to reach the machine that runs QEMU, where somebody listens."""
    tree.use_networkd()
    install(tree)
    add_service(tree.root, "curious", "exec 3<>/dev/tcp/168.0.0.2/$(cat /port); echo connected: $?")


def bound_to_mac_address(tree: Tree) -> None:
    # the address of a VM that is gone
    tree.use_networkd("[Match]\nMACAddress=00:22:48:12:34:56\n\n[Network]\nDHCP=yes\n")
    install(tree)


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


def ifupdown(tree: Tree) -> None:
    tree.write("etc/cloud/cloud-init.disabled", "")
    tree.write("etc/network/interfaces.d/azure", "allow-hotplug ens3\niface ens3 inet dhcp\n")
    install(tree)


def cloud_init(tree: Tree) -> None:
    tree.write("etc/cloud/cloud.cfg.d/90-azure.cfg", "datasource_list: [ Azure ]\n")


def two_agents(tree: Tree) -> None:
    cloud_init(tree)
    install(tree)


CORRECTLY = "It will provision."
INCORRECTLY = "It will provision, but not correctly."
NOT = "It will not provision."


class Case(NamedTuple):
    prepare: Callable[[Tree], None]
    says: Sequence[str]  # patterns; those of the checks that fail begin with FAIL
    result: str = CORRECTLY
    packages: Sequence[str] = ("python3",)
    generation: int = 1
    mode: str = "rw"  # of the root
    format: str = "raw"  # of qemu-img, and its options
    options: Sequence[str] = ()


# The longest come first.
CASES = [
    Case(cloud_init, ["is the only agent +cloud-init"], packages=CLOUD_INIT),
    Case(
        two_agents,
        [
            "FAIL +reports Ready once +it reported Ready 2 times",
            "FAIL +is the only agent +2 agents talk to Azure: cloud-init, custom-provisioning",
        ],
        INCORRECTLY,
        packages=CLOUD_INIT,
    ),
    Case(
        ifupdown,
        ["Hostname published by systemctl restart ifup@ens3.service", "asks DHCP .*by dhclient\n"],
        packages=CLOUD_INIT,
    ),
    Case(
        read_only,
        ["FAIL +silent after a reboot +it reported Ready again: the unit was not disabled"],
        INCORRECTLY,
        mode="ro",
    ),
    Case(
        sound,
        ["-> 503", "takes the computer name +web000000"],
        generation=2,
        options=["--faults", "--name=web"],
    ),
    Case(
        sound,
        [
            "vpc, 1,024 MiB, generation 1; .*a private network",
            "DHCP +REQUEST rehearsal000001",
            "Hostname published by networkctl reconfigure ens3",
            "asks DHCP .*by systemd-networkd\n",
            "takes the computer name +rehearsal000000, from /metadata/instance/compute",
            "is the only agent +custom-provisioning",
            "Linux version",
            "/dev/tcp/168.0.0.2/.*: Connection refused",
        ],
        format="vpc -o subformat=fixed,force_size",
    ),
    Case(
        bound_to_mac_address,
        ["vhdx, ", "FAIL +asks DHCP +no DHCP request .* no DHCP client, .* another MAC address"],
        NOT,
        format="vhdx",
    ),
    Case(install, ["FAIL +asks DHCP +no DHCP request .* no DHCP client"], NOT),
    Case(
        not_enabled,
        ["FAIL +requests the goal state .*sends no request .*: its unit is not enabled"],
        NOT,
    ),
    Case(
        python_minimal,
        [
            "qcow2, ",
            "FAIL +requests the goal state +it asks DHCP but sends no request .* see its console",
            "From its console:(.|\n)*ModuleNotFoundError",
        ],
        NOT,
        format="qcow2",
    ),
]


class RehearsalTest(VMTest):
    def setUp(self) -> None:
        super().setUp()
        shutil.copytree(str(ROOT / "tests"), str(self.directory / "tests"))
        shutil.copy(str(SCRIPT), str(self.directory))

    def rehearse(self, image: Path, *options: str) -> Tuple[int, str]:
        """Rehearse IMAGE as nobody; return the status, and the VMs' console and the output."""
        console = image.with_name("console")
        console.touch()
        console.chmod(0o666)
        done = attempt(*REHEARSE, *options, f"--console={console}", image, cwd=self.directory)
        return done.returncode, console.read_text(encoding="utf-8") + done.stdout

    def build_and_rehearse(self, case: Case, port: int) -> Tuple[int, str]:
        tree = Tree(new_directory(), case.packages)
        tree.write("port", str(port))
        case.prepare(tree)
        raw, image = tree.disk(case.generation, case.mode), tree.directory / "image"
        command("qemu-img", "convert", "-f", "raw", "-O", *case.format.split(), raw, image)
        raw.unlink()
        image.chmod(0o444)
        result = self.rehearse(image, f"--generation={case.generation}", *case.options)
        tree.remove()
        return result

    def check(self, case: Case, status: int, output: str) -> None:
        self.assertEqual(status, 0 if case.result == CORRECTLY else 1, output)
        self.assertIn(f"\n{case.result}\n", output)
        states = re.findall(r"(?m)^  (ok|FAIL|\?) ", output)
        self.assertEqual(len(states), 9, output)
        failing = sum(pattern.startswith("FAIL") for pattern in case.says)
        self.assertEqual(states.count("FAIL"), failing, output)
        for pattern in case.says:
            self.assertRegex(output, pattern)
        if case.result == NOT:  # it ends with the first VM
            self.assertNotIn("VM 2", output)
            self.assertIn("\nFrom its console:\n  | ", output)
        else:
            self.assertNotIn("?", states, output)

    def test_each_image_gets_its_verdict(self) -> None:
        cases = [case for case in CASES if ONLY in (None, case.prepare.__name__)]
        with socket.socket() as listener, ThreadPoolExecutor(2) as pool:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.settimeout(0)
            port = listener.getsockname()[1]
            results = [pool.submit(self.build_and_rehearse, case, port) for case in cases]
            for case, result in zip(cases, results):
                with self.subTest(case.prepare.__name__):
                    self.check(case, *result.result())
            with self.assertRaises(BlockingIOError):  # no image reached this machine
                listener.accept()

    def test_file_that_is_not_a_disk(self) -> None:
        image = self.directory / "image, of text"
        image.write_text("not a disk\n" * 100)
        status, output = self.rehearse(image)
        self.assertEqual(status, 2)
        self.assertRegex(output, r"\A.*: not a disk: no boot signature.*\n\Z")

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
