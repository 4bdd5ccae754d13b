"""What the tests share: the script as a process, with stand-ins for the tools that it calls."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from tests.fake_azure import FakeAzure

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "azure_provision.py"
UNIT_FILE = ROOT / "azure-provisioning.service"
INSTALLER = ROOT / "install.sh"

# Runs the script's own main() with some of its constants changed. It never names the machine that
# the tests run on, and records what it calls for that.
DRIVER = """
import io, json, os, sys
root, settings, record, journal, uid = json.loads(sys.argv[1])
sys.path.insert(0, root)
import azure_provision
def note(*words):
    with open(record, "a") as file:
        print(*words, file=file)
def sethostname(name):
    if "REFUSED" in open(record).read():
        raise PermissionError(1, "Operation not permitted")
    note("sethostname", name)
def fsync(descriptor, real=os.fsync):
    note("fsync", os.path.basename(os.readlink("/proc/self/fd/%d" % descriptor)))
    real(descriptor)
class FullDisk(io.FileIO):
    def write(self, data):
        raise OSError(28, "No space left on device")
if "FULL_DISK" in os.environ:
    azure_provision.open = lambda name, *mode, **options: (
        FullDisk(name, "wb") if isinstance(name, int) else open(name, *mode, **options)
    )
for name, value in settings.items():
    getattr(azure_provision, name)
    setattr(azure_provision, name, value)
azure_provision.socket.sethostname, os.fsync = sethostname, fsync
os.geteuid = lambda: uid
if journal:
    os.environ["JOURNAL_STREAM"] = "{0.st_dev}:{0.st_ino}".format(os.fstat(1))
sys.exit(azure_provision.main(sys.argv[2:]))
"""


class Run(NamedTuple):
    """How a run of the script ended."""

    status: int
    output: str
    errors: str
    seconds: float

    @property
    def lines(self) -> List[str]:
        return self.output.splitlines()


class Machine:
    """A directory with stand-ins for the machine: its tools on PATH, its files, its record.

    A stand-in writes its name and arguments to the record, then does what TOOLS says, in shell.
    """

    def __init__(self, **tools: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="azure provision "))
        self.record = self.root / "record"
        self.record.write_text("")
        self.hostname_file = self.root / "hostname"
        self.hostname_file.write_text("localhost\n")
        self.route_file = self.root / "route"  # empty: without a default route
        self.route_file.write_text("")
        self.bin = self.root / "bin"
        self.bin.mkdir()
        for name, action in tools.items():
            tool = self.bin / name
            tool.write_text(f"#!/bin/sh\necho {name} \"$@\" >>'{self.record}'\n{action}\n")
            tool.chmod(0o755)

    @property
    def calls(self) -> List[str]:
        """What was called, in order: "hostnamectl set-hostname web-prod-01"."""
        return self.record.read_text().splitlines()

    def remove(self) -> None:
        shutil.rmtree(str(self.root))


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

    def machine(self, **tools: str) -> Machine:
        """A machine with these tools; without any, one whose tools all succeed."""
        machine = Machine(**(tools or {"hostnamectl": "", "systemctl": ""}))
        self.addCleanup(machine.remove)
        return machine

    def provision(self, *arguments: str, machine: Optional[Machine] = None, **options: Any) -> Run:
        """Run the script to its end; OPTIONS are those of start()."""
        process = self.start(*arguments, machine=machine or self.machine(), **options)
        started = time.monotonic()
        try:
            output, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            self.fail(f"the script hangs:\n{output}{errors}")
        seconds = time.monotonic() - started
        self.assertNotIn("Traceback", output + errors)
        return Run(process.returncode, output, errors, seconds)

    def start(
        self, *arguments: str, machine: Machine, endpoints: bool = True, **options: Any
    ) -> "subprocess.Popen[str]":
        """Start the script as a process; OPTIONS are those of start_script()."""
        return start_script(machine, *(self.endpoints if endpoints else ()), *arguments, **options)

    def assert_in_order(self, patterns: List[str], lines: List[str]) -> None:
        """Each pattern matches a line, each after the one before."""
        remaining = iter(lines)
        for pattern in patterns:
            if not any(re.search(pattern, line) for line in remaining):
                self.fail(f"no line for {pattern!r} in its place:\n" + "\n".join(lines))


def start_script(
    machine: Machine,
    *arguments: str,
    environment: Optional[Dict[str, str]] = None,
    journal: bool = False,
    uid: int = 0,
    **settings: Any,
) -> "subprocess.Popen[str]":
    """Start the script on MACHINE; SETTINGS are constants of the script that are to differ.

    JOURNAL tells it that its standard output is the journal, UID whom it runs as.
    """
    settings.setdefault("HOSTNAME_FILE", str(machine.hostname_file))
    settings.setdefault("ROUTE_FILE", str(machine.route_file))
    setup = json.dumps([str(ROOT), settings, str(machine.record), journal, uid])
    return popen([sys.executable, "-I", "-c", DRIVER, setup, *arguments], machine, environment)


def popen(
    command: List[str], machine: Machine, environment: Optional[Dict[str, str]] = None
) -> "subprocess.Popen[str]":
    """Start COMMAND with nothing but the tools of MACHINE on PATH."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=dict({"PATH": str(machine.bin)}, **(environment or {})),
    )
