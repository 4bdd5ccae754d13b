"""Fuzz every answer that the platform can give: seeded, bounded, over real sockets.

Each run is a whole first boot against a server that answers some of its requests with mutations of
valid answers, with raw bytes, with odd statuses, headers and bodies, in pieces, late or never. It
has to end provisioned or with a clean failure. `python3 -m tests.test_fuzz --runs N --seed S` runs
as many as you like; `--first I --runs 1` runs one again.
"""

import argparse
import contextlib
import os
import random
import resource
import selectors
import socket
import struct
import sys
import tempfile
import threading
import time
import unittest
from typing import Any, Dict, Iterator, List, Tuple
from unittest import mock

import azure_provision
from tests.fake_azure import GOAL_STATE

RUNS, SEED = 1000, 20190601
NAME = "web-prod-01"
METADATA = b'{"name": "vm", "osProfile": {"computerName": "%s"}}'
GOOD_STATE = GOAL_STATE.format(
    version="2012-11-30", incarnation="1", container_id="c-1", instance_id="i-1"
).encode()
IDS = [
    b"a\nb",
    b"\n&lt;0>forged",
    b"a&#13;b",
    b"\xe2\x80\xa8",
    b"&amp;",
    b"x" * 20000,
    b"\xc2\x85x",
]

TOKENS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b"\xff", b"\xfe\xff", b"\xe2\x80\xa8", b"\xc2\x85", b"\x1b[2J"),
    *(b"\xef\xbb\xbf", b" ", b"\t", b"<3>", b"\n<0>forged", b"_", b"-", b".", b"..", b"%s", b"$()"),
    *(
        b"<!DOCTYPE x>",
        b"<!doctype x>",
        b"&x;",
        b"&#0;",
        b"&#xD800;",
        b"&amp;",
        b"]]>",
        b"<![CDATA[",
    ),
    *(b"<?xml version='1.1' encoding='utf-16'?>", b"<ContainerId>", b"</GoalState>", b"<a>" * 3000),
    *(
        b"-1",
        b"0",
        b"9" * 30,
        b"9" * 5000,
        b"0x10",
        b"1_0",
        b"1e9",
        b"chunked",
        b"identity",
        b"gzip",
    ),
    *(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/0.9", b"Content-Length: 5\r\n", b"x" * 70000),
]
STATUSES = [
    *(
        b"200 OK",
        b"200 OK",
        b"200 OK",
        b"200",
        b"200 ",
        b"201 Created",
        b"204 No Content",
        b"299 ?",
    ),
    *(b"100 Continue", b"101 Switching", b"199 ?", b"206 Partial", b"301 Moved", b"302 Found"),
    *(b"304 Not Modified", b"400 Bad Request", b"404 Not Found", b"410 Gone", b"429 Slow Down"),
    *(b"500 Oops", b"503 Later", b"999 ?", b"1000 ?", b"99 ?", b"-1 ?", b"2_0 ?", b"", b"OK"),
    *(
        b"500 \r<3>forged",
        b"500 \xff\xe2\x80\xa8",
        b"\xd9\xa2\xd9\xa0\xd9\xa0 OK",
        b"500 " + b"r" * 5000,
    ),
]
HEADERS = [
    *(b"Content-Length: 0", b"Content-Length: -1", b"Content-Length: 99999999999999999999999"),
    *(b"Content-Length: 1", b"Content-Length: x", b"Content-Length: 1048577", b"Content-Length:"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Connection: close"),
    *(
        b"Connection: keep-alive",
        b"Content-Encoding: gzip",
        b"Location: http://127.0.0.1:1/",
        b": x",
    ),
    *(b"no colon", b" folded", b"X: " + b"y" * 65500, b"X: " + b"y" * 70000, b"\xff\xfe: \x00"),
    *(b"Content-Type: text/xml; charset=\xff", b"X: 1\r\n" * 120, b"X: a\rSet: b", b"\0"),
]
NAMES = [
    *(b"myset_0", b"-web", b"web-", b"a b", b"a\nb", b"x" * 64, b"x" * 65, b"x" * 63, b".a", b"a."),
    *(
        b"a..b",
        b"",
        b" ",
        b"\xff",
        b"w\xc3\xa9b",
        b"--help",
        b"$(reboot)",
        b"a\0b",
        b"A.b-c.D",
        b"1",
    ),
    *(b"<html>502</html>", b"web\r\n", b"\r\n web \r\n", b"x" * 1048577, b"a.-b", b"localhost"),
]
BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "&%c;&%c;">' % (98 + i, 97 + i, 97 + i) for i in range(20))
    + b"]><GoalState>&u;</GoalState>"
)


def valid(name: str) -> bool:
    """Whether NAME is a hostname, told in another way than the script does."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return len(name) <= 64 and all(
        0 < len(label) <= 63
        and set(label) <= set(letters + "-")
        and label[0] != "-"
        and label[-1] != "-"
        for label in name.split(".")
    )


class Case:
    """One run's answers: for each resource, those before it recovers, if it ever does."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(seed * 1000003 + number)
        self.recovers = self.random.random() < 0.97
        self.left: Dict[str, int] = {}

    def answer(self, resource: str) -> Tuple[str, bytes]:
        """How to answer, and with what."""
        pick = self.random
        left = self.left.setdefault(resource, pick.choice([0, 0, 1, 1, 2]))
        self.left[resource] = left - 1
        metadata = METADATA % (NAME.encode() if pick.random() < 0.8 else pick.choice(NAMES))
        state = GOOD_STATE if pick.random() < 0.8 else GOOD_STATE.replace(b"c-1", pick.choice(IDS))
        good = {"goalstate": state, "health": b""}.get(resource, metadata)
        if left <= 0 and self.recovers:
            good = METADATA % NAME.encode() if resource == "compute" else good
            return "send", http(b"200 OK", [b"Content-Length: %d" % len(good)], good)
        kind = pick.random()
        if kind < 0.02:
            return pick.choice(["reset", "silence", "close"]), b""
        if kind < 0.10:
            answer = bytes(pick.getrandbits(8) for _ in range(pick.randrange(300)))
        elif kind < 0.55:
            answer = http(b"200 OK", [b"Content-Length: %d" % len(good)], good)
            answer = self.mutate(answer)
        else:
            answer = self.compose(good)
        how = pick.random()
        if how < 0.01:
            return "stall", answer[: pick.randrange(len(answer) + 1)]
        if how < 0.10:
            return "send", answer[: pick.randrange(len(answer) + 1)]
        return "pieces" if how < 0.2 else "send", answer

    def mutate(self, data: bytes) -> bytes:
        """DATA with a few edits."""
        pick = self.random
        for _ in range(pick.choice([1, 1, 2, 3, 8])):
            start = pick.randrange(len(data) + 1)
            end = start + pick.choice([0, 0, 1, 1, 4, 40])
            new = pick.choice(
                [pick.choice(TOKENS), bytes([pick.getrandbits(8)]), b"", data[start:end] * 2]
            )
            data = data[:start] + new + data[end:]
        return data

    def compose(self, good: bytes) -> bytes:
        """An answer of odd parts, whose framing is often right, so that the body is read."""
        pick = self.random
        body = pick.choice([good, self.mutate(good), pick.choice(NAMES), BOMB, b"<a/>" * 1000])
        headers = [pick.choice(HEADERS) for _ in range(pick.choice([0, 0, 1, 2, 3]))]
        framing = pick.random()
        if framing < 0.5:
            headers.insert(0, b"Content-Length: %d" % len(body))
        elif framing < 0.8:
            headers.append(b"Transfer-Encoding: chunked")
            size = pick.choice([b"%x" % len(body), b"%X;ext=1" % len(body), *TOKENS])
            body = (
                size
                + b"\r\n"
                + body
                + pick.choice([b"\r\n0\r\n\r\n", b"\r\n0\r\nX: y\r\n\r\n", b""])
            )
        status = b"200 OK" if pick.random() < 0.5 else pick.choice(STATUSES)
        return http(status, headers, body)


def http(status: bytes, headers: List[bytes], body: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 " + status, *headers, b"", body])


class Server:
    """Answers each connection as the case at hand has it, one after the other."""

    def __init__(self) -> None:
        self.case = Case(0, 0)
        self.held: List[socket.socket] = []  # connections that were left without an end
        self.listening = [self.listen(), self.listen()]
        self.wireserver, self.imds = (
            "{}:{}".format(*listening.getsockname()) for listening in self.listening
        )
        self.stop, self.stopped = socket.socketpair()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def listen(self) -> socket.socket:
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        return listening

    def close(self) -> None:
        self.stop.close()
        self.thread.join()
        for each in [*self.listening, *self.held, self.stopped]:
            each.close()

    def serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for readable in [*self.listening, self.stopped]:
                selector.register(readable, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self.stopped:
                        return
                    connection = key.fileobj.accept()[0]  # type: ignore[union-attr]
                    try:
                        self.answer(connection)
                    except OSError:  # the script has hung up
                        connection.close()

    def answer(self, connection: socket.socket) -> None:
        connection.settimeout(5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(65536)
        head, _, body = request.partition(b"\r\n\r\n")
        if head.startswith(b"POST"):
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            while len(body) < length:
                body += connection.recv(65536)
        words = (b"goalstate", b"health", b"compute")
        resource = next(word.decode() for word in words if word in head)
        how, answer = self.case.answer(resource)
        if how in ("silence", "stall"):
            connection.sendall(answer)
            self.held.append(connection)
            return
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == "pieces":
            for start in range(min(len(answer), 40)):
                connection.sendall(answer[start : start + 1])
            connection.sendall(answer[40:])
        else:
            connection.sendall(answer)
        connection.close()


class Clock:
    """The script's time: real, but for its pauses, which take none."""

    skipped = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped

    def sleep(self, seconds: float) -> None:
        self.skipped += seconds


class Fuzz:
    """Runs cases, and says what is wrong with how one ended."""

    def __init__(self) -> None:
        self.server = Server()
        self.commands: List[Tuple[str, ...]] = []
        self.output: List[bytes] = []
        self.ends = {0: 0, 1: 0}
        self.hostname_file = tempfile.NamedTemporaryFile()  # noqa: SIM115

    def run_tool(self, *command: str, timeout: float) -> str:
        self.commands.append(command)
        return ""

    def write(self, _: int, data: bytes) -> int:
        self.output.append(data)
        return len(data)

    @contextlib.contextmanager
    def patches(self) -> Iterator[None]:
        """The script in this process, its tools recorded, its limits low."""
        low: Dict[str, Any] = {"RESPONSE_TIMEOUT": 0.02, "READY_LIMIT": 2, "HOSTNAME_LIMIT": 2}
        low.update(run=self.run_tool, time=Clock(), ROUTE_FILE=os.devnull)
        low.update(HOSTNAME_FILE=self.hostname_file.name)
        script = mock.patch.multiple(azure_provision, **low)
        with script, mock.patch.object(os, "write", self.write):
            yield

    def close(self) -> None:
        self.server.close()
        self.hostname_file.close()

    def run(self, seed: int, number: int) -> None:
        """Run one case; raises AssertionError, or whatever the script let through."""
        self.server.case = Case(seed, number)
        self.commands.clear()
        self.output.clear()
        endpoints = ["--wireserver", self.server.wireserver, "--imds", self.server.imds]
        started = time.monotonic()
        status = azure_provision.main(endpoints)
        seconds = time.monotonic() - started
        while self.server.held:
            self.server.held.pop().close()
        assert seconds < 10, f"it took {seconds:.1f} s"
        self.ends[status] += 1  # a KeyError, for any other status
        for line in self.output:
            text = line.decode("ascii")
            assert text.endswith("\n") and text[:-1].isprintable(), f"a forged line: {text!r}"
            assert 2 < len(text) < 1200, f"a line of {len(text)} characters"
        assert len(self.output) < 40, f"{len(self.output)} lines"
        last = self.output[-1].decode()
        if status:
            assert last.startswith("Not provisioned: "), last
            assert self.commands == [], self.commands
            return
        assert last.startswith("Provisioned as "), last
        tool, verb, name = self.commands[0]
        assert (tool, verb) == ("hostnamectl", "set-hostname") and valid(name), self.commands
        self.hostname_file.seek(0)
        assert self.hostname_file.read().decode() == name + "\n"
        assert self.commands[-1][:2] == ("systemctl", "disable"), self.commands


def fuzz(runs: int, seed: int, first: int = 0, progress: bool = False) -> List[str]:
    """Run cases; return what went wrong."""
    findings: List[str] = []
    tool = Fuzz()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    try:
        with tool.patches():
            for number in range(first, first + runs):
                try:
                    tool.run(seed, number)
                except Exception as error:
                    findings.append(
                        f"--seed {seed} --first {number}: {type(error).__name__}: {error}"
                    )
                if progress and number % 10000 == 9999:
                    print(f"{number + 1} runs, {len(findings)} findings", file=sys.stderr)
    finally:
        tool.close()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > 64:
        findings.append(f"--seed {seed}: the memory grew by {grown:.0f} MiB")
    if progress:
        print(
            f"{runs} runs in {time.monotonic() - started:.0f} s: {tool.ends[0]} provisioned, "
            f"{tool.ends[1]} failed cleanly, {len(findings)} findings; memory +{grown:.0f} MiB"
        )
    return findings


class FuzzTest(unittest.TestCase):
    def test_every_run_ends_provisioned_or_with_a_clean_failure(self) -> None:
        self.assertEqual(fuzz(RUNS, SEED), [])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.test_fuzz")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--first", type=int, default=0, help="the number of the first run")
    options: Any = parser.parse_args()
    findings = fuzz(options.runs, options.seed, options.first, progress=True)
    print("\n".join(findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
