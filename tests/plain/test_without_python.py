"""The recipe for images without Python, its real script, with dash and with all of busybox."""

import json
import shutil
import subprocess
import unittest
from typing import Iterator, List

from tests.fake_azure import OK_LINE, Answer, FakeAzure, Flood, Raw, Reset, Status, Text
from tests.plain.harness import ROOT, ScriptTest, StandIns, popen

RECIPE = str(ROOT / "tests/recipes/without-python/azure-ready.sh")
TOOLS = ("curl", "sh", "cat", "cut", "grep", "head", "sed", "sleep", "tail", "tr")
NAMED = "hostnamectl set-hostname web-prod-01"
DONE = ["sync", "systemctl disable --no-reload azure-ready.service"]
STALE = b'{"computerName": "stale"}'
CUT = Raw(OK_LINE + b"Content-Length: 500\r\n\r\n" + STALE)
BAD_NAMES = '-|.|-web|web-|a..b|.a|a.|a.-b|a-.b|myset_0|w b|w\xe9b|$(id)|a;id|a\\b|a"b|a\nb|a\0b|'


@unittest.skipUnless(all(map(shutil.which, ("curl", "dash", "busybox"))), "no curl/dash/busybox")
class WithoutPythonTest(ScriptTest):
    def shells(self, hostnamectl: str = "") -> Iterator[StandIns]:
        """For each shell a machine on which it is "sh", with its kind of tools."""
        for shell in ("dash", "busybox"):
            machine = self.machine(hostnamectl=hostnamectl, hostname="", sync="", systemctl="")
            for tool in TOOLS:
                others = tool if shell == "dash" else shell
                source = shutil.which({"curl": "curl", "sh": shell}.get(tool, others))
                (machine.bin / tool).symlink_to(str(source))
            with self.subTest(shell=shell):
                yield machine

    def start(self, machine: StandIns, **given: str) -> "subprocess.Popen[str]":
        settings = {"WIRESERVER": self.azure.wireserver, "IMDS": self.azure.imds, "PAUSE": "0.01"}
        settings["HOSTNAME_FILE"] = str(machine.hostname_file)
        settings["ASSET_TAG_FILE"] = str(machine.tag_file)
        settings.update(READY_LIMIT="60", NAME_LIMIT="60", http_proxy="127.0.0.1:9")
        return popen(["sh", RECIPE], machine, dict(settings, **given))

    def finish(self, process: "subprocess.Popen[str]", status: int) -> None:
        output, errors = process.communicate(timeout=90)
        self.assertEqual(process.returncode, status, output + errors)

    def test_late_network_and_then_every_fault_in_each_step(self) -> None:
        refusals: List[Answer] = [Status(s, STALE) for s in (302, 404, 410, 429, 500, 503)]
        faults = [*refusals, Reset(), CUT, Raw(b"garbage"), Flood(OK_LINE + b"\r\n"), Text("")]
        goal_states = [*faults, Text(self.azure.goal_state().replace("InstanceId", "Other"))]
        expected = ["goalstate"] * len(goal_states) + ["goalstate", "health"] * (len(refusals) + 1)
        for machine in self.shells():
            self.azure.script("instance", [*faults, Text('{"compute": {"name": "x"}}')])
            unused = self.unused_port()
            host, port = unused.getsockname()
            process = self.start(machine, WIRESERVER=f"{host}:{port}")
            assert process.stdout is not None
            self.assertIn("retrying", process.stdout.readline())
            unused.close()
            with FakeAzure(wireserver=(host, port)) as late:
                late.incarnation, self.azure.partial = "7", True
                late.script("goalstate", goal_states)
                late.script("health", refusals)
                self.finish(process, 0)
            self.assertEqual([request.resource for request in late.requests], expected)
            self.assertEqual((machine.calls, late.ready.is_set()), ([NAMED, *DONE], True))

    def test_only_a_valid_name_is_set(self) -> None:
        for machine in self.shells():
            for name in (*BAD_NAMES.split("|"), "a" * 65, "a" * 100000, "a" * 64):
                text = 'x","computerName":"evil'  # JSON escapes these quotes
                compute = {"name": text, "osProfile": {"computerName": name}, "tags": text}
                sent = json.dumps({"compute": compute}, ensure_ascii=False)
                self.azure.script("instance", [Text(sent.replace("\\u0000", "\0"))])
                valid = len(name) == 64
                calls = [f"hostnamectl set-hostname {name}", *DONE] if valid else []
                self.finish(self.start(machine, NAME_LIMIT="0"), 0 if valid else 1)
                self.assertEqual(machine.calls, calls)

    def test_hostname_that_is_not_stored_leaves_the_unit_enabled(self) -> None:
        for machine in self.shells(hostnamectl="exit 1"):
            self.finish(self.start(machine, HOSTNAME_FILE="/"), 1)
            self.assertEqual(machine.calls, [NAMED, "hostname web-prod-01"])
            self.azure.script("health", [CUT])  # its status is the answer
            self.finish(self.start(machine, READY_LIMIT="0"), 0)
            self.assertEqual(machine.calls[2:], [NAMED, "hostname web-prod-01", *DONE])
            self.assertEqual(machine.hostname_file.read_text(), "web-prod-01\n")
            self.azure.script("goalstate", [Status(503)])
            self.finish(self.start(machine, READY_LIMIT="0"), 1)
            machine.tag_file.write_text("not Azure's")
            self.finish(self.start(machine, WIRESERVER="127.0.0.1:9"), 0)
            self.assertEqual(len(machine.calls), 6)
