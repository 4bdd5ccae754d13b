"""The real installer, into a temporary tree; and the unit, as systemd reads it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, Dict, Tuple
from unittest import mock

from tests.plain.harness import INSTALLER, ROOT, SCRIPT, UNIT_FILE

OPTIONS = ("--check", "--no-enable", "--uninstall")
Files = Dict[str, str]  # path: content, or "-> target" for a symlink

SYSTEM = "etc/systemd/system/"
WANTS = SYSTEM + "multi-user.target.wants/"
UNIT = "azure-provisioning.service"
UNIT_PATH = SYSTEM + UNIT
LINK = WANTS + UNIT
PRESET = "etc/systemd/system-preset/20-azure-provisioning.preset"
SCRIPT_PATH = "usr/local/sbin/azure_provision.py"
PYTHON = "usr/bin/python3"
GOOD_PYTHON = "#!/bin/sh\ncat >/dev/null; echo azure_provision.py 1.2.3"

NETPLAN = "etc/netplan/a.yaml"
NETWORK = "etc/systemd/network/a.network"
NM_CONF = "etc/NetworkManager/conf.d/a.conf"
NM_PROFILE = "etc/NetworkManager/system-connections/Wired connection 1.nmconnection"
IFCFG = "etc/sysconfig/network-scripts/ifcfg-eth0"
INTERFACES = "etc/network/interfaces"
RULES = "etc/udev/rules.d/70-persistent-net.rules"
KEYGEN = "usr/lib/systemd/system/sshd-keygen.service"

MAC = "00:22:48:AA:bb:cc"
MAC_FIX = "is bound to a MAC address that no VM of the image has: match by name or driver, or"
KEYGEN_FIX = "has no host keys in a VM, as nothing creates them: add a unit that runs ssh-keygen -A"
AGENT_FIX = "also reports to Azure: remove its package, or "
SHARED = "would be shared by all VMs: "
NO_CLIENT = "no DHCP client is enabled and configured: enable one"
NOT_FIRST_BOOT = 'creates SSH host keys only if /etc/machine-id is missing or "uninitialized":'


def enabled(unit: str) -> Files:
    return {WANTS + unit: f"-> /usr/lib/systemd/system/{unit}"}


# An image about which there is nothing to say. Its Python is a stand-in.
GOOD: Files = {
    PYTHON: GOOD_PYTHON,
    "etc/machine-id": "",
    # systemd's own; only containers use it
    "usr/lib/systemd/network/80-container-host0.network": "[Network]\nDHCP=yes\n",
    **enabled("dhcpcd.service"),
    "netplan/root.yaml": "",  # a name that no file in /etc/netplan has
}
NO_DHCPCD: Files = {SYSTEM + "dhcpcd.service": "-> /dev/null"}
UNINITIALIZED: Files = {"etc/machine-id": "uninitialized\n"}

# A file that makes an image unsound, and what is said about it.
UNSOUND = (
    (NETPLAN, f"  match:\n    macaddress: {MAC}\n", MAC_FIX),
    ("usr/local/lib/netplan/a.yaml", f"{{match: {{'macaddress': \"{MAC}\"}}}}\n", MAC_FIX),
    (NETWORK, "[Match]\nPermanentMACAddress=0022.48aa.bbcc", MAC_FIX),
    ("etc/systemd/network/80.network.d/a.conf", f"[Match]\nName=a\nMACAddress = {MAC}", MAC_FIX),
    ("usr/lib/systemd/network/a.link", f"#\n [Match] \n  MACAddress={MAC}\n", MAC_FIX),
    ("lib/systemd/network/a.link", f"[Link]\nMACAddress={MAC}\n", MAC_FIX),
    (NM_PROFILE, f"[ethernet]\nmac-address={MAC}\n", MAC_FIX),
    (NM_CONF, f"[connection]\nethernet.cloned-mac-address={MAC}", MAC_FIX),
    (IFCFG, f'HWADDR="{MAC}"\n', MAC_FIX),
    ("etc/sysconfig/network/ifcfg-eth0", f"LLADDR='{MAC}'\n", MAC_FIX),
    (INTERFACES, f"iface eth0 inet dhcp\n\thwaddress ether {MAC}\n", MAC_FIX),
    ("etc/network/interfaces.d/50-cloud-init", f"auto /mac/{MAC}=eth0\n", MAC_FIX),
    (RULES, f'SUBSYSTEM=="net", ATTR{{address}}=="{MAC}", NAME="eth0"\n', MAC_FIX),
    ("usr/bin/cloud-init", "", AGENT_FIX + "touch /etc/cloud/cloud-init.disabled"),
    ("usr/sbin/waagent", "", AGENT_FIX + "mask its unit"),
    ("usr/local/bin/azure-init", "", AGENT_FIX + "mask its unit"),
    ("usr/bin/afterburn", "", AGENT_FIX + "mask its checkin units"),
    ("etc/ssh/ssh_host_ed25519_key", "", SHARED + "rm -f /etc/ssh/ssh_host_"),
    ("usr/sbin/sshd", "", KEYGEN_FIX),
    ("etc/machine-id", "0" * 32 + "\n", SHARED + "truncate -s 0 /etc/machine-id"),
    ("var/lib/dbus/machine-id", "0" * 32, SHARED + "replace it with a link to /etc/machine-id"),
)

# What an image may have, all at once.
SOUND: Files = {
    NETPLAN: f"# macaddress: {MAC}\nmacaddress: random\ndhcp4: true # not macaddress: {MAC}\n",
    NETWORK: f"[Match]\n#MACAddress={MAC}\n;MACAddress={MAC}\n"
    f"[DHCPServerStaticLease]\nMACAddress={MAC}\n",
    "usr/lib/systemd/network/99-default.link": "[Link]\nMACAddressPolicy=persistent\n",
    "usr/lib/systemd/network/a.network.example": f"[Match]\nMACAddress={MAC}\n",
    NM_PROFILE: f"[ethernet]\n#mac-address={MAC}\nmac-address-denylist={MAC}\n"
    "cloned-mac-address=stable\n",
    NM_CONF: f"[keyfile]\nunmanaged-devices=mac:{MAC}\n#ethernet.mac-address={MAC}\n",
    IFCFG: f"#HWADDR={MAC}\nDEVICE=eth0\n",
    INTERFACES: f"#hwaddress {MAC}\nup arp -s 10.0.0.1 {MAC}\n",
    RULES: f'#ATTR{{address}}=="{MAC}"\nATTR{{address}}=="00:0d:3a:*", NAME="a"\n',
    "var/lib/dbus/machine-id": "-> /etc/machine-id",
    "usr/bin/cloud-init": "",
    "etc/cloud/cloud-init.disabled": "by the installer",
    "usr/sbin/waagent": "",
    SYSTEM + "walinuxagent.service": "-> /dev/null",
    "usr/bin/azure-init": "",
    SYSTEM + "azure-init.service": "-> /dev/null",
    "usr/bin/afterburn": "",
    SYSTEM + "afterburn-checkin.service": "-> /dev/null",
}

# Each set of files is a DHCP client that works; without any one of them, none does.
CLIENTS: Tuple[Files, ...] = (
    {**enabled("systemd-networkd.service"), NETWORK: "[Match]\nName=e*\n[Network]\nDHCP=ipv4\n"},
    {
        "usr/lib/systemd/system-preset/90.preset": "enable systemd-networkd.service\n",
        "usr/lib/systemd/network/a.network": "[Network]\nDHCP = true\n",
        **UNINITIALIZED,
    },
    {
        "lib/systemd/system-generators/netplan": "-> /usr/libexec/netplan/generate",
        NETPLAN: "network: {ethernets: {eth0: {dhcp4: true}}}\n",
    },
    enabled("NetworkManager.service"),
    {**enabled("networking.service"), INTERFACES: "auto eth0\niface eth0 inet dhcp\n"},
    {"usr/lib/systemd/system/multi-user.target.wants/dhclient@eth0.service": "-> ../a"},
    {**enabled("wicked.service"), IFCFG: 'BOOTPROTO="dhcp"\n'},
    {"etc/rc3.d/S10network": "-> ../init.d/network", IFCFG: 'BOOTPROTO="dhcp"\n'},
)

SSHD: Files = {"usr/sbin/sshd": ""}
DROP_IN = {SYSTEM + "ssh.service.d/keys.conf": "[Service]\nExecStartPre=/bin/ssh-keygen -A\n"}
FIRST_BOOT = "[Unit]\nConditionFirstBoot=yes\n[Service]\nExecStart=ssh-keygen -A\n"  # Debian 13
MENTION = "# ssh-keygen\nWants=sshd-keygen.service\n"  # as in cloud-init.service
NM_SERVER = {
    **NO_DHCPCD,
    **enabled("NetworkManager.service"),
    "usr/lib/NetworkManager/conf.d/00-server.conf": "[main]\nno-auto-default=*\n",
}
NM_LIB, NM_MAC = "usr/lib/NetworkManager/conf.d/a.conf", f"[ethernet]\nmac-address={MAC}\n"

# Sets of files, and what is said about them, if anything.
SETS: Tuple[Tuple[Files, str], ...] = (
    (SOUND, ""),
    (NO_DHCPCD, NO_CLIENT),
    (NM_SERVER, NO_CLIENT),
    ({**NM_SERVER, NM_PROFILE: "[ipv4]\nmethod=auto\n"}, ""),
    ({**SSHD, KEYGEN: "[Service]\nExecStart=/usr/libexec/openssh/sshd-keygen %i\n"}, ""),
    ({**SSHD, KEYGEN: MENTION}, f"/usr/sbin/sshd {KEYGEN_FIX}"),
    ({**SSHD, KEYGEN: FIRST_BOOT}, f"/{KEYGEN} {NOT_FIRST_BOOT}"),
    ({**SSHD, KEYGEN: FIRST_BOOT, **UNINITIALIZED}, ""),
    ({**SSHD, KEYGEN: FIRST_BOOT, **DROP_IN}, ""),
    # merged /usr is looked at once, and links are followed inside the image
    ({"lib": "-> usr/lib", NM_LIB: NM_MAC}, f"/{NM_LIB} {MAC_FIX}"),
    ({NM_CONF: "-> /usr/share/nm.conf", "usr/share/nm.conf": NM_MAC}, f"/{NM_CONF} {MAC_FIX}"),
)

LIB = "/usr/lib/systemd/system"
MASKED = f"/{UNIT_PATH} masks the unit: delete it"
HIDDEN = "which the unit's sandbox hides"
NO_PROGRAM = "the image has no program /usr/bin/{}: install python3"
CANNOT_RUN = "cannot run the script, which needs Python 3.6 or newer and all of its library: "
HIDE = "import sys; sys.modules['http.client'] = None; exec(sys.stdin.read())"
HIDING_PYTHON = f"#!/bin/sh\nexec '{sys.executable}' -c \"{HIDE}\" --version"

# Files and variables that the installer refuses, and what it says.
REFUSED: Tuple[Tuple[Files, Files, str], ...] = (
    ({}, {"UNITDIR": "/"}, "UNITDIR must not be /"),
    ({}, {"DESTDIR": "/no such"}, "DESTDIR is not a directory: /no such"),
    ({}, {"DESTDIR": str(SCRIPT)}, "DESTDIR is not a directory"),
    ({}, {"DESTDIR": f"{ROOT}\n"}, "DESTDIR has a control character: [^\n]*\n"),
    ({SCRIPT_PATH + "/file": ""}, {}, "azure_provision.py is a directory"),
    ({"usr/local": ""}, {}, "/usr/local is not a directory"),
    ({UNIT_PATH: ""}, {"UNITDIR": f"/{SYSTEM}"}, MASKED),
    ({UNIT_PATH: "-> /dev/null"}, {"UNITDIR": LIB}, MASKED),
    ({UNIT_PATH: "[Unit]"}, {"UNITDIR": LIB}, f"takes precedence over a unit in {LIB}: delete it"),
    *(({}, {"PREFIX": path}, HIDDEN) for path in ("/root", "/run/user/0", "/tmp", "/var/tmp/a")),
    ({"opt/a": "-> ../home/me", "home/me/py": "#!/bin/sh"}, {"PYTHON": "/opt/a/py"}, HIDDEN),
    ({"home": "-> opt/home", "opt/home/a": ""}, {"PREFIX": "/opt/home"}, HIDDEN),
    ({}, {"PYTHON": "/usr/bin/missing"}, NO_PROGRAM.format("missing")),
    ({}, {"PYTHON": "/usr/bin/"}, NO_PROGRAM.format("")),
    ({PYTHON: ""}, {}, NO_PROGRAM.format("python3")),
    ({PYTHON: "-> python3"}, {}, NO_PROGRAM.format("python3")),
    ({PYTHON: "#!/bin/sh\necho file; echo SyntaxError: x >&2; exit 1"}, {}, CANNOT_RUN + "Syntax"),
    ({PYTHON: "#!/bin/sh\necho GNU bash"}, {}, CANNOT_RUN + "GNU bash"),
    ({PYTHON: '#!/bin/sh\necho "$@"; exit 1'}, {}, CANNOT_RUN + "-I -S -B - --version"),
    ({PYTHON: HIDING_PYTHON}, {}, CANNOT_RUN + ".*http.client"),
)


def run(*command: str, **options: Any) -> Tuple[int, str, str]:
    """Run a command; return its status, output and error output."""
    process = subprocess.run(
        command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, encoding="utf-8", timeout=30, **options
    )
    return process.returncode, process.stdout, process.stderr


class InstallerTest(unittest.TestCase):
    """Each test has a tree, `self.tree`, of a sound image."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="azure install ")).resolve()
        self.addCleanup(shutil.rmtree, str(self.directory))
        self.tree = self.directory / "an image"
        self.installer = str(INSTALLER)
        self.new_tree()
        # A chroot that needs no root: it runs what is in the tree.
        self.tool("chroot", 'root=$1; shift; program=$1; shift; "$root$program" "$@"')

    def new_tree(self, *sets: Files) -> None:
        """Begin again with the good image and SETS of files."""
        shutil.rmtree(str(self.tree), ignore_errors=True)
        for files in (GOOD, *sets):
            for name, content in files.items():
                self.write(name, content)

    def write(self, name: str, content: str) -> Path:
        """Put a file into the tree: a link, if CONTENT is "-> target", or a program."""
        path = self.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.is_file():
            path.unlink()
        if content.startswith("-> "):
            path.symlink_to(content[3:])
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
        environment["PATH"] = f"{self.directory}/tools:{os.environ['PATH']}:/usr/sbin:/sbin"
        shell = ("/bin/sh", "-c", f'{before}\nexec "$0" "$@"', self.installer)
        return run(*shell, *arguments, env=environment)

    def succeed(self, *arguments: str, **options: Any) -> str:
        """Run the installer, which has nothing to complain about; return its output."""
        status, output, errors = self.install(*arguments, **options)
        self.assertEqual((status, errors), (0, ""))
        return output

    def refused(self, reason: str, *arguments: str, **options: Any) -> None:
        """The installer stops with one line that says REASON, and nothing has changed."""
        before = self.files()
        status, output, errors = self.install(*arguments, **options)
        self.assertEqual((status, output), (2 if "not an option" in reason else 1, ""), errors)
        self.assertRegex(errors, rf"\Ainstall\.sh: .*{reason}.*\n\Z")
        self.assertEqual(self.files(), before)

    def assert_sound(self, *options: str) -> None:
        before = self.files()
        self.assertRegex(self.succeed(*(options or ["--check"])), r"\ANo problem.*\n\Z")
        self.assertEqual(self.files(), before)

    def assert_unsound(self, warning: str) -> None:
        self.refused(f"warning: {re.escape(warning)}", "--check")

    def files(self) -> Dict[str, Tuple[int, str]]:
        """Every file and link in and around the tree: its mode, and its content or target."""
        found = {}
        # not rglob, which fails at a link to itself before Python 3.7
        for directory, directories, names in os.walk(str(self.directory)):
            for path in (Path(directory, name) for name in directories + names):
                name = os.path.relpath(str(path), str(self.tree))
                if path.is_symlink():
                    found[name] = (0, os.readlink(str(path)))
                elif path.is_file():
                    found[name] = (path.stat().st_mode & 0o777, path.read_text(encoding="utf-8"))
        return found


class CheckTest(InstallerTest):
    def test_each_problem_has_one_warning_with_file_and_fix(self) -> None:
        files_alone = [({name: text}, f"/{name} {warning}") for name, text, warning in UNSOUND]
        for files, warning in (*files_alone, *SETS):
            with self.subTest(files):
                self.new_tree(files)
                if warning:
                    self.assert_unsound(warning)
                else:
                    self.assert_sound()

    def test_each_dhcp_client_needs_all_of_its_files(self) -> None:
        for client in CLIENTS:
            with self.subTest(client):
                self.new_tree(NO_DHCPCD, client)
                self.assert_sound()
            for missing in client:
                with self.subTest(client, missing=missing):
                    rest = {name: client[name] for name in client if name != missing}
                    self.new_tree(NO_DHCPCD, rest)
                    self.assert_unsound(NO_CLIENT)

    def test_only_regular_files_of_the_image_are_read(self) -> None:
        self.new_tree(SSHD)
        for name in (KEYGEN, NETPLAN):
            self.write(name, "").unlink()
            os.mkfifo(str(self.tree / name))
        self.write("../outside.yaml", f"macaddress: {MAC}\n")
        self.write("etc/netplan/b.yaml", f"-> {self.directory}/outside.yaml")
        self.assert_unsound(f"/usr/sbin/sshd {KEYGEN_FIX}")

    def test_check_is_quiet_where_a_broken_pipe_does_not_kill(self) -> None:
        self.new_tree(NO_DHCPCD, enabled("systemd-networkd.service"))
        for number in range(5):
            content = "[Network]\nDHCP=yes\n" + "#\n" * 9999
            self.write(f"etc/systemd/network/{number}.network", content)
        self.succeed("--check", before="trap '' PIPE")  # as in a systemd service

    def test_check_finds_an_installation_that_is_not_whole(self) -> None:
        for path, problem in (
            (UNIT_PATH, f"/{UNIT_PATH} is missing"),
            (SCRIPT_PATH, f"/{SCRIPT_PATH} is missing"),
            (LINK, f"/{UNIT_PATH} is disabled, as on a provisioned VM"),
        ):
            self.succeed()
            self.assert_sound()
            (self.tree / path).unlink()
            self.assert_unsound(f"{problem}: run install.sh again")

    def test_check_with_another_option_changes_nothing(self) -> None:
        self.succeed()
        self.assert_sound("--check", "--uninstall")
        self.assert_sound("--uninstall", "--check")

    def test_installation_warns_and_goes_on(self) -> None:
        error = "Exec format error"
        wrong_cpu = f"cat >/dev/null; echo '{error}' >&2; exit "
        for netplan, chroot, warning in (
            (f"macaddress: {MAC}", "cat >/dev/null; echo azure_provision.py 1", MAC_FIX),
            ("", wrong_cpu + "125", f"so it was not checked: {error}"),
            ("", wrong_cpu + "126", f"so it was not checked: {error}"),
        ):
            self.new_tree({NETPLAN: netplan})
            self.tool("chroot", chroot)
            status, _, errors = self.install()
            self.assertRegex(errors, rf"\Ainstall\.sh: warning: .*{warning}.*\n\Z")
            self.assertEqual(status, 0)
            self.assertIn(LINK, self.files())


class InstallTest(InstallerTest):
    def test_installs_script_unit_preset_and_link_any_number_of_times(self) -> None:
        self.tool("systemctl", "echo a tree needs no systemctl >&2")
        installed = {
            **self.files(),
            SCRIPT_PATH: (0o755, SCRIPT.read_text(encoding="utf-8")),
            UNIT_PATH: (0o644, UNIT_FILE.read_text(encoding="utf-8")),
            PRESET: (0o644, f"enable {UNIT}\n"),
            LINK: (0, f"/{UNIT_PATH}"),
        }
        for again in range(3):
            if again == 2:
                (self.tree / LINK).unlink()  # as on a provisioned VM
            output = self.succeed()
            self.assertEqual(self.files(), installed)
            self.assertIn(f"/{SCRIPT_PATH}\nand /{UNIT_PATH}, enabled for the next boot", output)

    @unittest.skipUnless(shutil.which("systemctl"), "systemctl is not installed")
    def test_unit_stays_enabled_when_presets_are_applied(self) -> None:
        def systemctl(*arguments: str) -> str:
            return run("systemctl", f"--root={self.tree}", *arguments)[1].strip()

        default = {"usr/lib/systemd/system-preset/99-default-disable.preset": "disable *\n"}
        for unitdir in ("/etc/systemd/system", LIB):
            for options, state in (((), "enabled"), (("--no-enable",), "disabled")):
                with self.subTest(unitdir, options=options):
                    self.new_tree(default)
                    self.succeed(*options, UNITDIR=unitdir)
                    self.assertEqual(systemctl("is-enabled", UNIT), state)
                    systemctl("preset-all")
                    self.assertEqual(systemctl("is-enabled", UNIT), state)

    def test_no_enable_makes_neither_link_nor_preset_and_takes_any_unitdir(self) -> None:
        self.refused("--no-enable is needed: /opt/units", UNITDIR="/opt/units")
        before = set(self.files())
        self.assertIn("not enabled", self.succeed("--no-enable", UNITDIR="/opt/units"))
        self.assertEqual(set(self.files()) - before, {SCRIPT_PATH, f"opt/units/{UNIT}"})

    def test_uninstall_removes_everything_or_says_that_nothing_is_there(self) -> None:
        settings = {"PREFIX": "/opt/azure", "UNITDIR": LIB}
        before = self.files()
        self.succeed(**settings)
        self.assertEqual(len(self.files()), len(before) + 4)
        self.assertRegex(self.succeed("--uninstall", **settings), r"\ARemoved .*\n\Z")
        self.assertEqual(self.files(), before)
        output = self.succeed("--uninstall", **settings)
        self.assertEqual(output, f"Nothing to remove from {self.tree}.\n")
        self.write(LINK, f"-> /{UNIT_PATH}")
        self.assertIn("Removed", self.succeed("--uninstall"))
        self.assertEqual(self.files(), before)

    def test_unit_with_other_paths_differs_in_one_line(self) -> None:
        self.write("opt/my python/bin/python3.6", GOOD_PYTHON)
        self.succeed(PREFIX="/opt/a b/", PYTHON="/opt/my python/bin/python3.6")
        unit = UNIT_FILE.read_text(encoding="utf-8").replace(
            f"=/{PYTHON} -I -S /{SCRIPT_PATH}\n",
            '="/opt/my python/bin/python3.6" -I -S "/opt/a b/sbin/azure_provision.py"\n',
        )
        self.assertEqual(self.files()[UNIT_PATH][1], unit)
        self.assertIn("opt/a b/sbin/azure_provision.py", self.files())

    def test_works_from_any_directory_by_a_relative_destdir_and_through_a_link(self) -> None:
        clone = self.directory / "a clone"
        clone.mkdir()
        for file in (INSTALLER, SCRIPT, UNIT_FILE):
            shutil.copy(str(file), str(clone))
        (self.directory / "link").symlink_to("a clone/install.sh")
        options = {"before": f"cd '{self.directory}'", "CDPATH": self.directory}
        for self.installer in ("a clone/install.sh", "./link"):
            self.new_tree()
            self.succeed(DESTDIR=self.tree.name, **options)
            self.assertIn(SCRIPT_PATH, self.files())
        (clone / SCRIPT.name).unlink()
        self.refused("azure_provision.py or .* is missing in /", **options)

    def test_modes_do_not_depend_on_the_umask_and_existing_ones_stay(self) -> None:
        existing = self.tree / "usr/local/sbin"
        existing.mkdir(parents=True)
        existing.chmod(0o750)
        for prefix in ("/usr/local", "/opt/a"):
            self.succeed(PREFIX=prefix, before="umask 077")
        for name in ("opt", "opt/a", "opt/a/sbin", "etc/systemd/system-preset"):
            self.assertEqual((self.tree / name).stat().st_mode & 0o777, 0o755, name)
        self.assertEqual(self.files()[UNIT_PATH][0], 0o644)
        self.assertEqual(existing.stat().st_mode & 0o777, 0o750)

    def test_failed_installation_or_update_leaves_what_was_there(self) -> None:
        cp, mv, ln = shutil.which("cp"), shutil.which("mv"), shutil.which("ln")
        for tool, action, before in (
            ("cp", f'{cp} "$@" 2>/dev/null', "ulimit -f 4; trap '' XFSZ"),  # as on a full disk
            ("sed", "exit 1", ""),
            ("ln", "exit 1", ""),
            ("ln", f'kill $PPID; exec {ln} "$@"', ""),  # and again while it rolls back
            ("mv", f'case $* in *.wants/*) exit 1 ;; esac; exec {mv} "$@"', ""),
        ):
            broken = self.tool(tool, action)
            for earlier in ({}, {LINK: "-> /an/old/unit"}, {UNIT_PATH: "old", SCRIPT_PATH: "old"}):
                with self.subTest(tool, earlier=earlier):
                    self.new_tree(earlier)
                    self.refused("failed: everything is as it was", before=before)
            broken.unlink()

    def test_leftover_of_a_killed_installation_is_not_followed(self) -> None:
        precious = self.write("../precious", "precious")
        for suffix in ("new", "old"):
            self.write(f"{SCRIPT_PATH}.{suffix}", f"-> {precious}")
        self.succeed()
        self.assertEqual(precious.read_text(encoding="utf-8"), "precious")
        self.assertEqual([name for name in self.files() if name.endswith(("new", "old"))], [])

    def test_follows_a_link_to_a_directory_and_replaces_one_to_a_file(self) -> None:
        self.write("usr/local", "-> ../var/usrlocal")
        self.write("etc/precious", "precious")
        target = self.write("var/usrlocal/sbin/azure_provision.py", "-> ../../../etc/precious")
        self.succeed()
        self.assertFalse(target.is_symlink())
        self.assertEqual(self.files()["etc/precious"][1], "precious")

    def test_help_names_every_option_and_variable(self) -> None:
        output = self.succeed("--help")
        for word in (*OPTIONS, "--help", "DESTDIR", "PREFIX", "UNITDIR", "PYTHON"):
            self.assertIn(word, output)


class RefusalTest(InstallerTest):
    def test_refuses_to_install_live_without_root(self) -> None:
        self.tool("id", "echo 1000")
        # if it did not refuse, it would write to this machine
        for tool in ("cp", "ln", "mkdir", "mv", "rm", "systemctl"):
            self.tool(tool, "exit 1")
        (self.directory / "root").symlink_to("/")
        for destdir in (None, "/", self.directory / "root"):
            self.refused("not root", DESTDIR=destdir)
        for option in ("--uninstall", "--check"):
            self.refused("not root", option, DESTDIR=None)

    def test_refuses_unknown_arguments(self) -> None:
        for argument in ("--bogus", "--enable=no", ""):
            self.refused("not an option", argument)

    def test_refuses_paths_that_a_unit_cannot_take(self) -> None:
        for name in ("PREFIX", "UNITDIR", "PYTHON"):
            self.refused(f"{name} is not an absolute path: usr", **{name: "usr"})
            for path in ("/../x", "/usr/.."):
                self.refused(f"{name} must not contain '..'", **{name: path})
            for character in "\"'\\%$&|\n":
                reason = f"{name} has a character that cannot be used in a unit: [^|]*"
                self.refused(reason, **{name: f"/a{character}b"})

    def test_refuses_files_and_variables(self) -> None:
        for files, variables, reason in REFUSED:
            with self.subTest(files, **variables):
                self.new_tree(files)
                for options in ((), ("--no-enable",), ("--check",)):
                    self.refused(reason, *options, **variables)

    def test_refuses_links_that_lead_out_of_destdir(self) -> None:
        outside = self.directory / "outside"
        for name in (SCRIPT.name, UNIT, f"sbin/{SCRIPT.name}"):
            self.write(f"{outside}/{name}", "precious")
        for link in ("etc", "usr/local", "usr/local/sbin", SYSTEM[:-1], str(Path(PRESET).parent)):
            for target in (str(outside), "/no/such", "../" * 9 + str(outside)[1:]):
                with self.subTest(link, target=target):
                    self.new_tree()
                    shutil.rmtree(str(self.tree / link), ignore_errors=True)
                    self.write(link, f"-> {target}")
                    for options in ((), *zip(OPTIONS)):
                        self.refused("leads out of DESTDIR through a symlink: make", *options)

    def test_interpreter_link_is_followed_inside_the_image(self) -> None:
        self.write("usr/bin/python3.9", GOOD_PYTHON)
        self.write(PYTHON, "-> /etc/alternatives/python3")
        self.write("etc/alternatives/python3", "-> ../../../usr/bin/python3.9")
        self.tool("chroot", "cat >/dev/null; echo azure_provision.py 1.2.3")
        self.assert_sound()

    def test_script_imports_all_of_its_modules_at_once(self) -> None:
        text = SCRIPT.read_text(encoding="utf-8")
        modules = set(re.findall(r"(?m)^ *(?:import|from) ([a-z.]+)", text)) - {"sys"}
        self.assertGreater(len(modules), 5)
        code = compile(text, str(SCRIPT), "exec")
        for module in modules:
            with self.subTest(module), mock.patch.dict(sys.modules, {module: None}):
                self.assertRaises(ImportError, exec, code, {"__name__": "azure_provision"})

    def test_real_interpreter_runs_no_code_of_the_directory_and_writes_none(self) -> None:
        self.write(PYTHON, f"#!/bin/sh\nexec '{sys.executable}' \"$@\"")
        for name in ("re", "socket", "argparse", "sitecustomize"):
            self.write(f"../trap/{name}.py", "raise SystemExit('ran')\n")
        trap = self.directory / "trap"
        self.succeed(before=f"cd '{trap}'", PYTHONPATH=trap)
        self.assertEqual(len(list(trap.iterdir())), 4)


class UnitTest(InstallerTest):
    lines = tuple(line for line in UNIT_FILE.read_text().splitlines() if re.match("[A-Z]", line))

    def test_unit_is_what_was_promised(self) -> None:
        promised = (
            "Type=oneshot RemainAfterExit=yes After=network.target StandardOutput=journal+console "
            "TimeoutStartSec=30min WantedBy=multi-user.target"
        )
        self.assertLessEqual(set(promised.split()), set(self.lines))
        commands = [line for line in self.lines if line.startswith("Exec")]
        self.assertEqual(commands, [f"ExecStart=/{PYTHON} -I -S /{SCRIPT_PATH}"])

    def test_unit_has_none_of_the_settings_that_break_an_old_systemd(self) -> None:
        filters = [line for line in self.lines if line.startswith("SystemCallFilter=")]
        self.assertTrue(filters[0].startswith("SystemCallFilter=~"), "the first one decides")
        self.assertIn("SystemCallErrorNumber=EPERM", self.lines, "a denied call would kill")
        for line in self.lines:
            name, _, value = line.partition("=")
            self.assertNotEqual(name, "Restart", "before 244 a oneshot unit with it is refused")
            self.assertNotEqual(name, "Wants", "network-online.target may wait for two minutes")
            if "@" in value:
                self.assertRegex(line, "^SystemCallFilter=~", "231 to 238 drop unknown groups")

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_has_nothing_to_say_of_the_unit_with_default_or_other_paths(self) -> None:
        self.write("opt/my python", GOOD_PYTHON)
        self.succeed("--no-enable", PYTHON="/opt/my python", PREFIX="/opt/a b")
        # systemd-analyze looks for the program here, where the unit must not have it
        python = self.write("../my python", GOOD_PYTHON)
        unit = self.files()[UNIT_PATH][1].replace("/opt/my python", str(python))
        for file in (UNIT_FILE, self.write(UNIT_PATH, unit)):
            status, output, errors = run("systemd-analyze", "verify", str(file))
            self.assertEqual(status, 0, errors)
            self.assertNotIn("azure-provisioning", output + errors)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_exposure_is_2_1_at_most(self) -> None:
        options = ("security", "--offline=yes", "--threshold=21")
        status, output, errors = run("systemd-analyze", *options, str(UNIT_FILE))
        if "unrecognized option" in errors:
            self.skipTest("systemd-analyze cannot judge a file before systemd 250")
        self.assertEqual(status, 0, output[-200:])
