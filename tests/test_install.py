"""The real installer, into a temporary tree; and the unit, as systemd reads it."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from tests.harness import INSTALLER, ROOT, SCRIPT, UNIT_FILE

LINK = "etc/systemd/system/multi-user.target.wants/azure-provisioning.service"
PRESET = "etc/systemd/system-preset/20-azure-provisioning.preset"
SCRIPT_PATH = "usr/local/sbin/azure_provision.py"
UNIT_PATH = "etc/systemd/system/azure-provisioning.service"
WANTS = "etc/systemd/system/multi-user.target.wants/"

MAC = "00:22:48:AA:bb:cc"
MAC_FIX = "is bound to a MAC address that no VM of the image has: match by name or driver, or"
KEYGEN_FIX = "has no host keys in a VM, as nothing creates them: add a unit that runs ssh-keygen -A"

# A file (or a link, "-> target") that makes an image unsound, and what is said about it.
UNSOUND = (
    ("etc/netplan/50-cloud-init.yaml", f"  match:\n    macaddress: {MAC}\n", MAC_FIX),
    ("etc/netplan/flow.yaml", f"{{match: {{'macaddress': \"{MAC}\"}}}}\n", MAC_FIX),
    ("usr/lib/netplan/a.yaml", f"macaddress: '{MAC}'\n", MAC_FIX),
    ("lib/netplan/a.yaml", f"  macaddress: {MAC}\n", MAC_FIX),
    ("etc/systemd/network/a.network", f"[Match]\nName=a\nMACAddress = {MAC}\n", MAC_FIX),
    ("etc/systemd/network/a.network", "[Match]\nPermanentMACAddress=0022.48aa.bbcc", MAC_FIX),
    ("etc/systemd/network/80-dhcp.network.d/a.conf", f"[Match]\nMACAddress={MAC}", MAC_FIX),
    ("usr/lib/systemd/network/a.link", f"#\n [Match] \n  MACAddress={MAC}\n", MAC_FIX),
    ("lib/systemd/network/a.link", f"[Link]\nMACAddress={MAC}\n", MAC_FIX),
    (
        "etc/NetworkManager/system-connections/Wired connection 1.nmconnection",
        f"[ethernet]\nmac-address={MAC}\n",
        MAC_FIX,
    ),
    (
        "etc/NetworkManager/conf.d/a.conf",
        f"[connection]\nethernet.cloned-mac-address={MAC}",
        MAC_FIX,
    ),
    ("etc/sysconfig/network-scripts/ifcfg-eth0", f'HWADDR="{MAC}"\n', MAC_FIX),
    ("etc/sysconfig/network/ifcfg-eth0", f"LLADDR='{MAC}'\n", MAC_FIX),
    ("etc/network/interfaces", f"iface eth0 inet dhcp\n\thwaddress ether {MAC}\n", MAC_FIX),
    ("etc/network/interfaces.d/50-cloud-init", f"auto /mac/{MAC}=eth0\n", MAC_FIX),
    (
        "etc/udev/rules.d/70-persistent-net.rules",
        f'SUBSYSTEM=="net", ATTR{{address}}=="{MAC}", NAME="eth0"\n',
        MAC_FIX,
    ),
    (
        "usr/bin/cloud-init",
        "",
        "also reports to Azure: remove its package, or touch /etc/cloud/cloud-init.disabled",
    ),
    ("usr/sbin/waagent", "", "also reports to Azure: remove its package, or mask its unit"),
    ("usr/local/bin/azure-init", "", "also reports to Azure: remove its package"),
    ("usr/bin/afterburn", "", "also reports to Azure: remove its package"),
    ("etc/ssh/ssh_host_ed25519_key", "", "would be shared by all VMs: rm -f /etc/ssh/ssh_host_"),
    ("usr/sbin/sshd", "", KEYGEN_FIX),
    ("etc/machine-id", "0" * 32 + "\n", "would be shared by all VMs: truncate -s 0"),
    ("var/lib/dbus/machine-id", "0" * 32, "would be shared by all VMs: replace it with a link"),
)

# Files that an image may have.
SOUND = (
    ("etc/netplan/a.yaml", f"# macaddress: {MAC}\nmatch: {{driver: hv_netvsc}}\n"),
    ("etc/netplan/a.yaml", f"dhcp4: true # not macaddress: {MAC}\n"),
    ("etc/netplan/a.yaml", "macaddress: random\n"),
    ("etc/systemd/network/a.network", f"[Match]\nName=e*\n#MACAddress={MAC}\n;MACAddress={MAC}\n"),
    ("etc/systemd/network/a.network", f"[DHCPServerStaticLease]\nMACAddress={MAC}\n"),
    ("etc/systemd/network/a.network", "-> /dev/null"),
    ("usr/lib/systemd/network/99-default.link", "[Link]\nMACAddressPolicy=persistent\n"),
    ("usr/lib/systemd/network/a.network.example", f"[Match]\nMACAddress={MAC}\n"),
    (
        "etc/NetworkManager/system-connections/a.nmconnection",
        f"[ethernet]\n#mac-address={MAC}\ncloned-mac-address=stable\nmac-address-denylist={MAC}\n",
    ),
    ("etc/NetworkManager/conf.d/a.conf", f"[keyfile]\nunmanaged-devices=mac:{MAC}\n"),
    ("etc/NetworkManager/conf.d/a.conf", f"[connection]\n#ethernet.mac-address={MAC}\n"),
    ("etc/sysconfig/network-scripts/ifcfg-eth0", f"#HWADDR={MAC}\nDEVICE=eth0\n"),
    ("etc/network/interfaces", f"#hwaddress {MAC}\nup arp -s 10.0.0.1 {MAC}\n"),
    ("etc/udev/rules.d/a.rules", 'SUBSYSTEM=="net", ATTR{address}=="00:0d:3a:*", NAME="a"\n'),
    ("etc/udev/rules.d/a.rules", f'#ATTR{{address}}=="{MAC}"\n'),
    ("etc/ssh/sshd_config", ""),
    ("etc/machine-id", ""),
    ("etc/machine-id", "uninitialized\n"),
    ("var/lib/dbus/machine-id", "-> /etc/machine-id"),
)

# What turns an agent off, and what creates the SSH host keys: program, file, its content.
SETTLED = (
    ("usr/bin/cloud-init", "etc/cloud/cloud-init.disabled", "by the installer"),
    ("usr/sbin/waagent", "etc/systemd/system/walinuxagent.service", "-> /dev/null"),
    ("usr/bin/azure-init", "etc/systemd/system/azure-init.service", "-> /dev/null"),
    ("usr/bin/afterburn", "etc/systemd/system/afterburn-checkin.service", "-> /dev/null"),
    (
        "usr/sbin/sshd",
        "usr/lib/systemd/system/sshd-keygen@.service",
        "[Service]\nExecStart=/usr/libexec/openssh/sshd-keygen %i\n",
    ),
    (
        "usr/sbin/sshd",
        "etc/systemd/system/ssh.service.d/host-keys.conf",
        "[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\n",
    ),
)

# Each set of files is a DHCP client that works; without any one of them, none does.
INTERFACES = ("etc/network/interfaces", "auto eth0\niface eth0 inet dhcp\n")
IFCFG = ("etc/sysconfig/network-scripts/ifcfg-eth0", 'BOOTPROTO="dhcp"\n')
CLIENTS = (
    (
        (WANTS + "systemd-networkd.service", "-> /lib/systemd/system/systemd-networkd.service"),
        ("etc/systemd/network/a.network", "[Match]\nName=e*\n[Network]\nDHCP=ipv4\n"),
    ),
    (
        ("usr/lib/systemd/system-preset/90-systemd.preset", "enable systemd-networkd.service\n"),
        ("usr/lib/systemd/network/a.network", "[Network]\nDHCP = true\n"),
        ("etc/machine-id", "uninitialized\n"),
    ),
    (
        ("lib/systemd/system-generators/netplan", "-> /usr/libexec/netplan/generate"),
        ("etc/netplan/a.yaml", "network: {ethernets: {eth0: {dhcp4: true}}}\n"),
    ),
    ((WANTS + "NetworkManager.service", "-> /lib/systemd/system/NetworkManager.service"),),
    ((WANTS + "networking.service", "-> /lib/systemd/system/networking.service"), INTERFACES),
    (("etc/systemd/system/multi-user.target.wants/dhcpcd.service", "-> /dhcpcd.service"),),
    (("usr/lib/systemd/system/multi-user.target.wants/dhclient@eth0.service", "-> ../a"),),
    ((WANTS + "wicked.service", "-> /usr/lib/systemd/system/wicked.service"), IFCFG),
    (("etc/rc3.d/S10network", "-> ../init.d/network"), IFCFG),
)


class InstallTest(unittest.TestCase):
    """Each test has a tree, `self.tree`, of a sound image with a stand-in for its Python."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="azure install ")).resolve()
        self.addCleanup(shutil.rmtree, str(self.directory))
        self.tree = self.directory / "an image"
        self.new_tree()
        # Tools of this machine, and a chroot that needs no root: it runs what is in the tree.
        self.tools = self.directory / "tools"
        self.tools.mkdir()
        self.tool("chroot", 'root=$1; shift; program=$1; shift; "$root$program" "$@"')

    def new_tree(self, dhcp: bool = True) -> None:
        """Begin again with a sound image, or one that only lacks a DHCP client."""
        shutil.rmtree(str(self.tree), ignore_errors=True)
        self.python("cat >/dev/null; echo azure_provision.py 1.2.3")
        self.write("etc/machine-id", "")
        self.write(
            "usr/lib/systemd/network/80-container-host0.network",
            "[Match]\nVirtualization=container\n[Network]\nDHCP=yes\n",
        )
        if dhcp:
            self.write(WANTS + "dhcpcd.service", "-> /usr/lib/systemd/system/dhcpcd.service")

    def write(self, name: str, content: str = "") -> Path:
        """Put a file into the tree, or a link, if CONTENT is "-> target"."""
        path = self.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.is_file():
            path.unlink()
        if content.startswith("-> "):
            path.symlink_to(content[3:])
        else:
            path.write_text(content, encoding="utf-8")
        return path

    def python(self, action: str, path: str = "usr/bin/python3") -> None:
        """Put a Python into the tree that does ACTION, in shell."""
        self.write(path, f"#!/bin/sh\n{action}\n").chmod(0o755)

    def tool(self, name: str, action: str) -> None:
        tool = self.tools / name
        tool.write_text(f"#!/bin/sh\n{action}\n", encoding="utf-8")
        tool.chmod(0o755)

    def without_systemctl(self) -> str:
        """A PATH that has every tool that install.sh needs but systemctl."""
        tools = self.directory / "no systemctl"
        tools.mkdir()
        for name in (
            *("sh", "cp", "chmod", "mkdir", "dirname", "readlink", "id", "ln", "mv", "rm", "sed"),
            *("grep", "tail", "cat"),
        ):
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
            encoding="utf-8",
            cwd=str(environment.pop("cwd", "/")),
            preexec_fn=environment.pop("preexec_fn", None),
            env={name: str(value) for name, value in environment.items() if value is not None},
            timeout=30,
        )
        return process.returncode, process.stdout, process.stderr

    def files(self, root: Optional[Path] = None) -> Dict[str, Tuple[int, str]]:
        """Every file and link of the tree: its mode, and what is in it or where it leads."""
        root = root or self.tree
        found = {}
        for directory, directories, names in os.walk(str(root)):
            for path in (Path(directory, name) for name in directories + names):
                name = str(path.relative_to(root))
                if path.is_symlink():
                    found[name] = (0, os.readlink(str(path)))
                elif path.is_file():
                    found[name] = (path.stat().st_mode & 0o777, path.read_text(encoding="utf-8"))
        return found

    def refused(self, reason: str, *arguments: str, **environment: Any) -> None:
        """The installer stops with one line that says REASON, and nothing has changed."""
        before = self.files()
        status, output, errors = self.install(*arguments, **environment)
        self.assertEqual((status, output), (2 if "not an option" in reason else 1, ""), errors)
        self.assertRegex(errors, rf"\Ainstall\.sh: .*{reason}.*\n\Z")
        self.assertEqual(self.files(), before)

    def assert_sound(self) -> None:
        before = self.files()
        status, output, errors = self.install("--check")
        self.assertEqual((status, errors, self.files()), (0, "", before))
        self.assertRegex(output, r"\ANo problem.*\n\Z")

    def assert_unsound(self, warning: str) -> None:
        """--check and the installation say WARNING and nothing else; only the latter goes on."""
        self.refused(f"warning: {re.escape(warning)}", "--check")
        status, _, errors = self.install()
        self.assertEqual(status, 0, errors)
        self.assertRegex(errors, rf"\Ainstall\.sh: warning: {re.escape(warning)}.*\n\Z")

    def test_each_problem_has_one_warning_with_file_and_fix(self) -> None:
        for name, content, warning in UNSOUND:
            with self.subTest(name, content=content):
                self.new_tree()
                self.write(name, content)
                self.assert_unsound(f"/{name} {warning}")

    def test_sound_image_has_no_warning(self) -> None:
        for name, content in SOUND:
            with self.subTest(name, content=content):
                self.new_tree()
                self.write(name, content)
                self.assert_sound()

    def test_fix_silences_the_warning(self) -> None:
        for program, name, content in SETTLED:
            with self.subTest(program, file=name):
                self.new_tree()
                self.write(program)
                self.assertEqual(self.install("--check")[0], 1)
                self.write(name, content)
                self.assert_sound()

    def test_each_dhcp_client_needs_all_of_its_files(self) -> None:
        for client in CLIENTS:
            for missing in (None, *client):
                with self.subTest(client=client, missing=missing):
                    self.new_tree(dhcp=False)
                    for file in client:
                        if file != missing:
                            self.write(*file)
                    if missing is None:
                        self.assert_sound()
                    else:
                        self.assert_unsound("no DHCP client is enabled and configured: enable one")

    def test_masked_dhcp_client_is_not_enabled(self) -> None:
        self.write("etc/systemd/system/dhcpcd.service", "-> /dev/null")
        self.assert_unsound("no DHCP client")

    def test_networkmanager_without_a_default_profile_needs_one(self) -> None:
        self.new_tree(dhcp=False)
        self.write(*CLIENTS[3][0])
        self.write("usr/lib/NetworkManager/conf.d/00-server.conf", "[main]\nno-auto-default=*\n")
        self.assert_unsound("no DHCP client")
        self.write("etc/NetworkManager/system-connections/a", "[ipv4]\nmethod=auto\n")
        self.assert_sound()

    def test_host_keys_that_need_a_first_boot_need_an_uninitialized_machine_id(self) -> None:
        self.write("usr/sbin/sshd")
        unit = "usr/lib/systemd/system/sshd-keygen.service"  # Debian 13
        self.write(unit, "[Unit]\nConditionFirstBoot=yes\n[Service]\nExecStart=ssh-keygen -A\n")
        self.assert_unsound(f"/{unit} creates SSH host keys only if /etc/machine-id is missing or")
        self.write("etc/machine-id", "uninitialized\n")
        self.assert_sound()

    def test_unit_that_only_mentions_ssh_keygen_creates_no_keys(self) -> None:
        self.write("usr/sbin/sshd")
        unit = "[Unit]\n# ssh-keygen\nWants=sshd-keygen.service\n"  # as in cloud-init.service
        self.write("usr/lib/systemd/system/a.service", unit)
        self.assert_unsound(f"/usr/sbin/sshd {KEYGEN_FIX}")

    def test_check_is_quiet_where_a_broken_pipe_does_not_kill(self) -> None:
        self.new_tree(dhcp=False)
        self.write(WANTS + "systemd-networkd.service", "-> /usr/lib/systemd/system/x.service")
        for number in range(30):
            self.write(
                f"etc/systemd/network/{number}.network", "[Network]\nDHCP=yes\n" + "#\n" * 9999
            )
        # as for every service of systemd: IgnoreSIGPIPE=
        ignore = lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # noqa: E731
        status, _, errors = self.install("--check", preexec_fn=ignore)
        self.assertEqual((status, errors), (0, ""))

    def test_check_with_another_option_changes_nothing(self) -> None:
        self.install()
        before = self.files()
        for arguments in (("--check", "--uninstall"), ("--uninstall", "--check")):
            self.assertEqual(self.install(*arguments)[0], 0)
            self.assertEqual(self.files(), before)

    def test_merged_usr_is_looked_at_once(self) -> None:
        self.write("lib", "-> usr/lib")
        self.write("usr/lib/NetworkManager/conf.d/a.conf", f"[ethernet]\nmac-address={MAC}\n")
        self.assert_unsound("/usr/lib/NetworkManager/conf.d/a.conf is bound to a MAC address")

    def test_check_finds_a_unit_that_a_provisioned_vm_disabled(self) -> None:
        self.install()
        self.assert_sound()
        (self.tree / LINK).unlink()
        self.refused(f"warning: /{UNIT_PATH} is disabled.*: run install.sh again", "--check")

    def test_links_of_the_image_are_followed_inside_it(self) -> None:
        outside = self.directory / "outside"
        outside.mkdir()
        (outside / "a.yaml").write_text(f"macaddress: {MAC}\n", encoding="utf-8")
        self.write("etc/netplan/a.yaml", f"-> {outside}/a.yaml")
        self.assert_sound()
        self.write("etc/netplan/b.yaml", "-> /usr/share/b.yaml")
        self.write("usr/share/b.yaml", f"macaddress: {MAC}\n")
        self.assert_unsound("/etc/netplan/b.yaml is bound to a MAC address")

    def test_installs_script_unit_preset_and_link(self) -> None:
        before = self.files()
        status, output, errors = self.install()
        self.assertEqual((status, errors), (0, ""))
        files = self.files()
        self.assertRegex(
            files.pop(LINK)[1], r"(/etc/systemd/system|\.\.)/azure-provisioning.service$"
        )
        installed = {
            SCRIPT_PATH: (0o755, SCRIPT.read_text(encoding="utf-8")),
            UNIT_PATH: (0o644, UNIT_FILE.read_text(encoding="utf-8")),
            PRESET: (0o644, "enable azure-provisioning.service\n"),
        }
        self.assertEqual(files, dict(before, **installed))
        self.assertIn("azure_provision.py", output)

    def test_makes_the_link_itself_without_systemctl(self) -> None:
        status, _, errors = self.install(PATH=self.without_systemctl())
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual(self.files()[LINK][1], "/etc/systemd/system/azure-provisioning.service")

    def test_install_is_idempotent(self) -> None:
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

    @unittest.skipUnless(shutil.which("systemctl"), "systemctl is not installed")
    def test_unit_stays_enabled_when_presets_are_applied(self) -> None:
        self.write("usr/lib/systemd/system-preset/99-default-disable.preset", "disable *\n")
        for unitdir in ("/etc/systemd/system", "/usr/lib/systemd/system"):
            for option, state in ((), "enabled"), (("--no-enable",), "disabled"):
                with self.subTest(unitdir, option=option):
                    self.install(*option, UNITDIR=unitdir)
                    self.systemctl("preset-all")
                    output = self.systemctl("is-enabled", "azure-provisioning.service")
                    self.assertEqual(output, f"{state}\n")
                    self.install("--uninstall", UNITDIR=unitdir)

    def systemctl(self, *arguments: str) -> str:
        process = subprocess.run(
            ["systemctl", f"--root={self.tree}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        return process.stdout

    def test_no_enable_makes_neither_link_nor_preset(self) -> None:
        before = self.files()
        status, output, _ = self.install("--no-enable")
        self.assertEqual(status, 0)
        self.assertEqual(set(self.files()) - set(before), {SCRIPT_PATH, UNIT_PATH})
        self.assertIn("not enabled", output)

    def test_uninstall_removes_everything(self) -> None:
        before = self.files()
        for path in (None, self.without_systemctl()):
            with self.subTest(path):
                settings = {"PREFIX": "/opt/azure", "UNITDIR": "/usr/lib/systemd/system"}
                if path is not None:
                    settings["PATH"] = path
                self.install(**settings)
                self.assertEqual(len(self.files()), len(before) + 4)
                status, output, errors = self.install("--uninstall", **settings)
                self.assertEqual((status, errors, self.files()), (0, "", before))
                self.assertIn("Removed", output)

    def test_uninstall_of_nothing_succeeds(self) -> None:
        self.assertEqual(self.install("--uninstall")[0], 0)

    def test_default_unit_is_the_repository_s_and_others_differ_in_one_line(self) -> None:
        python = "opt/my python/bin/python3.6"
        (self.tree / python).parent.mkdir(parents=True)
        (self.tree / "usr/bin/python3").rename(self.tree / python)
        self.install(PREFIX="/opt/a b/", PYTHON=f"/{python}")
        unit = self.files()[UNIT_PATH][1]
        ours, theirs = UNIT_FILE.read_text(encoding="utf-8").splitlines(), unit.splitlines()
        self.assertEqual(len(ours), len(theirs))
        different = [(a, b) for a, b in zip(ours, theirs) if a != b]
        options = re.match(r"ExecStart=\S+ (.*) \S+$", different[0][0])
        assert options is not None
        self.assertEqual(
            [line for _, line in different],
            [f'ExecStart="/{python}" {options.group(1)} "/opt/a b/sbin/azure_provision.py"'],
        )
        self.assertIn("opt/a b/sbin/azure_provision.py", self.files())

    def test_works_from_any_directory_by_a_relative_destdir_and_through_a_link(self) -> None:
        copy = self.directory / "a clone"
        copy.mkdir()
        for file in (INSTALLER, SCRIPT, UNIT_FILE):
            shutil.copy(str(file), str(copy))
        (self.directory / "link").symlink_to("a clone/install.sh")
        for installer in ("../a clone/install.sh", "../link"):
            with self.subTest(installer):
                self.new_tree()
                status, _, errors = self.install(
                    installer=installer, cwd=self.tree, DESTDIR="../an image", CDPATH="/"
                )
                self.assertEqual((status, errors), (0, ""))
                self.assertIn(SCRIPT_PATH, self.files())
        (copy / SCRIPT.name).unlink()
        self.refused("azure_provision.py or .* is missing in /", installer=copy / "install.sh")

    def test_modes_do_not_depend_on_the_umask(self) -> None:
        before = os.umask(0o077)
        self.addCleanup(os.umask, before)
        self.install(PREFIX="/opt/a")
        for name in ("opt", "opt/a", "opt/a/sbin", "etc/systemd/system-preset"):
            self.assertEqual((self.tree / name).stat().st_mode & 0o777, 0o755, name)
        self.assertEqual(self.files()[UNIT_PATH][0], 0o644)

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
            record.read_text(encoding="utf-8"),
            f"--quiet --root={self.tree} enable azure-provisioning.service\n",
        )

    def test_failed_installation_is_rolled_back(self) -> None:
        def full_disk() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

        for tool in (None, "sed", "mv", "systemctl"):
            with self.subTest(tool):
                self.new_tree()
                if tool == "systemctl":
                    self.write(LINK, "-> /an/old/unit")
                before = self.files()
                if tool:
                    self.tool(tool, "echo no >&2; exit 1")
                status, output, errors = self.install(preexec_fn=None if tool else full_disk)
                self.assertEqual((status, output, self.files()), (1, "", before))
                self.assertRegex(errors, r"(?m)^install.sh: failed: everything is as it was")
                if tool:
                    (self.tools / tool).unlink()
                self.install()
                before = self.files()
                status, _, errors = self.install(preexec_fn=full_disk)
                self.assertEqual((status, self.files()), (1, before))
                self.assertIn("everything is as it was", errors)

    def test_failed_update_keeps_the_earlier_version(self) -> None:
        self.install()
        for path in (UNIT_PATH, "usr/local/sbin/azure_provision.py"):
            self.write(path, "an earlier version")
        before = self.files()
        self.tool("systemctl", "echo no >&2; exit 1")
        self.assertEqual((self.install()[0], self.files()), (1, before))

    def test_leftover_of_a_killed_installation_is_not_followed(self) -> None:
        precious = self.directory / "precious"
        precious.write_text("precious", encoding="utf-8")
        for suffix in ("new", "old"):
            self.write(f"usr/local/sbin/azure_provision.py.{suffix}", f"-> {precious}")
        self.assertEqual(self.install()[0], 0)
        self.assertEqual(precious.read_text(encoding="utf-8"), "precious")
        self.assertEqual([name for name in self.files() if name.endswith(("new", "old"))], [])

    def test_check_finds_an_installation_that_is_not_whole(self) -> None:
        for path in (UNIT_PATH, "usr/local/sbin/azure_provision.py"):
            self.install()
            (self.tree / path).unlink()
            self.refused(f"warning: /{path} is missing: run install.sh again", "--check")

    def test_refuses_a_destdir_with_a_line_break(self) -> None:
        self.refused("DESTDIR has a control character: [^\n]*\n", DESTDIR=f"{self.tree}\n")

    def test_refuses_to_install_live_without_root(self) -> None:
        self.tool("id", "echo 1000")
        # if it did not refuse, it would write to this machine
        for tool in ("cp", "mkdir", "mv", "rm", "systemctl"):
            self.tool(tool, "exit 1")
        (self.directory / "root").symlink_to("/")
        self.refused("not root", DESTDIR=None)
        self.refused("not root", DESTDIR="/")
        self.refused("not root", DESTDIR=self.directory / "root")
        self.refused("not root", "--uninstall", DESTDIR=None)
        self.refused("not root", "--check", DESTDIR=None)

    def test_refuses_a_destdir_that_is_not_a_directory(self) -> None:
        self.refused("DESTDIR is not a directory: /no such", DESTDIR="/no such")
        self.refused("DESTDIR is not a directory", "--uninstall", DESTDIR=SCRIPT)

    def test_refuses_an_interpreter_that_is_not_a_program(self) -> None:
        self.write("usr/bin/text")
        self.write("usr/bin/dangling", "-> /no/such/python")
        self.write("usr/bin/loop", "-> loop")
        for name in ("missing", "text", "dangling", "loop", "../lib", ""):
            path = f"/usr/bin/{name}".replace("/bin/../", "/")
            self.refused(f"the image has no program {path}: install python3", PYTHON=path)

    def test_interpreter_link_is_followed_inside_the_image(self) -> None:
        (self.tree / "usr/bin/python3").rename(self.tree / "usr/bin/python3.9")
        self.write("usr/bin/python3", "-> /etc/alternatives/python3")
        self.write("etc/alternatives/python3", "-> ../../../usr/bin/python3.9")
        self.tool("chroot", "cat >/dev/null; echo azure_provision.py 1.2.3")
        self.assert_sound()

    def test_refuses_an_interpreter_that_cannot_run_the_script(self) -> None:
        for action, reason in (
            ("echo '  File \"<stdin>\"'; echo 'SyntaxError: invalid syntax' >&2; exit 1", "Syntax"),
            ("echo 'Unknown option: -I' >&2; exit 2", "Unknown option: -I"),
            ("cat >/dev/null", ""),
            ("echo GNU bash", "GNU bash"),
        ):
            self.python(action)
            why = "which needs Python 3.6 or newer and all of its library"
            self.refused(f"/usr/bin/python3 cannot run the script, {why}: {reason}")

    def test_refuses_an_interpreter_without_a_module_of_the_script(self) -> None:
        modules = re.findall(r"(?m)^(?:import|from) ([a-z.]+)", SCRIPT.read_text(encoding="utf-8"))
        self.assertGreater(len(modules), 5)
        for module in sorted(set(modules) - {"sys", "typing"}):
            with self.subTest(module):
                hide = f"import sys; sys.modules['{module}'] = None; exec(sys.stdin.read())"
                self.python(f"exec '{sys.executable}' -c \"{hide}\" --version")
                self.refused(f"cannot run the script, .*{module}")

    def test_real_interpreter_runs_no_code_of_the_directory_and_writes_none(self) -> None:
        self.python(f"exec '{sys.executable}' \"$@\"")
        trap = self.directory / "trap"
        trap.mkdir()
        for name in ("re", "socket", "argparse", "sitecustomize"):
            (trap / f"{name}.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
        before = self.files(trap)
        status, _, errors = self.install(cwd=trap, PYTHONPATH=trap)
        self.assertEqual((status, errors, self.files(trap)), (0, "", before))
        self.python('echo "$@" >&2; exit 1')
        self.refused("-I -S -B - --version")

    def test_warns_of_an_interpreter_that_cannot_run_here(self) -> None:
        self.tool("chroot", "cat >/dev/null; echo 'cannot run: Exec format error' >&2; exit 126")
        status, _, errors = self.install()
        self.assertEqual(status, 0)
        self.assertRegex(
            errors, r"\A.*warning: .*so it was not checked: cannot run: Exec format error\n\Z"
        )
        self.assertIn(LINK, self.files())

    def test_refuses_paths_that_a_unit_cannot_take(self) -> None:
        for name in ("PREFIX", "UNITDIR", "PYTHON"):
            self.refused(f"{name} is not an absolute path: usr", **{name: "usr"})
            for path in ("/../x", "/usr/..", "/usr/../../x"):
                self.refused(f"{name} must not contain '..'", **{name: path})
            for character in '"', "'", "\\", "%", "$", "&", "|":
                self.refused(f"{name} has a character", **{name: f"/a{character}b"})
        code, _, errors = self.install(PREFIX="/a\nb")
        self.assertEqual(code, 1)
        self.assertIn("PREFIX has a character", errors)

    def test_refuses_paths_that_the_sandbox_hides(self) -> None:
        python = (self.tree / "usr/bin/python3").read_text(encoding="utf-8")
        for place in ("home/me", "root", "run/user/0", "tmp", "var/tmp/a", "opt/link", "opt/home"):
            with self.subTest(place):
                self.new_tree()
                self.write(f"{place.replace('link', '../home/me')}/python3", python).chmod(0o755)
                self.write("opt/link", "-> ../home/me")
                if place == "opt/home":
                    self.write("home", "-> opt/home")
                self.refused("which the unit's sandbox hides", PREFIX=f"/{place}")
                self.refused("which the unit's sandbox hides", PYTHON=f"/{place}/python3")

    def test_refuses_links_that_lead_out_of_destdir(self) -> None:
        outside = self.directory / "outside"
        (outside / "sbin").mkdir(parents=True)
        for name in (SCRIPT.name, "azure-provisioning.service", f"sbin/{SCRIPT.name}"):
            (outside / name).write_text("precious", encoding="utf-8")
        before = self.files(outside)
        for link in (
            "etc/systemd/system",
            "usr/local/sbin",
            "usr/local",
            "etc",
            "etc/systemd/system-preset",
        ):
            for target in (str(outside), "/no/such", "../" * 9 + str(outside)[1:]):
                with self.subTest(link, target=target):
                    self.new_tree()
                    shutil.rmtree(str(self.tree / link), ignore_errors=True)
                    self.write(link, f"-> {target}")
                    for option in ((), ("--no-enable",), ("--uninstall",), ("--check",)):
                        self.refused("leads out of DESTDIR through a symlink: make", *option)
                    self.assertEqual(self.files(outside), before)

    def test_follows_links_that_stay_in_destdir(self) -> None:
        self.write("usr/local", "-> ../var/usrlocal")
        (self.tree / "var/usrlocal").mkdir(parents=True)
        self.assertEqual(self.install()[0], 0)
        self.assertIn("var/usrlocal/sbin/azure_provision.py", self.files())

    def test_replaces_a_link_but_not_what_it_leads_to(self) -> None:
        self.write("etc/precious", "precious")
        self.write(SCRIPT_PATH, "-> ../../../etc/precious")
        self.assertEqual(self.install()[0], 0)
        self.assertEqual(self.files()["etc/precious"][1], "precious")
        self.assertEqual(self.files()[SCRIPT_PATH][0], 0o755)

    def test_refuses_targets_that_are_in_the_way(self) -> None:
        (self.tree / SCRIPT_PATH).mkdir(parents=True)
        self.refused("azure_provision.py is a directory")
        self.new_tree()
        self.write("usr/local")
        self.refused("/usr/local is not a directory")

    def test_refuses_a_unit_that_is_masked_or_hidden_by_another(self) -> None:
        lib = "/usr/lib/systemd/system"
        for content, unitdir, reason in (
            ("-> /dev/null", "/etc/systemd/system", "masks the unit: delete it"),
            ("", "/etc/systemd/system/", "masks the unit: delete it"),
            ("-> /dev/null", lib, "masks the unit: delete it"),
            ("[Unit]\n", lib, f"takes precedence over a unit in {lib}: delete it"),
        ):
            with self.subTest(content, unitdir=unitdir):
                self.write(UNIT_PATH, content)
                for option in ((), ("--no-enable",), ("--check",)):
                    self.refused(f"/{UNIT_PATH} {reason}", *option, UNITDIR=unitdir)

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
        for word in ("--check", "--no-enable", "--uninstall", "--help"):
            self.assertIn(word, output)
        for word in ("DESTDIR", "PREFIX", "UNITDIR", "PYTHON"):
            self.assertIn(word, output)


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
            # systemd-analyze looks for the program here, where the unit must not have it
            python = Path(directory, "my python")
            python.symlink_to(sys.executable)
            for settings in (
                {"PYTHON": "/usr/bin/python3"},
                {"PYTHON": "/opt/my python", "PREFIX": "/opt/a b"},
            ):
                unit = self.installed(directory, **settings)
                text = Path(unit).read_text(encoding="utf-8")
                text = text.replace("/opt/my python", str(python))
                Path(unit).write_text(text, encoding="utf-8")
                process = subprocess.run(
                    ["systemd-analyze", "verify", unit],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    encoding="utf-8",
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
            encoding="utf-8",
        )
        if "unrecognized option" in process.stdout:
            self.skipTest("systemd-analyze cannot judge a file before systemd 250")
        self.assertEqual(process.returncode, 0, process.stdout[-200:])

    def installed(self, directory: str, **settings: str) -> str:
        """Install the unit below DIRECTORY as if that were its place in the image."""
        tree = Path(directory, "tree")
        shutil.rmtree(str(tree), ignore_errors=True)
        chroot = Path(directory, "chroot")
        chroot.write_text("#!/bin/sh\ncat >/dev/null; echo azure_provision.py 1.2.3\n")
        chroot.chmod(0o755)
        python = Path(str(tree) + settings["PYTHON"])
        python.parent.mkdir(parents=True)
        python.write_text("")
        python.chmod(0o755)
        environment = dict(os.environ, DESTDIR=str(tree), **settings)
        environment["PATH"] = f"{directory}:{environment['PATH']}"
        subprocess.run(
            [str(INSTALLER), "--no-enable"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
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
