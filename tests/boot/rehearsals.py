"""Whole images, built and rehearsed, with what tests.rehearse must say of each.

`python3 -m unittest tests.boot.rehearsals` wants root to build the images; the rehearsals
themselves run without any privilege. They take 10 minutes on two cores without KVM; BOOT_JOBS is
how many run at a time (2).
"""

import os
import re
import shutil
import socket
import subprocess
import unittest
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

from azure_provision import UNIT
from tests.boot import disk
from tests.boot.disk import Tree
from tests.boot.host import RUN, command, missing, number, remove_tree, undo_at_exit
from tests.harness import INSTALLER, ROOT, SCRIPT
from tests.vm import inspect

JOBS = int(os.environ.get("BOOT_JOBS", "2"))

# The system's Python, since another one may be in a directory that nobody can read.
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")
PYTHON = "/usr/bin/python3"

# Its own services need these to be writable.
VOLATILE = "tmpfs /tmp tmpfs\ntmpfs /var/tmp tmpfs\n"

# Of a VM that is gone; VMs of the image have others.
BOUND_NETWORK = """\
[Match]
MACAddress=00:22:48:12:34:56

[Network]
DHCP=yes
"""
HOTPLUG = "allow-hotplug ens3\niface ens3 inet dhcp\n"

# 168.0.0.2 is the machine that runs QEMU.
CURIOUS_UNIT = f"""\
[Unit]
After={UNIT}

[Service]
Type=oneshot
ExecStart=/bin/bash -c 'exec 3<>/dev/tcp/168.0.0.2/{{port}}; echo connected: $?'
StandardOutput=journal+console
StandardError=journal+console

[Install]
WantedBy=multi-user.target
"""

CLOUD_INIT = ("python3", "cloud-init", "ifupdown", "isc-dhcp-client")


class Case(NamedTuple):
    """An image, and how it is rehearsed."""

    prepare: Callable[[Tree], None]
    packages: Sequence[str] = ("python3",)
    generation: int = 1
    mode: str = "rw"  # of the root
    format: str = "raw"  # of qemu-img
    options: Sequence[str] = ()


def install(tree: Tree, *options: str) -> None:
    command(INSTALLER, *options, DESTDIR=tree.root)


def sound(tree: Tree) -> None:
    tree.use_networkd()
    install(tree)


def sound_and_curious(tree: Tree) -> None:
    """A sound image that tries to reach this machine, where somebody listens."""
    sound(tree)
    port = _listener.getsockname()[1]
    tree.write("etc/systemd/system/curious.service", CURIOUS_UNIT.format(port=port))
    tree.systemctl("enable", "curious.service")


def bound(tree: Tree) -> None:
    tree.use_networkd(BOUND_NETWORK)
    install(tree)


def not_enabled(tree: Tree) -> None:
    tree.use_networkd()
    install(tree, "--no-enable")


def read_only(tree: Tree) -> None:
    sound(tree)
    tree.write("etc/fstab", VOLATILE)


def python_minimal(tree: Tree) -> None:
    sound(tree)
    names = ("python3", "python3.11", "libpython3-stdlib", "libpython3.11-stdlib")
    command("chroot", tree.root, "dpkg", "--purge", "--force-depends", *names)


def ifupdown(tree: Tree) -> None:
    tree.write("etc/cloud/cloud-init.disabled", "")
    tree.write("etc/network/interfaces.d/azure", HOTPLUG)
    install(tree)


def cloud_init(tree: Tree) -> None:
    tree.write("etc/cloud/cloud.cfg.d/90-azure.cfg", "datasource_list: [ Azure ]\n")


def two_agents(tree: Tree) -> None:
    cloud_init(tree)
    install(tree)


# The longest come first.
CASES = {
    "cloud-init": Case(cloud_init, CLOUD_INIT),
    "two agents": Case(two_agents, CLOUD_INIT),
    "ifupdown": Case(ifupdown, CLOUD_INIT),
    "read-only": Case(read_only, mode="ro"),
    "generation 2": Case(sound, generation=2, options=("--faults", "--name", "web")),
    "sound": Case(sound_and_curious, format="vpc"),
    "bound": Case(bound, format="vhdx"),
    "not enabled": Case(not_enabled, format="qcow2"),
    "python3-minimal": Case(python_minimal),
    "no DHCP client": Case(install),
}
EXTENSIONS = {"vpc": "vhd"}


class Result(NamedTuple):
    """What a rehearsal said."""

    status: int
    output: str
    console: str
    verdicts: Dict[str, Tuple[str, str]]

    @property
    def failed(self) -> List[str]:
        return [title for title, (state, _) in self.verdicts.items() if state == "FAIL"]


def rehearse(image: Path, *options: str) -> Result:
    """Rehearse IMAGE as nobody, who can read it and not write it."""
    console = image.with_name("console")
    console.touch()
    console.chmod(0o666)
    words = [*NOBODY, PYTHON, "-B", "-m", "tests.rehearse", "--console", str(console)]
    process = subprocess.Popen(
        [*words, *options, str(image)],
        cwd=str(_directory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        encoding="utf-8",
    )
    _processes.append(process)
    output = process.communicate()[0]
    found = re.findall(r"(?m)^  (ok|FAIL|\?) +(\S(?: ?\S)*)(?:  +(.*))?$", output)
    verdicts = {title: (state, remark) for state, title, remark in found}
    return Result(process.returncode, output, console.read_text(encoding="utf-8"), verdicts)


def build_and_rehearse(directory: Path, case: Case) -> Result:
    tree = Tree(directory, case.packages)
    case.prepare(tree)
    image = tree.disk(case.generation, case.mode)
    if case.format != "raw":
        raw, image = image, image.with_suffix("." + EXTENSIONS.get(case.format, case.format))
        force = ("-o", "subformat=fixed,force_size") if case.format == "vpc" else ()
        command("qemu-img", "convert", "-f", "raw", "-O", case.format, *force, raw, image)
        raw.unlink()
    image.chmod(0o444)
    result = rehearse(image, f"--generation={case.generation}", *case.options)
    tree.remove()
    return result


_processes: List["subprocess.Popen[str]"] = []
_results: Dict[str, "Future[Result]"] = {}
_wanted: List[str] = []
_pool = ThreadPoolExecutor(JOBS)
_listener = socket.socket()
_directory = RUN / f"{os.getpid()}-{number()}"


def setUpModule() -> None:
    absent = [*missing(), *disk.missing()]
    if absent:
        raise unittest.SkipTest(f"a rehearsal needs {', '.join(absent)}")
    undo_at_exit(lambda: remove_tree(_directory))
    _listener.bind(("127.0.0.1", 0))
    _listener.listen(1)
    _listener.settimeout(0)
    shutil.copytree(str(ROOT / "tests"), str(_directory / "tests"))
    shutil.copy(str(SCRIPT), str(_directory))
    for title in _wanted:
        submit(title)


def submit(title: str) -> "Future[Result]":
    """The result of a case to come."""
    if title not in _results:
        _results[title] = _pool.submit(build_and_rehearse, _directory / title, CASES[title])
    return _results[title]


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Any) -> unittest.TestSuite:
    """All of these tests: have the cases run ahead of them (not called for a single test)."""
    _wanted.extend(CASES)
    return tests


def tearDownModule() -> None:
    for result in _results.values():  # those that no test asked for
        result.cancel()
    for process in _processes:
        process.terminate()
    _pool.shutdown()
    _listener.close()
    remove_tree(_directory)


class RehearsalTest(unittest.TestCase):
    maxDiff = None

    def result(self, title: str, status: int) -> Result:
        """The result of a case, which must end with STATUS."""
        result = submit(title).result()
        self.assertEqual(result.status, status, result.output)
        return result

    def assert_verdict(self, result: Result, title: str, state: str, remark: str) -> None:
        """The verdict TITLE is STATE, with a remark that matches REMARK."""
        self.assertEqual(result.verdicts[title][0], state, result.output)
        self.assertRegex(result.verdicts[title][1], remark)

    def assert_sound(self, title: str) -> Result:
        result = self.result(title, 0)
        self.assertEqual([state for state, _ in result.verdicts.values()], ["ok"] * 9)
        self.assertIn("\nIt will provision.\n", result.output)
        return result

    def assert_fatal(self, result: Result, title: str, remark: str) -> None:
        """The one thing that is wrong is TITLE, and the rehearsal ends with the first VM."""
        self.assertEqual(result.failed, [title], result.output)
        self.assert_verdict(result, title, "FAIL", remark)
        self.assertNotIn("VM 2", result.output)
        self.assertIn("\nFrom its console:\n  | ", result.output)
        self.assertIn("\nIt will not provision.\n", result.output)

    def test_sound_image_provisions(self) -> None:
        result = self.assert_sound("sound")
        self.assertIn("vpc, 1,024 MiB, generation 1; ", result.output)
        self.assertIn("a private network", result.output)
        name = "rehearsal000000, from /metadata/instance/compute"
        self.assert_verdict(result, "takes the computer name", "ok", name)
        self.assert_verdict(result, "asks DHCP", "ok", "by systemd-networkd$")
        self.assert_verdict(result, "is the only agent", "ok", "custom-provisioning")
        self.assertRegex(result.output, "DHCP +REQUEST rehearsal000001")
        self.assertIn("Linux version", result.console)
        with self.assertRaises(BlockingIOError):  # nobody came
            _listener.accept()
        self.assertRegex(result.console, "/dev/tcp/168.0.0.2/.*: Connection refused")

    def test_sound_image_of_generation_2_provisions_despite_faults(self) -> None:
        result = self.assert_sound("generation 2")
        self.assertIn("-> 503", result.output)
        self.assert_verdict(result, "takes the computer name", "ok", "web000000")

    def test_network_bound_to_a_mac_address(self) -> None:
        result = self.result("bound", 1)
        self.assert_fatal(result, "asks DHCP", "no DHCP request .* another MAC address")
        self.assertIn("vhdx, ", result.output)

    def test_no_dhcp_client(self) -> None:
        result = self.result("no DHCP client", 1)
        self.assert_fatal(result, "asks DHCP", "no DHCP request .* no DHCP client")

    def test_unit_that_is_not_enabled(self) -> None:
        result = self.result("not enabled", 1)
        remark = "sends no request .*: its unit is not enabled"
        self.assert_fatal(result, "requests the goal state", remark)

    def test_python3_minimal(self) -> None:
        result = self.result("python3-minimal", 1)
        self.assert_fatal(result, "requests the goal state", "see its console")
        self.assertIn("ModuleNotFoundError", result.output.split("From its console:")[1])

    def test_ifupdown(self) -> None:
        result = self.assert_sound("ifupdown")
        self.assert_verdict(result, "asks DHCP", "ok", "by dhclient$")

    def test_read_only_root(self) -> None:
        result = self.result("read-only", 1)
        self.assertEqual(result.failed, ["silent after a reboot"], result.output)
        remark = "it reported Ready again: the unit was not disabled"
        self.assert_verdict(result, "silent after a reboot", "FAIL", remark)
        self.assertIn("\nIt will provision, but not correctly.\n", result.output)

    def test_cloud_init(self) -> None:
        result = self.assert_sound("cloud-init")
        self.assert_verdict(result, "is the only agent", "ok", "cloud-init")

    def test_two_agents(self) -> None:
        result = self.result("two agents", 1)
        remark = "2 agents talk to Azure: cloud-init, custom-provisioning"
        self.assert_verdict(result, "is the only agent", "FAIL", remark)
        self.assert_verdict(result, "reports Ready once", "FAIL", "reported Ready 2 times")
        self.assertIn("\nIt will provision, but not correctly.\n", result.output)

    def test_file_that_is_not_a_disk(self) -> None:
        directory = _directory / "not a disk"
        directory.mkdir(parents=True)
        image = directory / "image, of text"
        image.write_text("not a disk\n" * 100)
        result = rehearse(image)
        self.assertEqual(result.status, 2)
        self.assertRegex(result.output, r"\A.*: not a disk: no boot signature.*\n\Z")

    def test_vhd_has_the_size_that_its_footer_states(self) -> None:
        """QEMU would go by the geometry, which cannot express every size."""
        image = _directory / "footer.vhd"
        command("qemu-img", "create", "-f", "vpc", "-o", "subformat=fixed,force_size", image, "33M")
        footer = bytearray(image.read_bytes()[-512:])
        footer[28:32] = b"vpc "  # the creator: one of those whose geometry QEMU trusts
        footer[56:60] = bytes([993 >> 8, 993 & 255, 4, 17])  # cylinders, heads, sectors
        footer[64:68] = bytes(4)  # the checksum, which is of all but itself
        footer[64:68] = (~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big")
        with open(str(image), "r+b") as file:
            file.seek(-512, os.SEEK_END)
            file.write(footer)
        self.assertEqual(inspect(image).size, 33 * 1024 * 1024)
        by_geometry = command("qemu-img", "info", "-f", "vpc", "--output=json", image)
        self.assertNotIn(f"{33 << 20},", by_geometry)


if __name__ == "__main__":
    unittest.main()
