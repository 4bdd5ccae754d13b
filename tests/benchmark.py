"""Boot the same image with the article's script and unit, and with ours, in turn; compare.

`python3 -m tests.benchmark BASELINE_DIR`, as root: BASELINE_DIR holds azure-provisioning.py and
azure-provisioning.service of the article "Creating generalized images without a provisioning
agent". Both boot with their network already there, since the article's script does not wait for
one. Exits with status 1 where a target is missed.
"""

import argparse
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

from azure_provision import UNIT
from tests.boot.host import missing
from tests.boot.machine import SUITE, Machine
from tests.boot.network import DhcpServer, Namespace, connect
from tests.fake_azure import FakeAzure, Status
from tests.harness import ROOT

OUTAGE_REQUESTS, OUTAGE_LINES, OUTAGE_CPU = 1500, 20, 2.0

# Both units start when the network is there and nothing else of the boot competes with them.
QUIET = """\
[Unit]
Wants=network-online.target
After=network-online.target dbus.service systemd-logind.service systemd-user-sessions.service
After=getty.target
"""
# Tells the most memory that the script ever had; see getrusage(2).
MEMORY = """\
import os, sys
child = os.fork()
if not child:
    os.execv(sys.argv[1], sys.argv[1:])
usage = os.wait4(child, 0)[2]
print("peak memory: %d KiB" % usage.ru_maxrss)
"""
# Twenty minutes of the script's clock, in which sleeping takes no time.
OUTAGE = """\
import sys
sys.path.insert(0, sys.argv[1])
import azure_provision
class Clock:
    now = 0.0
    def monotonic(self):
        return self.now
    def sleep(self, seconds):
        self.now += seconds
connects = 0
class CountingConnection(azure_provision.http.client.HTTPConnection):
    def connect(self):
        global connects
        connects += 1
        super().connect()
azure_provision.time = Clock()
azure_provision.http.client.HTTPConnection = CountingConnection
status = azure_provision.main(["--wireserver", sys.argv[2], "--imds", sys.argv[2]])
print("connects:", connects, file=sys.stderr)
sys.exit(status)
"""


class Figures(NamedTuple):
    """One boot: milliseconds from the unit's start."""

    ready: float
    finished: float


class Bench:
    """A network with a DHCP server and an Azure, and machines that boot in it."""

    def __init__(self, stack: ExitStack, baseline: Path, sandbox: bool) -> None:
        self.baseline = baseline
        self.sandbox = sandbox
        self.router = Namespace()
        self.network = Namespace()
        self.router.add_platform()
        cable = connect(self.router, self.network)
        self.azure: FakeAzure = stack.enter_context(self.router.azure())
        self.server = DhcpServer(self.router, cable, "--no-ping")
        stack.callback(self.server.stop)

    def machine(self, ours: bool) -> Machine:
        """A new machine, with our script and unit or with the article's."""
        machine = Machine(install=ours)
        machine.use_networkd()
        machine.write(f"etc/systemd/system/{UNIT}.d/quiet.conf", QUIET)
        unit = machine.root / "etc/systemd/system" / UNIT
        if not ours:
            script = machine.root / "usr/local/azure-provisioning.py"
            shutil.copy(str(self.baseline / "azure-provisioning.py"), str(script))
            shutil.copy(str(self.baseline / UNIT), str(unit))
            machine.enable(UNIT)
        elif not self.sandbox:
            unit.write_text(without_sandbox(unit.read_text()))
        return machine

    def boot(self, ours: bool) -> Figures:
        """Boot a new machine."""
        machine = self.machine(ours)
        before = len(self.azure.asked("health"))
        boot = machine.boot(self.network)
        machine.remove()
        health = self.azure.asked("health")[before:]
        if len(health) != 1 or boot.hostname not in ("web-prod-01", "web-prod-01-vm"):
            raise SystemExit(f"this boot did not provision:\n{boot}")
        if ours and not any("Hostname published" in line for line in boot.lines):
            raise SystemExit(f"this boot did not publish its name:\n{boot}")
        started = boot.seconds("InactiveExit")
        # The article's unit is over when it is inactive again, ours stays active.
        ended = boot.seconds("ActiveEnter" if ours else "InactiveEnter")
        return Figures(1000 * (health[0].time - started), 1000 * (ended - started))

    def memory(self, ours: bool) -> int:
        """The peak memory of the script in a boot, in KiB."""
        machine = self.machine(ours)
        unit = (machine.root / "etc/systemd/system" / UNIT).read_text()
        command = re.findall(r"(?m)^ExecStart=(/usr/bin/python3 .*)$", unit)[0]
        machine.write("usr/local/memory.py", MEMORY)
        machine.write(
            f"etc/systemd/system/{UNIT}.d/memory.conf",
            "[Service]\nExecStart=\n"
            f"ExecStart=/usr/bin/python3 -IS /usr/local/memory.py {command}\n",
        )
        boot = machine.boot(self.network)
        machine.remove()
        for entry in boot.journal:
            found = re.match(r"peak memory: (\d+) KiB", str(entry.get("MESSAGE")))
            if found:
                return int(found.group(1))
        raise SystemExit(f"this boot told no memory:\n{boot}")


def without_sandbox(unit: str) -> str:
    """UNIT without its sandbox, which is the last part of its section."""
    start, rest = unit.split("# The sandbox.")
    return start + "[Install]" + rest.split("[Install]")[1]


def outage(endpoint: str) -> Tuple[int, int, float]:
    """Connections, journal lines and CPU seconds of twenty minutes without an answer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, "-I", "-c", OUTAGE, str(ROOT), endpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode != 1:
        raise SystemExit(f"the outage ended otherwise: {process.stdout}{process.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return int(process.stderr.split()[-1]), len(process.stdout.splitlines()), cpu


class Report:
    """Figures beside their targets."""

    def __init__(self) -> None:
        self.missed = 0

    def line(self, what: str, figure: str, good: bool, target: str) -> None:
        self.missed += not good
        print(f"  {what:<34} {figure:<44} {'ok' if good else 'MISSED'} ({target})", flush=True)

    def ratio(
        self, what: str, unit: str, theirs: List[float], ours: List[float], most: float
    ) -> None:
        """The ratio of the medians, which is to be MOST at most."""
        a, b = statistics.median(theirs), statistics.median(ours)
        figure = f"article {a:.0f} {unit}, ours {b:.0f} {unit}: {b / a:.2f}"
        self.line(what, figure, b / a <= most, f"at most {most:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.benchmark", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("baseline", metavar="BASELINE_DIR", type=Path)
    parser.add_argument("--pairs", type=int, default=21, help="boots of each (21, at least 7)")
    parser.add_argument("--no-sandbox", action="store_true", help="our unit without its sandbox")
    options = parser.parse_args()
    if options.pairs < 7:
        parser.error("--pairs: at least 7")
    for name in ("azure-provisioning.py", UNIT):
        if not (options.baseline / name).is_file():
            parser.error(f"no {name} in {options.baseline}")
    if missing():
        parser.error(f"a boot needs {', '.join(missing())}")

    report = Report()
    figures: Dict[bool, List[Figures]] = {False: [], True: []}
    memory: Dict[bool, List[float]] = {False: [], True: []}
    sandbox = "without its sandbox" if options.no_sandbox else "with its sandbox"
    print(f"{options.pairs} pairs of boots of Debian {SUITE}, our unit {sandbox}; medians")
    with ExitStack() as stack:
        bench = Bench(stack, options.baseline, not options.no_sandbox)
        for _ in range(options.pairs):
            for ours in (False, True):
                figures[ours].append(bench.boot(ours))
        for _ in range(3):
            for ours in (False, True):
                memory[ours].append(bench.memory(ours))
    theirs, ours_ = figures[False], figures[True]
    report.ratio(
        "unit's start to Ready received",
        "ms",
        [f.ready for f in theirs],
        [f.ready for f in ours_],
        1.05 if options.no_sandbox else 1.60,
    )
    report.ratio(
        "unit's start to unit finished",
        "ms",
        [f.finished for f in theirs],
        [f.finished for f in ours_],
        0.70,
    )
    report.ratio("peak memory of the script", "KiB", memory[False], memory[True], 1.10)

    print("20 minutes of outage, its time compressed")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        outage_of(report, "connection refused", "{}:{}".format(*nobody.getsockname()))
    with FakeAzure() as azure:
        azure.script("goalstate", [], forever=Status(503))
        outage_of(report, "status 503", azure.wireserver)
    return 1 if report.missed else 0


def outage_of(report: Report, what: str, endpoint: str) -> None:
    requests, lines, cpu = outage(endpoint)
    report.line(
        what,
        f"{requests} requests, {lines} lines, {cpu:.2f} s of CPU",
        requests <= OUTAGE_REQUESTS and lines <= OUTAGE_LINES and cpu <= OUTAGE_CPU,
        f"at most {OUTAGE_REQUESTS}, {OUTAGE_LINES}, {OUTAGE_CPU:.0f}",
    )


if __name__ == "__main__":
    sys.exit(main())
