"""The real installer, into a temporary tree; and the unit, as systemd reads it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, List, Tuple

from tests.harness import INSTALLER, ROOT, SCRIPT, UNIT_FILE

LINK = "etc/systemd/system/multi-user.target.wants/azure-provisioning.service"


class InstallTest(unittest.TestCase):
    """Each test has a tree, `self.tree`, with a Python that stands in for the image's."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="azure install "))
        self.addCleanup(shutil.rmtree, str(self.directory))
        self.tree = self.directory / "an image"
        self.python("cat >/dev/null")
        # Tools of this machine, and a chroot that needs no root: it runs what is in the tree.
        self.tools = self.directory / "tools"
        self.tools.mkdir()
        self.tool("chroot", 'root=$1; shift; program=$1; shift; "$root$program" "$@"')

    def python(self, action: str, path: str = "usr/bin/python3") -> None:
        """Put a Python into the tree that does ACTION, in shell."""
        python = self.tree / path
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f"#!/bin/sh\n{action}\n")
        python.chmod(0o755)

    def real_python(self, before: str = "pass") -> None:
        """Have the tree's Python be the one that runs this test, with BEFORE done first."""
        self.python(f"exec '{sys.executable}' -c \"import sys; {before}; exec(sys.stdin.read())\"")

    def tool(self, name: str, action: str) -> None:
        tool = self.tools / name
        tool.write_text(f"#!/bin/sh\n{action}\n")
        tool.chmod(0o755)

    def without_systemctl(self) -> str:
        """A PATH that has every tool of this machine but systemctl."""
        tools = self.directory / "no systemctl"
        tools.mkdir()
        for name in ("sh", "install", "dirname", "id", "ln", "rm", "sed", "tail", "mktemp", "cat"):
            path = shutil.which(name)
            assert path is not None, name
            (tools / name).symlink_to(path)
        return f"{self.tools}:{tools}"

    def install(self, *arguments: str, **environment: Any) -> Tuple[int, str, str]:
        """Run the installer; return its status, output and error output."""
        environment.setdefault("DESTDIR", self.tree)
        environment.setdefault("PATH", f"{self.tools}:{os.environ['PATH']}:/usr/sbin:/sbin")
        installer = environment.pop("installer", INSTALLER)
        process = subprocess.run(
            [str(installer), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            cwd=str(environment.pop("cwd", "/")),
            env={name: str(value) for name, value in environment.items() if value is not None},
            timeout=30,
        )
        return process.returncode, process.stdout, process.stderr

    def files(self) -> Dict[str, Tuple[int, str]]:
        """Every file and link of the tree: its mode, and what is in it or where it leads."""
        found = {}
        for path in sorted(self.tree.rglob("*")):
            name = str(path.relative_to(self.tree))
            if path.is_symlink():
                found[name] = (0, os.readlink(str(path)))
            elif path.is_file():
                found[name] = (path.stat().st_mode & 0o777, path.read_text())
        return found

    def refused(self, reason: str, *arguments: str, **environment: Any) -> None:
        """The installer stops with one line that says REASON, and nothing has changed."""
        before = self.files()
        status, output, errors = self.install(*arguments, **environment)
        self.assertEqual((status, output), (2 if "not an option" in reason else 1, ""), errors)
        self.assertRegex(errors, rf"\Ainstall\.sh: .*{reason}.*\n\Z")
        self.assertEqual(self.files(), before)

    def test_installs_script_unit_and_link(self) -> None:
        status, output, errors = self.install()
        self.assertEqual((status, errors), (0, ""))
        files = self.files()
        self.assertEqual(files["usr/local/sbin/azure_provision.py"], (0o755, SCRIPT.read_text()))
        self.assertEqual(
            files["etc/systemd/system/azure-provisioning.service"],
            (0o644, UNIT_FILE.read_text()),
        )
        self.assertRegex(files[LINK][1], r"(/etc/systemd/system|\.\.)/azure-provisioning.service$")
        self.assertEqual(len(files), 4)
        self.assertIn("azure_provision.py", output)
        self.assertIn("captured", output)

    def test_makes_the_link_itself_without_systemctl(self) -> None:
        status, _, errors = self.install(PATH=self.without_systemctl())
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual(self.files()[LINK][1], "/etc/systemd/system/azure-provisioning.service")

    def test_twice_is_once(self) -> None:
        self.install()
        once = self.files()
        status, _, errors = self.install()
        self.assertEqual((status, errors, self.files()), (0, "", once))

    def test_enables_again_what_a_provisioned_vm_disabled(self) -> None:
        self.install()
        once = self.files()
        (self.tree / LINK).unlink()
        self.install()
        self.assertEqual(self.files(), once)

    def test_no_enable_makes_no_link(self) -> None:
        status, output, _ = self.install("--no-enable")
        self.assertEqual(status, 0)
        self.assertNotIn(LINK, self.files())
        self.assertIn("not enabled", output)

    def test_uninstall_removes_all_of_it(self) -> None:
        before = self.files()
        for path in (None, self.without_systemctl()):
            with self.subTest(path):
                settings = {} if path is None else {"PATH": path}
                self.install(PREFIX="/opt/azure", UNITDIR="/usr/lib/systemd/system", **settings)
                self.assertEqual(len(self.files()), len(before) + 3)
                status, output, errors = self.install(
                    "--uninstall",
                    PREFIX="/opt/azure",
                    UNITDIR="/usr/lib/systemd/system",
                    **settings,
                )
                self.assertEqual((status, errors, self.files()), (0, "", before))
                self.assertIn("Removed", output)

    def test_uninstall_of_nothing_succeeds(self) -> None:
        self.assertEqual(self.install("--uninstall")[0], 0)

    def test_default_unit_is_the_repository_s_and_others_differ_in_one_line(self) -> None:
        self.python("cat >/dev/null", "opt/my python/bin/python3.6")
        self.install(PREFIX="/opt/a b", PYTHON="/opt/my python/bin/python3.6")
        unit = self.files()["etc/systemd/system/azure-provisioning.service"][1]
        ours, theirs = UNIT_FILE.read_text().splitlines(), unit.splitlines()
        self.assertEqual(len(ours), len(theirs))
        different = [(a, b) for a, b in zip(ours, theirs) if a != b]
        options = re.match(r"ExecStart=\S+ (.*) \S+$", different[0][0])
        assert options is not None
        self.assertEqual(
            [line for _, line in different],
            [
                f'ExecStart="/opt/my python/bin/python3.6" {options.group(1)} '
                '"/opt/a b/sbin/azure_provision.py"'
            ],
        )
        self.assertIn("opt/a b/sbin/azure_provision.py", self.files())

    def test_works_from_any_directory_and_by_a_relative_destdir(self) -> None:
        copy = self.directory / "a clone"
        copy.mkdir()
        for file in (INSTALLER, SCRIPT, UNIT_FILE):
            shutil.copy(str(file), str(copy))
        status, _, errors = self.install(
            installer="../a clone/install.sh", cwd=self.tree, DESTDIR="../an image", CDPATH="/"
        )
        self.assertEqual((status, errors), (0, ""))
        self.assertIn("usr/local/sbin/azure_provision.py", self.files())

    def test_modes_do_not_depend_on_the_umask(self) -> None:
        before = os.umask(0o077)
        self.addCleanup(os.umask, before)
        self.install()
        for name in ("usr/local/sbin", "etc/systemd/system"):
            self.assertEqual((self.tree / name).stat().st_mode & 0o777, 0o755, name)

    def test_existing_directory_keeps_its_mode(self) -> None:
        sbin = self.tree / "usr/local/sbin"
        sbin.mkdir(parents=True)
        sbin.chmod(0o750)
        self.install()
        self.assertEqual(sbin.stat().st_mode & 0o777, 0o750)

    def test_never_starts_it(self) -> None:
        record = self.directory / "record"
        self.tool("systemctl", f"echo \"$@\" >>'{record}'")
        self.install()
        self.assertEqual(
            record.read_text(), f"--quiet --root={self.tree} enable azure-provisioning.service\n"
        )

    def test_refuses_to_install_live_without_root(self) -> None:
        self.tool("id", "echo 1000")
        self.refused("not root", DESTDIR=None)
        self.refused("not root", DESTDIR="/")
        self.refused("not root", "--uninstall", DESTDIR=None)

    def test_refuses_a_destdir_that_is_none(self) -> None:
        self.refused("DESTDIR is no directory: /no such", DESTDIR="/no such")
        self.refused("DESTDIR is no directory", "--uninstall", DESTDIR=SCRIPT)

    def test_refuses_a_missing_interpreter(self) -> None:
        self.refused("no /usr/bin/python9", PYTHON="/usr/bin/python9")

    def test_takes_an_interpreter_behind_a_link_that_leads_into_the_image(self) -> None:
        python = self.tree / "usr/bin/python3"
        python.unlink()
        python.symlink_to("/etc/alternatives/a-python-of-the-image")
        self.tool("chroot", "cat >/dev/null; exit 0")
        self.assertEqual(self.install()[0], 0)

    def test_refuses_an_interpreter_that_is_too_old(self) -> None:
        self.real_python("sys.version_info = (3, 5, 9)")
        self.refused("/usr/bin/python3 cannot run the script: it is 3.5, and 3.6 is the oldest")

    def test_refuses_an_interpreter_without_a_module_of_the_script(self) -> None:
        modules = re.findall(r"(?m)^ *(?:import|from) ([a-z.]+)", SCRIPT.read_text())
        self.assertGreater(len(modules), 8)
        for module in sorted(set(modules) - {"sys", "typing"}):
            with self.subTest(module):
                self.real_python(f"sys.modules['{module}'] = None")
                self.refused(f"cannot run the script: .*{module}")

    def test_takes_a_real_interpreter(self) -> None:
        self.real_python()
        status, _, errors = self.install()
        self.assertEqual((status, errors), (0, ""))

    def test_warns_of_an_interpreter_that_cannot_run_here(self) -> None:
        self.tool("chroot", "cat >/dev/null; echo 'cannot run: Exec format error' >&2; exit 126")
        status, _, errors = self.install()
        self.assertEqual(status, 0)
        self.assertRegex(errors, "warning: .*not checked: cannot run: Exec format error\n$")
        self.assertEqual(len(errors.splitlines()), 1)
        self.assertIn(LINK, self.files())

    def test_refuses_an_interpreter_whose_link_leads_nowhere(self) -> None:
        python = self.tree / "usr/bin/python3"
        python.unlink()
        python.symlink_to("/no/such/python")
        self.tool("chroot", "echo \"chroot: failed to run '$2': No such file\" >&2; exit 127")
        self.refused("cannot run the script: chroot: failed to run '/usr/bin/python3'")

    def test_refuses_paths_that_a_unit_cannot_take(self) -> None:
        for name in ("PREFIX", "UNITDIR", "PYTHON"):
            self.refused(f"{name} is no absolute path: usr", **{name: "usr"})
            for character in '"', "'", "\\", "%", "$":
                self.refused(f"{name} has a character", **{name: f"/a{character}b"})
        code, _, errors = self.install(PREFIX="/a\nb")
        self.assertEqual(code, 1)
        self.assertIn("PREFIX has a character", errors)

    def test_refuses_a_unitdir_that_systemd_does_not_know(self) -> None:
        self.refused("--no-enable is needed: /opt/units", UNITDIR="/opt/units")
        self.assertEqual(self.install("--no-enable", UNITDIR="/opt/units")[0], 0)
        self.assertIn("opt/units/azure-provisioning.service", self.files())

    def test_usage_errors(self) -> None:
        for argument in ("--bogus", "-x", "argument", "", "--enable=no"):
            self.refused("not an option", argument)

    def test_help_names_every_option_and_variable(self) -> None:
        status, output, errors = self.install("--help")
        self.assertEqual((status, errors), (0, ""))
        for word in ("--no-enable", "--uninstall", "--help", "DESTDIR", "PREFIX", "PYTHON"):
            self.assertIn(word, output)

    def test_warns_of_each_other_agent(self) -> None:
        for agent, path in (
            ("cloud-init", "usr/bin/cloud-init"),
            ("waagent", "usr/sbin/waagent"),
            ("azure-init", "usr/bin/azure-init"),
        ):
            with self.subTest(agent):
                file = self.tree / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("")
                status, _, errors = self.install()
                self.assertEqual(status, 0)
                self.assertRegex(errors, rf"\Ainstall.sh: warning: the image has /{path}, .*\n\Z")
                file.unlink()


class UnitTest(unittest.TestCase):
    """The unit as it stands and as it is installed."""

    def lines(self) -> List[str]:
        return [
            line
            for line in UNIT_FILE.read_text().splitlines()
            if line and not line.startswith(("#", "["))
        ]

    def test_unit_is_what_was_promised(self) -> None:
        lines = self.lines()
        for line in (
            "Type=oneshot",
            "RemainAfterExit=yes",
            "After=network.target",
            "StandardOutput=journal+console",
            "TimeoutStartSec=30min",
            "WantedBy=multi-user.target",
        ):
            self.assertIn(line, lines)
        command = [line for line in lines if line.startswith("Exec")]
        self.assertEqual(len(command), 1)
        self.assertRegex(
            command[0], r"^ExecStart=/usr/bin/python3 -I -S /usr/local/sbin/azure_provision.py$"
        )

    def test_unit_has_none_of_the_settings_that_break_an_old_systemd(self) -> None:
        for line in self.lines():
            name, _, value = line.partition("=")
            self.assertNotEqual(name, "Restart", "before 244 a oneshot unit with it is refused")
            self.assertNotEqual(name, "Wants", "network-online.target may wait for two minutes")
            if "@" in value:
                self.assertEqual(name, "SystemCallFilter")
                self.assertTrue(value.startswith("~"), "231 to 238 drop an unknown group of these")
        filters = [line for line in self.lines() if line.startswith("SystemCallFilter=")]
        self.assertTrue(filters[0].startswith("SystemCallFilter=~"), "the first one decides")
        self.assertIn("SystemCallErrorNumber=EPERM", self.lines(), "a denied call would kill")

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_has_nothing_to_say_of_the_installed_unit(self) -> None:
        with tempfile.TemporaryDirectory(prefix="azure unit ") as directory:
            python = Path(directory, "my python")
            python.symlink_to(sys.executable)
            for settings in (
                {"PYTHON": "/usr/bin/python3"},
                {"PYTHON": str(python), "PREFIX": directory + "/a b"},
            ):
                unit = self.installed(directory, **settings)
                process = subprocess.run(
                    ["systemd-analyze", "verify", unit],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    universal_newlines=True,
                )
                ours = [s for s in process.stdout.splitlines() if "azure-provisioning" in s]
                self.assertEqual(ours, [])
                self.assertEqual(process.returncode, 0, process.stdout)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_exposure_is_2_1_at_most(self) -> None:
        process = subprocess.run(
            ["systemd-analyze", "security", "--offline=yes", "--threshold=21", str(UNIT_FILE)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )
        if "unrecognized option" in process.stdout:
            self.skipTest("systemd-analyze cannot judge a file before systemd 250")
        self.assertEqual(process.returncode, 0, process.stdout[-200:])

    def installed(self, directory: str, **settings: str) -> str:
        """Install the unit below DIRECTORY as if that were its place in the image."""
        tree = Path(directory, "tree")
        shutil.rmtree(str(tree), ignore_errors=True)
        chroot = Path(directory, "chroot")
        chroot.write_text("#!/bin/sh\ncat >/dev/null; exit 0\n")
        chroot.chmod(0o755)
        python = Path(str(tree) + settings["PYTHON"])
        python.parent.mkdir(parents=True)
        python.write_text("")
        environment = dict(os.environ, DESTDIR=str(tree), **settings)
        environment["PATH"] = f"{directory}:{environment['PATH']}"
        subprocess.run(
            [str(INSTALLER), "--no-enable"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
            env=environment,
        )
        return str(tree / "etc/systemd/system/azure-provisioning.service")


class RepositoryTest(unittest.TestCase):
    """What is true of the repository as a whole."""

    def test_script_is_executable_and_so_is_the_installer(self) -> None:
        for file in (SCRIPT, INSTALLER):
            self.assertTrue(os.access(str(file), os.X_OK), file)

    def test_top_level_is_what_it_is_to_be(self) -> None:
        known = {
            *("azure_provision.py", "azure-provisioning.service", "install.sh", "tests"),
            *("README.md", "pyproject.toml", "LICENSE"),
        }
        names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
        self.assertEqual(names - {"__pycache__"}, known)
