"""Which DHCP client is asked to publish the name, and that none of them can fail the run."""

import errno
import os
import socket
import struct
import threading
import time
import unittest
from typing import Any, Dict, List, Sequence
from unittest import mock

import azure_provision
from tests.harness import Machine, ScriptTest

HEADER = b"Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
WIRESERVER_ROUTE = b"eth9\t10813FA8\t0104000A\t0007\t0\t0\t5\tFFFFFFFF\t0\t0\t0\n"
NOTICE = "Hostname not published: "
UNMANAGED = "lo is not managed by systemd-networkd, NetworkManager, ifupdown or dhcpcd (restart"
LOOPBACK = 1  # the index of the interface that plays the one that leads to Azure

# Stand-ins that say that they manage the interface.
NETWORKD = "[ $1 = reconfigure ] || echo '  1 lo loopback carrier configured'"
NETWORK_MANAGER = "[ $1 != -g ] || echo '100 (connected)'"
IFUP = "[ $1 != is-active ] || echo active"
IFQUERY, DHCPCD = "echo lo=lo", "echo interface=lo"


def default_route(interface: bytes, metric: int = 100) -> bytes:
    return interface + b"\t00000000\t0104000A\t0003\t0\t0\t%d\t00000000\t0\t0\t0\n" % metric


def address_event(index: int = LOOPBACK, kind: int = 20) -> bytes:
    """An RTM_NEWADDR for the interface INDEX, as rtnetlink(7) has it."""
    return struct.pack("=IHHIIBBBBI", 24, kind, 0, 0, 0, socket.AF_INET, 24, 0, 0, index)


class Events(socket.socket):
    """A socket that takes rtnetlink's place."""

    def bind(self, groups: Any) -> None:
        """Subscribe to nothing: the test sends the events."""


class PublishTest(unittest.TestCase):
    """The step alone, with stand-ins for the clients and for what the kernel says."""

    routes = HEADER + WIRESERVER_ROUTE + default_route(b"lo")

    events: Sequence[bytes] = (address_event(),)  # of which the kernel tells

    def meanwhile(self, machine: Machine, kernel: socket.socket) -> None:
        """What happens while the script publishes."""

    def publish(self, **tools: str) -> Machine:
        """Publish on a machine with TOOLS."""
        machine = Machine(**tools)
        self.addCleanup(machine.remove)
        machine.route_file.write_bytes(self.routes)
        kernel, script = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        events = Events(socket.AF_UNIX, socket.SOCK_DGRAM, 0, script.detach())
        for event in self.events:
            kernel.send(event)
        thread = threading.Thread(target=self.meanwhile, args=(machine, kernel))
        self.lines: List[str] = []
        patches: Dict[str, Any] = {
            "ROUTE_FILE": str(machine.route_file),
            "PUBLISH_TIMEOUT": 1.2,
            "log": lambda priority, line: self.lines.append(f"<{priority}>{line}"),
        }
        started = time.monotonic()
        netlink = mock.patch.object(socket, "socket", lambda *kind: events)
        with kernel, events, netlink, mock.patch.multiple(azure_provision, **patches):
            with mock.patch.dict(os.environ, {"PATH": str(machine.bin)}):
                thread.start()
                azure_provision.publish_hostname()
                self.seconds = time.monotonic() - started
            thread.join()
        self.assertLess(self.seconds, 3)
        self.assertEqual(len(self.lines), 1, self.lines)
        return machine

    def assert_notice(self, reason: str) -> None:
        self.assertIn(f"<5>{NOTICE}{reason}", self.lines[0])

    def test_each_client_is_asked_in_its_own_way(self) -> None:
        for tools, command in (
            ({"networkctl": NETWORKD}, "networkctl reconfigure lo"),
            ({"nmcli": NETWORK_MANAGER}, "nmcli device connect lo"),
            ({"systemctl": IFUP}, "systemctl restart ifup@lo.service"),
            ({"ifquery": IFQUERY, "systemctl": ""}, "systemctl try-restart networking.service"),
            ({"dhcpcd": DHCPCD, "systemctl": ""}, "systemctl try-restart dhcpcd.service"),
        ):
            with self.subTest(command):
                machine = self.publish(**tools)
                self.assertRegex(self.lines[0], f"^<6>Hostname published by {command}, in ")
                self.assertEqual(machine.calls[-1], command)

    def test_client_that_is_not_done_yet_manages_the_interface_already(self) -> None:
        for state in ("40 (connecting (prepare))", "70 (connecting (getting IP configuration))"):
            self.publish(nmcli=f"[ $1 != -g ] || echo '{state}'")
            self.assertIn("published by nmcli device connect lo", self.lines[0])
        self.publish(networkctl=NETWORKD.replace("configured", "configuring"))
        self.assertIn("published by networkctl reconfigure lo", self.lines[0])

    def test_interface_of_another_client_is_left_alone(self) -> None:
        for networkd, network_manager, unit in (
            ("unmanaged", "10 (unmanaged)", "inactive"),
            ("pending", "100 (connected (externally))", "failed"),
            ("unconfigured", "30 (disconnected)", "activating"),
            ("linger", "120 (failed)", "inactive"),
            ("", "", ""),
            ("\x1b[31mconfigured\x1b[0m", "100", "active\nactive"),
            (r"\377\000garbage", "4 0", "reactive"),
        ):
            with self.subTest(networkd):
                machine = self.publish(
                    networkctl=f"printf '  1 lo loopback routable {networkd}'",
                    nmcli=f"echo '{network_manager}'",
                    systemctl=f"echo '{unit}'",
                )
                self.assert_notice(UNMANAGED)
                self.assertEqual(len(machine.calls), 3, "something was restarted")

    def test_client_that_does_not_run_is_passed_over(self) -> None:
        failing = "echo 'Failed to connect to bus' >&2; exit 1"
        self.publish(networkctl=failing, nmcli=NETWORK_MANAGER)
        self.assertIn("published by nmcli", self.lines[0])

    def test_clients_that_hang_or_flood_leave_their_share_of_the_time_to_the_others(self) -> None:
        hang, flood = "exec /bin/sleep 600", "while :; do echo configured; done"
        for tools in ({"networkctl": hang}, {"networkctl": flood}):
            self.publish(nmcli=NETWORK_MANAGER, **tools)
            self.assertIn("published by nmcli", self.lines[0])
        names = ("networkctl", "nmcli", "systemctl", "ifquery", "dhcpcd")
        self.publish(**dict.fromkeys(names, hang))
        self.assert_notice(UNMANAGED)

    def test_request_that_fails_hangs_or_floods_costs_a_notice(self) -> None:
        for action, reason in (
            ("echo no >&2; exit 1", "networkctl: no"),
            ("exec /bin/sleep 600", "networkctl: timed out after 1 s"),
            ("while :; do echo; done", "networkctl: printed more than 65536 bytes"),
        ):
            self.publish(networkctl=f"{NETWORKD}; [ $1 != reconfigure ] || {{ {action}; }}")
            self.assert_notice(reason)

    def test_network_that_does_not_come_back_costs_a_notice(self) -> None:
        others = [address_event(index=7), address_event(kind=21), address_event(kind=24)]
        for self.events in ([], others):
            self.publish(networkctl=NETWORKD)
            self.assert_notice("the network of lo is not back: timed out after 1 s")

    def test_wait_ends_with_the_default_route_that_follows_the_address(self) -> None:
        def meanwhile(machine: Machine, kernel: socket.socket) -> None:
            while "reconfigure" not in machine.record.read_text():
                time.sleep(0.01)
            machine.route_file.write_bytes(HEADER + WIRESERVER_ROUTE)
            kernel.send(address_event())
            time.sleep(0.3)
            machine.route_file.write_bytes(self.routes)
            kernel.send(address_event(index=0, kind=24))

        self.events = []
        with mock.patch.object(self, "meanwhile", meanwhile):
            self.publish(networkctl=NETWORKD)
        self.assertIn("published by networkctl", self.lines[0])
        self.assertTrue(0.3 < self.seconds < 1, self.seconds)

    def test_more_events_than_the_kernel_can_keep_are_no_failure(self) -> None:
        lost = OSError(errno.ENOBUFS, "No buffer space available")
        with mock.patch.object(Events, "recv", side_effect=lost):
            self.publish(networkctl=NETWORKD)
        self.assertIn("published by networkctl", self.lines[0])

    def test_machine_without_a_client_costs_a_notice(self) -> None:
        self.publish()
        self.assert_notice(UNMANAGED)

    def test_interface_is_the_one_of_the_best_default_route(self) -> None:
        self.routes = HEADER + default_route(b"eth8", 200) + default_route(b"lo", 100)
        self.assertEqual(self.publish(networkctl=NETWORKD).calls[-1], "networkctl reconfigure lo")

    def test_odd_routing_tables_cost_a_notice(self) -> None:
        for routes in (HEADER + WIRESERVER_ROUTE, HEADER, b"", HEADER + default_route(b"*")):
            with self.subTest(routes):
                self.routes = routes
                self.assertEqual(self.publish(networkctl=NETWORKD).calls, [])
                self.assert_notice("there is no default route")

    def test_routing_table_that_makes_no_sense_costs_a_notice(self) -> None:
        for self.routes in (HEADER + b"lo\n", HEADER + default_route(b"lo").replace(b"100", b"x")):
            self.publish(networkctl=NETWORKD)
            self.assert_notice("")

    def test_interface_name_cannot_forge_a_line(self) -> None:
        self.routes = HEADER + default_route(b"lo\x1b[2J\x1c")
        names = [(LOOPBACK, "lo\x1b[2J\x1c")]
        with mock.patch.object(socket, "if_nameindex", lambda: names):
            machine = self.publish(networkctl=NETWORKD)
        self.assertIn(r"networkctl reconfigure lo\x1b[2J\x1c, in", self.lines[0])
        self.assertTrue(machine.calls, "it was not asked")

    def test_interface_name_that_is_not_utf_8_reaches_the_client_as_it_is(self) -> None:
        self.routes = HEADER + default_route(b"\xff\xe9th0")
        machine = self.publish()
        self.assert_notice("\\udcff\\udce9th0 is not managed by")
        machine = self.publish(networkctl="exit 1")
        self.assertIn(b"networkctl --no-legend list \xff\xe9th0\n", machine.record.read_bytes())


class OrderTest(ScriptTest):
    def test_name_is_published_after_it_is_set_and_before_the_unit_is_disabled(self) -> None:
        machine = self.machine(networkctl=NETWORKD, hostnamectl="", systemctl="")
        machine.route_file.write_bytes(HEADER + default_route(b"lo"))
        run = self.provision(machine=machine, PUBLISH_TIMEOUT=0.5, journal=True)
        self.assertEqual(run.status, 0, run.output)
        self.assertEqual(
            machine.calls,
            [
                "hostnamectl set-hostname web-prod-01",
                "fsync hostname",
                "networkctl --no-legend list lo",
                "networkctl reconfigure lo",
                "systemctl disable --no-reload azure-provisioning.service",
            ],
        )
        self.assertIn(f"<5>{NOTICE}the network of lo is not back", run.output)

    def test_name_that_did_not_change_is_not_published(self) -> None:
        self.azure.computer_name = socket.gethostname()
        machine = self.machine(networkctl=NETWORKD, hostnamectl="", systemctl="")
        machine.route_file.write_bytes(HEADER + default_route(b"lo"))
        run = self.provision(machine=machine)
        self.assertNotIn("networkctl", " ".join(machine.calls))
        self.assertNotIn("published", run.output)
