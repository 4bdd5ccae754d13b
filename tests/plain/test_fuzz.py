"""Whole first boots against mutations of valid answers and against odd ones of every kind.

Each has to end provisioned or with a clean failure. `python3 -m tests.plain.test_fuzz --runs N
--seed S` runs as many as you like; `--first I --runs 1` runs one again.
"""

import argparse
import random
import string
import sys
import time
import unittest
from pathlib import Path
from typing import Any, Dict, List, Tuple

import azure_provision
from tests.fake_azure import Answer, FakeAzure, Handler, Raw, Reset, Trickle
from tests.plain.harness import Clock, StandIns, logged

RUNS, SEED = 1000, 11

# What the answers are made of, besides the valid ones.
# fmt: off
IDS = [b"a\nb", b"\n&lt;0>forged", b"a&#13;b", b"\xe2\x80\xa8", b"&amp;", b"x" * 20000, b"\xc2\x85"]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b"\xff", b"\xfe\xff", b"\xe2\x80\xa8", b"\xc2\x85", b"\x1b[2J",
    b"\xef\xbb\xbf", b" ", b"\n<0>forged", b"..", b"%s", b"&amp;", b"]]>", b"&x;", b"&#xD800;",
    b"<!DOCTYPE x>", b"<![CDATA[", b"</GoalState>", b"<?xml version='1.1' encoding='utf-16'?>",
    b"<ContainerId>", b"<a>" * 3000, b"x" * 70000, b"-1", b"0", b"9" * 5000, b"0x10", b"1_0",
    b"chunked", b"gzip", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/0.9", b"Content-Length: 5\r\n",
]
STATUSES = [
    b"200", b"200 ", b"201 Created", b"204 No Content", b"100 Continue", b"199 ?", b"301 Moved",
    b"400 Bad", b"404 Not Found", b"410 Gone", b"429 Slow down", b"503 Later", b"-1 ?", b"2_0 ?",
    b"", b"500 \r<3>forged", b"500 \xff\xe2\x80\xa8", b"500 " + b"r" * 5000, b"\xd9\xa2\xd9\xa0 OK",
]
HEADERS = [
    b"Content-Length: 0", b"Content-Length: -1", b"Content-Length: 99999999999999999999999",
    b"Content-Length:", b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b": x", b"\0",
    b"X: " + b"y" * 70000, b"X: 1\r\n" * 120, b"X: a\rSet: b", b"Content-Type: text/xml; a=\xff",
]
ODD_NAMES = [
    b"myset_0", b"-web", b"a b", b"a\nb", b"x" * 65, b"x" * 64, b"a..b", b"", b"\xff", b"\xc3\xa9",
    b"--help", b"$(reboot)", b"a\0b", b"<html>502</html>", b"\r\n web \r\n", b"x" * 1048577,
]
# fmt: on
BOMB = b'<!DOCTYPE x [<!ENTITY a "%s">]><a>%s</a>' % (b"ha" * 9999, b"&a;" * 9999)


def valid(name: str) -> bool:
    """Whether NAME is a hostname, told in another way than the script does."""
    letters = set(string.ascii_letters + string.digits + "-")
    return len(name) <= 64 and all(
        label and set(label) <= letters and label.strip("-") == label for label in name.split(".")
    )


def http(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    headers = headers or (b"Content-Length: %d" % len(body),)
    return b"\r\n".join([b"HTTP/1.1 " + status, *headers, b"", body])


class FuzzedAzure(FakeAzure):
    """Gives some answers of its own for each resource, then recovers, if it ever does."""

    def begin(self, seed: int, number: int) -> None:
        """Begin run NUMBER."""
        self.random = random.Random(seed * 1000003 + number)
        self.recovers = self.random.random() < 0.97
        self.left: Dict[str, int] = {}
        self.requests.clear()

    def answer(self, handler: Handler, body: bytes) -> Tuple[str, Answer]:
        resource, answer = super().answer(handler, body)
        left = self.left.setdefault(resource, self.random.choice([0, 0, 1, 1, 2]))
        self.left[resource] = left - 1
        good = getattr(answer, "body", b"")
        if left <= 0 and self.recovers:
            return resource, Raw(http(good))
        return resource, self.odd_answer(good)

    def odd_answer(self, good: bytes) -> Answer:
        """How to answer, where the platform would send GOOD."""
        pick = self.random
        for name, others in ((b"c-1", IDS), (b"web-prod-01", ODD_NAMES)):
            good = good.replace(name, pick.choice([name, pick.choice(others)]))
        noise = bytes(pick.getrandbits(8) for _ in range(pick.randrange(300)))
        answers = [noise, self.mutate(http(good)), self.compose(good)]
        answer = pick.choices(answers, [8, 46, 46])[0]
        cut = answer[: pick.randrange(len(answer) + 1)]
        faults: List[Answer] = [Raw(answer), Raw(cut), Trickle(cut), Reset(), Raw(b"")]
        return pick.choices(faults, [88, 9, 1, 1, 1])[0]

    def mutate(self, data: bytes) -> bytes:
        """DATA with a few edits."""
        pick = self.random
        for _ in range(pick.choice([1, 1, 2, 3, 8])):
            start = pick.randrange(len(data) + 1)
            end = start + pick.choice([0, 0, 1, 1, 4, 40])
            edits = [pick.choice(TOKENS), bytes([pick.getrandbits(8)]), b"", data[start:end] * 2]
            data = data[:start] + pick.choice(edits) + data[end:]
        return data

    def compose(self, good: bytes) -> bytes:
        """An answer of odd parts, whose framing is often right, so that the body is read."""
        pick = self.random
        body = pick.choice([good, self.mutate(good), pick.choice(ODD_NAMES), BOMB, b"<a/>" * 1000])
        headers = [pick.choice(HEADERS) for _ in range(pick.choice([0, 0, 1, 2, 3]))]
        framing = pick.choice(["length", "length", "chunks", "none"])
        if framing == "length":
            headers.insert(0, b"Content-Length: %d" % len(body))
        elif framing == "chunks":
            headers.append(b"Transfer-Encoding: chunked")
            size = pick.choice([b"%x" % len(body), b"%X;ext=1" % len(body), *TOKENS])
            body = size + b"\r\n" + body + pick.choice([b"\r\n0\r\n\r\n", b""])
        return http(body, *headers, status=pick.choice([b"200 OK", pick.choice(STATUSES)]))


def check(status: int, lines: List[str], commands: List[str], hostname_file: Path) -> None:
    """Raise AssertionError if a run did not end as it should."""
    assert len(lines) < 40, f"{len(lines)} lines"
    assert max(map(len, lines)) < 11000, "a very long line"
    if status == 1:
        assert lines[-1].startswith("Not provisioned: ") and not commands, (lines[-1], commands)
        return
    name = hostname_file.read_text()[:-1]
    assert valid(name), name
    assert status == 0 and lines[-1].startswith(f"Provisioned as {name} in "), (status, lines[-1])
    assert commands[0].split()[-1] == name and len(commands) == 2, commands


def fuzz(runs: int, seed: int, first: int = 0) -> Tuple[List[str], str]:
    """Run cases; return what went wrong, and a summary."""
    findings: List[str] = []
    commands: List[str] = []
    ends, started, clock = [0, 0], time.monotonic(), Clock()
    azure, machine = FuzzedAzure(), StandIns()
    azure.container_id = "c-1"
    endpoints = ["--wireserver", azure.wireserver, "--imds", azure.imds]

    def run(command: str) -> str:
        commands.append(command)
        return ""

    options: Dict[str, Any] = {"RESPONSE_TIMEOUT": 0.02, "READY_LIMIT": 2, "HOSTNAME_LIMIT": 2}
    options.update(run=run, time=clock, wait_for_event=clock.wait_for_event)
    with azure, machine.stand_ins(**options):
        for number in range(first, first + runs):
            azure.begin(seed, number)
            commands.clear()
            try:
                with logged() as lines:
                    status = azure_provision.main(endpoints)
                ends[status] += 1
                check(status, lines, commands, machine.hostname_file)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                findings.append(f"--seed {seed} --first {number}: {reason}")
    machine.remove()
    return findings, (
        f"{runs} runs in {time.monotonic() - started:.0f} s: {ends[0]} provisioned, "
        f"{ends[1]} failed cleanly, {len(findings)} findings"
    )


class FuzzTest(unittest.TestCase):
    def test_every_run_ends_provisioned_or_with_a_clean_failure(self) -> None:
        self.assertEqual(fuzz(RUNS, SEED)[0], [])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.plain.test_fuzz")
    for option, default in (("runs", RUNS), ("seed", SEED), ("first", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    findings, summary = fuzz(**vars(parser.parse_args()))
    print(*findings, summary, sep="\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
