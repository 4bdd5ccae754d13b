"""Which DHCP client is asked to publish the name, and that none of them can fail the run."""

import errno
import os
import socket
import struct
import threading
import time
import unittest
from typing import Any, List, Sequence, Tuple
from unittest import mock

import azure_provision
from tests.plain.harness import Run, ScriptTest, StandIns, logged

HEADER = b"Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
WIRESERVER_ROUTE = b"eth9\t10813FA8\t0104000A\t0007\t0\t0\t5\tFFFFFFFF\t0\t0\t0\n"
UNMANAGED = "lo is not managed by systemd-networkd, NetworkManager, ifupdown or dhcpcd; reboot, or"
LOOPBACK = 1  # the index of the interface that plays the one that leads to Azure

# Stand-ins that say that they manage the interface.
NETWORKCTL = "[ $1 = reconfigure ] || echo '  1 lo loopback carrier configured'"
NMCLI = "[ $1 != -g ] || echo '100 (connected)'"
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

    # The interface is that of the best default route.
    routes = HEADER + WIRESERVER_ROUTE + default_route(b"eth8", 200) + default_route(b"lo", 100)
    events: Sequence[bytes] = (address_event(),)  # of which the kernel tells

    def publish(self, meanwhile: Any = lambda *_: None, **tools: str) -> List[str]:
        """Publish on a machine with TOOLS; return what was called, and keep the line logged.

        MEANWHILE is called in a thread, with the machine and the other end of the socket.
        """
        machine = StandIns(**tools)
        self.addCleanup(machine.remove)
        machine.route_file.write_bytes(self.routes)
        kernel, script = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        events = Events(socket.AF_UNIX, socket.SOCK_DGRAM, 0, script.detach())
        for event in self.events:
            kernel.send(event)
        thread = threading.Thread(target=meanwhile, args=(machine, kernel))
        started = time.monotonic()
        netlink = mock.patch.object(socket, "socket", lambda *kind: events)
        stand_ins = machine.stand_ins(journal=True, PUBLISH_TIMEOUT=1.2, SHOW_TIMEOUT=0.2)
        with kernel, events, netlink, stand_ins, logged() as lines:
            thread.start()
            azure_provision.publish_hostname()
            self.seconds = time.monotonic() - started
            thread.join()
        self.assertLess(self.seconds, 3)
        self.assertEqual(len(lines), 1, lines)
        self.line = lines[0]
        return machine.calls

    def assert_published(self, command: str) -> None:
        self.assertRegex(self.line, f"^<6>Hostname published by {command}, in ")

    def assert_notice(self, reason: str) -> None:
        self.assertIn(f"<5>Hostname not published: {reason}", self.line)

    def test_each_client_is_asked_in_its_own_way(self) -> None:
        configuring = NETWORKCTL.replace("configured", "configuring")
        connecting = NMCLI.replace("100 (connected)", "{} (connecting (...))")
        hanging, flooding = "exec /bin/sleep 600", "while :; do echo configured; done"
        networkctl, nmcli = "networkctl reconfigure lo", "nmcli device connect lo"
        for tools, command in (
            ({"networkctl": NETWORKCTL}, networkctl),
            ({"nmcli": NMCLI}, nmcli),
            ({"systemctl": IFUP}, "systemctl restart ifup@lo.service"),
            ({"ifquery": IFQUERY, "systemctl": ""}, "systemctl try-restart networking.service"),
            ({"dhcpcd": DHCPCD, "systemctl": ""}, "systemctl try-restart dhcpcd.service"),
            # Not done yet, but the interface is theirs.
            ({"networkctl": configuring}, networkctl),
            ({"nmcli": connecting.format(40)}, nmcli),
            ({"nmcli": connecting.format(70)}, nmcli),
            # One that is of no use leaves time for the next.
            ({"networkctl": "echo configured; exit 1", "nmcli": NMCLI}, nmcli),
            ({"networkctl": hanging, "nmcli": NMCLI}, nmcli),
            ({"networkctl": flooding, "nmcli": NMCLI}, nmcli),
        ):
            with self.subTest(tools):
                self.assertEqual(self.publish(**tools)[-1], command)
                self.assert_published(command)

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
                calls = self.publish(
                    networkctl=f"printf '  1 lo loopback routable {networkd}'",
                    nmcli=f"echo '{network_manager}'",
                    systemctl=f"echo '{unit}'",
                    ifquery="echo lo",
                    dhcpcd="",
                )
                self.assert_notice(UNMANAGED)
                self.assertEqual(len(calls), 5, "something was restarted")

    def test_machine_whose_clients_are_absent_or_hang_costs_a_notice(self) -> None:
        names = ("networkctl", "nmcli", "systemctl", "ifquery", "dhcpcd")
        for tools in ({}, dict.fromkeys(names, "exec /bin/sleep 600")):
            self.publish(**tools)
            self.assert_notice(UNMANAGED)

    def test_request_that_fails_hangs_or_floods_costs_a_notice(self) -> None:
        for action, reason in (
            ("echo no >&2; exit 1", "networkctl: no"),
            ("exec /bin/sleep 600", "networkctl: timed out after 1 s"),
            ("while :; do echo; done", "networkctl: printed more than 65536 bytes"),
        ):
            self.publish(networkctl=f"{NETWORKCTL}; [ $1 != reconfigure ] || {{ {action}; }}")
            self.assert_notice(reason)

    def test_network_that_does_not_come_back_costs_a_notice(self) -> None:
        self.events = [address_event(index=7), address_event(kind=21), address_event(kind=24)]
        self.publish(networkctl=NETWORKCTL)
        self.assert_notice("the network of lo is not back after 1 s")

    def test_wait_ends_with_the_default_route_that_follows_the_address(self) -> None:
        def meanwhile(machine: StandIns, kernel: socket.socket) -> None:
            while "reconfigure" not in machine.record.read_text():
                time.sleep(0.01)
            machine.route_file.write_bytes(HEADER + WIRESERVER_ROUTE)
            kernel.send(address_event())
            time.sleep(0.3)
            machine.route_file.write_bytes(self.routes)
            kernel.send(address_event(index=0, kind=24))

        self.events = []
        self.publish(meanwhile, networkctl=NETWORKCTL)
        self.assert_published("networkctl reconfigure lo")
        self.assertGreater(self.seconds, 0.3)

    def test_time_that_has_run_out_is_no_time_rather_than_no_limit(self) -> None:
        for seconds in (0, -1):
            failed = self.assertRaises(azure_provision.ProvisioningError)
            with failed, azure_provision.time_limit(seconds):
                time.sleep(30)

    def test_more_events_than_the_kernel_can_keep_are_no_failure(self) -> None:
        lost = OSError(errno.ENOBUFS, "No buffer space available")
        with mock.patch.object(Events, "recv", side_effect=lost):
            self.publish(networkctl=NETWORKCTL)
        self.assert_published("networkctl reconfigure lo")

    def test_odd_routing_tables_cost_a_notice(self) -> None:
        not_a_metric = default_route(b"lo").replace(b"100", b"x")
        for routes, reason in (
            (b"", "there is no default route"),
            (WIRESERVER_ROUTE, "there is no default route"),
            (default_route(b"*"), "there is no default route"),
            (b"lo\n", ""),
            (not_a_metric, ""),
        ):
            with self.subTest(routes):
                self.routes = HEADER + routes
                self.assertEqual(self.publish(networkctl=NETWORKCTL), [])
                self.assert_notice(reason)
        self.routes = b""
        self.publish(networkctl=NETWORKCTL)
        self.assert_notice("there is no default route")

    def test_interface_name_cannot_forge_a_line(self) -> None:
        self.routes = HEADER + default_route(b"lo\x1b[2J\x1c")
        names = [(LOOPBACK, "lo\x1b[2J\x1c")]
        with mock.patch.object(socket, "if_nameindex", lambda: names):
            self.publish(networkctl=NETWORKCTL)
        self.assert_published(r"networkctl reconfigure lo\\x1b\[2J\\x1c")

    def test_interface_name_that_is_not_utf_8_reaches_the_client_as_it_is(self) -> None:
        self.routes = HEADER + default_route(b"\xff\xe9th0")
        calls = self.publish(networkctl="exit 1")
        self.assert_notice("\\udcff\\udce9th0 is not managed by")
        self.assertEqual(calls, [os.fsdecode(b"networkctl --no-legend list \xff\xe9th0")])


class OrderTest(ScriptTest):
    def provision_with_networkd(self) -> Tuple[Run, List[str]]:
        """Run the script on a machine with networkd, whose network does not come back."""
        machine = self.machine(networkctl=NETWORKCTL, hostnamectl="", systemctl="")
        machine.route_file.write_bytes(HEADER + default_route(b"lo"))
        run = self.provision(machine=machine, PUBLISH_TIMEOUT=0.6, journal=True)
        self.assertEqual(run.status, 0, run.output)
        return run, [" ".join(call.split()[:2]) for call in machine.calls]

    def test_name_is_published_after_it_is_set_and_before_the_unit_is_disabled(self) -> None:
        run, calls = self.provision_with_networkd()
        before = ["hostnamectl set-hostname", "fsync hostname"]
        publish = ["networkctl --no-legend", "networkctl reconfigure"]
        self.assertEqual(calls, [*before, *publish, "systemctl disable"])
        self.assertIn("<5>Hostname not published: the network of lo is not back", run.output)

    def test_name_that_did_not_change_is_not_published(self) -> None:
        self.azure.computer_name = socket.gethostname()
        run, calls = self.provision_with_networkd()
        self.assertNotIn("networkctl", " ".join(calls))
        self.assertNotIn("published", run.output)
