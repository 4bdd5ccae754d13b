"""A machine to boot: an image, a copy of it, and what its boot has to tell."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import unittest
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

from azure_provision import AZURE_CHASSIS_ASSET_TAG, CHASSIS_ASSET_TAG_FILE, UNIT, WIRESERVER
from tests.boot.host import CACHE, RUN, command, missing, number, remove_tree, undo_at_exit
from tests.boot.network import HOST_INTERFACE, Namespace
from tests.harness import INSTALLER

SUITE = os.environ.get("BOOT_SUITE", "bookworm")

PLAIN = ["systemd", "systemd-sysv", "python3", "iproute2"]
DBUS = [*PLAIN, "dbus", "libpam-systemd"]
BROKER = [*PLAIN, "dbus-broker", "libpam-systemd"]
PACKAGES = {
    "plain": [*DBUS, "curl"],
    "no-dbus": PLAIN,
    "dbus-broker": BROKER,
    "polkit": [*DBUS, "polkitd"],
    "resolved": [*DBUS, "systemd-resolved"],
    "netplan": [*DBUS, "netplan.io"],
    "network-manager": [*DBUS, "network-manager"],
    "network-manager-polkit": [*DBUS, "network-manager", "polkitd"],
    "network-manager-broker": [*BROKER, "network-manager"],
    "ifupdown": [*DBUS, "ifupdown", "isc-dhcp-client"],
}

# systemd-networkd's configuration of a machine whose network is a cable.
NETWORKD = f"""\
[Match]
Name={HOST_INTERFACE}

[Network]
DHCP=%s
"""

# Ordered after everything else: tells how the boot went, and ends it at once.
REPORT_UNIT = f"""\
[Unit]
After=multi-user.target {UNIT}

[Service]
Type=oneshot
ExecStart=/bin/sh /report/script

[Install]
WantedBy=graphical.target
"""
REPORT_SCRIPT = f"""\
cd /report
uname -n >hostname
cat /etc/hostname >etc-hostname
ip -4 -brief address show >addresses
systemctl is-enabled {UNIT} >enabled
systemctl show {UNIT} >unit
systemctl --version >systemd
python3 --version >python 2>&1
journalctl --sync
journalctl -b -o json --all >journal
touch complete
systemctl --force --force poweroff
"""


# Ordered after the unit and nothing else, and needs the network at once.
NEXT_UNIT = f"""\
[Unit]
After={UNIT}

[Service]
Type=oneshot
ExecStart=/bin/bash -c 'exec 3<>/dev/tcp/{WIRESERVER}/80 && echo connected'
StandardOutput=file:/report/next
StandardError=file:/report/next

[Install]
WantedBy=multi-user.target
"""


# Images, built once.


def image(variant: str, suite: str = SUITE, others: Sequence[str] = ()) -> Path:
    """The directory of an image; takes half a minute when it is not in the cache yet.

    It has the packages of VARIANT and these OTHERS.
    """
    packages = ",".join([*PACKAGES.get(variant, []), *others])
    key = hashlib.sha256(packages.encode()).hexdigest()[:8]
    directory = CACHE / f"{suite}-{variant}-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(str(CACHE / "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be building it
        if not directory.exists():
            print(f"building {directory}", file=sys.stderr, flush=True)
            unfinished = CACHE / "unfinished"
            shutil.rmtree(str(unfinished), ignore_errors=True)
            command(
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                f"--include={packages}",
                '--aptopt=Acquire::Check-Valid-Until "false"',
                suite,
                unfinished,
                *(mirror() if suite != host_suite() else []),
            )
            unfinished.rename(directory)
    return directory


def host_suite() -> str:
    """The suite of this machine, for which mmdebstrap takes this machine's own sources."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.split("=")[1].strip('"')
    return ""


def mirror() -> List[str]:
    """The first Debian mirror of this machine's apt, if it has one."""
    for line in command("apt-get", "indextargets", "--format", "$(REPO_URI)").splitlines():
        if "debian" in line and "security" not in line:
            return [line]
    return []


# The machine.


def children(process: int) -> List[int]:
    """The child processes of a process: proc_pid_task(5)."""
    try:
        return [
            int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:  # it has ended
        return []


class Boot:
    """How one boot went."""

    def __init__(self, report: Path, console: str) -> None:
        self.console = console
        self.files = {
            path.name: path.read_text(encoding="utf-8", errors="replace")
            for path in report.iterdir()
            if path.is_file()
        }
        self.journal: List[Dict[str, Any]] = [
            json.loads(line) for line in self.files.get("journal", "").splitlines()
        ]
        self.unit = dict(
            line.split("=", 1) for line in self.files.get("unit", "").splitlines() if "=" in line
        )
        self.hostname = self.files.get("hostname", "").strip()
        self.etc_hostname = self.files.get("etc-hostname", "").strip()
        self.enabled = self.files.get("enabled", "").strip()
        self.next = self.files.get("next", "").strip()  # what the next unit met

    @property
    def entries(self) -> List[Dict[str, Any]]:
        """The journal's entries that the script wrote."""
        return [e for e in self.journal if e.get("SYSLOG_IDENTIFIER") == "azure-provisioning"]

    @property
    def lines(self) -> List[str]:
        """The script's own lines, each with its priority in front: "<6>Response: 200 OK"."""
        return ["<{PRIORITY}>{MESSAGE}".format(**entry) for entry in self.entries]

    def seconds(self, name: str) -> float:
        """A monotonic time stamp of the unit, in seconds: "ExecMainStart", "ActiveEnter"."""
        return int(self.unit[f"{name}TimestampMonotonic"]) / 1e6

    def __str__(self) -> str:
        return "\n".join([*self.lines, self.files.get("enabled", "no report"), self.console])


class Machine:
    """A copy of an image, with the unit installed by install.sh, and how to boot it."""

    def __init__(self, variant: str = "plain", install: bool = True) -> None:
        original = image(variant)
        self.directory = RUN / f"{os.getpid()}-{number()}"
        self.root = self.directory / "root"
        undo_at_exit(self.remove)
        for name in ("upper", "work", "root", "report"):
            (self.directory / name).mkdir(parents=True)
        # Short names, since systemd reads the kernel's list of mounts more than a hundred times for
        # a sandbox; each line of it names these.
        (self.directory / "image").symlink_to(original)
        layers = "lowerdir=image,upperdir=upper,workdir=work"
        command("mount", "-t", "overlay", "-o", layers, "overlay", "root", cwd=self.directory)
        (self.root / "report").mkdir()
        self.write("etc/hostname", "golden-image\n")
        self.write("etc/systemd/system/boot-report.service", REPORT_UNIT)
        self.enable("boot-report.service")
        command("systemctl", f"--root={self.root}", "--quiet", "set-default", "graphical.target")
        self.options: List[str] = []
        self.asset_tag(AZURE_CHASSIS_ASSET_TAG)
        if install:
            command(INSTALLER, DESTDIR=self.root)

    def remove(self) -> None:
        if self.directory.exists():
            remove_tree(self.directory)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the machine."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def enable(self, unit: str) -> None:
        """Have it start UNIT when it boots."""
        command("systemctl", f"--root={self.root}", "--quiet", "enable", unit)

    def use_networkd(self, dhcp: str = "ipv4") -> None:
        """Have systemd-networkd ask for an address at the cable."""
        self.write("etc/systemd/network/10-cable.network", NETWORKD % dhcp)
        self.enable("systemd-networkd.service")

    def asset_tag(self, tag: str) -> None:
        """Have its firmware say TAG."""
        if Path(CHASSIS_ASSET_TAG_FILE).exists():
            file = self.directory / "tag"
            file.write_text(tag + "\n")
            self.sys = [f"--bind-ro={file}:{CHASSIS_ASSET_TAG_FILE}"]
            return
        self.sys = []
        if tag != AZURE_CHASSIS_ASSET_TAG:  # this machine has no DMI to put it over
            file = self.directory / "sys" / "dmi" / "id" / "chassis_asset_tag"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(tag + "\n")
            self.sys = [f"--bind-ro={self.directory}/sys:/sys/class"]

    @contextlib.contextmanager
    def start(self, network: Namespace) -> Iterator["Console"]:
        """Boot it; the machine is killed at the end of the block, as by a power cut."""
        report = self.directory / "report"
        shutil.rmtree(str(report))
        report.mkdir()
        (report / "script").write_text(REPORT_SCRIPT)
        # A terminal, since systemd writes "journal+console" to nothing else.
        terminal, inner = pty.openpty()
        process = subprocess.Popen(
            [
                "systemd-nspawn",
                "--quiet",
                "--directory",
                str(self.root),
                "--boot",
                f"--network-namespace-path=/run/netns/{network.name}",
                "--console=interactive",
                "--register=no",
                "--keep-unit",
                "--capability=CAP_NET_ADMIN,CAP_NET_RAW",
                f"--bind={report}:/report",
                *self.sys,
                *self.options,
            ],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=dict(os.environ, SYSTEMD_NSPAWN_UNIFIED_HIERARCHY="1"),
        )
        os.close(inner)
        console = Console(process, terminal, report)
        try:
            yield console
        finally:
            # Its PID 1, with which all its processes die; they would survive systemd-nspawn.
            for child in children(process.pid):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.wait()
            console.thread.join()

    def boot(self, network: Namespace, timeout: float = 60) -> Boot:
        """Boot it and wait until it has powered itself off."""
        with self.start(network) as console:
            return console.finish(timeout)


class Console:
    """The console of a machine that runs."""

    def __init__(self, process: "subprocess.Popen[bytes]", terminal: int, report: Path) -> None:
        self.process = process
        self._terminal = terminal
        self.report = report
        self.text = ""
        self._grown = threading.Condition()
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        while True:
            try:
                output = os.read(self._terminal, 65536)
            except OSError:  # EIO: nobody holds the other end any more
                output = b""
            with self._grown:
                self.text += output.decode("utf-8", "replace") or "\n(the machine is off)\n"
                self._grown.notify_all()
            if not output:
                os.close(self._terminal)
                return

    def wait_for(self, text: str, timeout: float = 30) -> None:
        """Wait until the machine has said TEXT; raises AssertionError if it does not."""
        with self._grown:
            off = "(the machine is off)"
            self._grown.wait_for(lambda: text in self.text or off in self.text, timeout)
            if text not in self.text:
                raise AssertionError(f"the console does not say {text!r}:\n{self.text}")

    def finish(self, timeout: float = 60) -> Boot:
        """Wait until the machine has told how the boot went and has powered itself off."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the boot does not end:\n{self.text}") from None
        if not (self.report / "complete").exists():
            raise AssertionError(f"the machine ended early:\n{self.text}")
        return Boot(self.report, self.text)


class BootTest(unittest.TestCase):
    """A test that boots; it has a network, `self.network`, whose Azure is `self.azure`."""

    @classmethod
    def setUpClass(cls) -> None:
        absent = missing()
        if absent:
            raise unittest.SkipTest(f"a boot needs {', '.join(absent)}")

    def setUp(self) -> None:
        self.network = Namespace()
        self.addCleanup(self.network.remove)
        self.azure = self.network.azure()
        self.azure.__enter__()
        self.addCleanup(self.azure.__exit__)

    def machine(self, variant: str = "plain") -> Machine:
        machine = Machine(variant)
        self.addCleanup(machine.remove)
        return machine

    def resources(self) -> List[str]:
        """What was asked, in order."""
        return [request.resource for request in self.azure.requests]

    def ready_time(self) -> float:
        """When the health report arrived, on the monotonic clock."""
        return self.azure.asked("health")[-1].time

    def figure(self, text: str) -> None:
        """Note a figure of this test, where BOOT_FIGURES names a file for them."""
        path = os.environ.get("BOOT_FIGURES")
        if path:
            with open(path, "a") as file:
                print(f"{SUITE} {self.id().split('.', 2)[-1]}: {text}", file=file)
