"""The tools for people: what they say of bad input, and that they leave nothing behind."""

import os
import socket
import subprocess
import sys
import unittest
from typing import List, Tuple

from tests.harness import ROOT


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


class FakeAzureTest(unittest.TestCase):
    def test_addresses_that_cannot_be_used_are_one_line_and_status_2(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            used = f"127.0.0.1:{taken.getsockname()[1]}"
            cases: List[Tuple[str, str]] = [
                (":80", "not HOST:PORT"),
                ("127.0.0.1", "not HOST:PORT"),
                ("127.0.0.1:http", "not HOST:PORT"),
                ("127.0.0.1:65536", "not HOST:PORT"),
                (used, f"cannot listen at {used} (--imds): Address already in use"),
                ("x" * 300 + ":80", "cannot listen at x"),
            ]
            for address, reason in cases:
                with self.subTest(address):
                    process = tool(
                        "tests.fake_azure", "--wireserver=127.0.0.1:0", f"--imds={address}"
                    )
                    errors = process.communicate(timeout=30)[1]
                    self.assertEqual(process.returncode, 2, errors)
                    self.assertIn(reason, errors.splitlines()[-1])
                    self.assertNotIn("Traceback", errors)


class DemoTest(unittest.TestCase):
    def test_demo_shows_a_first_boot(self) -> None:
        process = tool("tests.demo")
        output, errors = process.communicate(timeout=60)
        self.assertEqual((process.returncode, errors), (0, ""))
        self.assertIn("Ready has arrived", output)

    def test_demo_that_loses_its_reader_ends_with_its_script(self) -> None:
        with tool("tests.demo") as process:
            assert process.stdout is not None and process.stderr is not None
            while "ContainerId" not in process.stdout.readline():
                pass
            process.stdout.close()
            self.assertEqual(process.stderr.read(), "")
            self.assertEqual(process.wait(30), 1)
        with self.assertRaises(ProcessLookupError, msg="the script is still running"):
            os.killpg(process.pid, 0)
