"""What a container cannot show: clients that need udev or a real interface, and the whole sandbox.

`python3 -m unittest tests.boot.whole`, as root, boots whole VMs under QEMU, half a minute each;
BOOT_COUNT is the number of boots of each DHCP client (1).
"""

import os
import time
import unittest

from tests.boot import disk
from tests.boot.disk import Tree
from tests.boot.host import (
    command,
    missing,
    new_directory,
    new_name,
    note,
    remove_tree,
    skip_if,
    which,
)
from tests.boot.machine import CONNECTED, add_next_service
from tests.boot.test_boot import PROBED, add_probe
from tests.harness import INSTALLER
from tests.vm import VM, Boot

COUNT = int(os.environ.get("BOOT_COUNT", "1"))
TIMEOUT = 120  # seconds, for a boot under emulation
QEMU = {"qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils"}

INTERFACES = """\
source /etc/network/interfaces.d/*

auto lo
iface lo inet loopback

{} ens3
iface ens3 inet dhcp
"""


class VMTest(unittest.TestCase):
    """A test with whole VMs, and a directory for their images, `self.directory`."""

    @classmethod
    def setUpClass(cls) -> None:
        qemu = [f"{tool} ({package})" for tool, package in QEMU.items() if which(tool) is None]
        skip_if([*missing(), *disk.missing(), *qemu])

    def setUp(self) -> None:
        self.directory = new_directory()
        self.addCleanup(remove_tree, self.directory)


class WholeTest(VMTest):
    def tree(self, *packages: str, suite: str = "bookworm") -> Tree:
        """An image, with the unit installed."""
        tree = Tree(self.directory / new_name(), ("python3", *packages), suite)
        command(INSTALLER, DESTDIR=tree.root)
        add_next_service(tree.root)
        return tree

    def wait_for(self, boot: Boot, text: str) -> None:
        self.assertTrue(boot.wait(lambda: text in boot.console, TIMEOUT), boot.console)

    def check(self, tree: Tree, publish: str) -> None:
        """DHCP learns the new name by PUBLISH, and the next unit has its network."""
        image = tree.disk()
        for _ in range(COUNT):
            with self.subTest(publish=publish), VM(image) as vm, vm.boot() as boot:
                self.wait_for(boot, "Provisioned as")
                end = time.monotonic()
                self.wait_for(boot, CONNECTED)
                names = [request.name for request in boot.dhcp if request.kind == "REQUEST"]
                ready = [request.time for request in boot.requests if request.resource == "health"]
                note(f"{publish}: {names}, {end - ready[0]:.1f} s from Ready to the last line")
                self.assertIn(f"Hostname published by {publish}, in ", boot.console)
                self.assertEqual((names[0], names[-1]), ("golden-image", "rehearsal000000"))

    def test_ifupdown(self) -> None:
        hotplug = "systemctl restart ifup@ens3.service"
        auto = "systemctl try-restart networking.service"
        for verb, package, suite, publish in (
            ("allow-hotplug", "isc-dhcp-client", "bookworm", hotplug),
            ("allow-hotplug", "dhcpcd-base", "trixie", hotplug),
            ("auto", "dhcpcd-base", "trixie", auto),
        ):
            tree = self.tree("ifupdown", package, suite=suite)
            tree.write("etc/network/interfaces", INTERFACES.format(verb))
            self.check(tree, publish)

    def test_dhcpcd_service(self) -> None:
        self.check(self.tree("dhcpcd", suite="trixie"), "systemctl try-restart dhcpcd.service")

    def test_networkd(self) -> None:
        tree = self.tree()
        tree.use_networkd()
        self.check(tree, "networkctl reconfigure ens3")

    def test_sandbox_leaves_little_to_write_and_only_the_platform_to_reach(self) -> None:
        tree = self.tree()
        tree.use_networkd()
        add_probe(tree.root)
        with VM(tree.disk()) as vm, vm.boot() as boot:
            self.wait_for(boot, CONNECTED)
            said = [line.split(": ", 1)[1] for line in boot.lines if "azure-provisioning[" in line]
        self.assertEqual(said, PROBED)
