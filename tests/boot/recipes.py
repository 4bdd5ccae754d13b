"""The README's recipes, run as they are printed there, up to VMs that provision.

`python3 -m unittest tests.boot.recipes`, as root; BOOT_FIGURES is a file for what the VMs say.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import FrozenSet, List, NamedTuple

from azure_provision import UNIT
from tests.boot.disk import Tree, missing
from tests.boot.host import command, which
from tests.boot.machine import image, mirror
from tests.harness import INSTALLER, ROOT, SCRIPT, UNIT_FILE
from tests.vm import VM, run, split_options

TIMEOUT = 600  # seconds, for what a VM does under emulation

# The command that is missing, and its package in Debian; others are those of a disk.
TOOLS = {
    "systemd-nspawn": "systemd-container",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
}

# What such a VM on Azure has: Debian's cloud-init and waagent, which the recipe removes.
AGENTS = ("cloud-init", "waagent", "netplan.io", "isc-dhcp-client", "openssh-server")
MKOSI = ("mkosi", "ca-certificates")


README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(heading: str, language: str) -> List[str]:
    """The fenced blocks of a section of the README."""
    section = README.split(f"## {heading}\n")[1].split("\n##")[0]
    return [str(text) for text in re.findall(rf"(?ms)^```{language}\n(.*?)^```$", section)]


def live_recipe() -> str:
    return blocks("From a live VM", "sh")[0]


def copy_project(directory: Path) -> None:
    """Copy what install.sh needs, with the scripts of the README beside it."""
    directory.mkdir(parents=True)
    for file in (INSTALLER, SCRIPT, UNIT_FILE):
        shutil.copy(str(file), str(directory))
    image_script = blocks("Baking it into an image", "sh")[0]
    (directory / "image.sh").write_text(image_script, encoding="utf-8")
    (directory / "recipe.sh").write_text(live_recipe(), encoding="utf-8")


class RecipeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        absent = [f"{tool} ({TOOLS[tool]})" for tool in TOOLS if which(tool) is None]
        absent += [] if os.geteuid() == 0 else ["root"]
        absent += missing()
        if absent:
            raise unittest.SkipTest(f"the recipes need {', '.join(absent)}")

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="azure-recipe-"))
        self.addCleanup(shutil.rmtree, str(self.directory), ignore_errors=True)


class PackerTest(RecipeTest):
    """The Packer recipe, in a container that stands for the VM that Packer is logged in to."""

    def setUp(self) -> None:
        super().setUp()
        (self.text,) = blocks("With Packer", "hcl")

    def log_in(self) -> None:
        self.tree = Tree(self.directory, ("python3", *AGENTS))
        self.tmp = self.directory / "tmp"
        copy_project(self.tmp / "azure-provision")
        self.tree.write("usr/bin/sudo", '#!/bin/sh\nexec "$@"\n')
        (self.tree.root / "usr/bin/sudo").chmod(0o755)

    def inline(self) -> List[str]:
        found = re.search(r"(?ms)^ +inline = \[\n(.*?)^ +\]", self.text)
        assert found is not None
        return [json.loads(line.strip().rstrip(",")) for line in found.group(1).splitlines()]

    def provision(self) -> "subprocess.CompletedProcess[str]":
        """What Packer's shell provisioner does: https://developer.hashicorp.com/packer/docs/provisioners/shell."""
        script = "\n".join(["#!/bin/sh -e", *self.inline(), ""])
        (self.tmp / "script_1234.sh").write_text(script, encoding="utf-8")
        found = re.search(r'execute_command += (".*")', self.text)
        assert found is not None
        execute = json.loads(found.group(1))
        execute = execute.replace("{{ .Path }}", "/tmp/script_1234.sh")
        execute = execute.replace("{{ .Vars }}", "PACKER_BUILD_NAME='image'")
        self.assertNotIn("{{", execute)
        return self.run_in_container(execute)

    def run_in_container(self, line: str) -> "subprocess.CompletedProcess[str]":
        """Run a line of shell in the tree."""
        nspawn = ("systemd-nspawn", "--quiet", "--pipe", "--register=no", "--keep-unit")
        own = (f"--machine=azure-recipe-{os.getpid()}", "--private-network")
        where = (f"--bind={self.tmp}:/tmp", f"--directory={self.tree.root}")
        return subprocess.run(
            [*nspawn, *own, *where, "/bin/sh", "-c", line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )

    def test_inline_lines_are_those_of_the_live_recipe(self) -> None:
        self.assertEqual(self.inline(), live_recipe().splitlines())

    def test_installer_that_refuses_fails_the_build(self) -> None:
        self.log_in()
        self.tree.systemctl("mask", UNIT)
        done = self.provision()
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("masks the unit", done.stdout)
        self.assertNotEqual(list(self.tree.root.glob("etc/ssh/ssh_host_*")), [], "it went on")

    def test_image_is_sound_and_so_is_that_of_its_vm(self) -> None:
        self.log_in()
        done = self.provision()
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assert_sound(done.stdout)

        first_boot = f"systemctl disable {UNIT} && ssh-keygen -A && systemd-machine-id-setup"
        check = "cd /tmp/azure-provision && ./install.sh --check"
        done = self.run_in_container(f"{first_boot} && {check}")
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("is disabled, as on a provisioned VM", done.stdout)
        again = re.search(r"`(sh .*)` again", README)
        assert again is not None
        done = self.run_in_container(f"cd /tmp/azure-provision && {again.group(1)}")
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assert_sound(done.stdout)

    def assert_sound(self, said: str) -> None:
        self.assertIn("No problem was found in this machine.", said)
        self.assertEqual(list(self.tree.root.glob("etc/ssh/ssh_host_*")), [])
        self.assertEqual((self.tree.root / "etc/machine-id").read_text(), "")
        command(INSTALLER, "--check", DESTDIR=self.tree.root)

    def test_netplan_has_the_same_match(self) -> None:
        self.log_in()
        found = re.search(r"`(\{network: .*\})`", README)
        assert found is not None
        (self.tmp / "root/etc/netplan").mkdir(parents=True)
        (self.tmp / "root/etc/netplan/80-dhcp.yaml").write_text(found.group(1), encoding="utf-8")
        done = self.run_in_container("netplan generate --root-dir /tmp/root")
        self.assertEqual(done.returncode, 0, done.stdout)
        (network,) = (self.tmp / "root/run/systemd/network").iterdir()
        text = network.read_text(encoding="utf-8")
        self.assertIn("[Match]\nDriver=hv_netvsc virtio_net\n\n[Network]\nDHCP=ipv4\n", text)


# On Azure, and nothing that only takes time: neither mirrors nor locales.
CLOUD_INIT = """\
datasource_list: [ Azure ]
cloud_config_modules: []
cloud_final_modules: []
"""

# Says on the console which machine this is, before the login prompt, which tests.rehearse awaits.
IDENTITY_UNIT = """\
[Unit]
After=ssh.service
Before=serial-getty@ttyS0.service

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'for key in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -lf "$key"; done'
ExecStart=/bin/sh -c 'echo "machine-id $(cat /etc/machine-id), sshd $(systemctl is-active ssh)"'
SyslogIdentifier=identity
StandardOutput=journal+console
StandardError=journal+console

[Install]
WantedBy=multi-user.target
"""

# The builder, once cloud-init is done: what an engineer would do who is logged in.
BUILD_UNIT = """\
[Unit]
After=cloud-final.service walinuxagent.service identity.service

[Service]
Type=oneshot
WorkingDirectory=/srv/azure-provision
ExecStart=/bin/sh /srv/build
SyslogIdentifier=build
StandardOutput=journal+console
StandardError=journal+console

[Install]
WantedBy=cloud-init.target
"""
BUILD = """\
cat /etc/netplan/50-cloud-init.yaml
sh -e recipe.sh
echo "recipe: status $?"
systemctl --quiet disable build.service
rm -rf /srv/azure-provision /srv/build /etc/systemd/system/build.service
sync
systemctl poweroff
"""


class Identity(NamedTuple):
    """What no two VMs of an image may share."""

    machine_id: str
    host_keys: FrozenSet[str]


def identities(console: str) -> List[Identity]:
    """Those that were said on the console, one of each boot."""
    found, keys = [], set()
    for line in console.splitlines():
        said = re.search(
            r"identity\[\d+\]: (?:\d+ (SHA256:\S+) |machine-id (\w+), sshd active)", line
        )
        if said and said.group(1):
            keys.add(said.group(1))
        elif said:
            found.append(Identity(said.group(2), frozenset(keys)))
            keys.clear()
    return found


class ImageTest(RecipeTest):
    """A recipe that makes an image."""

    def rehearse(self, disk: Path) -> List[Identity]:
        """Rehearse DISK; return who its VMs are: the first, the second, the second again."""
        console = self.directory / "console"
        tool = [sys.executable, "-m", "tests.rehearse", str(disk), f"--timeout={TIMEOUT}"]
        tool += ["--console", str(console)]
        done = subprocess.run(
            tool,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            cwd=str(ROOT),
        )
        note(done.stdout)
        said = console.read_text(encoding="utf-8")
        self.assertEqual(done.returncode, 0, f"{done.stdout}\n{said}")
        self.assertIn("It will provision.", done.stdout)
        return identities(said)

    def assert_distinct(self, found: List[Identity], *others: Identity) -> None:
        """Each VM has an identity of its own, and keeps it."""
        self.assertEqual(len(found), 3, found)
        first, second, again = found
        self.assertEqual(second, again)
        everyone = [first, second, *others]
        keys = [key for each in everyone for key in each.host_keys]
        self.assertTrue(all(each.host_keys for each in everyone), everyone)
        self.assertEqual(len(set(keys)), len(keys), everyone)
        self.assertEqual(len({each.machine_id for each in everyone}), len(everyone), everyone)


def note(text: str) -> None:
    """Write to the file BOOT_FIGURES, if there is one."""
    path = os.environ.get("BOOT_FIGURES")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            print(text, file=file)


def show(at: float, source: str, text: str) -> None:
    """Note what a VM does: a listener."""
    note(f"{at:10.1f} {source}: {text}")


def capture(vm: VM, image: Path) -> None:
    """Make an image of the disk of a VM that is off."""
    options = ["driver=qcow2", "file.filename=" + vm.path("disk")]
    options += [f"backing.{option}" for option in split_options(vm.image.options)]
    run("qemu-img", "convert", "--image-opts", ",".join(options), "-O", "qcow2", str(image))


class LiveTest(ImageTest):
    def test_vm_of_cloud_init_becomes_an_image_whose_vms_provision(self) -> None:
        tree = Tree(self.directory / "tree", ("python3", *AGENTS))
        tree.write("etc/cloud/cloud.cfg.d/90-azure.cfg", CLOUD_INIT)
        tree.write("etc/systemd/system/identity.service", IDENTITY_UNIT)
        tree.write("etc/systemd/system/build.service", BUILD_UNIT)
        tree.write("srv/build", BUILD)
        copy_project(tree.root / "srv/azure-provision")
        tree.systemctl("enable", "identity.service", "build.service")

        image = self.directory / "image.qcow2"
        with VM(tree.disk(), number=7, listener=show) as vm, vm.boot() as boot:
            self.assertTrue(boot.wait(boot.off.is_set, TIMEOUT), boot.console)
            self.assertTrue(vm.azure.ready.is_set(), boot.console)
            self.assertRegex(boot.console, f'macaddress: "?{vm.mac}')
            self.assertIn("recipe: status 0", boot.console)
            builder = identities(boot.console)
            capture(vm, image)
        self.assert_distinct(self.rehearse(image), *builder)


class DirectoryTest(ImageTest):
    def test_tree_of_mmdebstrap_becomes_a_disk_whose_vms_provision(self) -> None:
        (mmdebstrap, _) = blocks("Into a directory", "sh")
        copy_project(self.directory / "azure-provision")
        command("sh", "-e", "-c", mmdebstrap, cwd=self.directory / "azure-provision")

        tree = Unpacked(self.directory, self.directory / "azure-provision/image.tar")
        tree.write("etc/systemd/system/identity.service", IDENTITY_UNIT)
        tree.systemctl("enable", "identity.service")
        self.assert_distinct(self.rehearse(tree.disk()))


class Unpacked(Tree):
    """The tree in an archive, as it is."""

    def __init__(self, directory: Path, archive: Path) -> None:
        self.directory, self.root = directory, directory / "root"
        self.root.mkdir()
        command("tar", "-x", "--numeric-owner", "-C", self.root, "-f", archive)


MKOSI_CONF = """\
[Distribution]
Distribution=debian
Release=bookworm

[Output]
Format=directory

[Content]
Bootable=no
Packages=systemd,systemd-sysv,dbus,python3,openssh-server
"""
MKOSI_SOURCES = """\
Types: deb
URIs: {mirror}
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
RUN_MKOSI = """\
mount --bind root root
mount -t proc proc root/proc
mount --rbind /sys root/sys
mount --rbind /dev root/dev
mount -t tmpfs tmpfs root/run
exec chroot root sh -c 'cd /work && exec mkosi build'
"""


class MkosiTest(RecipeTest):
    """The recipe for mkosi, with that of Debian 13."""

    def test_unit_is_enabled_after_presets_that_disable_everything(self) -> None:
        (_, script) = blocks("Into a directory", "sh")
        root = self.directory / "root"
        command("cp", "--archive", "--reflink=auto", image("mkosi", "trixie", MKOSI), root)
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", str(root / "etc"))
        work = root / "work"
        copy_project(work / "azure-provision")
        sources = MKOSI_SOURCES.format(mirror=mirror()[0])
        for name, text in (
            ("mkosi.conf", MKOSI_CONF),
            ("mkosi.postinst", script),
            ("mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources", sources),
            # As Fedora and RHEL have it. mkosi applies the presets after the script.
            ("mkosi.extra/usr/lib/systemd/system-preset/99-default.preset", "disable *\n"),
        ):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text, encoding="utf-8")
        (work / "mkosi.postinst").chmod(0o755)
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-e", "-c", RUN_MKOSI],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            cwd=str(self.directory),
        )
        note(done.stdout)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("No problem was found in", done.stdout)
        tree = work / "image"
        self.assertEqual(
            command("systemctl", f"--root={tree}", "is-enabled", UNIT).strip(), "enabled"
        )
        wants = tree / "etc/systemd/system/multi-user.target.wants"
        enabled = [link.name for link in wants.iterdir()]
        self.assertIn(UNIT, enabled)
        self.assertNotIn("ssh.service", enabled, "the presets were not applied")
