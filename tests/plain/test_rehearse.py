"""The parts of tests.rehearse that need no VM: DHCP, the console's text, verdicts, usage errors."""

import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple

from tests import rehearse
from tests.fake_azure import Request
from tests.plain.harness import ROOT
from tests.vm import DhcpRequest, Setup, parse_dhcp, printable, split_options


def frame(*options: Tuple[int, bytes], kind: int = 3) -> bytes:
    """An Ethernet frame with a DHCP message, as a client sends it."""
    message = bytes([1, 1, 6, 0]) + bytes(232) + b"\x63\x82\x53\x63\0" + bytes([53, 1, kind])
    message += b"".join(bytes([code, len(value)]) + value for code, value in options) + b"\xff"
    udp = struct.pack("!4H", 68, 67, 8 + len(message), 0)
    ip = bytes([0x45, 0]) + bytes(7) + bytes([17]) + bytes(10)
    return bytes(12) + b"\x08\x00" + ip + udp + message


class DhcpTest(unittest.TestCase):
    def parsed(self, *options: Tuple[int, bytes]) -> DhcpRequest:
        request = parse_dhcp(frame(*options), 1.5)
        assert request is not None
        return request

    def test_name_is_option_12_or_else_81_and_cannot_forge_terminal_output(self) -> None:
        wire = (81, b"\5\0\0\3web\7example\0")
        for options, name in (
            ([(81, b"\1\0\0web.example.org")], "web.example.org"),
            ([wire], "web.example"),
            ([wire, (12, b"web")], "web"),
            ([(12, b"\x1b[2Jweb\n\xff\x9b")], "web?\ufffd\ufffd"),
        ):
            with self.subTest(options):
                self.assertEqual(self.parsed(*options).name, name)

    def test_clients_are_told_apart(self) -> None:
        networkd = (61, bytes.fromhex("ffb6220feb00020000ab11"))
        for options, client in (
            ([networkd, (55, bytes([1, 3, 12]))], "systemd-networkd"),
            ([(61, b"\1abcdef"), (55, bytes([1, 28, 249]))], "NetworkManager"),
            ([(61, b"\xff:\0\0\1\0\1\1"), (55, bytes([1, 28, 2, 3]))], "dhclient"),
            ([(61, b"\1abcdef")], "an unknown client"),
            ([networkd, (60, b"dhcpcd-9.4.1:Linux")], "dhcpcd-9.4.1:Linux"),
        ):
            with self.subTest(client):
                self.assertEqual(self.parsed(*options), DhcpRequest(1.5, "REQUEST", "", client))

    def test_truncated_frame_is_ignored_or_read(self) -> None:
        whole = frame((12, b"web"), (81, b"\4\0\0\3web\0"), (61, b"\xff"))
        for length in range(len(whole)):
            request = parse_dhcp(whole[:length])
            self.assertTrue(request is None or request.kind == "REQUEST")

    def test_other_packets_are_ignored(self) -> None:
        firmware = frame((60, b"PXEClient:Arch:00007:UNDI:003016"))
        kinds = [frame(kind=kind) for kind in (0, 5, 7)]
        for other in (b"", bytes(60), b"\xff" * 400, firmware, *kinds):
            self.assertIsNone(parse_dhcp(other))


class TextTest(unittest.TestCase):
    def test_escape_sequences_are_removed(self) -> None:
        for raw, text in (
            ("[\x1b[0;32m  OK  \x1b[0m] Started", "[  OK  ] Started"),
            ("\x1b]0;title\x07prompt", "prompt"),
            ("\x1bP+q544e\x1b\\x", "x"),
            ("a\x1bcb", "ab"),
            ("\x9b2J\r\x08\u202e", "?2J???"),
            ("\x1b", "?"),
        ):
            self.assertEqual(printable(raw), text)

    def test_commas_in_a_path_stay_doubled(self) -> None:
        found = split_options("driver=raw,file.filename=/a,,b,,,,c")
        self.assertEqual(found, ["driver=raw", "file.filename=/a,,b,,,,c"])


READY = b"<Health><State>Ready</State></Health>"
SOUND = "goalstate 200\nhealth 200\ncompute 200"


def request(
    resource: str, outcome: str, headers: Optional[Dict[str, str]] = None, body: bytes = READY
) -> Request:
    """A request at 120 s; OUTCOME is its status, and the reason if it was refused."""
    status, _, reason = outcome.partition(" ")
    path = "/machine?comp=" if resource in ("goalstate", "health") else "/metadata/instance/"
    headers = headers or {"x-ms-agent-name": "custom-provisioning"}
    return Request(120, resource, "GET", path + resource, headers, body, int(status), reason)


class FakeBoot:
    """A boot at 100 s that asks DHCP with these names at 110 s, and Azure for these resources."""

    vm = SimpleNamespace(azure=SimpleNamespace(vm_name="myset_0", computer_name="myset000000"))
    started, seconds = 100, 60

    def __init__(
        self, dhcp: str = "", asked: str = "", *others: Request, console: str = "Linux version 6"
    ) -> None:
        self.prompt_time = 0
        self.console, self.lines = console, console.splitlines()
        self.dhcp = [DhcpRequest(110, "REQUEST", name, "dhclient") for name in dhcp.split()]
        words = [line.partition(" ") for line in asked.splitlines()]
        self.requests = [*(request(name, outcome) for name, _, outcome in words), *others]


def verdict(boots: List[FakeBoot], reboot: Optional[FakeBoot]) -> Tuple[int, List[str]]:
    """The exit status and the lines."""
    rehearsal: Any = SimpleNamespace(boots=boots, reboot=reboot, fates={}, setup=Setup())
    return rehearse.verdict(rehearsal)


class VerdictTest(unittest.TestCase):
    def test_each_fault_fails_its_check_and_gives_the_reason(self) -> None:
        sound, named = FakeBoot("golden myset000000", SOUND), FakeBoot("myset000000")
        twice = FakeBoot("golden myset000000", SOUND + "\nhealth 200")
        late, golden = FakeBoot("golden", SOUND), FakeBoot("golden")
        firmware = FakeBoot(console="BdsDxe: failed to load")
        asks_again = FakeBoot("myset000000", "goalstate 200")
        refused = FakeBoot("golden", "goalstate 400 no header")
        rejected = FakeBoot("golden", "goalstate 200\nhealth 400 not this VM's ContainerId")
        report = request("health", "200", body=b"<Health><State>NotReady</State></Health>")
        not_ready = FakeBoot("golden", "goalstate 200", report)
        asks_name = FakeBoot("golden", "goalstate 200\nhealth 200\nname 200")
        other_agent = request("goalstate", "200", {"User-Agent": "Cloud-Init/22.4.2"})
        two_agents = FakeBoot("golden myset000000", SOUND, other_agent)
        cases: Any = [
            ([sound, sound], named, []),
            ([FakeBoot()], None, ["asks DHCP: .* within 60 s: there is no .* another MAC"]),
            ([firmware], None, ["asks DHCP: .* boot\\? try --generation 2", "speaks .*=ttyS0"]),
            ([golden], None, ["requests the goal state: .* unit is not enabled .* firewall"]),
            ([refused], None, ["requests the .*: refused: no header$", "reports .* within 60 s"]),
            ([rejected], None, ["reports Ready once: rejected with status 400: not this VM's Con"]),
            ([not_ready], None, ["reports Ready once: it reported NotReady: <Health>"]),
            ([twice, twice], named, ["reports Ready once: it reported Ready 2 times$"]),
            ([asks_name], None, ["takes the computer name: .* for /metadata/instance/name, not"]),
            ([FakeBoot("myset0", SOUND)], None, ["takes the computer name: it took myset0,"]),
            ([late, late], named, ["publishes it .*: not before a reboot; .*dhclient.* 'golden'"]),
            ([late, late], golden, ["publishes .*", "silent .*'golden', not 'myset000000'"]),
            ([sound, sound], sound, ["silent after a reboot: it reported Ready again: the unit"]),
            ([sound, sound], asks_again, ["silent after a reboot: it asks the WireServer"]),
            ([sound, sound], FakeBoot(), ["silent after a reboot: no DHCP request within 60 s"]),
            ([sound, FakeBoot()], None, ["second VM .*: asks DHCP: .* VM 2 FAIL no DHCP request"]),
            ([two_agents], None, ["is the .*: 2 agents .*: cloud-init, custom-provisioning;"]),
        ]
        for boots, reboot, expected in cases:
            with self.subTest(expected):
                status, lines = verdict(boots, reboot)
                self.assertEqual(status, 1 if expected else 0)
                failed = [re.sub("  +", ": ", line[8:]) for line in lines if line[2:6] == "FAIL"]
                self.assertEqual(len(failed), len(expected), failed)
                for found, pattern in zip(failed, expected):
                    self.assertRegex(found, "^" + pattern)

    def test_last_line_is_the_result(self) -> None:
        sound = FakeBoot("golden myset000000", SOUND)
        unnamed = FakeBoot("golden", SOUND)
        for boots, result in (
            ([sound, sound], "It will provision."),
            ([unnamed, unnamed], "It will provision, but not correctly."),
            ([sound, FakeBoot("golden")], "It will not provision."),
        ):
            self.assertEqual(verdict(boots, FakeBoot("myset000000"))[1][-1], result)

    def test_agents_are_known_by_name_or_resource(self) -> None:
        for resource, headers, name in (
            # cloud-init calls itself the Azure Linux Agent in one of the two headers
            ("x", {"User-Agent": "Cloud-Init/23", "x-ms-agent-name": "WALinuxAgent"}, "cloud-init"),
            ("x", {"X-Ms-Agent-Name": "com.coreos.afterburn"}, "afterburn"),
            ("versions", {"User-Agent": "Python-urllib/3.9"}, "walinuxagent"),
            ("x", {"X-MS-Agent-Name": "acme\x1b[2J"}, "acme"),
            ("x", {"User-Agent": "curl/7.88"}, ""),
        ):
            self.assertEqual(rehearse.agent(request(resource, "200", headers)), name)

    def test_boot_is_watched_as_long_as_more_is_to_be_expected(self) -> None:
        """It began at 100 s, asked DHCP at 110 s, Azure at 120 s."""
        for second, name, asked, prompt, until in (
            (False, "golden", "", 0, math.inf),
            (False, "myset000000", SOUND, 0, 140),
            (False, "myset000000", SOUND, 128, 133),
            (False, "golden", "", 104, 120),
            (False, "golden", "", 130, 160),
            (True, "golden", "", 0, math.inf),
            (True, "myset000000", "", 0, 120),
            (True, "golden", SOUND, 0, 120),
            (True, "myset000000", "", 124, 130),
        ):
            with self.subTest(second=second, name=name, asked=asked, prompt=prompt):
                boot: Any = FakeBoot(name, asked)
                boot.prompt_time = prompt
                self.assertEqual(rehearse.deadline(boot, second), until)


class ProbeTest(unittest.TestCase):
    @unittest.skipUnless(shutil.which("qemu-system-x86_64"), "needs QEMU")
    def test_accelerator_that_works_is_recognized(self) -> None:
        self.assertTrue(rehearse.runs_guest("tcg", timeout=60))


class CommandLineTest(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="rehearse, ")
        self.addCleanup(directory.cleanup)
        self.image = str(Path(directory.name, "image"))
        Path(self.image).write_bytes(bytes(512))

    def assert_refused(self, reason: str, *arguments: str) -> None:
        """It ends with status 2 and REASON in the last line, on a PATH without QEMU."""
        with self.subTest(arguments=arguments):
            process = subprocess.run(
                [sys.executable, "-m", "tests.rehearse", *arguments],
                cwd=str(ROOT),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                env=dict(os.environ, PATH="/nowhere"),
                timeout=60,
            )
            self.assertEqual((process.returncode, process.stdout), (2, ""), process.stderr)
            last = process.stderr.splitlines()[-1]
            self.assertRegex(last, rf"^python3 -m tests\.rehearse: error: .*{reason}")

    def test_usage_error_is_told_in_the_last_line(self) -> None:
        for reason, words in (
            ("required: IMAGE", []),
            ("invalid choice: 3", ["--generation=3", "x"]),
            ("not the beginning of a hostname", ["--name=my_set", "x"]),
            ("unrecognized arguments", ["--time=1", "x"]),
            ("--console: the file is not empty", [f"--console={self.image}", self.image]),
        ):
            self.assert_refused(reason, *words)

    def test_reason_why_an_image_cannot_be_rehearsed_is_one_line(self) -> None:
        small = self.image + "\x1b[2J\nsmall"
        Path(small).touch()
        for reason, image in (
            ("No such file or directory: '/nowhere'$", "/nowhere"),
            ("neither a file nor a block device", "."),
            ("neither a file nor a block device", os.devnull),
            ("image.small: not a disk: it has 0 bytes", small),
            ("apt install qemu-system-x86", self.image),
        ):
            self.assert_refused(reason, image)


if __name__ == "__main__":
    unittest.main()
