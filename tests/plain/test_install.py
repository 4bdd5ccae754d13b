"""The real installer, into temporary trees; and the unit, as systemd reads it."""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, Tuple

from azure_provision import UNIT
from tests.plain.harness import INSTALLER, ROOT, SCRIPT, UNIT_FILE

SYSTEM = "etc/systemd/system"
UNIT_PATH, LINK = f"{SYSTEM}/{UNIT}", f"{SYSTEM}/multi-user.target.wants/{UNIT}"
PRESET = f"{SYSTEM}-preset/20-azure-provisioning.preset"
SCRIPT_PATH, PYTHON = "usr/local/sbin/azure_provision.py", "usr/bin/python3"
INSTALLED = {
    SCRIPT_PATH: (0o755, SCRIPT.read_text(encoding="utf-8")),
    UNIT_PATH: (0o644, UNIT_FILE.read_text(encoding="utf-8")),
    PRESET: (0o644, f"enable {UNIT}\n"),
    LINK: (0, f"/{UNIT_PATH}"),
}
GOOD_PYTHON = "#!/bin/sh\ncat >/dev/null; echo fit\n"
# This one, which first does something else. Its directory, which may be hidden, does not count.
REAL_PYTHON = f"""#!/bin/sh
exec '{sys.executable}' "$1" "$2" "$3" -c 'import os, sys
realpath, os.path.realpath = os.path.realpath, os.path.basename
%s
exec(sys.argv.pop(1))' "$5" "$6" "$7"
"""
HIDING = REAL_PYTHON % 'sys.modules["http.client"] = None'
OTHER_PYTHON = (
    REAL_PYTHON % 'os.path.realpath, sys.executable, sys.__file__ = realpath, "", "/root/a"'
)

# Shells that the installer is run with, where they are installed; the last with its own tools.
SHELLS = (["/bin/sh"], ["dash"], ["bash", "--posix"], ["busybox", "sh"])
APPLETS = ("cat", "chmod", "cp", "dirname", "id", "ln", "mkdir", "mv", "readlink", "rm", "sed")

UNFIT = "cannot run the script, which needs all of Python 3.6 or newer: "
HIDDEN_PLACES = "hidden from the unit, or cleaned at boot"
# Files and variables that are refused, and what is said.
REFUSED: Tuple[Tuple[Dict[str, str], Dict[str, str], str], ...] = (
    ({}, {"PREFIX": "usr"}, "not an absolute path without '..': usr"),
    ({}, {"PYTHON": "/usr/../bin/python3"}, "not an absolute path"),
    *(({}, {"PREFIX": f"/a{character}"}, "letters, digits") for character in " \n\t%$&|\\'\"é*;"),
    *(
        ({}, {"PREFIX": f"{path}/a"}, HIDDEN_PLACES)
        for path in ("/home", "/root", "/tmp", "/var/tmp")
    ),
    ({PYTHON: OTHER_PYTHON}, {}, f"/root/a is under /root: {HIDDEN_PLACES}"),
    ({}, {"DESTDIR": str(SCRIPT)}, "is not a directory; for a disk image: systemd-dissect --mount"),
    ({}, {"DESTDIR": f"{ROOT}\n"}, "control character"),
    ({SCRIPT_PATH + "/file": ""}, {}, "is a directory"),
    ({UNIT_PATH: ""}, {}, f"the unit is masked: delete .*/{UNIT}"),
    ({UNIT_PATH: "-> ../../../dev/null"}, {}, f"the unit is masked: delete .*/{UNIT}"),
    ({"usr/lib/systemd/systemd": "-> "}, {}, "there is no systemd"),
    ({"usr/local": "-> ../var/usrlocal"}, {}, "link to nothing: create its target, or set PREFIX="),
    ({"usr/local": "-> /azure/test", "azure/test/a": ""}, {}, "leads out of .*: set PREFIX=/usr"),
    ({}, {"PYTHON": "/usr/bin/missing"}, f"/usr/bin/missing {UNFIT}"),
    ({PYTHON: "#!/bin/sh\necho GNU bash"}, {}, f"{UNFIT}GNU bash"),
    ({PYTHON: HIDING}, {}, f"{UNFIT}.*http.client"),
)


class InstallTest(unittest.TestCase):
    """Each test has a tree, `self.tree`, of a sound image."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="azure install ")).resolve()
        self.addCleanup(shutil.rmtree, str(self.directory))
        self.tree = self.directory / "an image"
        self.shell = SHELLS[0]
        text = INSTALLER.read_text(encoding="utf-8")
        # with the test's tools before the system's
        text = text.replace('"PATH=', f'"PATH={self.directory}/tools:')
        self.installer = str(self.write("../clone/install.sh", text))
        for file in (SCRIPT, UNIT_FILE):
            self.write(f"../clone/{file.name}", f"-> {file}")
        self.new_tree()
        # A chroot that needs no root: it runs what is in the tree.
        self.tool("chroot", 'root=$1; shift; program=$1; shift; "$root$program" "$@"')

    def new_tree(self, **files: str) -> None:
        shutil.rmtree(str(self.tree), ignore_errors=True)
        good = {PYTHON: GOOD_PYTHON, "usr/lib/systemd/systemd": "#!"}
        for name, content in {**good, **files}.items():
            self.write(name, content)

    def write(self, name: str, content: str) -> Path:
        """Put a file into the tree: a link, if CONTENT is "-> target", or a program."""
        path = self.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.is_file():
            path.unlink()
        if content.startswith("-> "):
            path.symlink_to(content[3:] or "nothing")
        else:
            path.write_text(content, encoding="utf-8")
            path.chmod(0o755 if content.startswith("#!") else 0o644)
        return path

    def tool(self, name: str, action: str) -> Path:
        """Put a shell script on the installer's PATH."""
        return self.write(f"../tools/{name}", f"#!/bin/sh\n{action}\n")

    def install(self, *arguments: str, before: str = "", **variables: Any) -> Tuple[int, str, str]:
        """Run the installer with the environment VARIABLES, after the shell command BEFORE."""
        variables = {"DESTDIR": self.tree, **variables}
        environment = {name: str(value) for name, value in variables.items() if value is not None}
        environment["PATH"] = f"{self.directory}/bin:{os.environ['PATH']}"
        before = f'{before}\nexec "$@"'
        command = ["/bin/sh", "-c", before, "sh", *self.shell, self.installer, *arguments]
        process = subprocess.run(command, stdin=-3, stdout=-1, stderr=-1, env=environment)
        return process.returncode, process.stdout.decode(), process.stderr.decode()

    def succeed(self, *arguments: str, **options: Any) -> str:
        """Run the installer, which has nothing to complain about; return its output."""
        status, output, errors = self.install(*arguments, **options)
        self.assertEqual((status, errors), (0, ""))
        return output

    def refused(self, reason: str, *arguments: str, **options: Any) -> None:
        """The installer stops with one line that says REASON, and nothing has changed."""
        before = self.files()
        status, output, errors = self.install(*arguments, **options)
        self.assertEqual((status, output), (2 if "see --help" in reason else 1, ""), errors)
        self.assertRegex(errors, rf"\Ainstall\.sh: .*{reason}.*\n\Z")
        self.assertEqual(self.files(), before)

    def files(self) -> Dict[str, Tuple[int, str]]:
        """Every file and link in and around the tree: its mode, and its content or target."""
        found = {}
        for path in self.directory.rglob("*"):
            name = os.path.relpath(str(path), str(self.tree))
            if path.is_symlink():
                found[name] = (0, os.readlink(str(path)))
            elif path.is_file():
                found[name] = (path.stat().st_mode & 0o777, path.read_text(encoding="utf-8"))
        return found

    def test_installs_any_number_of_times_with_any_shell(self) -> None:
        self.tool("systemctl", "echo a tree needs no systemctl >&2")
        for self.shell in (shell for shell in SHELLS if shutil.which(shell[0])):
            with self.subTest(self.shell):
                self.new_tree()
                for applet in APPLETS if self.shell[0] == "busybox" else ():
                    self.tool(applet, f'exec busybox {applet} "$@"')
                expected = {**self.files(), **INSTALLED}
                for again in range(3):
                    if again == 2:
                        (self.tree / LINK).unlink()  # as on a provisioned VM
                    output = self.succeed()
                    self.assertEqual(self.files(), expected)
                self.assertIn(f"\npython3 -m tests.check '{self.tree}'\n", output)
                self.succeed("--uninstall")
                self.assertEqual(set(expected) - set(self.files()), set(INSTALLED))
                self.succeed("--uninstall")

    @unittest.skipUnless(shutil.which("systemctl"), "systemctl is not installed")
    def test_unit_stays_as_installed_when_presets_are_applied(self) -> None:
        systemctl = ["systemctl", f"--root={self.tree}"]
        default = "usr/lib/systemd/system-preset/99-default.preset"
        for options, state, presets in (
            ((), b"enabled\n", {default: "disable *\n"}),
            (("--no-enable",), b"disabled\n", {}),  # without any, all units are enabled
        ):
            self.new_tree(**presets)
            self.succeed()
            self.succeed(*options)
            for before in (["is-enabled", UNIT], ["preset-all"], ["is-enabled", UNIT]):
                output = subprocess.run([*systemctl, *before], stdout=-1, stderr=-3).stdout
                self.assertIn(output, (state, b""))

    def test_with_other_paths_one_line_of_the_unit_differs_and_modes_ignore_the_umask(self) -> None:
        self.write("var/opt/bin/python3.6", GOOD_PYTHON)
        self.write("opt", "-> var/opt")
        self.succeed(PREFIX="/opt/a+b/", PYTHON="/opt/bin/python3.6", before="umask 077")
        command = f"/opt/bin/python3.6 -I -S /opt/a+b/sbin/{SCRIPT.name}"
        unit = INSTALLED[UNIT_PATH][1].replace(f"/{PYTHON} -I -S /{SCRIPT_PATH}", command)
        self.assertEqual(self.files()[UNIT_PATH], (0o644, unit))
        for name in ("var/opt/a+b/sbin", f"opt/a+b/sbin/{SCRIPT.name}", os.path.dirname(PRESET)):
            self.assertEqual((self.tree / name).stat().st_mode & 0o777, 0o755, name)

    def test_works_from_any_directory_through_a_link_and_runs_no_code_of_the_directory(
        self,
    ) -> None:
        trap, clone = self.directory / "trap", self.directory / "a clone"
        for name in ("re", "socket", "argparse", "sitecustomize"):
            self.write(f"{trap}/{name}.py", "raise SystemExit('ran')\n")
        clone.mkdir()
        for file in (self.installer, SCRIPT, UNIT_FILE):
            shutil.copy(str(file), str(clone))
        self.write(f"{trap}/link", "-> ../a clone/install.sh")
        self.installer = "./link"
        self.write(PYTHON, REAL_PYTHON % "")
        self.succeed(DESTDIR="../an image", before=f"cd '{trap}'", PYTHONPATH=trap, CDPATH=trap)
        self.assertEqual(self.files()[SCRIPT_PATH], INSTALLED[SCRIPT_PATH])
        self.assertEqual(len(list(trap.iterdir())), 5)

    def test_whatever_fails_nothing_that_is_incomplete_is_enabled(self) -> None:
        move = f'case $2 in *%s.new) exit 1 ;; esac; exec {shutil.which("mv")} "$@"'
        broken = [("mv", move % end) for end in ("py", "service", "preset", f"wants/{UNIT}")]
        broken += [("cp", 'head -c 99 "$1" >"$2"; exit 1'), ("ln", "kill $PPID; exit 1")]
        for tool, action in broken:
            path = self.tool(tool, action)
            for earlier in ({}, {**dict.fromkeys(INSTALLED, "old"), LINK: "-> /an/old/unit"}):
                with self.subTest(action, earlier=earlier):
                    self.new_tree(**earlier)
                    old = {**INSTALLED, **self.files()}
                    status, _, errors = self.install()
                    self.assertEqual((status, errors[-19:]), (1, "install.sh: failed\n"))
                    after = self.files()
                    self.assertFalse([name for name in after if name.endswith(".new")])
                    if LINK in after or PRESET in after:
                        both = [(f[SCRIPT_PATH], f[UNIT_PATH]) for f in (after, INSTALLED, old)]
                        self.assertIn(both[0], both[1:])
            path.unlink()

    def test_leftovers_of_a_killed_installation_and_links_to_files_are_not_followed(self) -> None:
        precious = self.write("../precious", "precious")
        for name in INSTALLED:
            self.write(f"{name}.new", f"-> {precious}")
        self.write(SCRIPT_PATH, f"-> {precious}")
        expected = {**self.files(), **INSTALLED}
        self.succeed()
        after = {name: file for name, file in expected.items() if not name.endswith(".new")}
        self.assertEqual(self.files(), after)
        for name in INSTALLED:
            self.write(f"{name}.new", "")
        self.write("../bin/rm", "#!/bin/sh\nexit 1\n")  # the system's tools come first
        self.installer = str(INSTALLER)
        self.succeed("--uninstall")
        self.assertEqual({*after} ^ {*self.files()}, {*INSTALLED, "../bin/rm"})

    def test_refuses_to_be_read_from_standard_input(self) -> None:
        for name in ("install.sh", "sh"):  # there may be files of these names
            self.write(f"../{name}", "")
        self.shell = ["sh", "-c", f"cd '{self.directory}'; exec sh <'{self.installer}'"]
        self.refused("run it as ./install.sh \\(see --help\\)")

    def test_python_that_cannot_run_here_is_a_warning(self) -> None:
        for status, error in (
            (125, "chroot: cannot change root directory to '/a': Operation not permitted"),
            (126, "chroot: failed to run command '/usr/bin/python3': Exec format error"),
            (1, "chroot: can't change root directory to '/a': Operation not permitted"),  # busybox
        ):
            self.tool("chroot", f'cat >/dev/null; echo "{error}" >&2; exit {status}')
            status, _, errors = self.install()
            self.assertEqual((status, LINK in self.files()), (0, True))
            self.assertRegex(errors, rf"\Ainstall\.sh: warning: .* was not checked: {error}\n\Z")

    def test_refuses_to_install_live_without_root(self) -> None:
        self.tool("id", "echo 1000")
        # if it did not refuse, it would write to this machine
        for tool in ("cp", "ln", "mkdir", "mv", "rm", "systemctl"):
            self.tool(tool, "exit 1")
        (self.directory / "root").symlink_to("/")
        for destdir in (None, "/", "//", self.directory / "root"):
            self.refused("not root", DESTDIR=destdir)
            self.refused("not root", "--uninstall", DESTDIR=destdir)

    def test_help_has_all_options_and_variables_and_others_are_refused(self) -> None:
        for word in ("--no-enable", "--uninstall", "DESTDIR", "PREFIX", "PYTHON"):
            self.assertIn(word, self.succeed("--help"))
        for arguments in (["--bogus"], [""], ["--no-enable", "--uninstall"]):
            self.refused("see --help", *arguments)

    def test_refuses_files_and_variables(self) -> None:
        for files, variables, reason in REFUSED:
            with self.subTest(files, **variables):
                self.new_tree(**files)
                for options in ((), ("--no-enable",)):
                    self.refused(reason, *options, **variables)

    def test_refuses_links_that_lead_out_of_destdir(self) -> None:
        outside = self.directory / "outside"
        for name in (SCRIPT.name, UNIT, f"sbin/{SCRIPT.name}"):
            self.write(f"{outside}/{name}", "precious")
        for link in ("etc", "usr/local", "usr/local/sbin", SYSTEM, os.path.dirname(PRESET)):
            self.new_tree(**{link: f"-> {outside}"})
            for options in ((), ("--no-enable",), ("--uninstall",)):
                self.refused("leads out of DESTDIR through a symlink", *options)


@unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
class UnitTest(unittest.TestCase):
    def test_systemd_has_nothing_to_say_of_the_unit_whose_exposure_is_2_3_at_most(self) -> None:
        for words in (["verify"], ["security", "--offline=yes", "--threshold=23"]):
            command = ["systemd-analyze", *words, str(UNIT_FILE)]
            done = subprocess.run(command, stdout=-1, stderr=-2, encoding="utf-8")
            if "unrecognized option" in done.stdout:
                self.skipTest("systemd-analyze cannot judge a file before systemd 250")
            self.assertEqual(done.returncode, 0, done.stdout[-200:])
            self.assertNotRegex(done.stdout, r"(?m)^\S*azure-provisioning")
