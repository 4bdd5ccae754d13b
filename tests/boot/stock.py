"""Each DHCP client as Debian configures it, with a fast DHCP server and with one that takes 3 s.

`python3 -m unittest tests.boot.stock`, as root; BOOT_COUNT is the number of boots of each (1).
"""

import os

from tests.boot.machine import Machine, enable
from tests.boot.test_dhcp import CLIENTS, NETWORK_MANAGER, NETWORKD, Client, DhcpBootTest

COUNT = int(os.environ.get("BOOT_COUNT", "1"))

NETPLAN = '{network: {version: 2, ethernets: {all: {match: {name: "host*"}, dhcp4: true}}}}\n'
PROFILE = "[connection]\nid=cable\ntype=ethernet\n\n[ipv4]\nmethod=auto\n"


def netplan(machine: Machine) -> None:
    machine.write("etc/netplan/01-all.yaml", NETPLAN, 0o600)
    enable(machine.root, "systemd-networkd.service")


def profile_and_slow_script(machine: Machine) -> None:
    etc = "etc/NetworkManager"
    machine.write(f"{etc}/system-connections/cable.nmconnection", PROFILE, 0o600)
    machine.write(f"{etc}/dispatcher.d/pre-up.d/10-slow", "#!/bin/sh\nsleep 1\n", 0o755)


MORE_CLIENTS = [
    Client("plain", NETWORKD, lambda machine: machine.use_networkd("yes")),
    Client("netplan", NETWORKD, netplan),
    Client("network-manager-polkit", NETWORK_MANAGER),
    Client("network-manager-broker", NETWORK_MANAGER),
    Client("network-manager", NETWORK_MANAGER, profile_and_slow_script),
]


class StockTest(DhcpBootTest):
    def test_each_client_publishes_the_name(self) -> None:
        for client in (*CLIENTS, *MORE_CLIENTS):
            for delay in (0, 3) * COUNT:
                self.check(client, delay)
