"""The parts of tests.rehearse that need no VM: DHCP, the console's text, verdicts, usage errors."""

import os
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from tests import rehearse
from tests.fake_azure import Request
from tests.harness import ROOT
from tests.vm import DhcpRequest, Setup, clean, parse_dhcp, split_options

MAC = "00:0d:3a:00:00:01"


def frame(*options: Tuple[int, bytes], kind: int = 3, end: bytes = b"\xff") -> bytes:
    """An Ethernet frame with a DHCP message, as a client sends it."""
    message = bytes([1, 1, 6, 0]) + bytes(24) + bytes.fromhex(MAC.replace(":", "")) + bytes(202)
    message += b"\x63\x82\x53\x63" + bytes([53, 1, kind])
    message += b"".join(bytes([code, len(value)]) + value for code, value in options) + end
    udp = struct.pack("!4H", 68, 67, 8 + len(message), 0)
    ip = bytes([0x45, 0]) + bytes(7) + bytes([17]) + bytes(10)
    return bytes(12) + b"\x08\x00" + ip + udp + message


class DhcpTest(unittest.TestCase):
    def parsed(self, *options: Tuple[int, bytes], **how: Any) -> DhcpRequest:
        request = parse_dhcp(frame(*options, **how), 1.5)
        assert request is not None
        return request

    def test_host_name_is_read(self) -> None:
        self.assertEqual(
            self.parsed((12, b"web-prod-01"), (60, b"udhcp 1.35")),
            DhcpRequest(1.5, "REQUEST", MAC, "web-prod-01", "udhcp 1.35"),
        )

    def test_fqdn_is_read_if_there_is_no_host_name(self) -> None:
        self.assertEqual(self.parsed((81, b"\1\0\0web.example.org")).name, "web.example.org")
        wire = b"\5\0\0\3web\7example\0"
        self.assertEqual(self.parsed((81, wire)).name, "web.example")
        self.assertEqual(self.parsed((81, wire), (12, b"web")).name, "web")

    def test_clients_are_told_apart(self) -> None:
        networkd = (61, bytes.fromhex("ffb6220feb00020000ab11"))
        dhclient = (61, bytes.fromhex("ff3a000001000100013296fb3b000d3a000001"))
        for options, client in (
            ([networkd, (55, bytes([1, 3, 12]))], "systemd-networkd"),
            ([(61, b"\1abcdef"), (55, bytes([1, 28, 249]))], "NetworkManager"),
            ([dhclient, (55, bytes([1, 28, 2, 3]))], "dhclient"),
            ([(61, b"\1abcdef")], "an unknown client"),
            ([networkd, (60, b"dhcpcd-9.4.1:Linux")], "dhcpcd-9.4.1:Linux"),
        ):
            self.assertEqual(self.parsed(*options).client, client)

    def test_name_cannot_forge_terminal_output(self) -> None:
        self.assertEqual(self.parsed((12, b"\x1b[2Jweb\n\xff\x9b")).name, "web?\ufffd\ufffd")

    def test_every_truncation_is_survived(self) -> None:
        whole = frame((12, b"web"), (81, b"\4\0\0\3web\0"), (61, b"\xff"))
        for length in range(len(whole)):
            request = parse_dhcp(whole[:length])
            self.assertTrue(request is None or request.kind == "REQUEST")

    def test_other_packets_are_ignored(self) -> None:
        firmware = frame((60, b"PXEClient:Arch:00007:UNDI:003016"))
        for other in (
            b"",
            bytes(60),
            firmware,
            frame(kind=0),
            frame(kind=5),
            frame(kind=7),
            b"\xff" * 400,
        ):
            self.assertIsNone(parse_dhcp(other))


class ConsoleTest(unittest.TestCase):
    def test_escape_sequences_are_removed(self) -> None:
        for raw, text in (
            ("[\x1b[0;32m  OK  \x1b[0m] Started", "[  OK  ] Started"),
            ("\x1b]0;title\x07prompt", "prompt"),
            ("\x1bP+q544e\x1b\\x", "x"),
            ("a\x1bcb", "ab"),
            ("\x9b2J\r\x08\u202e", "?2J???"),
            ("\x1b", "?"),
        ):
            self.assertEqual(clean(raw), text)


class OptionsTest(unittest.TestCase):
    def test_commas_in_a_path_stay_doubled(self) -> None:
        found = split_options("driver=raw,file.filename=/a,,b,,,,c")
        self.assertEqual(found, ["driver=raw", "file.filename=/a,,b,,,,c"])


# Verdicts.


class Azure:
    vm_name, computer_name = "myset_0", "myset000000"


class Vm:
    azure = Azure()


class FakeBoot:
    """What the verdicts look at in a boot: what the VM asked, and when."""

    def __init__(
        self, dhcp: str = "", requests: str = "", console: str = "Linux version 6"
    ) -> None:
        self.vm = Vm()
        self.started, self.seconds, self.prompt_time = 100.0, 60.0, 0.0
        self.console, self.lines = console, console.splitlines()
        names = dhcp.split()
        self.dhcp = [DhcpRequest(110, "REQUEST", MAC, name, "dhclient") for name in names]
        self.requests = [request(*line.partition(" ")[::2]) for line in requests.splitlines()]


READY = b"<Health><State>Ready</State></Health>"
SOUND = "goalstate 200\nhealth 200\ncompute 200"


def request(resource: str, outcome: str, headers: Optional[Dict[str, str]] = None) -> Request:
    status, _, reason = outcome.partition(" ")
    path = "/machine?comp=" if resource in ("goalstate", "health") else "/metadata/instance/"
    headers = headers or {"x-ms-agent-name": "custom-provisioning"}
    return Request(120, resource, "GET", path + resource, headers, READY, int(status), reason)


class Rehearsed:
    def __init__(self, boots: List[Any], reboot: Any = None) -> None:
        self.boots, self.reboot = boots, reboot
        self.fates: Dict[Any, str] = {}
        self.setup = Setup()
        self.display = self
        self.output: List[str] = []

    def line(self, text: str = "") -> None:
        self.output.append(text)


class VerdictTest(unittest.TestCase):
    def failed(self, boots: List[FakeBoot], reboot: Optional[FakeBoot] = None) -> Dict[str, str]:
        """The verdicts that are FAIL, and what they say."""
        rehearsed: Any = Rehearsed(boots, reboot)
        found = {title: check(rehearsed.boots[0], rehearsed) for title, check in rehearse.CHECKS}
        return {title: remark for title, (state, remark) in found.items() if state == "FAIL"}

    def test_sound_image_passes(self) -> None:
        boot = FakeBoot("golden myset000000", SOUND)
        self.assertEqual(self.failed([boot, boot], FakeBoot("myset000000")), {})

    def test_exit_status_and_last_line(self) -> None:
        boot = FakeBoot("golden myset000000", SOUND)
        twice = FakeBoot("golden myset000000", SOUND + "\nhealth 200")
        for boots, status, result in (
            ([boot, boot], 0, "It will provision."),
            ([twice, twice], 1, "It will provision, but not correctly."),
            ([FakeBoot("golden")], 1, "It will not provision."),
        ):
            rehearsed: Any = Rehearsed(boots, FakeBoot("myset000000"))
            self.assertEqual(rehearse.verdict(rehearsed), status)
            self.assertEqual(rehearsed.output[-1].strip(), result)

    def test_no_dhcp(self) -> None:
        ((title, remark),) = self.failed([FakeBoot()]).items()
        self.assertEqual(title, "asks DHCP")
        self.assertRegex(remark, "within 60 s: there is no DHCP client, .* another MAC address")

    def test_nothing_at_all(self) -> None:
        failed = self.failed([FakeBoot(console="")])
        self.assertIn("--generation 2", failed["asks DHCP"])
        firmware = FakeBoot(console="BdsDxe: failed to load Boot0001")
        self.assertIn("does it boot?", self.failed([firmware])["asks DHCP"])
        self.assertIn("console=ttyS0", failed["speaks on the console"])

    def test_no_request(self) -> None:
        ((title, remark),) = self.failed([FakeBoot("golden")]).items()
        self.assertEqual(title, "requests the goal state")
        self.assertIn("its unit is not enabled or cannot start, or a firewall blocks it", remark)

    def test_rejected_report_says_why(self) -> None:
        boot = FakeBoot("golden", "goalstate 200\nhealth 400 not this VM's ContainerId")
        ((title, remark),) = self.failed([boot]).items()
        self.assertEqual(title, "reports Ready once")
        self.assertEqual(remark, "rejected with status 400: not this VM's ContainerId")

    def test_not_ready(self) -> None:
        boot = FakeBoot("golden", "goalstate 200\nhealth 200")
        body = READY.replace(b"Ready", b"NotReady")
        boot.requests[-1] = boot.requests[-1]._replace(body=body)
        self.assertIn("it reported NotReady: <Health>", self.failed([boot])["reports Ready once"])

    def test_two_reports(self) -> None:
        boot = FakeBoot("golden myset000000", SOUND + "\nhealth 200")
        failed = self.failed([boot, boot], FakeBoot("myset000000"))
        self.assertEqual(failed, {"reports Ready once": "it reported Ready 2 times"})

    def test_resource_name(self) -> None:
        boot = FakeBoot("golden", "goalstate 200\nhealth 200\nname 200")
        self.assertIn("/metadata/instance/name", self.failed([boot])["takes the computer name"])
        for name in ("myset0", "myset_0"):
            taken = FakeBoot(name, SOUND)
            self.assertIn(f"it took {name}", self.failed([taken])["takes the computer name"])

    def test_name_that_is_published_late_or_never(self) -> None:
        boot = FakeBoot("golden", SOUND)
        late = self.failed([boot, boot], FakeBoot("myset000000"))
        self.assertEqual(list(late), ["publishes it in DHCP"])
        self.assertRegex(late["publishes it in DHCP"], "only after a reboot; .*dhclient.*'golden'")
        never = self.failed([boot, boot], FakeBoot("golden"))
        self.assertIn("not even after a reboot", never["publishes it in DHCP"])
        self.assertIn("'golden', not 'myset000000'", never["silent after a reboot"])

    def test_second_report_after_a_reboot(self) -> None:
        boot = FakeBoot("golden myset000000", SOUND)
        failed = self.failed([boot, boot], FakeBoot("myset000000", SOUND))
        self.assertEqual(list(failed), ["silent after a reboot"])
        self.assertIn("it reported Ready again: the unit", failed["silent after a reboot"])
        asks = self.failed([boot, boot], FakeBoot("myset000000", "goalstate 200"))
        self.assertIn("it asks the WireServer", asks["silent after a reboot"])

    def test_second_vm_that_differs(self) -> None:
        boots = [FakeBoot("golden myset000000", SOUND), FakeBoot()]
        failed = self.failed(boots)
        self.assertRegex(
            failed["second VM is the same"], "^asks DHCP: .* VM 2 FAIL no DHCP request"
        )

    def test_two_agents(self) -> None:
        boot = FakeBoot("golden myset000000", SOUND)
        boot.requests.append(request("goalstate", "200", {"User-Agent": "Cloud-Init/22.4.2"}))
        remark = self.failed([boot])["is the only agent"]
        self.assertIn("2 agents talk to Azure: cloud-init, custom-provisioning", remark)

    def test_agents_are_known_by_name_or_path(self) -> None:
        for resource, headers, name in (
            # cloud-init calls itself the Azure Linux Agent, in one of the two headers
            ("x", {"User-Agent": "Cloud-Init/23", "x-ms-agent-name": "WALinuxAgent"}, "cloud-init"),
            ("x", {"X-Ms-Agent-Name": "com.coreos.afterburn"}, "afterburn"),
            ("versions", {"User-Agent": "Python-urllib/3.9"}, "walinuxagent"),
            ("x", {"X-MS-Agent-Name": "acme\x1b[2J"}, "acme"),
            ("x", {"User-Agent": "curl/7.88"}, ""),
        ):
            self.assertEqual(rehearse.agent(request(resource, "200", headers)), name)


class PatienceTest(unittest.TestCase):
    """Until when a boot is watched; it began at 100 s, asked DHCP at 110 s, Azure at 120 s."""

    def until(self, boot: Any, second: bool = False) -> float:
        return (rehearse.second_deadline if second else rehearse.first_deadline)(boot)

    def test_first_boot(self) -> None:
        self.assertEqual(self.until(FakeBoot("golden")), float("inf"))
        self.assertEqual(self.until(FakeBoot("golden", SOUND)), 140)
        self.assertEqual(self.until(FakeBoot("myset000000", SOUND)), 140)
        done = FakeBoot("myset000000", SOUND)
        done.prompt_time = 128.0
        self.assertEqual(self.until(done), 133)
        idle = FakeBoot("golden")
        idle.prompt_time = 130.0
        self.assertEqual(self.until(idle), 160)

    def test_second_boot(self) -> None:
        self.assertEqual(self.until(FakeBoot("golden"), True), float("inf"))
        self.assertEqual(self.until(FakeBoot("myset000000"), True), 120)
        self.assertEqual(self.until(FakeBoot("golden", SOUND), True), 120)
        done = FakeBoot("myset000000")
        done.prompt_time = 124.0
        self.assertEqual(self.until(done, True), 130)


class CommandLineTest(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="rehearse, ")
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)

    def rehearse(self, *arguments: str, **environment: str) -> Tuple[int, str, str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.rehearse", *arguments],
            cwd=str(ROOT),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            env=dict(os.environ, **environment),
        )
        output, errors = process.communicate()
        return process.returncode, output, errors

    def assert_refused(self, reason: str, *arguments: str, **environment: str) -> None:
        """It ends with status 2 and one line."""
        status, output, errors = self.rehearse(*arguments, **environment)
        self.assertEqual((status, output), (2, ""), errors)
        self.assertRegex(errors, rf"\Apython3 -m tests\.rehearse: .*{reason}.*\n\Z")

    def test_usage_errors_are_one_line(self) -> None:
        for reason, words in (
            ("IMAGE", ""),
            ("invalid choice: 3", "--generation 3 x"),
            ("not a number from", "--timeout 0 x"),
            ("not a number from", "--timeout 1e9 x"),
            ("not a number from", "--memory -1 x"),
            ("not the beginning of a hostname", "--name my_set x"),
            ("unrecognized arguments", "--verbose x"),
            ("invalid choice: 'hvf'", "--accel hvf x"),
        ):
            self.assert_refused(reason, *words.split())

    def test_image_that_is_not_there(self) -> None:
        reason = "/nowhere: No such file or directory"
        self.assert_refused(reason, "/nowhere")
        self.assert_refused(reason, "/nowhere", PATH=str(self.directory))  # with or without QEMU
        self.assert_refused("-x: No such file or directory", "--", "-x")

    def test_image_that_is_no_file(self) -> None:
        fifo = self.directory / "fifo"
        os.mkfifo(str(fifo))
        for path in (self.directory, fifo):
            self.assert_refused("neither a file nor a block device", str(path))

    def test_image_that_is_empty(self) -> None:
        image = self.directory / "image"
        image.write_bytes(b"")
        self.assert_refused("not a disk: it has 0 bytes", str(image))

    def test_control_characters_of_its_name_are_not_printed(self) -> None:
        self.assert_refused("a: No such file", "/nowhere/\x1b[2J\na")

    def test_missing_qemu_names_its_package(self) -> None:
        image = self.directory / "image"
        image.write_bytes(bytes(512))
        self.assert_refused("apt install qemu-system-x86", str(image), PATH=str(self.directory))

    def test_help_tells_of_every_option(self) -> None:
        status, output, _ = self.rehearse("--help")
        self.assertEqual(status, 0)
        for option in ["generation", "name", "timeout", "memory", "faults", "console", "accel"]:
            self.assertIn(f"--{option}", output)


if __name__ == "__main__":
    unittest.main()
