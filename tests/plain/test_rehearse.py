"""The parts of tests.rehearse that need no VM: DHCP, the console's text, verdicts, usage errors."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple
from unittest import mock

import azure_provision
from tests import rehearse, vm
from tests.fake_azure import FakeAzure, Request
from tests.plain.harness import ROOT
from tests.vm import MIB, DhcpRequest, Image, Setup, as_azure_answers, parse_dhcp, printable


def frame(*options: Tuple[int, bytes], kind: int = 3) -> bytes:
    """An Ethernet frame with a DHCP message, as a client sends it."""
    message = bytes([1, 1, 6, 0]) + bytes(232) + b"\x63\x82\x53\x63\0" + bytes([53, 1, kind])
    message += b"".join(bytes([code, len(value)]) + value for code, value in options) + b"\xff"
    udp = struct.pack("!4H", 68, 67, 8 + len(message), 0)
    ip = bytes([0x45, 0]) + bytes(7) + bytes([17]) + bytes(10)
    return bytes(12) + b"\x08\x00" + ip + udp + message


class DhcpParserTest(unittest.TestCase):
    def parsed(self, *options: Tuple[int, bytes]) -> DhcpRequest:
        request = parse_dhcp(frame(*options), 1.5)
        assert request is not None
        return request

    def test_name_is_option_12_or_else_81_and_cannot_forge_terminal_output(self) -> None:
        wire = (81, b"\5\0\0\3web\7example\0")
        for options, name in (
            ([(81, b"\1\0\0web.example.org")], "web.example.org"),
            ([(12, b"web\0")], "web"),
            ([wire], "web"),
            ([wire, (12, b"web")], "web"),
            ([(12, b"\x1b[2Jweb\n\xff\x9b")], "web?\ufffd\ufffd"),
        ):
            with self.subTest(options):
                self.assertEqual(self.parsed(*options).name, name)

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

    def test_answers_get_the_options_of_azures_server(self) -> None:
        sent = frame((3, bytes(4)), kind=5)
        ports_and_checksum = b"\0\x43\0\x44" + sent[38:40] + b"\xab\xcd"
        answer = (sent[:34] + ports_and_checksum + sent[42:]).ljust(590, b"\0")
        changed = as_azure_answers(answer)
        self.assertEqual(len(changed), len(answer))
        end, routes = (
            answer.rindex(b"\xff"),
            bytes([121, 23, 0, 168, 0, 0, 2, 32, 168, 63, 129, 16]),
        )
        server = bytes([168, 63, 129, 16])
        options = b"\3\4\xa8\0\0\2\6\4" + server + b"\xf5\4" + server + routes
        self.assertEqual(changed[end : end + len(options)], options)
        self.assertEqual((changed[:40], changed[40:42]), (answer[:40], bytes(2)))
        self.assertEqual(as_azure_answers(sent), sent)


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


READY = b"<Health><State>Ready</State></Health>"
WAAGENT_SAYS = "2026-11-27T10:53:51Z INFO Daemon Daemon Run daemon"
SOUND_REQUESTS = "goalstate 200\nhealth 200\ncompute 200"


def request(
    resource: str, outcome: str, headers: Optional[Dict[str, str]] = None, body: bytes = READY
) -> Request:
    """A request at 120 s; OUTCOME is its status, and the reason if it was refused."""
    status, _, reason = outcome.partition(" ")
    path = "/machine?comp=" if resource in ("goalstate", "health") else "/metadata/instance/"
    headers = headers or {"x-ms-agent-name": "custom-provisioning"}
    return Request(120, resource, "GET", path + resource, headers, body, int(status), reason)


class FakeBoot:
    """A boot from 100 s to 160 s that asks DHCP with names at 110 s, and Azure for resources."""

    azure = SimpleNamespace(vm_name="myset_0", computer_name="myset000000")
    vm = SimpleNamespace(azure=azure, setup=Setup(2), number=0)
    started, seconds, active_time, prompt_time, read_bytes = 100, 60, 130, 130, 40 * MIB
    stage, interface, console, fate = "system", "ens3", "Linux version 6", ""

    def __init__(self, dhcp: str = "", asked: str = "", *others: Request, **extra: Any) -> None:
        self.dhcp = [DhcpRequest(110, "REQUEST", name) for name in dhcp.split()]
        words = [line.partition(" ") for line in asked.splitlines()]
        self.requests = [*(request(name, outcome) for name, _, outcome in words), *others]
        vars(self).update(extra)
        self.lines = self.console.splitlines()


def judged(*boots: Any, image: Image = Image([], MIB, "raw")) -> Tuple[int, List[str]]:  # noqa: B008
    return rehearse.verdict(image, list(boots))


class VerdictTest(unittest.TestCase):
    def assert_verdict(self, lines: List[str], *patterns: str) -> None:
        """The checks that are not ok are these: "FAIL title: remark", "? title: remark"."""
        found = [re.sub("  +", ": ", re.sub(" +", " ", line[2:8]) + line[8:]) for line in lines]
        found = [line for line in found if re.match(r"(FAIL|\?) ", line)]
        self.assertEqual(len(found), len(patterns), found)
        for line, pattern in zip(found, patterns):
            self.assertRegex(line, "^" + pattern)

    def test_each_fault_fails_its_check_and_gives_the_reason(self) -> None:
        sound, named = FakeBoot("golden myset000000", SOUND_REQUESTS), FakeBoot("myset000000")
        late, golden = FakeBoot("golden", SOUND_REQUESTS), FakeBoot("golden")
        asks_again = FakeBoot("myset000000", "goalstate 200")
        refused = FakeBoot("golden", "goalstate 400 no header")
        unknown = FakeBoot("golden", "goalstate 404 not here")
        body = b"<Health><State>NotReady</State><Description>Ready</Description></Health>"
        report = request("health", "200", body=body)
        not_ready = FakeBoot("golden", "goalstate 200", report)
        body = b"<State>NotReady</State><SubStatus>ProvisioningFailed</SubStatus>"
        final = request("health", "200", body=body)
        failed = FakeBoot("golden myset000000", SOUND_REQUESTS, final)
        asks_name = FakeBoot("golden", "goalstate 200\nhealth 200\nname 200")
        other_agent = request("goalstate", "200", {"User-Agent": "Cloud-Init/22.4.2"})
        two_agents = FakeBoot("golden myset000000", SOUND_REQUESTS, other_agent)
        lost = "ALERT!  LABEL=root does not exist.  Dropping to a shell!"
        no_root, no_nvme, no_vda = (
            FakeBoot(
                console=lost, prompt_time=0, vm=SimpleNamespace(**{**vars(FakeBoot.vm), **more})
            )
            for more in ({}, {"number": 1}, {"number": 1, "setup": Setup(1)})
        )
        waagent = request("goalstate", "200", {"x-ms-agent-name": "WALinuxAgent"})
        cloud_init = [request(name, "200", other_agent.headers) for name in ("health", "compute")]
        starts = request("health", "200", waagent.headers, b"<State>NotReady</State>")
        azures = FakeBoot("golden myset000000", "", *cloud_init, waagent, starts)
        extensions = FakeBoot("golden myset000000", SOUND_REQUESTS, waagent)
        rivals = FakeBoot("golden myset000000", SOUND_REQUESTS, waagent, starts)
        late_rival = FakeBoot("myset000000", "", waagent, starts)
        with_dhcp = FakeBoot("golden", console=lost, prompt_time=0)
        panics = FakeBoot(console=lost, prompt_time=0, fate="Kernel panic - not syncing")
        slot = FakeBoot("golden myset000000", SOUND_REQUESTS, interface="eth0")
        slot2 = FakeBoot(interface="eth0")
        sound_but_mute = FakeBoot("golden myset000000", SOUND_REQUESTS, stage="firmware")
        rival = FakeBoot("golden myset000000", SOUND_REQUESTS, console=WAAGENT_SAYS)
        both, renamed = [sound, sound], FakeBoot(interface="ens9")
        quiet = FakeBoot("golden myset000000", SOUND_REQUESTS, interface="")
        cases: Any = [
            ([*both, named], []),
            ([azures], []),
            ([extensions], []),
            ([rivals], ["FAIL is the .*: 2 agents .*: custom-provisioning, walinuxagent;"]),
            ([*both, late_rival], ["FAIL is the .*: 2 agents .*: custom-provisioning, walinuxa"]),
            ([FakeBoot()], [r"\? asks DHCP: .* within 60 s: .* eth0, .* was ens3 here"]),
            ([FakeBoot(interface="")], [r"\? asks DHCP: .* was unknown"]),
            ([FakeBoot(interface="eth0")], ["FAIL asks DHCP: .* another interface name th"]),
            ([no_root], [r"\? asks DHCP: .* does not find its root .* virtio"]),
            ([sound, no_nvme], ["FAIL second VM .*: asks DHCP: .* it is the disk driver"]),
            ([sound, no_vda], ["FAIL second VM .*: asks DHCP: .* another one in VM 2"]),
            ([slot, slot2], ["FAIL second .* bound to the PCI slot"]),
            ([with_dhcp], [r"\? reaches Azure: .* does not find .* another disk"]),
            ([panics], [r"\? asks DHCP: .* find its root", r"\? stays up: Kernel panic"]),
            ([*both[:1], sound_but_mute], []),
            ([rival], [r"\? is the only agent: walinuxagent runs, too"]),
            ([sound, renamed], ["FAIL second .* VM 1's, ens3.* ens9, and eth0"]),
            ([quiet, FakeBoot(interface="")], ["FAIL second .* VM 1's, unknown, .* is unknown"]),
            ([FakeBoot(stage="firmware", read_bytes=0)], [r"\? asks DHCP: .* this machine too b"]),
            ([FakeBoot(stage="firmware", read_bytes=9)], ["FAIL asks DHCP: .*no kernel"]),
            ([golden], ["FAIL reaches Azure: .* unit is not enabled .* firewall"]),
            ([refused], ["FAIL reports Ready: refused with status 400: no header$"]),
            ([unknown], [r"\? reports Ready: refused with status 404: not here$"]),
            ([not_ready], ["FAIL reports Ready: it reported NotReady: <Health>"]),
            ([failed], ["FAIL reports Ready: it reported NotReady: <S"]),
            ([asks_name], ["FAIL takes the .* for /metadata/instance/name, not"]),
            (
                [FakeBoot("myset0", SOUND_REQUESTS)],
                ["FAIL takes the computer .*: it took myset0,"],
            ),
            ([late, late, named], ["FAIL publishes .*: not before .*; .* the name 'golden'"]),
            (
                [late, late, golden],
                ["FAIL publishes .*", "FAIL silent .*'golden', not 'myset000000'"],
            ),
            ([*both, sound], ["FAIL silent after a reboot: it reported Ready again: the unit"]),
            ([*both, asks_again], ["FAIL silent after a reboot: it asks the WireServer"]),
            ([*both, FakeBoot()], ["FAIL silent after a reboot: no DHCP request within 60 s"]),
            ([two_agents], ["FAIL is the .*: 2 agents .*: cloud-init, custom-provisioning;"]),
        ]
        for boots, expected in cases:
            with self.subTest(expected):
                status, lines = judged(*boots)
                self.assertEqual(status, (3 if "?" in expected[0][:3] else 1) if expected else 0)
                self.assert_verdict(lines, *expected)

    def test_vm_that_is_still_booting_is_not_condemned(self) -> None:
        booting: Any = {"prompt_time": 0, "active_time": 159}
        sound = FakeBoot("golden myset000000", SOUND_REQUESTS)
        for boots in (
            [FakeBoot(**booting)],
            [FakeBoot(stage="firmware", read_bytes=0, **booting)],
            [FakeBoot("golden", **booting)],
            [FakeBoot("golden", "goalstate 200", **booting)],
            [sound, FakeBoot(**booting)],
        ):
            status, lines = judged(*boots)
            self.assertEqual((status, lines[-1]), (3, rehearse.UNTOLD))
            self.assert_verdict(lines, r"\? .* still booting when the time ran out: raise --time")

    def test_vm_that_does_not_stay_up_fails_even_if_all_else_is_well(self) -> None:
        panic = "Kernel panic - not syncing"
        sound, named = FakeBoot("golden myset000000", SOUND_REQUESTS), FakeBoot("myset000000")
        first = FakeBoot("golden myset000000", SOUND_REQUESTS, fate=panic)
        again = FakeBoot("myset000000", fate=panic)
        for boots in (
            [first],
            [sound, first],
            [sound, first, named],  # it panicked when it was to turn itself off
            [sound, sound, again],
        ):
            status, lines = judged(*boots)
            self.assertEqual(status, 1)
            self.assert_verdict(lines, f"FAIL stays up: {panic}")
        status, lines = judged(FakeBoot(fate=panic))
        self.assert_verdict(lines, f"FAIL asks DHCP: .* 60 s: {panic}", "FAIL stays up: ")

    def test_vhd_that_azure_refuses_fails_and_the_commands_are_told(self) -> None:
        status, lines = judged(image=Image(["driver=vpc"], MIB, "vpc", "dynamic"))
        self.assertEqual((status, lines[-1]), (1, "It will not provision."))
        self.assert_verdict(lines, "FAIL can be uploaded: Azure refuses this VHD: dynamic")
        self.assertIn("qemu-img convert --image-opts driver=vpc -O vpc ", "\n".join(lines))

    def test_last_line_is_the_result(self) -> None:
        sound, unnamed = (
            FakeBoot("golden myset000000", SOUND_REQUESTS),
            FakeBoot("golden", SOUND_REQUESTS),
        )
        silent, named = FakeBoot(stage="firmware", console=""), FakeBoot("myset000000")
        for boots, result in (
            ([sound, sound, named], "It will provision."),
            ([unnamed, unnamed, named], "It will provision, but not correctly."),
            ([sound, FakeBoot("golden")], "It will not provision."),
            ([silent], "It will not provision, or not correctly."),
        ):
            self.assertEqual(judged(*boots)[1][-1], result)

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

    def test_azure_may_be_told_in_another_way(self) -> None:
        """What azure-init and Talos send, and what no agent should, replayed against the fake."""
        init = {"x-ms-guest-agent-name": "Azure-Init/0.1.1", "Content-Type": "application/json"}
        talos = {"x-ms-version": "2015-04-05", "x-ms-agent-name": "Talos"}
        with FakeAzure() as azure:

            def ask(path: str, headers: Dict[str, str], body: str = "") -> int:
                with contextlib.closing(http.client.HTTPConnection(azure.wireserver)) as server:
                    server.request("POST" if body else "GET", path, body or None, headers)
                    return server.getresponse().status

            ids = (azure.incarnation, azure.container_id, azure.instance_id)
            report = azure_provision.HEALTH_REPORT.format(*ids)
            for length in ("-1", "9999999"):
                self.assertEqual(ask("/", {"Content-Length": length}), 413)
            self.assertIn(ask("/provisioning/health", init, '{"state": "Ready"}'), range(200, 300))
            self.assertEqual(ask("/machine?comp=goalstate", talos), 200)
            xml = {"Content-Type": "text/xml; charset=utf-8"}
            self.assertEqual(ask("/machine?comp=health", {**talos, **xml}, report), 200)
        name = request("instance", "200", {"": ""})
        for asked, agent in ((azure.requests[:1], "azure-init"), (azure.requests[1:], "Talos")):
            boot = FakeBoot("golden myset000000", "", *asked, name)
            status, lines = judged(boot, boot, FakeBoot("myset000000"))
            self.assertEqual(status, 0, lines)
            self.assertTrue(any(line.endswith(agent) for line in lines), lines)

    def test_boot_is_watched_as_long_as_more_is_to_be_expected(self) -> None:
        """It began at 100 s, asked DHCP at 110 s, Azure at 120 s."""
        for second, name, asked, prompt, until, *console in (
            (False, "golden", "", 0, 280),
            (False, "", "", 130, 280),
            (False, "myset000000", SOUND_REQUESTS, 0, 140),
            (False, "myset000000", SOUND_REQUESTS, 139, 147),
            (False, "myset000000", SOUND_REQUESTS, 139, 159, WAAGENT_SAYS),
            (False, "golden", "", 104, 260),
            (False, "golden", "", 130, 280),
            (True, "golden", "", 0, 280),
            (True, "", "", 124, 274),
            (True, "myset000000", "", 0, 120),
            (True, "myset000000", "", 124, 132),
        ):
            with self.subTest(second=second, name=name, asked=asked, prompt=prompt):
                boot: Any = FakeBoot(name, asked, prompt_time=prompt, console="\n".join(console))
                boots = [boot] * (3 if second else 1)
                self.assertEqual(rehearse.deadline(boots, 300), until)
                self.assertEqual(rehearse.deadline(boots, 5), 105)
                if (
                    second or asked
                ) and not console:  # it is done, and waagent asks again and again
                    waagent = request("goalstate", "200", {"x-ms-agent-name": "WALinuxAgent"})
                    boot.requests.append(waagent._replace(time=135))
                    self.assertEqual(rehearse.deadline(boots, 300), until)


class ProbeTest(unittest.TestCase):
    @unittest.skipUnless(shutil.which("qemu-system-x86_64"), "needs QEMU")
    def test_accelerator_that_works_is_recognized(self) -> None:
        self.assertTrue(vm.runs_guest(Setup(), timeout=60))
        endless = {"x86_64": b"\xeb\xfe".rjust(65536 - 14, b"\0").ljust(65536, b"\0")}  # jmp $
        with mock.patch.object(vm, "PROBES", endless):
            self.assertFalse(vm.runs_guest(Setup(), timeout=1))

    def test_firmware_is_what_qemu_describes_without_secure_boot(self) -> None:
        file = {"executable": {"filename": "code", "format": "qcow2"}}
        with tempfile.TemporaryDirectory() as name, mock.patch.object(vm, "FIRMWARE", Path(name)):
            for number, (architecture, machine, feature, mapping) in enumerate(
                (
                    ("x86_64", "pc-q35-*", "secure-boot", file),
                    ("x86_64", "microvm", "", file),
                    ("x86_64", "pc-q35-*", "", {"device": "memory"}),
                    ("aarch64", "virt-*", "", file),
                )
            ):
                target = {"architecture": architecture, "machines": [machine]}
                described = {"targets": [target], "features": [feature], "mapping": mapping}
                (Path(name) / f"{number}.json").write_text(json.dumps(described))
            drive = ["-drive", "if=pflash,readonly=on,format=qcow2,file=code"]
            self.assertEqual(Setup(2, architecture="aarch64").firmware(), drive)
            with self.assertRaisesRegex(vm.VMError, "^there is no EFI firmware; .* ovmf"):
                Setup(2).firmware()

    def test_tool_that_hangs_is_ended(self) -> None:
        with self.assertRaisesRegex(vm.VMError, "^sleep did not end within 0.1 s$"):
            vm.run_tool("sleep", "60", timeout=0.1)


class RehearseCommandTest(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="rehearse, ")
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.image = self.file("image", bytes(512))

    def file(self, name: str, content: bytes) -> str:
        (self.directory / name).write_bytes(content)
        return str(self.directory / name)

    def start(self, *arguments: str, path: str = "/nowhere") -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.rehearse", *arguments],
            cwd=str(ROOT),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            env=dict(os.environ, PATH=path),
        )
        assert process.stdout is not None and process.stderr is not None
        for clean_up in (process.stderr.close, process.stdout.close, process.wait, process.kill):
            self.addCleanup(clean_up)
        return process

    def assert_refused(self, reason: str, *arguments: str) -> None:
        """It ends with status 2 and REASON in the last line, on a PATH without QEMU."""
        with self.subTest(arguments=arguments):
            process = self.start(*arguments)
            output, errors = process.communicate(timeout=60)
            self.assertEqual((process.returncode, output), (2, ""), errors)
            last = errors.splitlines()[-1]
            self.assertRegex(last, rf"^python3 -m tests\.rehearse: error: .*{reason}")

    def test_usage_error_is_told_in_the_last_line(self) -> None:
        fifo = str(self.directory / "fifo")
        os.mkfifo(fifo)
        for reason, words in (
            ("required: IMAGE", []),
            ("invalid choice", ["--generation=3", "x"]),
            ("not the beginning of a hostname", ["--name=my_set", "x"]),
            ("unrecognized arguments", ["--time=1", "x"]),
            ("image: neither an empty file nor a", [f"--console={self.image}", self.image]),
            ("null: neither an empty file nor a", [f"--console={os.devnull}", self.image]),
            ("No such device or address: '.*fifo'", [f"--console={fifo}", self.image]),
            ("fifo: not a disk: neither a file nor", [fifo]),
        ):
            self.assert_refused(reason, *words)

    def test_reason_why_an_image_cannot_be_rehearsed_is_one_line(self) -> None:
        header = struct.pack(">4sIQI52xQ", b"QFI\xfb", 3, 0, 0, 0).ljust(512, b"\0")
        backing, data = bytearray(header), bytearray(header)
        backing[15], data[79] = 104, 4
        for reason, image in (
            ("No such file or directory: '/nowhere'$", "/nowhere"),
            ("neither a file nor a block device", "."),
            ("neither a file nor a block device", os.devnull),
            ("image.small: not a disk: it has 0 bytes", self.file("image\x1b[2J\nsmall", b"")),
            ("its data in another file: flatten it first: ", self.file("backing", bytes(backing))),
            ("its data in another file: flatten it first: ", self.file("data", bytes(data))),
            ("apt install qemu-system-x86", self.file("sound", header)),
            ("apt install qemu-system-x86", self.image),
        ):
            self.assert_refused(reason, image)

    def test_signal_ends_it_while_a_tool_hangs(self) -> None:
        fifo = str(self.directory / "fifo")
        os.mkfifo(fifo)
        script = f"#!/bin/sh\necho started >'{fifo}'\nexec sleep 60\n"
        Path(self.file("qemu-img", script.encode())).chmod(0o755)
        for number in (signal.SIGINT, signal.SIGTERM):
            process = self.start(self.image, path=f"{self.directory}:/usr/bin:/bin")
            Path(fifo).read_text()  # waits until it has started
            process.send_signal(number)
            output, _ = process.communicate(timeout=30)
            self.assertEqual((process.returncode, output), (128 + number, "Stopped.\n"))

    def start_endless_vm(self) -> "subprocess.Popen[str]":
        endless = b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"  # jmp $
        image = self.file("endless", endless.ljust(MIB, b"\0"))
        process = self.start(image, path=os.environ["PATH"])
        assert process.stdout
        while "first boot" not in process.stdout.readline():
            self.assertIsNone(process.poll())
        return process

    @unittest.skipUnless(shutil.which("qemu-system-x86_64"), "needs QEMU")
    def test_signal_ends_it_while_a_vm_runs(self) -> None:
        process = self.start_endless_vm()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
        self.assertEqual((process.returncode, errors), (128 + signal.SIGTERM, ""))
        self.assertTrue(output.endswith("Stopped.\n"), output)

    @unittest.skipUnless(shutil.which("qemu-system-x86_64"), "needs QEMU")
    def test_vm_that_ends_by_itself_does_not_stay_up(self) -> None:
        for fate, code in (
            ("resets again and again", "b0fe e664 f4"),  # mov al, 0xfe; out 0x64, al; hlt
            ("turned itself off", "ba0406 b80020 ef"),  # mov dx, 0x604; mov ax, 0x2000; out dx, ax
        ):
            sector = bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa"
            image = self.file("ends", sector.ljust(MIB, b"\0"))
            output, _ = self.start(image, path=os.environ["PATH"]).communicate(timeout=60)
            self.assertRegex(output, f"FAIL +stays up +the VM {fate}")
            self.assertTrue(output.endswith("It will not provision.\n"), output)

    @unittest.skipUnless(shutil.which("qemu-system-x86_64"), "needs QEMU")
    def test_qemu_that_is_told_to_end_says_nothing_of_the_image(self) -> None:
        process = self.start_endless_vm()
        children, state, qemu = Path(f"/proc/{process.pid}/task/{process.pid}/children"), "", ""
        # At first it is a copy of its parent, and then it does not handle the signal yet.
        while not re.match(r"Name:\tqemu(.|\n)*SigCgt:\t\w+[4-7c-f]\w{3}\n", state):
            qemu = children.read_text().strip()
            state = Path(f"/proc/{qemu}/status").read_text() if qemu else ""
        os.kill(int(qemu), signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 2)
        self.assertRegex(errors, "^python3 -m tests.rehearse: error: QEMU ")


if __name__ == "__main__":
    unittest.main()
