"""What a real DHCP server learns of the name: Azure's DNS learns just that."""

import os
import time
from typing import Callable, NamedTuple

from tests.boot.container import (
    CONNECTED,
    SUITE,
    BootTest,
    Container,
    ContainerBoot,
    add_next_service,
)
from tests.boot.network import DhcpServer, add_interface, connect

RECONFIGURE = "networkctl reconfigure host0"
CONNECT = "nmcli device connect host0"


AZURE_ROUTES = "168.63.129.16/32,10.0.0.1,169.254.169.254/32,10.0.0.1"
NETWORKD_METRIC = 1024  # of a route that systemd-networkd has from DHCP
AUX_FILE = """\
[Match]
Name=aux0

[Network]
Address=10.200.0.2/24

[Route]
Gateway=10.200.0.1
Metric={}
"""
# Seconds; a script that only tried once a second would be half a second late.
ROUTE_DELAYS = [float(delay) for delay in os.environ.get("BOOT_ROUTE_DELAYS", "1.5").split()]


class Client(NamedTuple):
    """A DHCP client: the image that has it, what publishes its name, how it is configured."""

    variant: str
    command: str
    configure: Callable[[Container], None] = lambda machine: None


def ifupdown(machine: Container) -> None:
    machine.write("etc/network/interfaces", "auto lo host0\niface host0 inet dhcp\n")


CLIENTS = [
    Client("plain", RECONFIGURE, Container.use_networkd),
    Client("network-manager", CONNECT),  # makes a profile for every cable
]
if SUITE != "sid":  # which has no dhclient; dhcpcd needs a real interface: see in_a_vm
    CLIENTS.append(Client("ifupdown", "systemctl try-restart networking.service", ifupdown))


class DhcpBootTest(BootTest):
    """The machine's only way to Azure is a cable to a router, and an address of its DHCP."""

    def setUp(self) -> None:
        super().setUp()
        self.router = self.network  # Azure listens there
        self.router.add_platform()
        self.network = self.namespace()
        self.cable = connect(self.router, self.network)

    def serve(self, delay: int = 0, routes: str = "") -> DhcpServer:
        """A DHCP server, which takes DELAY seconds for each offer, and not 3 more for a ping."""
        options = ["--no-ping", f"--dhcp-reply-delay={delay}"]
        if routes:
            options.append(f"--dhcp-option=121,{routes}")
        server = DhcpServer(self.router, self.cable, *options)
        self.addCleanup(server.stop)
        return server

    def machine(self, variant: str = "plain") -> Container:
        machine = super().machine(variant)
        add_next_service(machine.root)
        return machine

    def assert_published(self, boot: ContainerBoot, server: DhcpServer, command: str) -> None:
        """The server learned the new name, for the same address, and the next unit had it."""
        self.assert_provisioned(boot)
        self.assert_line(boot, f"<6>DHCP request sent again by {command}")
        self.assert_line(boot, "<6>The network of host0 was back after ")
        first, last = server.acknowledgements[0], server.acknowledgements[-1]
        names = [ack.name for ack in server.acknowledgements]
        self.figure(f"{names} {last.time - first.time:.2f} s apart")
        self.assertEqual((first.name, last.name), ("golden-image", "web-prod-01"))
        self.assertEqual(last.address, first.address)
        renamed = next(ack for ack in server.acknowledgements if ack.name == "web-prod-01")
        self.assertLess(self.azure.requests[-1].time, renamed.time, "it was published too early")
        self.assertEqual(boot.messages("next"), [f"<6>{CONNECTED}"], boot)

    def seconds_from_route_to_ready(self, delay: float) -> float:
        """How long after its route to Azure a VM reports Ready, if the route comes DELAY s late."""
        self.doCleanups()
        self.setUp()
        machine = self.machine()
        with machine.start(self.network) as boot:
            boot.wait_for_console("Network is unreachable; retrying")
            time.sleep(delay)  # not for an event: that it takes this long is what is tried
            self.network.ip("link", "set", "host0", "up")
            self.network.ip("address", "add", "10.0.0.40/16", "dev", "host0")
            self.network.ip("route", "add", "default", "via", "10.0.0.1")
            routed = time.monotonic()
            boot.finish()
        seconds = self.azure.asked("health")[0].time - routed
        self.figure(f"route {delay} s late: Ready {seconds:.3f} s after it")
        return seconds

    def check(self, client: Client, delay: int = 0) -> None:
        """ContainerBoot an image with CLIENT, against a DHCP server that takes DELAY seconds."""
        with self.subTest(client=client, delay=delay):
            self.doCleanups()  # each boot has a network of its own
            self.setUp()
            server = self.serve(delay)
            machine = self.machine(client.variant)
            client.configure(machine)
            self.assert_published(machine.boot(self.network), server, client.command)


class DhcpTest(DhcpBootTest):
    def test_each_client_publishes_the_name(self) -> None:
        for client in CLIENTS:
            self.check(client)

    def test_dhcp_that_answers_late(self) -> None:
        server = self.serve(delay=3)
        machine = self.machine()
        machine.use_networkd()
        boot = machine.boot(self.network)
        self.assert_published(boot, server, RECONFIGURE)
        self.assertGreater(server.acknowledgements[0].time - boot.seconds("ExecMainStart"), 2)
        (retry,) = [line for line in boot.lines if "retrying" in line]
        self.assertIn("Network is unreachable; retrying", retry)

    def test_name_that_the_machine_had_already_is_not_published_again(self) -> None:
        server = self.serve()
        machine = self.machine()
        machine.use_networkd()
        machine.write("etc/hostname", "web-prod-01\n")
        boot = machine.boot(self.network)
        self.assert_provisioned(boot)
        self.assertEqual([ack.name for ack in server.acknowledgements], ["web-prod-01"])
        self.assertNotIn("DHCP", "\n".join(boot.lines))

    def test_interface_that_nothing_manages_is_left_alone(self) -> None:
        self.network.ip("link", "set", "host0", "up")
        self.network.ip("address", "add", "10.0.0.40/24", "dev", "host0")
        self.network.ip("route", "add", "default", "via", "10.0.0.1")
        boot = self.machine().boot(self.network)
        self.assert_provisioned(boot)
        self.assert_line(boot, "<5>DHCP request not sent again: no known DHCP client manages host0")

    def test_name_is_published_on_the_interface_that_leads_to_azure(self) -> None:
        """It has the routes of Azure's option 121, and "aux0" may have the better default route."""
        for default_route, other_metric in ((True, 1), (True, NETWORKD_METRIC), (False, None)):
            with self.subTest(default_route=default_route, other_metric=other_metric):
                self.doCleanups()
                self.setUp()
                server = self.serve(routes=AZURE_ROUTES + (",0.0.0.0/0,10.0.0.1" * default_route))
                machine = self.machine()
                machine.use_networkd()
                if other_metric:
                    add_interface(self.network, "aux0")
                    route = AUX_FILE.format(other_metric)
                    machine.write("etc/systemd/network/10-aux.network", route)
                self.assert_published(machine.boot(self.network), server, RECONFIGURE)

    def test_ready_follows_the_route_at_once(self) -> None:
        for delay in ROUTE_DELAYS:
            with self.subTest(delay=delay):
                self.assertLess(self.seconds_from_route_to_ready(delay), 0.25)
