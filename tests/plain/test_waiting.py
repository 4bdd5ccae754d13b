"""Faults of every class in every step, recovery after them, and both deadlines."""

import tracemalloc
from typing import Any, Dict, List, Sequence, Tuple, Union

from azure_provision import READY_LIMIT, ProvisioningError, keep_trying
from tests.fake_azure import (
    OK_LINE,
    Answer,
    FakeAzure,
    Flood,
    Raw,
    Reset,
    Silence,
    Status,
    Text,
    Trickle,
)
from tests.plain.harness import Clock, ScriptTest, start_script

MIB = 1024 * 1024
CHUNKED = OK_LINE + b"Transfer-Encoding: chunked\r\n\r\n"
TIMED_OUT = "timed out after 0 s"
TRUNCATED = "the body is truncated, or over 1048576 bytes"

# What no step takes for an answer, and what is said of it.
FAULTS: List[Tuple[Answer, str]] = [
    (Reset(), "Connection reset by peer"),
    (Raw(b""), "closed connection without response"),
    (Raw(b"\x00\xff\r\n<3>forged\r\n\r\n"), r"\\x00\\xff"),
    (Raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "SSH-2.0"),
    (Raw(b"HTTP/1.1 OK OK\r\n\r\n"), "HTTP/1.1 OK OK"),
    # No end, or too late.
    (Silence(), TIMED_OUT),
    (Trickle(OK_LINE + b"X: "), TIMED_OUT),
    (Trickle(OK_LINE + b"Content-Length: 500\r\n\r\n", interval=0.1), TIMED_OUT),
    # Newer Pythons count these.
    (Flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), f"{TIMED_OUT}|more than 100 interim"),
    (Flood(OK_LINE + b"\r\n"), TRUNCATED),
    (Flood(OK_LINE, b"X: y\r\n" * 1000), "got more than 100 headers"),
    (Flood(OK_LINE + b"X: "), "got more than 65536 bytes"),
    (Flood(CHUNKED + b"-1\r\n"), "got more than 65536 bytes when reading chunk size"),
    (Flood(CHUNKED + b"fffffffffffff\r\n"), TRUNCATED),
    # Too much, or too little.
    (Text("x" * (MIB + 1)), TRUNCATED),
    (Raw(OK_LINE + b"Content-Length: 99999999999999999999\r\n\r\nweb-prod"), TRUNCATED),
    (Raw(OK_LINE + b"Content-Length: 11\r\n\r\n"), TRUNCATED),
    (Raw(CHUNKED + b"20\r\nweb-prod\r\n"), "IncompleteRead"),
    (Raw(CHUNKED + b"hello\r\nweb\r\n0\r\n\r\n"), "IncompleteRead"),
    # A status that is not accepted; its body is not waited for, and a redirect not followed.
    (Status(302, headers={"Location": "/machine?comp=goalstate"}), "302 Found"),
    (Trickle(b"HTTP/1.1 503 Later\r\nContent-Length: 5\r\n\r\n", b"", 1), " 503 Later"),
    (Raw(b"HTTP/1.1 500 no\r<3>forged\r\nContent-Length: 0\r\n\r\n"), r"500 no\\r<3>forged; gave"),
]
for _status in (401, 410, 429, 500, 503):
    FAULTS.append((Status(_status), f" {_status} "))
for _length in (b"0_3", b"-3", b"", b"\xb2", b"3\r\nContent-Length: 4"):
    _answer = Raw(OK_LINE + b"Content-Length: " + _length + b"\r\n\r\nweb")
    FAULTS.append((_answer, "the Content-Length is not one number"))


class FaultTest(ScriptTest):
    """A run that has no time to try again."""

    def refuse(self, resource: str, answers: Sequence[Answer], reason: str) -> None:
        """The run fails at once, for REASON, when RESOURCE gives ANSWERS; nothing is changed."""
        with self.subTest(resource, reason=reason):
            self.azure.script(resource, answers)
            self.azure.requests.clear()
            limits: Dict[str, Any] = {"READY_LIMIT": 0, "HOSTNAME_LIMIT": 0}
            limits["RESPONSE_TIMEOUT"] = 0.25 if TIMED_OUT in reason else 10
            machine = self.machine()
            run = self.provision(machine=machine, **limits)
            self.assertEqual((run.status, machine.calls), (1, []))
            self.assertRegex(run.lines[-1], f"^Not provisioned: .*({reason})")
            self.assertLess(len(run.lines[-1]), 360)
            self.assertEqual(self.azure.requests[-1].resource, resource)

    def test_faulty_answer_in_each_step(self) -> None:
        for resource, before, statuses in (
            ("goalstate", [], (201, 204, 400)),
            ("health", [], (400, 404)),
            ("compute", [], ()),
            ("compute", [Status(400), Status(400)], ()),  # an old IMDS
        ):
            faults = [(Status(status), f" {status} ") for status in statuses]
            for answer, reason in (*FAULTS, *faults):
                self.refuse(resource, [*before, answer], reason)
            self.assertEqual(self.azure.ready.is_set(), resource == "compute")

    def test_invalid_goal_state(self) -> None:
        cases: List[Tuple[Union[bytes, str], str]] = [
            ("", "is not valid XML: no element found"),
            ("<a>" * 100000, "is not valid XML"),
            ("<html><body>It works!</body></html>", "no ContainerId or no InstanceId"),
            ('<!DOCTYPE x [<!ENTITY a "a">]><GoalState>&a;</GoalState>', "has a DOCTYPE or a NUL"),
            ("<GoalState>&a\u2028\x85;</GoalState>", "is not valid XML"),
            # UTF-16 would hide a DOCTYPE.
            ("<!DOCTYPE x><GoalState/>".encode("utf-16"), "is not valid XML: .*utf-8"),
            ("<!DOCTYPE x><GoalState/>".encode("utf-16-le"), "has a DOCTYPE or a NUL"),
        ]
        for name in ("ContainerId", "InstanceId"):
            start, rest = self.azure.goal_state().split(f"<{name}>")
            end = rest.split(f"</{name}>")[1]
            for element in ("", f"<{name}> \n </{name}>"):
                cases.append((start + element + end, "no ContainerId or no InstanceId"))
        for goal_state, reason in cases:
            self.refuse("goalstate", [Text(goal_state)], f"The goal state .*{reason}")

    def test_memory_is_bounded_whatever_is_sent(self) -> None:
        cases: List[Tuple[Answer, str]] = [fault for fault in FAULTS if isinstance(fault[0], Flood)]
        large = "<GoalState>" + "<a/>" * 200000 + "</GoalState>"
        cases.append((Text(large), "no ContainerId or no InstanceId"))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for answer, reason in cases:
            self.refuse("goalstate", [answer], reason)
        self.assertLess(tracemalloc.get_traced_memory()[1], 64 * MIB)


class RecoveryTest(ScriptTest):
    def test_every_fault_in_a_row_in_each_step_and_then_success(self) -> None:
        cut = Raw(OK_LINE + b"Content-Length: 40\r\n\r\nweb-prod")
        flaws: List[Answer] = [Reset(), *map(Status, (500, 429, 503, 410))]
        flaws += [Raw(b"garbage\r\n\r\n"), cut]
        for resource in ("goalstate", "health", "compute"):
            self.azure.script(resource, flaws)
        machine = self.machine()
        run = self.provision(machine=machine)
        self.assertEqual(run.status, 0, run.output)
        count = len(flaws)
        requests = [request.resource for request in self.azure.requests]
        posts = ["goalstate", "health"] * (count + 1)
        self.assertEqual(requests, ["goalstate"] * count + posts + ["compute"] * (count + 1))
        self.assertEqual(machine.calls[0], "hostnamectl set-hostname web-prod-01")
        self.assertIn(f"Succeeded on attempt {2 * count + 1} after ", run.output)
        self.assertIn(f"Succeeded on attempt {count + 1} after ", run.output)

    def test_refused_connection_is_tried_until_someone_listens(self) -> None:
        unused = self.unused_port()
        address = unused.getsockname()
        wireserver = "{}:{}".format(*address)
        process = start_script(self.machine(), *self.endpoints, "--wireserver", wireserver)
        assert process.stdout is not None
        self.assertIn("Connection refused; retrying for up to 1200 s", process.stdout.readline())
        unused.close()
        with FakeAzure(wireserver=address) as late:
            rest, errors = process.communicate(timeout=30)
            self.assertTrue(late.ready.is_set())
        self.assertEqual((process.returncode, errors), (0, ""))
        self.assertIn("Succeeded on attempt ", rest)

    def test_same_reason_is_logged_once_and_another_one_again(self) -> None:
        self.azure.script("goalstate", [Status(s) for s in (503, 503, 500, 500, 503)])
        run = self.provision()
        reasons = [line.split(":")[-1].split()[0] for line in run.lines if "retrying" in line]
        self.assertEqual((run.status, reasons), (0, ["503", "500", "503"]), run.output)


class DeadlineTest(ScriptTest):
    """Each limit, on a clock on which pauses take no time."""

    def test_run_gives_up_at_the_limit_and_changes_nothing(self) -> None:
        cases: List[Tuple[str, Answer, str]] = [
            ("goalstate", Status(503), "503"),
            ("goalstate", Silence(), TIMED_OUT),
            ("health", Status(500), "500"),
            ("compute", Status(429), "429"),
            ("compute", Text("{}"), "neither a computer name nor a VM name"),
            ("compute", Text("<a>"), "did not send compute metadata, but: <a>"),
        ]
        for resource, answer, reason in cases:
            with self.subTest(resource, reason=reason):
                self.azure.ready.clear()
                self.azure.script(resource, [], forever=answer)
                clock, machine = Clock(), self.machine()
                limit = "HOSTNAME_LIMIT" if resource == "compute" else "READY_LIMIT"
                options: Dict[str, Any] = {limit: 1, "time": clock, "journal": True}
                options["RESPONSE_TIMEOUT"] = 0.05 if reason == TIMED_OUT else 10
                run = self.provision(machine=machine, **options)
                self.azure.script(resource, [])
                self.assertEqual((run.status, machine.calls), (1, []))
                gave_up = r"; gave up after \d+ attempts in 1 s; the next boot"
                self.assertRegex(run.lines[-1], f"^<3>Not provisioned: .*{reason}.*{gave_up}")
                self.assertTrue(1 <= clock.now < 2, clock.now)
                self.assertEqual(self.azure.ready.is_set(), resource == "compute")

    def outage(self, kinds: int) -> Tuple[List[float], List[str]]:
        """The pauses and lines of a step that fails for twenty minutes, for KINDS of reasons."""
        clock = Clock()

        def attempt() -> Tuple[str, str]:
            raise ProvisioningError(f"reason {len(clock.pauses) % kinds}")

        run = self.provision(time=clock, report_ready=lambda *_: keep_trying(attempt, READY_LIMIT))
        self.assertRegex(run.lines[-1], r"gave up after \d+ attempts in 120[01] s")
        return clock.pauses, run.lines[:-1]

    def test_pause_is_a_quarter_of_the_time_spent(self) -> None:
        pauses, _ = self.outage(1)
        spent = 0.0
        for pause in pauses:
            self.assertAlmostEqual(pause, min(max(spent / 4, 0.05), 1))
            spent += pause
        self.assertEqual((pauses[0], pauses[-1]), (0.05, 1))
        self.assertLess(len(pauses), 1500)
        self.assertTrue(1200 <= spent < 1201, spent)

    def test_outage_is_a_few_lines_even_if_its_reason_always_changes(self) -> None:
        for kinds, lines in ((1, 1), (2, 10), (10000, 10)):
            self.assertEqual(len(self.outage(kinds)[1]), lines)
