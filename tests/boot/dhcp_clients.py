"""Each DHCP client as Debian configures it, and servers that are slow: DHCP's, and Azure's.

`python3 -m unittest tests.boot.dhcp_clients`, as root; BOOT_COUNT=N boots each N times (1).
"""

import os

from tests.boot.container import BootTest, Container, enable
from tests.boot.test_dhcp import CLIENTS, CONNECT, RECONFIGURE, Client, DhcpBootTest
from tests.fake_azure import Slow

COUNT = int(os.environ.get("BOOT_COUNT", "1"))

NETPLAN = '{network: {version: 2, ethernets: {all: {match: {name: "host*"}, dhcp4: true}}}}\n'
CABLE_PROFILE = "[connection]\nid=cable\ntype=ethernet\n\n[ipv4]\nmethod=auto\n"


def netplan(machine: Container) -> None:
    machine.write("etc/netplan/01-all.yaml", NETPLAN, 0o600)
    enable(machine.root, "systemd-networkd.service")


def resolved(machine: Container) -> None:
    machine.use_networkd()
    enable(machine.root, "systemd-resolved.service")


def profile(machine: Container) -> None:
    machine.write("etc/NetworkManager/system-connections/cable.nmconnection", CABLE_PROFILE, 0o600)


def slow_script(machine: Container) -> None:
    script = "etc/NetworkManager/dispatcher.d/pre-up.d/10-slow"
    machine.write(script, "#!/bin/sh\nsleep 1\n", 0o755)


MORE_CLIENTS = [
    Client("plain", RECONFIGURE, lambda machine: machine.use_networkd("yes")),
    Client("netplan", RECONFIGURE, netplan),
    Client("polkit", RECONFIGURE, Container.use_networkd),
    Client("dbus-broker", RECONFIGURE, Container.use_networkd),
    Client("resolved", RECONFIGURE, resolved),
    Client("network-manager-polkit", CONNECT),
    Client("network-manager-broker", CONNECT),
    Client("network-manager", CONNECT, profile),
    Client("network-manager", CONNECT, slow_script),
]


class SlowAzureTest(BootTest):
    def test_answers_that_take_35_seconds_each_are_waited_for(self) -> None:
        self.network.add_platform()
        for resource in ("goalstate", "health", "instance"):
            self.azure.script(resource, [Slow(35)])
        with self.machine().start(self.network) as boot:
            boot.finish(timeout=180)
        self.assert_provisioned(boot)
        self.assertEqual(self.resources(), ["goalstate", "health", "instance"])


class StockTest(DhcpBootTest):
    def test_each_client_publishes_the_name(self) -> None:
        for client in (*CLIENTS, *MORE_CLIENTS):
            for delay in (0, 3) * COUNT:
                self.check(client, delay)

    def test_network_that_does_not_come_back_costs_a_notice(self) -> None:
        server = self.serve()
        machine = self.machine()
        machine.use_networkd()
        with machine.start(self.network) as boot:
            self.azure.wait_for("instance")
            server.stop()
            boot.finish()
        self.assert_provisioned(boot)
        self.assert_line(boot, "<5>host0 has no network again after 30 s")
