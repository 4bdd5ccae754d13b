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

# Runs the script's own main() with some of its constants changed, and without ever naming the
# machine that the tests run on.
DRIVER = """
import json, sys
root, settings, record = json.loads(sys.argv[1])
sys.path.insert(0, root)
import azure_provision
for name, value in settings.items():
    getattr(azure_provision, name)
    setattr(azure_provision, name, value)
def sethostname(name):
    if "REFUSED" in open(record).read():
        raise PermissionError(1, "Operation not permitted")
    with open(record, "a") as file:
        print("sethostname", name, file=file)
azure_provision.socket.sethostname = sethostname
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

    def provision(
        self,
        *arguments: str,
        machine: Optional[Machine] = None,
        endpoints: bool = True,
        environment: Optional[Dict[str, str]] = None,
        **settings: Any,
    ) -> Run:
        """Run the script to its end; SETTINGS are constants of its that are to differ."""
        process = self.start(
            *arguments,
            machine=machine or self.machine(),
            endpoints=endpoints,
            environment=environment,
            **settings,
        )
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
        self,
        *arguments: str,
        machine: Machine,
        endpoints: bool = True,
        environment: Optional[Dict[str, str]] = None,
        **settings: Any,
    ) -> "subprocess.Popen[str]":
        """Start the script as a process."""
        settings.setdefault("HOSTNAME_FILE", str(machine.hostname_file))
        setup = json.dumps([str(ROOT), settings, str(machine.record)])
        command = [sys.executable, "-I", "-c", DRIVER, setup]
        if endpoints:
            command += self.endpoints
        return popen([*command, *arguments], machine, environment)

    def assert_in_order(self, patterns: List[str], lines: List[str]) -> None:
        """Each pattern matches a line, each after the one before."""
        remaining = iter(lines)
        for pattern in patterns:
            if not any(re.search(pattern, line) for line in remaining):
                self.fail(f"no line for {pattern!r} in its place:\n" + "\n".join(lines))


def popen(
    command: List[str], machine: Machine, environment: Optional[Dict[str, str]] = None
) -> "subprocess.Popen[str]":
    """Start COMMAND with nothing but the tools of MACHINE on PATH."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        env=dict({"PATH": str(machine.bin)}, **(environment or {})),
    )
