"""Each DHCP client as Debian configures it, with a fast DHCP server and with one that takes 3 s.

`python3 -m unittest tests.boot.stock`, as root; BOOT_COUNT is the number of boots of each (1).
"""

import os

from tests.boot.machine import Machine
from tests.boot.test_dhcp import (
    CLIENTS,
    FAST,
    NETWORK_MANAGER,
    NETWORKD,
    SLOW,
    Client,
    DhcpBootTest,
)

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


MORE_CLIENTS = [
    Client("networkd with DHCP=yes", "plain", NETWORKD, dhcp_yes),
    Client("netplan", "netplan", NETWORKD, netplan),
    Client("networkd with polkitd", "polkit", NETWORKD, Machine.use_networkd),
    Client("networkd with dbus-broker", "dbus-broker", NETWORKD, Machine.use_networkd),
    Client("networkd with resolved", "resolved", NETWORKD, resolved),
    Client("NetworkManager with a profile", "network-manager", NETWORK_MANAGER, profile),
    Client("NetworkManager with polkitd", "network-manager-polkit", NETWORK_MANAGER),
    Client("NetworkManager with dbus-broker", "network-manager-broker", NETWORK_MANAGER),
    Client(
        "NetworkManager in a pre-up script", "network-manager", NETWORK_MANAGER, slow_dispatcher
    ),
]


class StockTest(DhcpBootTest):
    def test_each_client_publishes_the_name(self) -> None:
        for client in (*CLIENTS, *MORE_CLIENTS):
            for options in (FAST, SLOW) * COUNT:
                self.check(client, *options)

    def test_network_that_does_not_come_back_is_a_notice(self) -> None:
        server = self.serve(*FAST)
        with self.networkd_machine().start(self.network) as boot:
            self.azure.wait_for("compute")
            server.stop()
            boot.finish()
        self.assert_provisioned(boot)
        self.assert_line(boot, "<5>Hostname not published: the network of host0 is not")
