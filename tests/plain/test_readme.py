"""What the README says: its commands, its links, and each line of its table."""

import re
import unittest
from typing import Any, List
from unittest import mock

import azure_provision
from tests.fake_azure import Reset, Silence, Status, Text
from tests.plain.harness import ROOT, ScriptTest, StandIns
from tests.plain.test_publish import HEADER, NETWORKCTL, route

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

    def test_version_is_the_same_in_both_files(self) -> None:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        self.assertIn(f'version = "{azure_provision.__version__}"', project)


class TableTest(ScriptTest):
    """When something is wrong: each line of the table is one that the script logs."""

    def log_lines(self) -> List[str]:
        """What the script logs in all kinds of trouble."""
        lines: List[str] = []

        def run(*arguments: str, **options: Any) -> None:
            ran = self.provision(*arguments, **options)
            lines.extend(line.replace("/dev/full", "/etc/hostname") for line in ran.lines)

        # The kernel refuses TCP to the first so: no network is needed, and nothing is sent.
        for host in ("255.255.255.255", "127.0.0.1:1"):
            run("--wireserver", host)
        bodies = ["{}", "<a/>", "<!DOCTYPE a><a/>"]
        self.azure.script("goalstate", [Silence(), *map(Text, bodies)])
        self.azure.script("health", [Status(s) for s in (401, 403, 410, 429, 500, 503)])
        statuses = [Status(s) for s in (401, 403, 404, 410, 429, 500, 503)]
        self.azure.script("instance", [Silence(), Reset(), *statuses, Text("{}"), Text("<html>")])
        run(RESPONSE_TIMEOUT=0.2)
        self.azure.script("instance", [Text('{"compute": {"name": "not_valid"}}')])
        run()
        self.azure.computer_name = "not_valid"
        run()
        run("--dry-run")
        self.azure.computer_name = "web"
        failing = self.machine(hostnamectl="exit 1", systemctl="exit 1")
        refused = PermissionError(1, "Operation not permitted")
        with mock.patch.object(StandIns, "sethostname", side_effect=refused):
            run(machine=failing)
        run(machine=failing)
        run(HOSTNAME_FILE="/dev/full")
        for tools, routes in (({"networkctl": NETWORKCTL}, b"lo"), ({}, b"lo"), ({}, b"*")):
            machine = self.machine(hostnamectl="", systemctl="", **tools)
            machine.route_file.write_bytes(HEADER + route(routes))
            run(machine=machine)
        run(endpoints=False, uid=1000)
        failing.tag_file.write_text("Amazon EC2\n")
        run(endpoints=False, machine=failing)
        return lines

    def test_every_line_of_the_table_is_logged(self) -> None:
        section = README.split("## When something is wrong\n")[1].split("\n## ")[0]
        cells = re.findall(r"(?m)^\| (`[^|]*`[^|]*) \|", section)
        phrases = [phrase for cell in cells for phrase in re.findall(r"`([^`]+)`", cell)]
        self.assertGreater(len(phrases), 5)
        lines = self.log_lines()
        for phrase in phrases:
            pattern = ".*".join(map(re.escape, phrase.split("…")))
            # its example of an interface, and any number
            pattern = re.sub(r"\b(N|[0-9]+)(?=(\\? s\b|\\? attempts))", r"\\d+", pattern)
            pattern = pattern.replace("eth0", "lo")
            found = any(re.search(pattern, line) for line in lines)
            self.assertTrue(found, f"{phrase!r} is not in:\n" + "\n".join(lines))
