"""What the README says: its commands, its links, and each line of its table."""

import errno
import os
import re
import unittest
from typing import Any, List
from unittest import mock

from tests.fake_azure import OK_LINE, Raw, Reset, Silence, Status, Text
from tests.plain.harness import ROOT, SCRIPT, ScriptTest, StandIns
from tests.plain.test_publish import HEADER, NETWORKCTL, default_route

README = (ROOT / "README.md").read_text(encoding="utf-8")


class ReadmeTest(unittest.TestCase):
    def test_commands_stand_there_alone(self) -> None:
        for command in ("python3 -m tests.demo", "python3 -m unittest"):
            self.assertTrue(f"\n```sh\n{command}\n```\n" in README, command)

    def test_links_lead_to_files_and_headings(self) -> None:
        headings = {
            re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in README.splitlines()
            if line.startswith("#")
        }
        for target in re.findall(r"\]\(([^)]+)\)", README):
            if target.startswith("#"):
                self.assertIn(target[1:], headings)
            elif not target.startswith("https://"):
                self.assertTrue((ROOT / target).exists(), target)

    def test_steps_are_named_as_in_the_script(self) -> None:
        functions = re.findall(r"(?m)^def (\w+)", SCRIPT.read_text(encoding="utf-8"))
        steps = re.findall(r"(?m)^[2-6]\. \*\*`(\w+)`", README)
        self.assertEqual(len(steps), 5)
        for step in steps:
            self.assertIn(step, functions)


class TableTest(ScriptTest):
    """When something is wrong: each line of the table is one that the script logs."""

    def log_lines(self) -> List[str]:
        """What the script logs in all kinds of trouble."""
        lines: List[str] = []

        def run(*arguments: str, status: int = 0, **options: Any) -> None:
            ran = self.provision(*arguments, **options)
            self.assertEqual(ran.status, status, ran.output)
            lines.extend(line.replace("/dev/full", "/etc/hostname") for line in ran.lines)

        # The kernel refuses TCP to this address so: no network is needed, and nothing is sent.
        run("--wireserver", "255.255.255.255", status=1)
        run("--wireserver", "{}:{}".format(*self.unused_port().getsockname()), status=1)
        bodies = ["{}", "<a/>", "<!DOCTYPE a><a/>"]
        self.azure.script("goalstate", [Silence(), *map(Text, bodies)])
        self.azure.script("health", [Status(s) for s in (410, 429, 500, 503)])
        lengths = (b"40\r\n\r\n", b"3\r\nContent-Length: 4\r\n\r\n")
        bad = [Raw(OK_LINE + b"Content-Length: " + length) for length in lengths]
        self.azure.script("compute", [Silence(), Status(404), Status(429), *bad, Text("<html>")])
        run(RESPONSE_TIMEOUT=0.2)
        self.azure.script("compute", [Status(200, b" " * 1048577), Reset()])
        run()
        self.azure.script("compute", [], forever=Text("{}"))
        run(status=1)
        self.azure.script("compute", [Text('{"name": "not_valid"}')])
        run(status=1)
        failing = self.machine(hostnamectl="exit 1", systemctl="exit 1")
        refused = PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        with mock.patch.object(StandIns, "sethostname", side_effect=refused):
            run(machine=failing, status=1)
        run(machine=failing)
        run(HOSTNAME_FILE="/dev/full")
        for tools in ({}, {"networkctl": NETWORKCTL}):
            machine = self.machine(hostnamectl="", systemctl="", **tools)
            machine.route_file.write_bytes(HEADER + default_route(b"lo"))
            run(machine=machine, PUBLISH_TIMEOUT=0.5)
        run(endpoints=False, uid=1000, status=2)
        failing.tag_file.write_text("Amazon EC2\n")
        run(endpoints=False, machine=failing)
        return lines

    def test_every_line_of_the_table_is_logged(self) -> None:
        section = README.split("## When something is wrong\n")[1].split("\n## ")[0]
        rows = re.findall(r"(?m)^\| (`.*?) \| [^|]+ \| [^|]+ \|$", section)
        phrases = [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]
        phrases.append("Not provisioned: …; the next boot tries again")
        self.assertGreater(len(phrases), 25)
        lines = self.log_lines()
        for phrase in phrases:
            pattern = ".*".join(map(re.escape, phrase.split("…")))
            # its example of an interface, and any number
            pattern = re.sub(r"(\\ )(N|10)(?=\\ )", r"\1\\d+", pattern).replace("eth0", r"\w+")
            found = any(re.search(pattern, line) for line in lines)
            self.assertTrue(found, f"{phrase!r} is not in:\n" + "\n".join(lines))
