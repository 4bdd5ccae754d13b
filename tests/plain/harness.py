"""What the tests share: a machine of stand-ins, and the script run on it against a fake Azure."""

import contextlib
import faulthandler
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import unittest
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple
from unittest import mock

import azure_provision
from azure_provision import IMDS, WIRESERVER
from tests.fake_azure import FakeAzure

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "azure_provision.py"
UNIT_FILE = ROOT / "azure-provisioning.service"
INSTALLER = ROOT / "install.sh"

# Runs the script's own main() as a process, on a machine that another process made.
DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
import azure_provision
from tests.plain.harness import StandIns
with StandIns(sys.argv[2]).stand_ins():
    sys.exit(azure_provision.main(sys.argv[3:]))
"""


class Clock:
    """The script's `time`, on which only pauses take time, and those none of ours."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait_for_event(self, events: socket.socket, limit: float) -> Set[Tuple[int, int]]:
        """No network event comes."""
        self.sleep(limit)
        return set()


class Run(NamedTuple):
    """How a run of the script ended."""

    status: int
    output: str
    errors: str

    @property
    def lines(self) -> List[str]:
        return self.output.splitlines()


class StandIns:
    """A directory that stands for a machine: its tools on PATH, its files, its record.

    A tool writes its name and arguments to the record, then does what TOOLS says, in shell.
    DIRECTORY is that of stand-ins which another process made.
    """

    def __init__(self, directory: str = "", **tools: str) -> None:
        self.root = Path(directory or tempfile.mkdtemp(prefix="azure provision "))
        self.record = self.root / "record"
        self.hostname_file = self.root / "hostname"
        self.route_file = self.root / "route"  # empty: without a route
        self.tag_file = self.root / "tag"  # absent: without a chassis asset tag
        self.bin = self.root / "bin"
        if not directory:
            self.record.write_text("")
            self.hostname_file.write_text("localhost\n")
            self.route_file.write_text("")
            self.bin.mkdir()
        for name, action in tools.items():
            tool = self.bin / name
            text = f"#!/bin/sh\necho {name} \"$@\" >>'{self.record}'\n{action}\n"
            tool.write_bytes(os.fsencode(text))
            tool.chmod(0o755)

    @property
    def calls(self) -> List[str]:
        """What was called, in order: "hostnamectl set-hostname web-prod-01"."""
        return os.fsdecode(self.record.read_bytes()).splitlines()

    def note(self, call: str) -> None:
        with self.record.open("a") as file:
            file.write(call + "\n")

    def sethostname(self, name: str) -> None:
        self.note(f"sethostname {name}")

    def fsync(self, descriptor: int) -> None:
        """Note what is in the file by now."""
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.note(f"fsync {file.name}: {file.read_text().strip()}")

    @contextlib.contextmanager
    def stand_ins(
        self,
        environment: Optional[Dict[str, str]] = None,
        journal: bool = False,
        uid: int = 0,
        **settings: Any,
    ) -> Iterator[None]:
        """Have the script use this machine and never the real one.

        SETTINGS are names of the script that are to have another value. JOURNAL tells it that its
        standard output is the journal, UID whom it runs as.
        """
        environment = {"PATH": str(self.bin), **(environment or {})}
        if journal:
            environment["JOURNAL_STREAM"] = "{0.st_dev}:{0.st_ino}".format(os.fstat(1))
        files = {
            "HOSTNAME_FILE": str(self.hostname_file),
            "ROUTE_FILE": str(self.route_file),
            "CHASSIS_ASSET_TAG_FILE": str(self.tag_file),
        }
        script = mock.patch.multiple(azure_provision, **{**files, **settings})
        system = mock.patch.multiple(os, fsync=self.fsync, geteuid=lambda: uid)
        kernel = mock.patch.object(socket, "sethostname", self.sethostname)
        with script, system, kernel, mock.patch.dict(os.environ, environment, clear=True):
            yield

    def remove(self) -> None:
        shutil.rmtree(str(self.root))


@contextlib.contextmanager
def logged() -> Iterator[List[str]]:
    """Collect what the script logs in this process; each is one line, of printable ASCII."""
    lines: List[str] = []
    with mock.patch.object(os, "write", lambda _, data: lines.append(data.decode("ascii"))):
        yield lines
    for line in lines:
        assert line.endswith("\n") and line[:-1].isprintable(), f"a forged line: {line!r}"


class ScriptTest(unittest.TestCase):
    """A test that runs the script against a fake Azure, `self.azure`."""

    def setUp(self) -> None:
        self.azure = FakeAzure()
        self.azure.__enter__()
        self.addCleanup(self.azure.__exit__)

    @property
    def endpoints(self) -> List[str]:
        """The options that point the script at the fake."""
        return ["--wireserver", self.azure.wireserver, "--imds", self.azure.imds]

    def machine(self, **tools: str) -> StandIns:
        """A machine with these tools; without any, one whose tools all succeed."""
        machine = StandIns(**(tools or {"hostnamectl": "", "systemctl": ""}))
        self.addCleanup(machine.remove)
        return machine

    def connection(self, host: str, timeout: float) -> HTTPConnection:
        """A connection to the fake in the platform's place."""
        fakes = {WIRESERVER: self.azure.wireserver, IMDS: self.azure.imds}
        return HTTPConnection(fakes.get(host, host), timeout=timeout)

    def unused_port(self) -> socket.socket:
        """A socket that does not listen yet: connections to its address are refused."""
        unused = socket.socket()
        self.addCleanup(unused.close)
        unused.bind(("127.0.0.1", 0))
        return unused

    def provision(
        self,
        *arguments: str,
        machine: Optional[StandIns] = None,
        endpoints: bool = True,
        **options: Any,
    ) -> Run:
        """Run the script in this process, where its pauses take no time; it has to end soon.

        Without ENDPOINTS the fake has the platform's place. OPTIONS are those of stand_ins().
        """
        clock = Clock()
        defaults: Dict[str, Any] = {"time": clock, "wait_for_event": clock.wait_for_event}
        defaults["HTTPConnection"] = self.connection
        stand_ins = (machine or self.machine()).stand_ins(**{**defaults, **options})
        words = [*(self.endpoints if endpoints else ()), *arguments]
        printed, errors = io.StringIO(), io.StringIO()  # by argparse
        printing = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors)
        faulthandler.dump_traceback_later(60, exit=True, file=2)  # if it hangs
        with stand_ins, printing[0], printing[1], logged() as lines:
            try:
                status: Any = azure_provision.main(words)
            except SystemExit as error:  # from argparse
                status = error.code
        faulthandler.cancel_dump_traceback_later()
        return Run(status, "".join(lines) + printed.getvalue(), errors.getvalue())


def start_script(machine: StandIns, *arguments: str) -> "subprocess.Popen[str]":
    """Start the script as a process on MACHINE."""
    driver = [sys.executable, "-I", "-c", DRIVER, str(ROOT), str(machine.root)]
    return popen([*driver, *arguments], machine)


def popen(
    command: List[str], machine: StandIns, environment: Optional[Dict[str, str]] = None
) -> "subprocess.Popen[str]":
    """Start COMMAND with nothing but the tools of MACHINE on PATH."""
    env, pipe = {"PATH": str(machine.bin), **(environment or {})}, subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8", env=env)
