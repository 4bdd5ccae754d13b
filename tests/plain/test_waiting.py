"""Faults of every class in each step, answers that come late, and what ends a wait."""

import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
import unittest
from typing import Any, Callable, List, Sequence, Tuple, Union

import azure_provision
from tests.fake_azure import OK_LINE, Answer, Flood, Raw, Reset, Silence, Slow, Status, Text
from tests.plain.harness import ROOT, ScriptTest, start_script

CHUNKED = OK_LINE + b"Transfer-Encoding: chunked\r\n\r\n"

# What no step takes for an answer, and what is said of it.
FAULTS: List[Tuple[Answer, str]] = [
    (Reset(), "Connection reset by peer"),
    (Raw(b""), "closed connection"),
    (Raw(b"\x00\xff\r\n<3>forged\r\n\r\n"), r"\\x00\\xff"),
    (Raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "SSH-2.0"),
    (Silence(), "timed out"),
    (Flood(OK_LINE, b"X: y\r\n" * 1000), "headers"),
    (Flood(OK_LINE + b"X: "), "65536 bytes"),
    # A status that is not accepted; a redirect is not followed.
    (Status(302, headers={"Location": "/machine?comp=goalstate"}), "302 Found"),
    (Raw(b"HTTP/1.1 500 no\r<3>forged\r\nContent-Length: 0\r\n\r\n"), r"500 no\\r<3>forged"),
]
FAULTS += [(Status(status), f" {status} ") for status in (401, 403, 404, 410, 429, 500, 503)]
# Bodies that never end or were cut short, where a body is read.
BODIES: List[Answer] = [
    Flood(OK_LINE + b"\r\n"),
    Flood(CHUNKED + b"fffffffffffff\r\n"),
    Raw(OK_LINE + b"Content-Length: 11\r\n\r\n"),
    Raw(OK_LINE + b"Content-Length: 99999999999999999999\r\n\r\nweb-prod"),
    Raw(CHUNKED + b"20\r\nweb-prod\r\n"),
]


class FaultTest(ScriptTest):
    """A run that has no time to try again."""

    def refuse(self, resource: str, answers: Sequence[Answer], reason: str = "") -> None:
        """The run fails at once, for REASON, when RESOURCE gives ANSWERS; nothing is changed."""
        with self.subTest(resource, reason=reason):
            self.azure.script(resource, answers)
            self.azure.requests.clear()
            limits: Any = {"READY_LIMIT": 0, "HOSTNAME_LIMIT": 0}
            limits["RESPONSE_TIMEOUT"] = 0.2 if reason == "timed out" else 30
            machine = self.machine()
            run = self.provision(machine=machine, **limits)
            self.assertEqual((run.status, machine.calls), (1, []))
            self.assertRegex(run.lines[-1], f"^Not provisioned: .*{reason}.*; gave up after")
            self.assertEqual(self.azure.requests[-1].resource, resource)

    def test_faulty_answer_in_each_step(self) -> None:
        for answer, reason in FAULTS:
            self.refuse("goalstate", [answer], reason)
            self.refuse("health", [answer], reason)
        self.refuse("health", [Status(400)], " 400 ")
        self.assertFalse(self.azure.ready.is_set())
        for answer, reason in FAULTS:
            self.refuse("instance", [answer], reason)
        for answer, reason in (*FAULTS[-3:], (Status(400), " 400 ")):
            self.refuse("instance", [Status(400), answer], reason)
        for answer in BODIES:
            self.refuse("goalstate", [answer])
            self.refuse("instance", [answer])

    def test_invalid_goal_state(self) -> None:
        usual, entity = self.azure.goal_state(), '<!DOCTYPE x [<!ENTITY a "aaa">]><GoalState '
        bomb = usual.replace("<GoalState ", entity).replace("</ContainerId>", "&a;</ContainerId>")
        cases: List[Union[bytes, str]] = ["", "<a>" * 100000, "<html>It works!</html>", bomb]
        cases += [bomb.replace("utf-8", "utf-16").encode("utf-16"), "<GoalState>&a;</GoalState>"]
        for name in ("ContainerId", "InstanceId", "RoleInstance"):
            start, rest = usual.split(f"<{name}>")
            end = rest.split(f"</{name}>")[1]
            cases += [start + end, f"{start}<{name}> \n </{name}>{end}"]
        for goal_state in cases:
            self.refuse("goalstate", [Text(goal_state)], "The goal state ")

    def test_status_of_the_health_report_is_the_answer_whatever_its_body(self) -> None:
        length, chunked = b"Content-Length: ", b"Transfer-Encoding: chunked\r\n"
        lengths = [length + n + b"\r\n" for n in (b"0\r\nContent-Length: 0", b"x", b"9" * 20)]
        for head in (*lengths, chunked, b""):
            for answer in (Raw(OK_LINE + head + b"\r\n\xffno"), Flood(OK_LINE + head + b"\r\n")):
                with self.subTest(vars(answer)):
                    self.azure.requests.clear()
                    self.azure.script("health", [answer])
                    self.assertEqual(self.provision().status, 0)
                    self.assertEqual(len(self.azure.requests), 3)


class RecoveryTest(ScriptTest):
    def test_every_fault_in_a_row_in_each_step_and_then_success(self) -> None:
        flaws = [answer for answer, _ in FAULTS if not isinstance(answer, Silence)]
        for resource in ("goalstate", "health", "instance"):
            self.azure.script(resource, flaws)
        machine = self.machine()
        run = self.provision(machine=machine)
        self.assertEqual(run.status, 0, run.output)
        requests = [request.resource for request in self.azure.requests]
        count, posts = len(flaws), ["goalstate", "health"] * (len(flaws) + 1)
        self.assertEqual(requests, ["goalstate"] * count + posts + ["instance"] * (count + 1))
        self.assertEqual(machine.calls[0], "hostnamectl set-hostname web-prod-01")

    def test_answers_that_come_late_are_waited_for(self) -> None:
        for resource in ("goalstate", "health", "instance"):
            self.azure.script(resource, [Slow(0.5)])
        self.assertEqual(self.provision(CONNECT_TIMEOUT=0.2).status, 0)
        self.assertEqual(len(self.azure.requests), 3)

    def test_connection_that_is_not_answered_is_soon_given_up(self) -> None:
        with socket.socket() as full, socket.socket() as first, socket.socket() as second:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for client in (first, second):  # the next SYN is dropped
                client.setblocking(False)
                client.connect_ex(full.getsockname())
            wireserver = "--wireserver={}:{}".format(*full.getsockname())
            run = self.provision(wireserver, READY_LIMIT=0, CONNECT_TIMEOUT=0.2)
        self.assertRegex(run.lines[-1], "timed out; gave up after 0 s")

    def test_same_reason_is_logged_once_and_another_one_again(self) -> None:
        self.azure.script("goalstate", [Status(s) for s in (503, 503, 500, 500, 503)])
        run = self.provision()
        reasons = [line.split(":")[-1].split()[0] for line in run.lines if "retrying" in line]
        self.assertEqual((run.status, reasons), (0, ["503", "500", "503"]), run.output)

    def test_each_step_gives_up_at_its_limit_after_an_attempt_every_second(self) -> None:
        for resource in ("goalstate", "health", "instance"):
            limit = "HOSTNAME_LIMIT" if resource == "instance" else "READY_LIMIT"
            options: Any = {limit: 20}
            self.azure.requests.clear()
            self.azure.script(resource, [], forever=Status(429))
            machine = self.machine()
            run = self.provision(machine=machine, journal=True, **options)
            self.azure.script(resource, [])
            self.assertEqual((run.status, machine.calls), (1, []))
            self.assertRegex(run.lines[-1], "^<3>Not provisioned: .* 429 .*; gave up after 20 s; ")
            self.assertEqual(len(self.azure.asked(resource)), 21)


def in_a_network_namespace(test: Callable[[Any], None]) -> Callable[[Any], None]:
    """Run TEST in a process whose only interface is lo, and that is down."""

    def wrapper(self: unittest.TestCase) -> None:
        if os.environ.get("IN_A_NETWORK_NAMESPACE"):
            return test(self)
        unshare = ["unshare", "-n" if os.geteuid() == 0 else "-rn"]
        if subprocess.call([*unshare, "true"], stderr=subprocess.DEVNULL) != 0:
            raise unittest.SkipTest("network namespaces are not allowed here")
        command = [*unshare, "env", "IN_A_NETWORK_NAMESPACE=1", sys.executable, "-m", "unittest"]
        command, pipe = [*command, self.id()], subprocess.PIPE
        process = subprocess.run(command, cwd=str(ROOT), stderr=pipe, encoding="utf-8")
        self.assertEqual(process.returncode, 0, process.stderr)
        return None

    return wrapper


def set_up(interface: bytes, address: str = "127.0.0.1") -> None:
    """Give INTERFACE, lo or an alias of it, an ADDRESS, and set it up: netdevice(7)."""
    sockaddr = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8916, struct.pack("16s16s", interface, sockaddr))  # SIOCSIFADDR
        fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", interface, 1))  # SIOCSIFFLAGS, IFF_UP


class EventTest(ScriptTest):
    """In real time, with the kernel's own events."""

    @in_a_network_namespace
    def test_network_that_comes_up_ends_the_wait_at_once(self) -> None:
        def log(_: int, message: str) -> None:
            if "Network is unreachable; retrying" in message:
                set_up(b"lo")

        real: Any = {"time": time, "wait_for_event": azure_provision.wait_for_event, "log": log}
        started = time.monotonic()
        run = self.provision(MIN_PAUSE=20, MAX_PAUSE=30, **real)
        self.assertLess(time.monotonic() - started, 10)
        self.assertEqual((run.status, len(self.azure.requests)), (0, 3))

    @in_a_network_namespace
    def test_however_many_events_come_imds_is_asked_five_times_a_second_at_most(self) -> None:
        set_up(b"lo")
        self.azure.rate_limit = 5
        self.azure.newest_version = "2017-06-01"  # refuses both requests of an attempt
        with start_script(self.machine(), *self.endpoints) as process:
            self.azure.wait_for("instance")
            end = time.monotonic() + 2
            while time.monotonic() < end:  # more than the kernel can keep
                set_up(b"lo:1", f"127.0.1.{1 + int(end * 1e6) % 200}")
                end -= 1e-6
            self.assertIsNone(process.poll())
            process.kill()
            output, _ = process.communicate()
        statuses = {request.status for request in self.azure.asked("instance")}
        self.assertEqual(statuses, {400}, output)
        self.assertGreater(len(self.azure.asked("instance")), 3)
