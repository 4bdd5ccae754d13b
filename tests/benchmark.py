"""Compare this project with the script and unit of Microsoft's article, booted in turn.

`python3 -m tests.benchmark BASELINE_DIR`, as root: BASELINE_DIR holds azure-provisioning.py and
azure-provisioning.service of the article "Creating generalized images without a provisioning
agent". Exits with status 1 if a target is missed.
"""

import argparse
import math
import re
import shutil
import socket
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Callable, List, NamedTuple, Tuple, TypeVar
from unittest import mock

import azure_provision
from azure_provision import READY_LIMIT, UNIT, ProvisioningError
from tests.boot import disk
from tests.boot.host import command, missing
from tests.boot.machine import SUITE, Boot, Machine
from tests.boot.network import DhcpServer, Namespace, connect
from tests.fake_azure import FakeAzure, Status
from tests.harness import INSTALLER
from tests.test_waiting import Clock
from tests.vm import VM

T = TypeVar("T")

SCRIPT = "azure-provisioning.py"  # the article's
VM_TIMEOUT = 180  # seconds, for a boot under emulation

# In the containers both units start when the network is up and nothing else is starting.
QUIET = """\
[Unit]
Wants=network-online.target
After=network-online.target dbus.service systemd-logind.service systemd-user-sessions.service
After=getty.target
"""
# Runs a command and prints its peak memory: getrusage(2).
MEASURE = """\
import resource, subprocess, sys
subprocess.call(sys.argv[1:])
print("peak memory: %d KiB" % resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
MEASURED = "[Service]\nExecStart=\nExecStart=/usr/bin/python3 -IS /usr/local/measure.py {}\n"


class Times(NamedTuple):
    """Milliseconds from the start of the unit."""

    ready: float
    finished: float


class Containers:
    """Boots of one or the other in a container, in a network with a DHCP server and an Azure."""

    def __init__(self, stack: ExitStack, baseline: Path) -> None:
        self.baseline = baseline
        router, self.network = Namespace(), Namespace()
        router.add_platform()
        cable = connect(router, self.network)
        self.azure: FakeAzure = stack.enter_context(router.azure())
        stack.callback(DhcpServer(router, cable, "--no-ping").stop)

    def boot(self, ours: bool, measure: bool = False) -> Boot:
        machine = Machine(install=False)
        machine.use_networkd()
        install(machine.root, self.baseline, ours)
        drop_ins = f"etc/systemd/system/{UNIT}.d"
        machine.write(f"{drop_ins}/quiet.conf", QUIET)
        if measure:
            unit = (machine.root / "etc/systemd/system" / UNIT).read_text()
            script = re.findall(r"(?m)^ExecStart=(/usr/bin/python3 .*)", unit)[0]
            machine.write("usr/local/measure.py", MEASURE)
            machine.write(f"{drop_ins}/measure.conf", MEASURED.format(script))
        boot = machine.boot(self.network)
        machine.remove()
        return boot

    def times(self, ours: bool) -> Times:
        """How long the unit took in a boot; SystemExit if it did not do its work."""
        before = len(self.azure.asked("health"))
        boot = self.boot(ours)
        health = self.azure.asked("health")[before:]
        name = self.azure.computer_name if ours else self.azure.vm_name
        published = not ours or "Hostname published" in str(boot)
        if len(health) != 1 or boot.hostname != name or not published:
            raise SystemExit(f"this boot did not provision:\n{boot}")
        started = boot.seconds("InactiveExit")
        # The article's unit is inactive at its end, ours stays active.
        finished = boot.seconds("ActiveEnter" if ours else "InactiveEnter")
        return Times(1000 * (health[0].time - started), 1000 * (finished - started))

    def memory(self, ours: bool) -> float:
        """The script's peak memory in a boot, in MiB."""
        boot = self.boot(ours, measure=True)
        for entry in boot.journal:
            found = re.match(r"peak memory: (\d+) KiB", str(entry.get("MESSAGE")))
            if found:
                return int(found.group(1)) / 1024
        raise SystemExit(f"this boot did not tell its peak memory:\n{boot}")


def install(root: Path, baseline: Path, ours: bool) -> None:
    """Install our script and unit, or the article's, in the image whose tree is at ROOT."""
    if ours:
        command(INSTALLER, DESTDIR=root)
        return
    shutil.copy(str(baseline / SCRIPT), str(root / "usr/local"))
    shutil.copy(str(baseline / UNIT), str(root / "etc/systemd/system"))
    command("systemctl", f"--root={root}", "--quiet", "enable", UNIT)


def make_disk(directory: Path, baseline: Path, ours: bool) -> Path:
    """Make a disk for whole VMs; the two differ in nothing but what is installed."""
    tree = disk.Tree(directory, ("python3", "curl"))
    tree.use_networkd()
    install(tree.root, baseline, ours)
    return tree.disk()


def seconds_to_ready(image: Path) -> float:
    """From the start of a VM to the arrival of its health report; infinite if none arrives."""
    with VM(image) as vm, vm.boot() as boot:
        boot.wait(lambda: bool(vm.azure.asked("health")), VM_TIMEOUT)
        boot.check()
        health = vm.azure.asked("health")
        return health[0].time - boot.started if health else math.inf


def in_turn(count: int, measure: Callable[[bool], T]) -> List[Tuple[T, T]]:
    """Measure the article's and ours alternately, so that a busy moment slows down both."""
    return [(measure(False), measure(True)) for _ in range(count)]


def verdict(what: str, figures: str, met: bool, target: str) -> bool:
    print(f"  {what:<20} {figures:<42} {'ok' if met else 'MISSED'} (at most {target})", flush=True)
    return met


def compare(what: str, unit: str, pairs: List[Tuple[float, float]], most: float) -> bool:
    """Print the ratio of the medians, which is to be at most MOST."""
    theirs, ours = map(statistics.median, zip(*pairs))
    figures = f"article {theirs:.1f} {unit}, ours {ours:.1f} {unit}: {ours / theirs:.2f}"
    return verdict(what, figures, ours / theirs <= most, f"{most:.2f}")


def compare_vms(pairs: List[Tuple[float, float]]) -> bool:
    """Print each boot of a whole VM, too, and whether the difference may be chance."""
    spread, medians = 0.0, []
    for name, seconds in zip(("article", "ours"), zip(*pairs)):
        spread = max(spread, max(seconds) - min(seconds))
        medians.append(statistics.median(seconds))
        each = " ".join(f"{second:.1f}" for second in seconds)
        print(f"  {name}: {each} s, spread {max(seconds) - min(seconds):.1f} s")
    met = compare("VM start to Ready", "s", pairs, 1)
    difference = medians[1] - medians[0]
    if abs(difference) < spread:
        print(f"  The medians differ by {difference:+.1f} s, which is less than the spread.")
    return met


def outage(what: str, endpoint: str) -> bool:
    """Print what 20 minutes without an answer cost, on a clock on which only pauses take time."""
    clock = Clock()
    lines: List[str] = []
    log = mock.patch.object(azure_provision, "log", lambda _, line: lines.append(line))
    started = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
    with log, mock.patch.object(azure_provision, "time", clock), suppress(ProvisioningError):
        azure_provision.report_ready(endpoint, dry_run=False)
    cpu = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID) - started
    requests = len(clock.pauses) + 1
    met = clock.now >= READY_LIMIT and requests <= 1500 and len(lines) <= 20 and cpu <= 2
    figures = f"{requests} requests, {len(lines)} lines, {cpu:.2f} s of CPU"
    return verdict(what, figures, met, "1500, 20, 2")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.benchmark", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("baseline", metavar="BASELINE_DIR", type=Path)
    parser.add_argument("--boots", type=int, default=21, help="of each in containers (21)")
    parser.add_argument("--vm-boots", type=int, default=5, help="of each in whole VMs (5)")
    options = parser.parse_args()
    for name in (SCRIPT, UNIT):
        if not (options.baseline / name).is_file():
            parser.error(f"no {name} in {options.baseline}")
    absent = [*missing(), *disk.missing()]
    if absent:
        parser.error(f"a boot needs {', '.join(absent)}")

    met = []
    with ExitStack() as stack:
        print(f"In a container of Debian {SUITE}, medians of {options.boots} boots", flush=True)
        containers = Containers(stack, options.baseline)
        times = in_turn(options.boots, containers.times)
        ready = [(theirs.ready, ours.ready) for theirs, ours in times]
        finished = [(theirs.finished, ours.finished) for theirs, ours in times]
        memory = in_turn(3, containers.memory)
        met.append(compare("unit start to Ready", "ms", ready, 1.6))
        met.append(compare("unit start to end", "ms", finished, 0.7))
        met.append(compare("script's peak memory", "MiB", memory, 0.9))

        print(f"In a whole VM, {options.vm_boots} boots", flush=True)
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="azure-benchmark-"))
        )
        disks = [
            make_disk(directory / name, options.baseline, ours)
            for name, ours in (("article", False), ("ours", True))
        ]
        boots = in_turn(options.vm_boots, lambda ours: seconds_to_ready(disks[ours]))
        met.append(compare_vms(boots))

    print("20 minutes of outage, its time compressed")
    with socket.socket() as nobody, FakeAzure() as azure:
        nobody.bind(("127.0.0.1", 0))
        azure.script("goalstate", [], forever=Status(503))
        met.append(outage("connection refused", "{}:{}".format(*nobody.getsockname())))
        met.append(outage("status 503", azure.wireserver))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
