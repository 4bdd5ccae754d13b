"""What a container cannot show: clients that need udev or a real interface, and the whole sandbox.

`python3 -m unittest tests.boot.in_a_vm`, as root, boots whole VMs under QEMU, half a minute each;
BOOT_COUNT is the number of boots of each DHCP client (1).
"""

import os
import unittest
from pathlib import Path

from tests.boot import disk
from tests.boot.container import CONNECTED, add_next_service
from tests.boot.disk import Tree
from tests.boot.host import command, missing, new_directory, note, remove_tree, skip_if, which
from tests.boot.test_boot import SANDBOX_ALLOWS, add_probe
from tests.plain.harness import INSTALLER
from tests.vm import VM, VMBoot

VM_COUNT = int(os.environ.get("BOOT_COUNT", "1"))
VM_TIMEOUT = 120  # seconds, for a boot under emulation

INTERFACES = "auto lo\niface lo inet loopback\n\n{} ens3\niface ens3 inet dhcp\n"


class VMTest(unittest.TestCase):
    """A test with whole VMs, which has a directory, `self.directory`."""

    @classmethod
    def setUpClass(cls) -> None:
        qemu = [tool for tool in ("qemu-system-x86_64", "qemu-img") if which(tool) is None]
        skip_if([*missing(), *disk.missing_tools(), *qemu])

    def setUp(self) -> None:
        self.directory = new_directory()
        self.addCleanup(remove_tree, self.directory)


class WholeTest(VMTest):
    def tree(self, *packages: str, suite: str = "bookworm") -> Tree:
        """An image, with the unit installed."""
        tree = Tree(new_directory(), ("python3", *packages), suite)
        self.addCleanup(remove_tree, tree.directory)
        command(INSTALLER, DESTDIR=tree.root)
        add_next_service(tree.root)
        return tree

    def wait_for(self, boot: VMBoot, text: str) -> None:
        self.assertTrue(boot.wait(lambda: text in boot.console, VM_TIMEOUT), boot.console)

    def check(self, image: Path, publish: str) -> None:
        """DHCP learns the new name by PUBLISH, and the next unit has its network."""
        with self.subTest(publish=publish), VM(image) as vm, vm.boot() as boot:
            self.wait_for(boot, "Provisioned as")
            self.wait_for(boot, CONNECTED)
            names = [request.name for request in boot.dhcp if request.kind == "REQUEST"]
            ready = next(request.time for request in boot.requests if request.resource == "health")
            note(f"{publish}: {names}, Ready after {ready - boot.started:.1f} s")
            self.assertIn(f"DHCP request sent again by {publish}", boot.console)
            self.assertEqual((names[0], names[-1]), ("golden-image", "rehearsal000000"))

    def test_each_client_of_debian_13_publishes_the_name(self) -> None:
        for packages, verb, publish in (
            (["ifupdown", "dhcpcd-base"], "allow-hotplug", "restart ifup@ens3.service"),
            (["ifupdown", "dhcpcd-base"], "auto", "try-restart networking.service"),
            (["dhcpcd"], "", "try-restart dhcpcd.service"),
        ):
            tree = self.tree(*packages, suite="trixie")
            if verb:
                tree.write("etc/network/interfaces", INTERFACES.format(verb))
            image = tree.disk()
            for _ in range(VM_COUNT):
                self.check(image, f"systemctl {publish}")

    def test_sandbox_leaves_little_to_write_and_only_the_platform_to_reach(self) -> None:
        tree = self.tree()
        tree.use_networkd()
        add_probe(tree.root)
        with VM(tree.disk()) as vm, vm.boot() as boot:
            self.wait_for(boot, CONNECTED)
            said = [line.split(": ", 1)[1] for line in boot.lines if "azure-provisioning[" in line]
        self.assertEqual(said, SANDBOX_ALLOWS)
