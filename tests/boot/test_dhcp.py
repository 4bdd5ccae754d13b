"""What a real DHCP server learns of the name: Azure's DNS learns just that."""

import re
import subprocess
import threading
import time
from typing import List, NamedTuple

from tests.boot.machine import PREFIX, Boot, BootTest, Machine, Namespace, which

NETWORKD = """\
[Match]
Name=host0

[Network]
DHCP=ipv4
LinkLocalAddressing=no
"""
NETWORK_MANAGER = """\
[connection]
id=host0
type=ethernet
interface-name=host0

[ipv4]
method=auto

[ipv6]
method=disabled
"""


class Acknowledgement(NamedTuple):
    """A DHCPACK in dnsmasq's log: `dnsmasq-dhcp: DHCPACK(veth) 10.0.0.57 02:..:01 web-prod-01`."""

    time: float
    address: str
    name: str


class DhcpServer:
    """dnsmasq in the namespace of a router, at the other end of the machine's cable."""

    def __init__(self, router: Namespace, interface: str, *options: str) -> None:
        self.lines: List[str] = []
        self.acknowledgements: List[Acknowledgement] = []
        self.process = subprocess.Popen(
            [
                *("ip", "netns", "exec", router.name, which("dnsmasq") or "dnsmasq"),
                *("--keep-in-foreground", "--conf-file=/dev/null", "--log-facility=-"),
                *("--log-dhcp", "--port=0", "--bind-interfaces", f"--interface={interface}"),
                *("--dhcp-range=10.0.0.50,10.0.0.99,infinite", "--dhcp-authoritative"),
                *("--dhcp-leasefile=/dev/null", "--leasefile-ro", "--user=root"),
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in log:
                self.lines.append(line.rstrip())
                found = re.search(r"DHCPACK\(\S+\) (\S+) \S+ ?(\S*)", line)
                if found:
                    now = time.monotonic()
                    self.acknowledgements.append(Acknowledgement(now, *found.groups()))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.thread.join()


class DhcpTest(BootTest):
    """The machine's only way to Azure is a cable to a router, and an address of its DHCP."""

    def setUp(self) -> None:
        super().setUp()
        self.router = self.network  # Azure listens there
        self.router.add_platform()
        self.network = Namespace()
        self.addCleanup(self.network.remove)
        cable = f"{PREFIX}{self.router.name.split('-')[-1]}"
        self.router.ip("link", "add", cable, "type", "veth", "peer", "name", "host0")
        self.router.ip("link", "set", "host0", "netns", self.network.name)
        self.router.ip("address", "add", "10.0.0.1/24", "dev", cable)
        self.router.ip("link", "set", cable, "up")
        self.cable = cable

    def serve(self, *options: str) -> DhcpServer:
        server = DhcpServer(self.router, self.cable, *options)
        self.addCleanup(server.stop)
        return server

    def networkd(self) -> Machine:
        machine = self.machine()
        machine.write("etc/systemd/network/10-host0.network", NETWORKD)
        machine.enable("systemd-networkd.service")
        return machine

    def network_manager(self) -> Machine:
        machine = self.machine("network-manager")
        profile = "etc/NetworkManager/system-connections/host0.nmconnection"
        machine.write(profile, NETWORK_MANAGER)
        (machine.root / profile).chmod(0o600)
        return machine

    def assert_published(self, boot: Boot, server: DhcpServer, command: str) -> None:
        """The server's last word to the machine has the new name and the address of before."""
        self.assertIn(f"<6>Hostname published by {command}", boot.lines, boot)
        first, last = server.acknowledgements[0], server.acknowledgements[-1]
        for ack in server.acknowledgements:
            self.figure(f"DHCPACK {ack.address} {ack.name}, {ack.time - first.time:.2f} s")
        self.assertEqual((first.name, last.name), ("golden-image", "web-prod-01"), server.lines)
        self.assertEqual(last.address, first.address)
        self.assertLess(self.ready_time(), last.time)
        self.assertEqual((boot.hostname, boot.enabled), ("web-prod-01", "disabled"))
        self.assertIn(first.address, boot.files["addresses"])

    def test_networkd_publishes_the_name(self) -> None:
        server = self.serve("--no-ping")
        boot = self.networkd().boot(self.network)
        self.assert_published(boot, server, "networkctl reconfigure host0")

    def test_network_manager_publishes_the_name(self) -> None:
        server = self.serve("--no-ping")
        boot = self.network_manager().boot(self.network)
        self.assert_published(boot, server, "nmcli device connect host0")

    def test_dhcp_that_answers_late(self) -> None:
        server = self.serve()  # it pings an address for 3 s before it offers it
        boot = self.networkd().boot(self.network)
        self.assertEqual(boot.unit["Result"], "success", boot)
        waited = server.acknowledgements[0].time - boot.seconds("ExecMainStart")
        lag = self.ready_time() - server.acknowledgements[0].time
        self.figure(f"DHCP answered after {waited:.2f} s, Ready {lag:.2f} s later")
        self.assertGreater(waited, 2)
        self.assertLess(lag, waited / 4 + 0.5)
        self.assert_published(boot, server, "networkctl reconfigure host0")

    def test_name_that_the_machine_had_already_is_not_published_again(self) -> None:
        server = self.serve("--no-ping")
        machine = self.networkd()
        machine.write("etc/hostname", "web-prod-01\n")
        boot = machine.boot(self.network)
        self.assertEqual(boot.enabled, "disabled", boot)
        self.assertEqual([ack.name for ack in server.acknowledgements], ["web-prod-01"])
        self.assertNotIn("published", "\n".join(boot.lines))

    def test_client_that_is_not_known_is_told_of(self) -> None:
        self.network.ip("link", "set", "host0", "up")
        self.network.ip("address", "add", "10.0.0.40/24", "dev", "host0")
        self.network.ip("route", "add", "default", "via", "10.0.0.1")
        boot = self.machine().boot(self.network)
        self.assertEqual((boot.hostname, boot.enabled), ("web-prod-01", "disabled"), boot)
        notice = "<5>The hostname will be published at the next boot: host0 has no DHCP"
        self.assertTrue(any(line.startswith(notice) for line in boot.lines), boot)
