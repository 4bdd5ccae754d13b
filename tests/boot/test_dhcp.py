"""What a real DHCP server learns of the name: Azure's DNS learns just that."""

from typing import Callable

from tests.boot.machine import NEXT_UNIT, Boot, BootTest, Machine
from tests.boot.network import DhcpServer, Namespace, connect

FAST = ("--no-ping",)  # dnsmasq would ping an address for 3 s before it offers it
SLOW = ("--no-ping", "--dhcp-reply-delay=3")  # each offer takes 3 s


class DhcpBootTest(BootTest):
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

    def machine(self, variant: str = "plain") -> Machine:
        machine = super().machine(variant)
        machine.write("etc/systemd/system/next.service", NEXT_UNIT)
        machine.enable("next.service")
        return machine

    def assert_published(self, boot: Boot, server: DhcpServer, command: str) -> None:
        """The server learned the new name, for the same address, and the next unit had it."""
        self.assertTrue(
            any(line.startswith(f"<6>Hostname published by {command}, in ") for line in boot.lines),
            boot,
        )
        first, last = server.acknowledgements[0], server.acknowledgements[-1]
        names = [ack.name for ack in server.acknowledgements]
        self.figure(
            f"{names} {last.time - first.time:.2f} s apart; from Ready to the unit's end "
            f"{boot.seconds('ActiveEnter') - self.ready_time():.2f} s; the next unit: {boot.next}"
        )
        self.assertEqual((first.name, last.name), ("golden-image", "web-prod-01"), server.lines)
        self.assertEqual(last.address, first.address)
        for ack in server.acknowledgements[1:]:
            self.assertLess(self.azure.requests[-1].time, ack.time, "the last exchange comes first")
        self.assertEqual((boot.hostname, boot.enabled), ("web-prod-01", "disabled"))
        self.assertIn(first.address, boot.files["addresses"])
        self.assertEqual(boot.next, "connected", boot)

    def check(
        self, variant: str, configure: Callable[[Machine], None], command: str, *server: str
    ) -> None:
        """Boot an image of VARIANT, configured by CONFIGURE; COMMAND publishes its name."""
        dhcp = self.serve(*(server or FAST))
        machine = self.machine(variant)
        configure(machine)
        self.assert_published(machine.boot(self.network), dhcp, command)


def ifupdown(machine: Machine) -> None:
    machine.write("etc/network/interfaces", "auto lo host0\niface host0 inet dhcp\n")


def network_manager(machine: Machine) -> None:
    """Nothing to do: NetworkManager makes a profile for every cable."""


class DhcpTest(DhcpBootTest):
    def test_networkd_publishes_the_name(self) -> None:
        self.check("plain", Machine.use_networkd, "networkctl reconfigure host0")

    def test_network_manager_publishes_the_name(self) -> None:
        self.check("network-manager", network_manager, "nmcli device connect host0")

    def test_ifupdown_publishes_the_name(self) -> None:
        self.check("ifupdown", ifupdown, "systemctl try-restart networking.service")

    def test_dhcp_that_answers_late(self) -> None:
        server = self.serve(*SLOW)
        machine = self.machine()
        machine.use_networkd()
        boot = machine.boot(self.network)
        self.assertEqual(boot.unit["Result"], "success", boot)
        waited = server.acknowledgements[0].time - boot.seconds("ExecMainStart")
        lag = self.ready_time() - server.acknowledgements[0].time
        self.figure(f"DHCP answered after {waited:.2f} s, Ready {lag:.2f} s later")
        self.assertGreater(waited, 2)
        self.assertLess(lag, waited / 4 + 0.5)
        self.assert_published(boot, server, "networkctl reconfigure host0")

    def test_name_that_the_machine_had_already_is_not_published_again(self) -> None:
        server = self.serve(*FAST)
        machine = self.machine()
        machine.use_networkd()
        machine.write("etc/hostname", "web-prod-01\n")
        boot = machine.boot(self.network)
        self.assertEqual((boot.enabled, boot.next), ("disabled", "connected"), boot)
        self.assertEqual([ack.name for ack in server.acknowledgements], ["web-prod-01"])
        self.assertNotIn("published", "\n".join(boot.lines))

    def test_interface_that_nothing_manages_is_left_alone(self) -> None:
        self.network.ip("link", "set", "host0", "up")
        self.network.ip("address", "add", "10.0.0.40/24", "dev", "host0")
        self.network.ip("route", "add", "default", "via", "10.0.0.1")
        boot = self.machine().boot(self.network)
        self.assertEqual((boot.hostname, boot.enabled), ("web-prod-01", "disabled"), boot)
        notice = "<5>Hostname not published: host0 is not managed by"
        self.assertTrue(any(line.startswith(notice) for line in boot.lines), boot)
