"""What a real DHCP server learns of the name: Azure's DNS learns just that."""

from tests.boot.machine import Boot, BootTest, Machine
from tests.boot.network import DhcpServer, Namespace, connect

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


class DhcpTest(BootTest):
    """The machine's only way to Azure is a cable to a router, and an address of its DHCP."""

    def setUp(self) -> None:
        super().setUp()
        self.router = self.network  # Azure listens there
        self.router.add_platform()
        self.network = Namespace()
        self.addCleanup(self.network.remove)
        self.cable = connect(self.router, self.network)

    def serve(self, *options: str) -> DhcpServer:
        server = DhcpServer(self.router, self.cable, *options)
        self.addCleanup(server.stop)
        return server

    def networkd(self) -> Machine:
        machine = self.machine()
        machine.use_networkd()
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
        for ack in server.acknowledgements[1:]:
            self.assertLess(self.azure.requests[-1].time, ack.time, "the last exchange comes first")
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
