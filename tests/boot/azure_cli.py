"""The commands of the recipes for Azure, parsed by azure-cli itself, without an account.

`python3 -m unittest tests.boot.azure_cli`, as root; az is $AZ, or on PATH.
"""

import os
import shutil
import subprocess
import unittest
from typing import List

from tests.plain.harness import ROOT, StandIns, popen

AZ = os.environ.get("AZ") or shutil.which("az") or ""
LOGIN = r"(?m)^ERROR: Please run 'az login' to setup account\.\n\Z"

# What stands for az while a recipe runs: it notes one argument a line, and says what az would.
NOTE = """\
printf '%s\\n' "$@" '' >>"$NOTES"
compute=/subscriptions/0/resourceGroups/images/providers/Microsoft.Compute
case "$1 $2" in
"disk grant-access") echo "https://md.blob.storage.azure.net/a/b?sv=2018-03-28&sig=c%3D" ;;
"disk show") echo $compute/disks/debian12 ;;
"vm show") echo $compute/virtualMachines/builder ;;
"sig image-version") echo $compute/galleries/images/images/debian12/versions/1.0.0 ;;
esac
"""


@unittest.skipUnless(AZ, "needs azure-cli")
@unittest.skipUnless(os.geteuid() == 0, "needs root, for a network in which nothing can be reached")
class AzureCliTest(unittest.TestCase):
    def machine(self, **tools: str) -> StandIns:
        machine = StandIns(**tools)
        self.addCleanup(machine.remove)
        return machine

    def commands(self, recipe: str, *arguments: str) -> List[List[str]]:
        """What a RECIPE tells az to do."""
        machine = self.machine(az=NOTE, azcopy="", wc="echo 1073742336")
        notes = machine.root / "notes"
        script = ["/bin/sh", str(ROOT / "tests/recipes" / recipe), *arguments]
        process = popen(script, machine, {"NOTES": str(notes)})
        output, errors = process.communicate(timeout=30)
        self.assertEqual((process.returncode, errors), (0, ""), output)
        return [command.split("\n") for command in notes.read_text().split("\n\n")[:-1]]

    def az(self, command: List[str]) -> str:
        """What azure-cli says to COMMAND."""
        home = str(self.machine().root)  # nobody's account, and nobody's SSH keys
        settings = {"HOME": home, "AZURE_CONFIG_DIR": home, "AZURE_CORE_COLLECT_TELEMETRY": "no"}
        return subprocess.run(
            ["unshare", "--net", AZ, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env=dict(os.environ, **settings),
        ).stdout

    def test_every_command_ends_at_the_login(self) -> None:
        for recipe, arguments, count in (("upload.sh", [__file__], 10), ("capture.sh", [], 7)):
            commands = self.commands(recipe, *arguments)
            self.assertEqual(len(commands), count)
            for command in commands:
                with self.subTest(" ".join(command)):
                    self.assertRegex(self.az(command), LOGIN)

    def test_misspelt_option_does_not(self) -> None:
        create = self.commands("capture.sh")[-1]
        self.assertIn("unrecognized arguments: --imagge", self.az([*create, "--imagge", "x"]))
