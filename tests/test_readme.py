"""What the README says: its commands, its recipe without Python, its table of lines."""

import re
import shutil
import subprocess
import unittest
from typing import List

from tests.harness import ROOT, SCRIPT, ScriptTest, popen

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

    def test_every_line_of_its_table_is_one_of_the_script(self) -> None:
        script = SCRIPT.read_text(encoding="utf-8")
        for words in (
            "retrying for up to",
            "timed out after ",
            "gave up after ",
            "The goal state is not valid XML",
            "has no ContainerId",
            "has a DOCTYPE",
            "IMDS has neither",
            "IMDS did not send compute metadata",
            "in IMDS is not a valid hostname: ",
            "setting the hostname without hostnamectl",
            "stays enabled for the next boot",
            "The hostname cannot be set: ",
            "Hostname not published: ",
            "is not managed by",
            "is not back",
            "will run again",
            'Not on Azure (the chassis asset tag is "',
            "Not root",
        ):
            self.assertTrue(words in script, words)
            self.assertTrue(words in README, words)

    def test_steps_are_named_as_in_the_script(self) -> None:
        functions = re.findall(r"(?m)^def (\w+)", SCRIPT.read_text(encoding="utf-8"))
        for step in re.findall(r"(?m)^[2-6]\. \*\*`(\w+)`", README):
            self.assertIn(step, functions)


@unittest.skipUnless(shutil.which("curl"), "curl is not installed")
class WithoutPythonTest(ScriptTest):
    """The recipe for an image without Python, as it stands in the README."""

    def recipe(self) -> "subprocess.Popen[str]":
        found = re.search(r"```sh\n(#!/bin/sh\n.*?)```", README, re.S)
        assert found is not None
        recipe = found.group(1).replace("168.63.129.16", self.azure.wireserver)
        recipe = recipe.replace("169.254.169.254", self.azure.imds)
        self.shell = self.machine(hostnamectl="")
        path = f"{self.shell.bin}:/usr/local/bin:/usr/bin:/bin"
        return popen(["sh", "-c", recipe], self.shell, {"PATH": path})

    def test_it_reports_ready_and_sets_the_computer_name(self) -> None:
        self.azure.incarnation = "4"
        process = self.recipe()
        errors = process.communicate(timeout=30)[1]
        self.assertEqual((process.returncode, errors), (0, ""))
        self.assertTrue(self.azure.ready.is_set())
        self.assertEqual(self.shell.calls, ["hostnamectl set-hostname web-prod-01"])

    def test_invalid_name_is_rejected(self) -> None:
        names: List[str] = ["myset_0", "-rf", "web-", "a b", "$(reboot)", "web\nprod", "<html>"]
        for name in names:
            with self.subTest(name):
                self.azure.computer_name = name
                process = self.recipe()
                errors = process.communicate(timeout=30)[1]
                self.assertEqual((process.returncode, errors), (1, "no valid hostname\n"))
                self.assertEqual(self.shell.calls, [])
