"""Each DHCP client as Debian configures it, with a fast DHCP server and with one that takes 3 s.

`python3 -m unittest tests.boot.stock`, as root; BOOT_COUNT is the number of boots of each (1).
"""

import os
from typing import Callable

from tests.boot.machine import Machine
from tests.boot.test_dhcp import FAST, SLOW, DhcpBootTest, ifupdown, network_manager

COUNT = int(os.environ.get("BOOT_COUNT", "1"))

NETPLAN = """\
network:
  version: 2
  ethernets:
    all:
      match:
        name: "host*"
      dhcp4: true
"""
PROFILE = """\
[connection]
id=cable
type=ethernet

[ipv4]
method=auto
"""


def dhcp_yes(machine: Machine) -> None:
    machine.use_networkd("yes")


def netplan(machine: Machine) -> None:
    machine.write("etc/netplan/01-all.yaml", NETPLAN, 0o600)
    machine.enable("systemd-networkd.service")


def resolved(machine: Machine) -> None:
    machine.use_networkd()
    machine.enable("systemd-resolved.service")


def profile(machine: Machine) -> None:
    machine.write("etc/NetworkManager/system-connections/cable.nmconnection", PROFILE, 0o600)


def slow_dispatcher(machine: Machine) -> None:
    script = "etc/NetworkManager/dispatcher.d/pre-up.d/10-slow"
    machine.write(script, "#!/bin/sh\nsleep 1\n", 0o755)


class StockTest(DhcpBootTest):
    def each(self, variant: str, configure: Callable[[Machine], None], command: str) -> None:
        for number in range(COUNT):
            for server in (FAST, SLOW):
                with self.subTest(number=number, server=server):
                    self.doCleanups()
                    self.setUp()
                    self.check(variant, configure, command, *server)

    def networkd(self, variant: str, configure: Callable[[Machine], None]) -> None:
        self.each(variant, configure, "networkctl reconfigure host0")

    def network_manager(self, variant: str, configure: Callable[[Machine], None]) -> None:
        self.each(variant, configure, "nmcli device connect host0")

    def test_networkd_with_dhcp_ipv4(self) -> None:
        self.networkd("plain", Machine.use_networkd)

    def test_networkd_with_dhcp_yes(self) -> None:
        self.networkd("plain", dhcp_yes)

    def test_netplan(self) -> None:
        self.networkd("netplan", netplan)

    def test_networkd_with_polkitd(self) -> None:
        self.networkd("polkit", Machine.use_networkd)

    def test_networkd_with_dbus_broker(self) -> None:
        self.networkd("dbus-broker", Machine.use_networkd)

    def test_networkd_with_resolved(self) -> None:
        self.networkd("resolved", resolved)

    def test_network_manager_with_its_default_profile(self) -> None:
        self.network_manager("network-manager", network_manager)

    def test_network_manager_with_a_profile(self) -> None:
        self.network_manager("network-manager", profile)

    def test_network_manager_with_polkitd(self) -> None:
        self.network_manager("network-manager-polkit", network_manager)

    def test_network_manager_with_dbus_broker(self) -> None:
        self.network_manager("network-manager-broker", network_manager)

    def test_network_manager_while_a_pre_up_script_runs(self) -> None:
        self.network_manager("network-manager", slow_dispatcher)

    def test_ifupdown_with_dhclient(self) -> None:
        self.each("ifupdown", ifupdown, "systemctl try-restart networking.service")

    def test_network_that_does_not_come_back_is_a_notice(self) -> None:
        server = self.serve(*FAST)
        machine = self.machine()
        machine.use_networkd()
        with machine.start(self.network) as console:
            self.azure.wait_for("compute")
            server.stop()
            boot = console.finish()
        self.assertEqual((boot.hostname, boot.enabled), ("web-prod-01", "disabled"), boot)
        self.assertEqual(boot.unit["Result"], "success")
        notice = "<5>Hostname not published: the network of host0 is not"
        self.assertTrue(any(line.startswith(notice) for line in boot.lines), boot)
