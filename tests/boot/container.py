"""A machine to boot: an image, a copy of it, and what its boot has to tell."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import unittest
from pathlib import Path
from typing import Any, Dict, List, Sequence

from azure_provision import AZURE_CHASSIS_ASSET_TAG, CHASSIS_ASSET_TAG_FILE, UNIT, WIRESERVER
from tests.boot.host import CACHE, command, missing, new_directory, note, remove_tree, skip_if
from tests.boot.network import HOST_INTERFACE, Namespace
from tests.plain.harness import INSTALLER

SUITE = os.environ.get("BOOT_SUITE", "bookworm")

PLAIN = ["systemd", "systemd-sysv", "python3", "iproute2"]
DBUS = [*PLAIN, "dbus", "libpam-systemd"]
PACKAGES = {
    "plain": [*DBUS, "curl"],
    "no-dbus": PLAIN,
    "netplan": [*DBUS, "netplan.io"],
    "network-manager": [*DBUS, "network-manager"],
    "polkit": [*DBUS, "polkitd"],
    "resolved": [*DBUS, "systemd-resolved"],
    "dbus-broker": [*PLAIN, "dbus-broker", "libpam-systemd"],
    "network-manager-polkit": [*DBUS, "network-manager", "polkitd"],
    "network-manager-broker": [*PLAIN, "dbus-broker", "libpam-systemd", "network-manager"],
    "ifupdown": [*DBUS, "ifupdown", "isc-dhcp-client"],
}

CABLE_FILE = f"[Match]\nName={HOST_INTERFACE}\n\n[Network]\nDHCP=%s\n"

# A script of the tests, which says on the console what it finds.
SERVICE = """\
[Unit]
After={after}
Before={before}

[Service]
Type=oneshot
ExecStart=/bin/bash /usr/local/{name}
SyslogIdentifier={name}
StandardOutput=journal+console

[Install]
WantedBy=multi-user.target
"""
REPORT = f"""\
cd /report
uname -n >hostname
cat /etc/hostname >etc-hostname
systemctl is-enabled {UNIT} >enabled
systemctl show {UNIT} >unit
journalctl --sync
journalctl -b -o json --all >journal
touch complete
systemctl --force --force poweroff
"""
CONNECTED = "the next unit has its network"


def image(variant: str, suite: str = SUITE, others: Sequence[str] = ()) -> Path:
    """The directory of an image with the packages of VARIANT and these OTHERS, built once."""
    packages = ",".join([*PACKAGES.get(variant, []), *others])
    key = hashlib.sha256(packages.encode()).hexdigest()[:8]
    directory = CACHE / f"{suite}-{variant}-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be building it
        if not directory.exists():
            print(f"building {directory}", file=sys.stderr, flush=True)
            unfinished = CACHE / f"unfinished-{directory.name}"
            shutil.rmtree(str(unfinished), ignore_errors=True)
            options = ("--quiet", "--variant=minbase", f"--include={packages}")
            old = '--aptopt=Acquire::Check-Valid-Until "false"'
            command("mmdebstrap", *options, old, suite, unfinished, *mirror())
            unfinished.rename(directory)
    return directory


def mirror() -> List[str]:
    """The first Debian mirror of this machine's apt, if it has one."""
    uris = command("apt-get", "indextargets", "--format", "$(REPO_URI)", "Label: Debian")
    return uris.split()[:1]


def write(root: Path, path: str, text: str, mode: int = 0o644) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)


def add_service(root: Path, name: str, script: str, after: str = UNIT, before: str = "") -> None:
    """Have SCRIPT run at each boot, after the unit unless AFTER says otherwise."""
    service = SERVICE.format(name=name, after=after, before=before)
    write(root, f"usr/local/{name}", script)
    write(root, f"etc/systemd/system/{name}.service", service)
    enable(root, f"{name}.service")


def enable(root: Path, unit: str) -> None:
    command("systemctl", f"--root={root}", "--quiet", "enable", unit)


def add_next_service(root: Path) -> None:
    """Add what is ordered after the unit and needs the network at once."""
    add_service(root, "next", f"exec 3<>/dev/tcp/{WIRESERVER}/80 && echo {CONNECTED}")


class Container:
    """A copy of an image, with the unit installed by install.sh, and how to boot it."""

    def __init__(self, variant: str = "plain", install: bool = True) -> None:
        self.directory = new_directory()
        self.root = self.directory / "root"
        self.report = self.directory / "report"
        self.options: List[str] = []  # of systemd-nspawn
        for name in ("upper", "work", "root", "report"):
            (self.directory / name).mkdir()
        # Short names: systemd reads the list of mounts more than a hundred times for a sandbox.
        (self.directory / "image").symlink_to(image(variant))
        layers = "lowerdir=image,upperdir=upper,workdir=work"
        command("mount", "-t", "overlay", "-o", layers, "overlay", "root", cwd=self.directory)
        (self.root / "report").mkdir()
        self.write("etc/hostname", "golden-image\n")
        add_service(self.root, "report", REPORT, after=f"multi-user.target {UNIT}")
        self.asset_tag(AZURE_CHASSIS_ASSET_TAG)
        if install:
            command(INSTALLER, DESTDIR=self.root)

    def remove(self) -> None:
        remove_tree(self.directory)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        write(self.root, path, text, mode)

    def use_networkd(self, dhcp: str = "ipv4") -> None:
        """Have systemd-networkd ask for an address at the cable."""
        self.write("etc/systemd/network/10-cable.network", CABLE_FILE % dhcp)
        enable(self.root, "systemd-networkd.service")

    def asset_tag(self, tag: str) -> None:
        """Have its firmware say TAG."""
        sys = self.directory / "sys"
        write(sys, "dmi/id/chassis_asset_tag", tag + "\n")
        self.sys: List[str] = []
        if Path(CHASSIS_ASSET_TAG_FILE).exists():
            self.sys = [f"--bind-ro={sys}/dmi/id/chassis_asset_tag:{CHASSIS_ASSET_TAG_FILE}"]
        elif tag != AZURE_CHASSIS_ASSET_TAG:  # this machine has no DMI to put it over
            self.sys = [f"--bind-ro={sys}:/sys/class"]

    def start(self, network: Namespace) -> "ContainerBoot":
        """Turn the power on; the block of this context manager ends with a power cut."""
        for file in self.report.iterdir():
            file.unlink()
        command = [
            *("systemd-nspawn", "--quiet", f"--directory={self.root}", "--boot"),
            *("--console=interactive", "--register=no", "--keep-unit"),
            f"--network-namespace-path={network.path}",
            "--kill-signal=SIGKILL",  # that its PID 1 gets when systemd-nspawn is terminated
            *("--capability=CAP_NET_ADMIN,CAP_NET_RAW", f"--bind={self.report}:/report"),
            *self.sys,
            *self.options,
        ]
        return ContainerBoot(command, self.report)

    def boot(self, network: Namespace) -> "ContainerBoot":
        """ContainerBoot it and wait until it has powered itself off."""
        with self.start(network) as boot:
            boot.finish()
            return boot


class ContainerBoot:
    """One boot: the console while it runs, and how it went once it has finished."""

    def __init__(self, command: List[str], report: Path) -> None:
        self.report = report
        self.console = ""
        self._changed = threading.Condition()
        # A terminal, since systemd writes "journal+console" to nothing else.
        terminal, inner = pty.openpty()
        env = dict(os.environ, SYSTEMD_NSPAWN_UNIFIED_HIERARCHY="1")
        self._process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=env)
        os.close(inner)
        self._thread = threading.Thread(target=self._read_console, args=(terminal,))
        self._thread.start()

    def __enter__(self) -> "ContainerBoot":
        return self

    def __exit__(self, *args: Any) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()

    def _read_console(self, terminal: int) -> None:
        # It ends with EIO when nobody holds the other end any more.
        with open(terminal, "rb", 0) as file, contextlib.suppress(OSError):
            for output in iter(lambda: file.read(65536), b""):
                with self._changed:
                    self.console += output.decode("utf-8", "replace")
                    self._changed.notify_all()

    def wait_for_console(self, text: str) -> None:
        """Wait until the machine has said TEXT; raises AssertionError if it does not."""
        with self._changed:
            if not self._changed.wait_for(lambda: text in self.console, 30):
                raise AssertionError(f"the console does not say {text!r}:\n{self.console}")

    def finish(self, timeout: int = 60) -> None:
        """Wait until the machine has told how the boot went and has powered itself off."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        if not (self.report / "complete").exists():
            raise AssertionError(f"the boot did not end, or too early:\n{self.console}")
        self.hostname, self.etc_hostname, self.enabled, unit, journal = (
            (self.report / name).read_text(encoding="utf-8", errors="replace").strip()
            for name in ("hostname", "etc-hostname", "enabled", "unit", "journal")
        )
        self.unit = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
        self.journal: List[Dict[str, Any]] = [json.loads(line) for line in journal.splitlines()]

    def messages(self, identifier: str) -> List[str]:
        """What one program wrote to the journal, with priorities: "<6>Response: 200 OK"."""
        entries = [e for e in self.journal if e.get("SYSLOG_IDENTIFIER") == identifier]
        return ["<{PRIORITY}>{MESSAGE}".format(**entry) for entry in entries]

    @property
    def lines(self) -> List[str]:
        return self.messages("azure-provisioning")

    def seconds(self, name: str) -> float:
        """A time of the unit on the monotonic clock: "ExecMainStart", "ActiveEnter"."""
        return int(self.unit[f"{name}TimestampMonotonic"]) / 1e6

    def __str__(self) -> str:
        return "\n".join([*self.lines, self.enabled, self.console])


class BootTest(unittest.TestCase):
    """A test that boots; it has a network, `self.network`, whose Azure is `self.azure`."""

    @classmethod
    def setUpClass(cls) -> None:
        skip_if(missing())

    def setUp(self) -> None:
        self.network = self.namespace()
        self.azure = self.network.azure()
        self.azure.__enter__()
        self.addCleanup(self.azure.__exit__)

    def namespace(self) -> Namespace:
        namespace = Namespace()
        self.addCleanup(namespace.remove)
        return namespace

    def machine(self, variant: str = "plain") -> Container:
        machine = Container(variant)
        self.addCleanup(machine.remove)
        return machine

    def resources(self) -> List[str]:
        """What was asked, in order."""
        return [request.resource for request in self.azure.requests]

    def figure(self, text: str) -> None:
        note(f"{SUITE} {self.id().split('.', 2)[-1]}: {text}")

    def assert_line(self, boot: ContainerBoot, start: str) -> None:
        """One of the script's lines begins with START."""
        self.assertTrue(any(line.startswith(start) for line in boot.lines), boot)

    def assert_provisioned(
        self, boot: ContainerBoot, name: str = "web-prod-01", stored: bool = True
    ) -> None:
        """The unit succeeded, and the machine has its NAME; if it is not stored, for this boot."""
        started, ended = boot.seconds("ExecMainStart"), boot.seconds("ActiveEnter")
        self.assertEqual((boot.unit["Result"], boot.unit["ActiveState"]), ("success", "active"))
        state = (name, name, "disabled") if stored else (name, "golden-image", "enabled")
        self.assertEqual((boot.hostname, boot.etc_hostname, boot.enabled), state, boot)
        self.assertTrue(self.azure.ready.is_set())
        self.assertRegex(boot.lines[-1], f"^<6>Provisioned as {name} in ")
        ready = self.azure.asked("health")[-1].time
        self.figure(f"Ready {ready - started:.3f} s and the unit's end {ended - started:.3f} s")
