"""The tools for people: what they say of bad input, and that they leave nothing behind."""

import os
import subprocess
import sys
import unittest

from tests.fake_azure import listen
from tests.plain.harness import ROOT


def tool(*words: str) -> "subprocess.Popen[str]":
    """Start a tool, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


class ToolsTest(unittest.TestCase):
    def test_fake_azure_says_in_one_line_why_an_address_cannot_be_used(self) -> None:
        with listen(("127.0.0.1", 0)) as taken:
            used = "{}:{}".format(*taken.getsockname())
            for address, reason in (
                (":80", "not HOST:PORT"),
                ("127.0.0.1", "not HOST:PORT"),
                ("127.0.0.1:http", "not HOST:PORT"),
                ("127.0.0.1:65536", "not HOST:PORT"),
                (used, f"cannot listen at {used} (--imds): Address already in use"),
                ("x" * 300 + ":80", "cannot listen at x"),
            ):
                with self.subTest(address):
                    words = ("tests.fake_azure", "--wireserver=127.0.0.1:0", f"--imds={address}")
                    process = tool(*words)
                    errors = process.communicate(timeout=30)[1]
                    self.assertEqual(process.returncode, 2, errors)
                    self.assertIn(reason, errors.splitlines()[-1])
                    self.assertNotIn("Traceback", errors)

    def test_demo_shows_a_first_boot(self) -> None:
        process = tool("tests.demo")
        output, errors = process.communicate(timeout=60)
        self.assertEqual((process.returncode, errors), (0, ""))
        self.assertIn("Ready has arrived", output)

    def test_demo_that_loses_its_reader_ends_with_its_script(self) -> None:
        with tool("tests.demo") as process:
            assert process.stdout is not None and process.stderr is not None
            while "Health report" not in process.stdout.readline():
                pass
            process.stdout.close()
            self.assertEqual(process.stderr.read(), "")
            self.assertEqual(process.wait(30), 1)
        with self.assertRaises(ProcessLookupError, msg="the script is still running"):
            os.killpg(process.pid, 0)
