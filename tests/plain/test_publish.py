"""Which DHCP client is asked to publish the name, and that none of them can fail the run."""

import errno
import os
import socket
import struct
import threading
import time
import unittest
from typing import Any, Dict, List, Sequence, Tuple
from unittest import mock

import azure_provision
from tests.plain.harness import ScriptTest, StandIns, logged

HEADER = b"Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
LO_INDEX = 1  # the index of the interface that plays the one that leads to Azure


def stand_in(*answers: Tuple[str, str]) -> str:
    """A stand-in that knows the arguments of ANSWERS, and what it does for each."""
    cases = "".join(f"'{arguments}') {action};; " for arguments, action in answers)
    return f'case "$*" in {cases} *) echo Unknown operation >&2; exit 1;; esac'


def networkctl(version: int, state: str = "configured") -> str:
    """A networkctl of systemd VERSION whose lo is in STATE, as it was seen to answer."""
    status = f"printf '* 1: lo\\n  Link File: n/a\\n       State: carrier ({state})\\n'"
    answers = [("status lo", status)]
    if version >= 230:  # before that: too many arguments
        answers.append(("--no-legend list lo", f"echo '  1 lo loopback carrier {state}'"))
    if version >= 244:
        answers.append(("reconfigure lo", ":"))
    return stand_in(*answers)


def nmcli(state: str = "100 (connected)") -> str:
    """An nmcli whose lo is in STATE."""
    return stand_in(
        ("-g GENERAL.STATE device show lo", f"echo '{state}'"), ("device connect lo", ":")
    )


def ifup(state: str) -> str:
    """A systemctl of ifupdown whose ifup@lo.service is in STATE."""
    return stand_in(
        ("is-active ifup@lo.service", f"echo '{state}'"), ("restart ifup@lo.service", ":")
    )


NETWORKCTL, RECONFIGURE = networkctl(252), "networkctl reconfigure lo"
IFQUERY = stand_in(("--state lo", "echo lo=lo"))
DHCPCD = stand_in(("-U lo", "printf 'broadcast_address=10.0.0.255\\ninterface=lo\\n'"))


def route(interface: bytes, metric: int = 100, prefix: str = "0.0.0.0/0") -> bytes:
    """A line of /proc/net/route, in the byte order of this machine."""
    address, length = prefix.split("/")
    mask = struct.unpack("=I", struct.pack("!I", 2**32 - 2 ** (32 - int(length))))[0]
    destination = struct.unpack("=I", socket.inet_aton(address))[0]
    line = b"%s\t%08X\t0104000A\t0003\t0\t0\t%d\t%08X\t0\t0\t0\n"
    return line % (interface, destination, metric, mask)


def address_event(index: int = LO_INDEX, kind: int = 20) -> bytes:
    """An RTM_NEWADDR for the interface INDEX, as rtnetlink(7) has it."""
    return struct.pack("=IHHIIBBBBI", 24, kind, 0, 0, 0, socket.AF_INET, 24, 0, 0, index)


class PublishTest(unittest.TestCase):
    """The step alone, with stand-ins for the clients and for what the kernel says."""

    routes = HEADER + route(b"lo")
    events: Sequence[bytes] = (address_event(),)  # of which the kernel tells

    def meanwhile(self, machine: StandIns, kernel: socket.socket) -> None:
        """What happens at the same time, at the other end of the socket for events."""

    def publish(self, limit: float = 30, **tools: str) -> List[str]:
        """Publish on a machine with TOOLS; return what was called, and keep the lines logged."""
        machine = StandIns(**tools)
        self.addCleanup(machine.remove)
        machine.route_file.write_bytes(self.routes)
        kernel, script = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for event in self.events:
            kernel.send(event)
        thread = threading.Thread(target=self.meanwhile, args=(machine, kernel))

        def network_events() -> socket.socket:
            self.assertEqual(machine.calls, [], "events could be missed")
            return script

        limits: Any = dict.fromkeys(("COMMAND_TIMEOUT", "NETWORK_TIMEOUT"), limit)
        stand_ins = machine.stand_ins(journal=True, network_events=network_events, **limits)
        with kernel, script, stand_ins, logged() as lines:
            thread.start()
            azure_provision.publish_hostname()
            thread.join()
        self.output = "".join(lines)
        return machine.calls

    def assert_published(self, command: str) -> None:
        back = r"<6>The network of lo was back after \d+\.\d\d s"
        self.assertRegex(self.output, f"^<6>DHCP request sent again by {command}\n{back}\n$")

    def assert_not_sent(self, *reasons: str) -> None:
        reason = ".*".join(["DHCP request not sent again: ", *reasons])
        self.assertRegex(self.output, f"^<5>{reason}.*; DNS may not have the hostname.*\n$")

    def test_each_client_is_asked_in_its_own_way(self) -> None:
        restart, hanging = "systemctl try-restart {}", "exec /bin/sleep 600"
        connect = "nmcli device connect lo"
        cases: List[Tuple[Dict[str, str], str]] = [
            ({"networkctl": NETWORKCTL}, RECONFIGURE),
            ({"nmcli": nmcli()}, connect),
            ({"systemctl": ifup("active")}, "systemctl restart ifup@lo.service"),
            ({"ifquery": IFQUERY, "systemctl": ""}, restart.format("networking.service")),
            ({"dhcpcd": DHCPCD, "systemctl": ""}, restart.format("dhcpcd.service")),
            # Not done yet, but the interface is theirs.
            ({"networkctl": networkctl(257, "configuring")}, RECONFIGURE),
            ({"nmcli": nmcli("40 (connecting (prepare))")}, connect),
            ({"nmcli": nmcli("90 (connecting (starting secondary...))")}, connect),
            # One that is of no use leaves it to the next.
            ({"networkctl": "echo configured; exit 1", "nmcli": nmcli()}, connect),
            ({"networkctl": hanging, "nmcli": nmcli()}, connect),
            ({"networkctl": networkctl(243), "systemctl": "exit 1", "nmcli": nmcli()}, connect),
        ]
        for version in (219, 229, 232, 241, 243):
            tools = {"networkctl": networkctl(version), "systemctl": ""}
            cases.append((tools, restart.format("systemd-networkd")))
        for tools, command in cases:
            with self.subTest(tools):
                limit = 1 if hanging in tools.values() else 30
                self.assertEqual(self.publish(limit=limit, **tools)[-1], command)
                self.assert_published(command)

    def test_interface_of_another_client_is_left_alone(self) -> None:
        for version, networkd, manager, unit in (
            (252, "unmanaged", "10 (unmanaged)", "inactive"),
            (241, "unmanaged", "20 (unavailable)", "inactive"),
            (229, "pending", "100 (connected (externally))", "failed"),
            (252, "unconfigured", "30 (disconnected)", "activating"),
            (219, "linger", "120 (failed)", "inactive"),
            (252, "", "", ""),
            (252, "\x1b[31mconfigured\x1b[0m", "100", "active\nactive"),
            (252, "garbage\udcff", "4 0", "reactive"),
        ):
            with self.subTest(networkd, version=version):
                calls = self.publish(
                    networkctl=networkctl(version, networkd),
                    nmcli=nmcli(manager),
                    systemctl=ifup(unit),
                    ifquery="",
                    dhcpcd="echo dhcpcd is not running",
                )
                self.assert_not_sent("no known DHCP client manages lo")
                for call in calls:
                    self.assertNotRegex(call, "start|connect|reconfigure")

    def test_machine_whose_clients_are_absent_or_hang_costs_a_notice_that_says_so(self) -> None:
        names = ("networkctl", "nmcli", "systemctl", "ifquery", "dhcpcd")
        self.publish()
        self.assert_not_sent(*(f"{name}: No such file or directory" for name in names))
        self.publish(limit=0.2, **dict.fromkeys(names, "exec /bin/sleep 600"))
        self.assert_not_sent(*(f"{name}: .*timed out" for name in names))

    def test_request_that_fails_or_hangs_costs_a_notice_that_says_so(self) -> None:
        for action, reason, limit in (
            ("echo Access denied >&2; exit 1", "Access denied", 30),
            ("exec /bin/sleep 600", ".*timed out", 1),
        ):
            failing = f"[ $1 != reconfigure ] || {{ {action}; }}; {NETWORKCTL}"
            self.publish(limit=limit, networkctl=failing)
            self.assert_not_sent(f"networkctl: {reason}")

    def test_network_that_does_not_come_back_costs_a_notice(self) -> None:
        self.events = [address_event(index=7), address_event(kind=21), address_event(kind=24)]
        self.publish(limit=1, networkctl=NETWORKCTL)
        self.assertRegex(self.output, "^<6>.*\n<5>lo has no network again after 1 s; DNS may")

    def test_wait_ends_with_the_route_to_azure_that_follows_the_address(self) -> None:
        def meanwhile(machine: StandIns, kernel: socket.socket) -> None:
            while "reconfigure" not in machine.record.read_text():
                time.sleep(0.01)
            machine.route_file.write_bytes(HEADER + route(b"eth9"))
            kernel.send(address_event())
            time.sleep(0.2)
            machine.route_file.write_bytes(self.routes)
            kernel.send(address_event(index=0, kind=24))

        self.events, self.meanwhile = [], meanwhile  # type: ignore[method-assign]
        self.publish(networkctl=NETWORKCTL)
        self.assert_published(RECONFIGURE)
        self.assertGreater(float(self.output.split()[-2]), 0.19)

    def test_more_events_than_the_kernel_can_keep_are_no_failure(self) -> None:
        recv = socket.socket.recv

        def flooded(events: socket.socket, size: int) -> bytes:
            data = recv(events, size)
            if data == b"lost":
                raise OSError(errno.ENOBUFS, "No buffer space available")
            return data

        self.events = [b"lost", address_event()]
        with mock.patch.object(socket.socket, "recv", flooded):
            self.publish(networkctl=NETWORKCTL)
        self.assert_published(RECONFIGURE)

    def test_best_route_to_azure_names_the_interface(self) -> None:
        azure, near = "168.63.129.16/32", "168.63.0.0/16"  # of option 121, and another
        for routes, interface in (
            ([route(b"a", 200), route(b"b", 100), route(b"c", 300)], "b"),
            ([route(b"a", 0), route(b"b", 1000, azure)], "b"),
            ([route(b"a", 1000, azure), route(b"b", 0, near), route(b"c", 0)], "a"),
            ([route(b"b"), route(b"a")], "b"),  # the first of equals
            ([route(b"a"), route(b"b")], "a"),
            ([route(b"a", 9, azure), route(b"b", 8, azure)], "b"),
            ([route(b"a", 0, "10.0.0.0/8"), route(b"b", 0, "169.254.169.254/32")], ""),
            ([route(b"*", 0), route(b"b", 512)], "b"),
            ([route(b"*")], ""),
            ([], ""),
        ):
            with self.subTest(routes):
                self.routes = HEADER + b"".join(routes)
                calls = self.publish(networkctl="exit 1")
                self.assert_not_sent(f"manages {interface};" if interface else "no route to")
                asked = [call.split()[-1] for call in calls]
                self.assertEqual(asked, [interface] * 2 if interface else [])

    def test_interface_name_that_is_not_utf_8_reaches_the_client_and_forges_no_line(self) -> None:
        self.routes = HEADER + route(b"\xff\xe9\x1bth0")
        calls = self.publish(networkctl="exit 1")
        self.assert_not_sent(r"manages \\udcff\\udce9\\x1bth0;")
        shown = os.fsdecode(b"networkctl --no-legend list \xff\xe9\x1bth0")
        self.assertEqual("\n".join(calls[:1]), shown)


class OrderTest(ScriptTest):
    def test_changed_name_is_published_once_it_is_set_and_before_the_unit_is_disabled(self) -> None:
        publish = ["networkctl --no-legend", "networkctl reconfigure"]
        for name, published in (("web-prod-01", publish), (socket.gethostname(), [])):
            self.azure.computer_name = name
            machine = self.machine(networkctl=NETWORKCTL, hostnamectl="", systemctl="")
            machine.route_file.write_bytes(HEADER + route(b"lo"))
            run = self.provision(machine=machine)  # the network does not come back
            self.assertEqual((run.status, "DHCP" in run.output), (0, bool(published)), run.output)
            calls = [" ".join(call.split()[:2]) for call in machine.calls]
            before = ["hostnamectl set-hostname", "fsync hostname:"]
            self.assertEqual(calls, [*before, *published, "systemctl disable"])
