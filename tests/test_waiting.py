"""Faults of every class in every step, recovery after them, and both deadlines."""

import contextlib
import functools
import json
import socket
import threading
import time
import tracemalloc
from typing import Any, Callable, Dict, Iterator, List, Tuple, Union
from unittest import mock

import azure_provision
from azure_provision import ProvisioningError
from tests.fake_azure import (
    OK,
    Answer,
    Chunked,
    FakeAzure,
    Flood,
    Raw,
    Reset,
    Silence,
    Status,
    Text,
    Trickle,
)
from tests.harness import SCRIPT, ScriptTest

BIG = b"x" * (1024 * 1024 + 1)

# What no step takes for an answer, and what is said of it.
FAULTS: Dict[str, Tuple[Callable[[], Answer], str]] = {
    "reset": (Reset, "Connection reset by peer"),
    "silence": (Silence, "timed out after 0 s"),
    "closed without an answer": (lambda: Raw(b""), "closed connection without response"),
    "header that trickles": (lambda: Trickle(OK + b"X: "), "timed out after 0 s"),
    "body that trickles": (
        lambda: Trickle(OK + b"Content-Length: 500\r\n\r\n", interval=0.1),
        "timed out after 0 s",
    ),
    "body without end": (lambda: Flood(OK + b"\r\n"), "more than 1048576 bytes"),
    "header without end": (lambda: Flood(OK, b"X: y\r\n" * 1000), "got more than 100 headers"),
    "header line without end": (lambda: Flood(OK + b"X: "), "got more than 65536 bytes"),
    "interim answers without end": (
        lambda: Flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        "timed out after 0 s|more than 100 interim responses",
    ),
    "chunk of -1 bytes": (
        lambda: Flood(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n"),
        "got more than 65536 bytes when reading chunk size",
    ),
    "chunk without end": (
        lambda: Flood(OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffff\r\n"),
        "more than 1048576 bytes",
    ),
    "chunk of no size": (
        lambda: Raw(OK + b"Transfer-Encoding: chunked\r\n\r\nhello\r\nweb\r\n0\r\n\r\n"),
        "IncompleteRead",
    ),
    "chunks cut short": (
        lambda: Raw(OK + b"Transfer-Encoding: chunked\r\n\r\n20\r\nweb-prod\r\n"),
        "IncompleteRead",
    ),
    "body cut short": (lambda: Raw(OK + b"Content-Length: 40\r\n\r\nweb-prod"), "lacks 32 bytes"),
    "body cut off whole": (lambda: Raw(OK + b"Content-Length: 11\r\n\r\n"), "lacks 11 bytes"),
    "oversized": (lambda: Status(200, BIG), "more than 1048576 bytes"),
    "oversized by its word": (
        lambda: Raw(OK + b"Content-Length: 99999999999999999999\r\n\r\nweb-prod"),
        "lacks 99999999999999999991 bytes",
    ),
    "garbage": (lambda: Raw(b"\x00\xff\r\n<3>forged\r\n\r\n"), r"\\x00\\xff"),
    "garbage of one line": (lambda: Raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "SSH-2.0"),
    "no number for a status": (lambda: Raw(b"HTTP/1.1 OK OK\r\n\r\n"), "HTTP/1.1 OK OK"),
    "reason that forges a line": (
        lambda: Raw(b"HTTP/1.1 500 no\r<3>forged\r\nContent-Length: 0\r\n\r\n"),
        r"500 no\\r<3>forged; gave",
    ),
}
FAULTS["refusal whose body never comes"] = (
    lambda: Trickle(b"HTTP/1.1 503 Later\r\nContent-Length: 5\r\n\r\n", b"", 1),
    " 503 Later",
)
for _length in ("0_3", "+3", "-3", "3, 3", "", "\xb2", "3\r\nContent-Length: 4"):
    FAULTS[f"Content-Length {_length!r}"] = (
        functools.partial(Raw, OK + f"Content-Length: {_length}\r\n\r\nweb".encode("latin-1")),
        "the Content-Length is not one number",
    )
for _status in (301, 302, 307, 401, 403, 409, 410, 429, 500, 502, 503, 504):
    FAULTS[f"status {_status}"] = (functools.partial(Status, _status), f" {_status} ")
FAULTS["redirect that leads somewhere"] = (
    lambda: Status(302, headers={"Location": "/machine?comp=goalstate"}),
    "302 Found",
)

# What only a goal state can be wrong about.
GOAL_STATE_FAULTS: Dict[str, Tuple[Union[bytes, str], str]] = {
    "nothing": ("", "is not valid XML: no element found"),
    "an error page": ("<html><body>It works!</body></html>", "no ContainerId or no InstanceId"),
    "half": ("<GoalState><Container>", "is not valid XML"),
    "not XML": ("{}", "is not valid XML"),
    "a DOCTYPE": (
        '<!DOCTYPE x [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;">]><GoalState>&b;</GoalState>',
        "has a DOCTYPE or a NUL",
    ),
    "an unknown entity": ("<GoalState>&x;</GoalState>", "is not valid XML: undefined entity"),
    "invalid UTF-8": (b"<GoalState>\xff</GoalState>", "is not valid XML: .*utf-8"),
    "UTF-16, which hides a DOCTYPE": (
        '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE x><GoalState/>'.encode("utf-16"),
        "is not valid XML: .*utf-8",
    ),
    "UTF-16 without a mark, which hides a DOCTYPE": (
        "<!DOCTYPE x><GoalState/>".encode("utf-16-le"),
        "has a DOCTYPE or a NUL",
    ),
    "NUL": ("<GoalState>\0</GoalState>", "has a DOCTYPE or a NUL"),
    "an error that forges a line": ("<GoalState>&a\u2028\x85;</GoalState>", r"^[\x20-\x7e]*$"),
    "a deep nest": ("<a>" * 100000, "is not valid XML"),
}


@contextlib.contextmanager
def output() -> Iterator[List[str]]:
    """Collect what the script logs, in this process."""
    lines: List[str] = []
    with mock.patch.object(azure_provision, "log", lambda _, line: lines.append(line)):
        yield lines


class FaultTest(ScriptTest):
    """Each step called in this process, its answers over a real socket."""

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.object(azure_provision, "RESPONSE_TIMEOUT", 0.4)
        patch.start()
        self.addCleanup(patch.stop)

    def refuse(self, resource: str, step: Callable[[], Any], answer: Answer, reason: str) -> None:
        """STEP fails at once, for REASON, when RESOURCE gives ANSWER: nothing else is asked."""
        self.azure.script(resource, [answer])
        before = len(self.azure.requests)
        started = time.monotonic()
        with self.assertRaisesRegex(ProvisioningError, reason) as caught:
            step()
        self.assertLess(time.monotonic() - started, 3)
        self.assertRegex(str(caught.exception), r"\A[\x20-\x7e]{10,300}\Z")
        self.assertEqual(self.azure.requests[before:][-1].resource, resource)

    def each_fault(self, resource: str, step: Callable[[], Any]) -> None:
        """Every fault fails STEP for its reason, and at once."""
        with mock.patch.multiple(azure_provision, READY_LIMIT=0, HOSTNAME_LIMIT=0), output():
            for name, (fault, reason) in FAULTS.items():
                with self.subTest(name):
                    self.refuse(resource, step, fault(), reason)

    def test_goal_state(self) -> None:
        self.each_fault(
            "goalstate", lambda: azure_provision.report_ready(self.azure.wireserver, False)
        )
        self.assertEqual(self.azure.asked("health"), [])

    def test_health_report(self) -> None:
        self.each_fault(
            "health", lambda: azure_provision.report_ready(self.azure.wireserver, False)
        )
        self.assertFalse(self.azure.ready.is_set())

    def test_compute_metadata(self) -> None:
        self.each_fault("compute", lambda: azure_provision.fetch_hostname(self.azure.imds))

    def test_compute_metadata_of_an_old_imds(self) -> None:
        def step() -> None:
            self.azure._scripts["compute"][:0] = [Status(400), Status(400)]
            azure_provision.fetch_hostname(self.azure.imds)

        self.each_fault("compute", step)

    def test_statuses_that_are_not_accepted(self) -> None:
        def step() -> None:
            azure_provision.report_ready(self.azure.wireserver, False)

        with mock.patch.object(azure_provision, "READY_LIMIT", 0), output():
            for status in (201, 204, 299, 400, 404):
                self.refuse("goalstate", step, Status(status), f" {status}")
            for status in (400, 404):
                self.refuse("health", step, Status(status), f" {status} ")

    def test_invalid_goal_states(self) -> None:
        for name, (goal_state, reason) in GOAL_STATE_FAULTS.items():
            with self.subTest(name):
                self.refuse(
                    "goalstate",
                    lambda: azure_provision.fetch_goal_state(self.azure.wireserver),
                    Text(goal_state),
                    reason,
                )

    def test_goal_state_with_an_empty_or_a_missing_id(self) -> None:
        for name in ("ContainerId", "InstanceId"):
            for replacement in (r"", f"<{name}/>", f"<{name}> \n </{name}>"):
                with self.subTest(replacement):
                    start, rest = self.azure.goal_state().split(f"<{name}>")
                    goal_state = start + replacement + rest.split(f"</{name}>")[1]
                    self.refuse(
                        "goalstate",
                        lambda: azure_provision.fetch_goal_state(self.azure.wireserver),
                        Text(goal_state),
                        "no ContainerId or no InstanceId",
                    )

    def test_declared_encoding_is_not_believed(self) -> None:
        goal_state = self.azure.goal_state().replace('encoding="utf-8"', 'encoding="utf-16"')
        self.azure.script("goalstate", [Text(goal_state)])
        found = azure_provision.fetch_goal_state(self.azure.wireserver)
        self.assertEqual(found.container_id, self.azure.container_id)

    def test_body_of_just_1_mib_is_read(self) -> None:
        for chunked in (Text, Chunked):
            for size in (1024 * 1024, 1024 * 1024 + 1):
                self.azure.script("compute", [chunked(json.dumps({"name": "web"}).ljust(size))])
                with mock.patch.object(azure_provision, "HOSTNAME_LIMIT", 0), output():
                    if size == 1024 * 1024:
                        self.assertEqual(azure_provision.fetch_hostname(self.azure.imds), "web")
                        continue
                    with self.assertRaisesRegex(ProvisioningError, "more than 1048576 bytes"):
                        azure_provision.fetch_hostname(self.azure.imds)

    def test_memory_is_bounded_whatever_is_sent(self) -> None:
        goal_state = "<GoalState>" + "<a/>" * 200000 + "</GoalState>"
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with mock.patch.multiple(azure_provision, READY_LIMIT=0, RESPONSE_TIMEOUT=10), output():
            for name in ("body without end", "chunk of -1 bytes", "chunk without end"):
                with self.subTest(name):
                    self.azure.script("goalstate", [FAULTS[name][0]()])
                    with self.assertRaises(ProvisioningError):
                        azure_provision.report_ready(self.azure.wireserver, False)
            self.azure.script("goalstate", [Text(goal_state)])
            with self.assertRaises(ProvisioningError):
                azure_provision.report_ready(self.azure.wireserver, False)
        self.assertLess(tracemalloc.get_traced_memory()[1], 64 * 1024 * 1024)


class RecoveryTest(ScriptTest):
    """The script as a process, through a fault or several."""

    def test_every_fault_in_a_row_in_each_step_and_then_success(self) -> None:
        flaws: List[Answer] = [
            Reset(),
            Status(500),
            Status(429),
            Status(503),
            Status(410),
            Raw(b"garbage\r\n\r\n"),
            Raw(OK + b"Content-Length: 40\r\n\r\nweb-prod"),
        ]
        for resource in ("goalstate", "health", "compute"):
            self.azure.script(resource, flaws)
        machine = self.machine()
        run = self.provision(machine=machine)
        self.assertEqual(run.status, 0, run.output)
        self.assertEqual(
            [request.resource for request in self.azure.requests],
            ["goalstate"] * len(flaws)
            + ["goalstate", "health"] * len(flaws)
            + ["goalstate", "health"]
            + ["compute"] * (len(flaws) + 1),
        )
        self.assertEqual(machine.calls[0], "hostnamectl set-hostname web-prod-01")
        self.assertIn(f"Succeeded on attempt {2 * len(flaws) + 1}, after ", run.output)
        self.assertIn(f"Succeeded on attempt {len(flaws) + 1}, after ", run.output)

    def test_metadata_that_is_not_there_yet_is_waited_for(self) -> None:
        self.azure.script("compute", [Status(404), Text("{}"), Status(410)])
        run = self.provision()
        self.assertEqual(run.status, 0, run.output)
        self.assertIn("Hostname: web-prod-01 (computerName)", run.output)
        self.assertIn("IMDS has neither a computer name nor a VM name; retrying", run.output)

    def test_health_report_names_the_goal_state_fetched_last(self) -> None:
        self.azure.script("health", [Status(410)])

        def move_on(request: Any) -> None:
            if request.resource == "health" and request.status == 410:
                self.azure.incarnation = "2"

        self.azure.on_request = move_on
        run = self.provision()
        self.assertEqual(run.status, 0, run.output)
        bodies = [request.body for request in self.azure.asked("health")]
        self.assertIn(b"<GoalStateIncarnation>1<", bodies[0])
        self.assertIn(b"<GoalStateIncarnation>2<", bodies[1])
        self.assertIn("<GoalStateIncarnation>2<", run.output)

    def test_refused_connection_is_tried_until_someone_listens(self) -> None:
        reserved = socket.socket()
        reserved.bind(("127.0.0.1", 0))
        address = reserved.getsockname()
        endpoints = ("--wireserver", "{}:{}".format(*address), "--imds", self.azure.imds)
        process = self.start(*endpoints, machine=self.machine(), endpoints=False)
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        self.assertIn("Connection refused; retrying for up to 1200 s", lines[1])
        reserved.close()
        with FakeAzure(wireserver=address) as late:
            rest, errors = process.communicate(timeout=30)
            self.assertTrue(late.ready.is_set())
        self.assertEqual((process.returncode, errors), (0, ""))
        self.assertIn("Succeeded on attempt ", rest)

    def test_same_reason_is_logged_once_and_another_one_again(self) -> None:
        self.azure.script("goalstate", [Status(s) for s in (503, 503, 500, 500, 503)])
        run = self.provision()
        reasons = [line.split(":")[-1] for line in run.lines if "retrying" in line]
        self.assertEqual(
            [reason.split()[0] for reason in reasons], ["503", "500", "503"], run.output
        )
        self.assertEqual(run.status, 0)


class DeadlineTest(ScriptTest):
    """The limits lowered, not waited for."""

    def give_up(self, limit: str, resource: str, answer: Answer, **settings: Any) -> List[str]:
        """The lines of a run that gives up, in time, because of RESOURCE."""
        self.azure.script(resource, [], forever=answer)
        machine = self.machine()
        run = self.provision(machine=machine, journal=True, **dict(settings, **{limit: 0.6}))
        self.assertEqual(run.status, 1)
        self.assertEqual(machine.calls, [])
        self.assertRegex(
            run.lines[-1], r"^<3>Not provisioned: .*; gave up after \d+ attempts in 1 s; the next"
        )
        asked = self.azure.asked(resource)
        self.assertGreaterEqual(asked[-1].time - asked[0].time, 0.35)
        self.assertLess(run.seconds, 5)
        return run.lines

    def test_goal_state(self) -> None:
        self.assertIn("503", self.give_up("READY_LIMIT", "goalstate", Status(503))[-1])

    def test_health_report_shares_the_limit_of_the_goal_state(self) -> None:
        self.assertIn("500", self.give_up("READY_LIMIT", "health", Status(500))[-1])

    def test_compute_metadata(self) -> None:
        for answer in (Status(429), Status(404), Text("{}"), Text("<html>")):
            self.give_up("HOSTNAME_LIMIT", "compute", answer)
            self.assertTrue(self.azure.ready.is_set())

    def test_silence(self) -> None:
        lines = self.give_up("READY_LIMIT", "goalstate", Silence(), RESPONSE_TIMEOUT=0.2)
        self.assertIn("timed out after 0 s", lines[-1])


class Clock:
    """The time module of the script, in which sleeping takes no time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: List[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class OutageTest(ScriptTest):
    """Twenty minutes in a moment: the clock is the only thing that is not real."""

    def outage(self, reason: Callable[[int], str]) -> Tuple[Clock, List[str]]:
        """Have a step fail for all of its twenty minutes."""
        clock = Clock()

        def attempt() -> None:
            raise ProvisioningError(reason(len(clock.pauses)))

        gave_up = self.assertRaisesRegex(
            ProvisioningError, r"gave up after \d+ attempts in 120[01] s"
        )
        with mock.patch.object(azure_provision, "time", clock), output() as lines, gave_up:
            azure_provision.keep_trying(attempt, azure_provision.READY_LIMIT)
        return clock, lines

    def test_pause_is_a_quarter_of_the_time_spent(self) -> None:
        clock, _ = self.outage(lambda _: "refused")
        spent = 0.0
        for pause in clock.pauses:
            self.assertAlmostEqual(pause, min(max(spent / 4, 0.05), 1))
            spent += pause
        self.assertEqual(clock.pauses[0], 0.05)
        self.assertEqual(clock.pauses[-1], 1)
        self.assertLess(len(clock.pauses), 1500)
        self.assertTrue(1200 <= clock.now < 1201, clock.now)

    def test_outage_is_a_few_lines_even_if_its_reason_always_changes(self) -> None:
        self.assertEqual(len(self.outage(lambda _: "refused")[1]), 1)
        _, lines = self.outage(lambda count: f"reason {count}")
        self.assertEqual(len(lines), 10)
        self.assertIn("further reasons are not logged", lines[-1])
        self.assertEqual(len(self.outage(lambda count: f"reason {count % 2}")[1]), 10)

    def test_wall_clock_is_not_asked(self) -> None:
        text = SCRIPT.read_text(encoding="utf-8")
        words = ("time.time(", "datetime", "time.sleep(")
        self.assertEqual([text.count(word) for word in words], [0, 0, 1])


class WholeRunTest(ScriptTest):
    def test_unreachable_platform_for_the_whole_limit_leaves_a_short_journal(self) -> None:
        reserved = socket.socket()
        self.addCleanup(reserved.close)
        reserved.bind(("127.0.0.1", 0))
        clock = Clock()
        with mock.patch.object(azure_provision, "time", clock), output() as lines:
            endpoint = "{}:{}".format(*reserved.getsockname())
            self.assertEqual(
                azure_provision.main(["--wireserver", endpoint, "--imds", endpoint]), 1
            )
        self.assertEqual(len(lines), 3, lines)
        self.assertEqual(threading.active_count(), 3)  # this one and the fake's two
