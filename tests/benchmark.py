"""Compare this project with the script and unit of Microsoft's article, booted in turn.

`python3 -m tests.benchmark BASELINE_DIR`, as root: BASELINE_DIR holds azure-provisioning.py and
azure-provisioning.service of the article "Creating generalized images without a provisioning
agent". Exits with status 1 if a target is missed.
"""

import argparse
import math
import re
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, List, NamedTuple, Tuple, TypeVar

from azure_provision import UNIT
from tests.boot import disk
from tests.boot.container import SUITE, Container, ContainerBoot
from tests.boot.host import command, missing
from tests.boot.network import DhcpServer, Namespace, connect
from tests.fake_azure import FakeAzure
from tests.plain.harness import INSTALLER
from tests.vm import VM

T = TypeVar("T")

ARTICLE_SCRIPT = "azure-provisioning.py"  # the article's
BOOT_TIMEOUT = 180  # seconds, for a boot under emulation

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
    published: float  # how long publishing took, which the article's does not do


class Containers:
    """Boots of one or the other in a container, in a network with a DHCP server and an Azure."""

    def __init__(self, stack: ExitStack, baseline: Path) -> None:
        self.baseline = baseline
        router, self.network = Namespace(), Namespace()
        router.add_platform()
        cable = connect(router, self.network)
        self.azure: FakeAzure = stack.enter_context(router.azure())
        stack.callback(DhcpServer(router, cable, "--no-ping").stop)

    def boot(self, ours: bool, measure: bool = False) -> ContainerBoot:
        machine = Container(install=False)
        machine.use_networkd()
        install_either(machine.root, self.baseline, ours)
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
        times = [  # our two lines
            int(entry["__MONOTONIC_TIMESTAMP"]) / 1000
            for entry in boot.journal
            if re.match("Hostname set by |The network of ", str(entry["MESSAGE"]))
        ]
        if len(health) != 1 or boot.hostname != name or len(times) != (2 if ours else 0):
            raise SystemExit(f"this boot did not provision:\n{boot}")
        started = boot.seconds("InactiveExit")
        # The article's unit is inactive at its end, ours stays active.
        finished = boot.seconds("ActiveEnter" if ours else "InactiveEnter")
        published = times[1] - times[0] if ours else 0
        return Times(1000 * (health[0].time - started), 1000 * (finished - started), published)

    def memory(self, ours: bool) -> float:
        """The script's peak memory in a boot, in MiB."""
        journal = str(self.boot(ours, measure=True).journal)
        (peak,) = re.findall(r"peak memory: (\d+) KiB", journal)
        return int(peak) / 1024


def install_either(root: Path, baseline: Path, ours: bool) -> None:
    """Install our script and unit, or the article's, in the image whose tree is at ROOT."""
    if ours:
        command(INSTALLER, DESTDIR=root)
        return
    shutil.copy(str(baseline / ARTICLE_SCRIPT), str(root / "usr/local"))
    shutil.copy(str(baseline / UNIT), str(root / "etc/systemd/system"))
    command("systemctl", f"--root={root}", "--quiet", "enable", UNIT)


def make_disk(directory: Path, baseline: Path, ours: bool) -> Path:
    """Make a disk for whole VMs; the two differ in nothing but what is installed.

    There the article's unit, which does not wait for a network, starts when it starts.
    """
    tree = disk.Tree(directory, ("python3", "curl"))
    tree.use_networkd()
    install_either(tree.root, baseline, ours)
    return tree.disk()


def seconds_to_ready(image: Path, ours: bool) -> float:
    """From the start of a VM to the arrival of its health report; infinite if none arrives."""
    with VM(image) as vm, vm.boot() as boot:
        boot.wait(lambda: bool(vm.azure.asked("health")), BOOT_TIMEOUT)
        boot.check()
        health = vm.azure.asked("health")
    seconds = health[0].time - boot.started if health else math.inf
    print(f"  {'ours' if ours else 'article'}: {seconds:.1f} s", flush=True)
    return seconds


def in_turn(count: int, measure: Callable[[bool], T]) -> List[Tuple[T, T]]:
    """Measure the article's and ours alternately, so that a busy moment slows down both."""
    return [(measure(False), measure(True)) for _ in range(count)]


def compare(what: str, unit: str, pairs: List[Tuple[float, float]], most: float) -> bool:
    """Print whether the ratio of the medians is at most MOST, and how much the figures scatter."""
    theirs = statistics.median(figure for figure, _ in pairs)
    ours = statistics.median(figure for _, figure in pairs)
    spread = max(max(figures) - min(figures) for figures in zip(*pairs))
    met = ours / theirs <= most
    print(
        f"  {what}: article {theirs:.1f} {unit}, ours {ours:.1f} {unit}, ratio {ours / theirs:.2f}"
        + (f" (at most {most:.2f}): {'ok' if met else 'MISSED'}" if most < math.inf else "")
        + f"; spread {spread:.1f} {unit}"
        + (", more than the medians differ" if abs(ours - theirs) < spread else ""),
        flush=True,
    )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.benchmark", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("baseline", metavar="BASELINE_DIR", type=Path)
    parser.add_argument("--boots", type=int, default=21, help="of each in containers (21)")
    parser.add_argument("--vm-boots", type=int, default=10, help="of each in whole VMs (10)")
    options = parser.parse_args()
    for name in (ARTICLE_SCRIPT, UNIT):
        if not (options.baseline / name).is_file():
            parser.error(f"no {name} in {options.baseline}")
    if min(options.boots, options.vm_boots) < 1:
        parser.error("at least one boot of each is needed")
    absent = [*missing(), *disk.missing_tools()]
    if absent:
        parser.error(f"a boot needs {', '.join(absent)}")

    print(f"Medians of {options.boots} boots in a container of Debian {SUITE}", flush=True)
    with ExitStack() as stack:
        containers = Containers(stack, options.baseline)
        times = in_turn(options.boots, containers.times)
        memory = in_turn(min(options.boots, 3), containers.memory)
    ready = [(theirs.ready, ours.ready) for theirs, ours in times]
    finished = [(theirs.finished, ours.finished) for theirs, ours in times]
    as_much = [(theirs.finished, ours.finished - ours.published) for theirs, ours in times]
    met = [
        compare("unit start to Ready", "ms", ready, 1.5),
        compare("whole unit, without publishing the name", "ms", as_much, 0.5),
        compare("whole unit", "ms", finished, math.inf),
        compare("peak memory of the script", "MiB", memory, 1.1),
    ]

    print(f"{options.vm_boots} boots of a whole VM, from its start to Ready", flush=True)
    with tempfile.TemporaryDirectory(prefix="azure-benchmark-") as directory:
        disks = {
            ours: make_disk(Path(directory, name), options.baseline, ours)
            for name, ours in (("article", False), ("ours", True))
        }
        seconds = in_turn(options.vm_boots, lambda ours: seconds_to_ready(disks[ours], ours))
    for name, boots in zip(("the article's", "ours"), zip(*seconds)):
        reported = [figure for figure in boots if figure < math.inf]
        median = statistics.median(reported or [math.inf])
        print(f"  {name}: {len(reported)} of {len(boots)} reported Ready; median {median:.1f} s")
    met.append(all(ours < math.inf for _, ours in seconds))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
