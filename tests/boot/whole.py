"""What a container cannot show: clients that need udev or a real interface, and the whole sandbox.

`python3 -m unittest tests.boot.whole`, as root, boots whole VMs under QEMU, half a minute each;
BOOT_COUNT is the number of boots of each DHCP client (1).
"""

import os
import shutil
import tempfile
import time
import unittest
from pathlib import Path
from typing import Sequence

from azure_provision import UNIT, WIRESERVER
from tests.boot.disk import Tree, missing
from tests.boot.host import command
from tests.boot.test_boot import PROBE
from tests.harness import INSTALLER
from tests.vm import VM, Boot

COUNT = int(os.environ.get("BOOT_COUNT", "1"))
TIMEOUT = 120  # seconds, for a boot under emulation

INTERFACES = """\
source /etc/network/interfaces.d/*

auto lo
iface lo inet loopback

{verb} ens3
iface ens3 inet dhcp
"""
CONSOLE = "StandardOutput=journal+console\nStandardError=journal+console\n"

# Ordered after the unit and nothing else, and needs the network at once.
NEXT_UNIT = f"""\
[Unit]
After={UNIT}

[Service]
Type=oneshot
ExecStart=/bin/bash -c 'exec 3<>/dev/tcp/{WIRESERVER}/80 && echo the next unit has its network'
{CONSOLE}
[Install]
WantedBy=multi-user.target
"""


class WholeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        absent = missing()
        if absent:
            raise unittest.SkipTest(f"a whole VM needs {', '.join(absent)}")

    def tree(self, *packages: str, suite: str = "bookworm") -> Tree:
        """An image, with the unit installed."""
        directory = Path(tempfile.mkdtemp(prefix="azure-whole-"))
        self.addCleanup(shutil.rmtree, str(directory), ignore_errors=True)
        tree = Tree(directory, ("python3", *packages), suite)
        command(INSTALLER, DESTDIR=tree.root)
        tree.write("etc/systemd/system/next.service", NEXT_UNIT)
        tree.systemctl("enable", "next.service")
        return tree

    def note(self, text: str) -> None:
        path = os.environ.get("BOOT_FIGURES")
        if path:
            with open(path, "a", encoding="utf-8") as file:
                print(f"{self.id().split('.', 2)[-1]}: {text}", file=file)

    def assert_published(self, boot: Boot, publish: str) -> None:
        """DHCP learned the new name, and the next unit had its network."""
        done = "the next unit has its network"
        boot.wait(lambda: "Provisioned as" in boot.console, TIMEOUT)
        end = time.monotonic()
        self.assertTrue(boot.wait(lambda: done in boot.console, TIMEOUT), boot.console)
        names = [request.name for request in boot.dhcp if request.kind == "REQUEST"]
        ready = [request.time for request in boot.requests if request.resource == "health"]
        self.note(f"{names}, {end - ready[0]:.1f} s from Ready to the last line")
        self.assertIn(f"Hostname published by {publish}, in ", boot.console)
        self.assertEqual((names[0], names[-1]), ("golden-image", "rehearsal000000"), boot.dhcp)

    def check(self, tree: Tree, publish: str) -> None:
        disk = tree.disk()
        for number in range(COUNT):
            with self.subTest(number=number), VM(disk) as vm, vm.boot() as boot:
                self.assert_published(boot, publish)

    def ifupdown(self, verb: str, packages: Sequence[str], suite: str, publish: str) -> None:
        tree = self.tree(*packages, suite=suite)
        tree.write("etc/network/interfaces", INTERFACES.format(verb=verb))
        self.check(tree, publish)

    def test_ifupdown_with_dhclient_and_hotplug(self) -> None:
        packages = ("ifupdown", "isc-dhcp-client")
        publish = "systemctl restart ifup@ens3.service"
        self.ifupdown("allow-hotplug", packages, "bookworm", publish)

    def test_ifupdown_with_dhcpcd_and_hotplug(self) -> None:
        packages = ("ifupdown", "dhcpcd-base")
        publish = "systemctl restart ifup@ens3.service"
        self.ifupdown("allow-hotplug", packages, "trixie", publish)

    def test_ifupdown_with_dhcpcd(self) -> None:
        packages = ("ifupdown", "dhcpcd-base")
        publish = "systemctl try-restart networking.service"
        self.ifupdown("auto", packages, "trixie", publish)

    def test_dhcpcd_service(self) -> None:
        self.check(self.tree("dhcpcd", suite="trixie"), "systemctl try-restart dhcpcd.service")

    def test_networkd(self) -> None:
        tree = self.tree()
        tree.use_networkd()
        self.check(tree, "networkctl reconfigure ens3")

    def test_sandbox_leaves_little_to_write_and_only_the_platform_to_reach(self) -> None:
        tree = self.tree()
        tree.use_networkd()
        tree.write("usr/local/probe", PROBE.replace("10.0.0.1", "168.0.0.2"))
        probe = "[Service]\nExecStart=\nExecStart=/bin/bash /usr/local/probe\n"
        online = "[Unit]\nWants=network-online.target\nAfter=network-online.target\n"
        tree.write(f"etc/systemd/system/{UNIT}.d/probe.conf", online + probe)
        with VM(tree.disk()) as vm, vm.boot() as boot:
            self.assertTrue(boot.wait(lambda: "the next unit" in boot.console, TIMEOUT))
            said = [line.split(": ", 1)[1] for line in boot.lines if "azure-provisioning[" in line]
        self.assertEqual(
            said,
            [
                *("writable: /etc", "writable: /tmp", "writable: /run/shm", "writable: /var/tmp"),
                *("reachable: 168.63.129.16", "reachable: 169.254.169.254"),
            ],
        )
