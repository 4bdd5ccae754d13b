"""The README's recipes, run as they are printed there, up to VMs that provision.

`python3 -m unittest tests.boot.recipes`, as root; BOOT_FIGURES is a file for what the VMs say.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import List, Sequence

from azure_provision import UNIT
from tests.boot.container import add_service, image, mirror, write
from tests.boot.disk import Tree
from tests.boot.host import attempt, command, note
from tests.boot.in_a_vm import VMTest
from tests.plain.harness import INSTALLER, ROOT, SCRIPT, UNIT_FILE
from tests.vm import VM, split_options

TIMEOUT = 600  # seconds, for what a VM does under emulation

# What such a VM on Azure has: Debian's cloud-init and waagent, which the recipe removes.
AGENTS = ("cloud-init", "waagent", "netplan.io", "isc-dhcp-client", "openssh-server")

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(heading: str, language: str) -> List[str]:
    """The fenced blocks of a section of the README."""
    section = README.split(f"## {heading}\n")[1].split("\n##")[0]
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", section)


def copy_project(directory: Path) -> None:
    """Copy what install.sh needs, with the scripts of the README beside it."""
    directory.mkdir(parents=True)
    for file in (INSTALLER, SCRIPT, UNIT_FILE):
        shutil.copy(str(file), str(directory))
    write(directory, "image.sh", blocks("Baking it into an image", "sh")[0])
    write(directory, "live.sh", blocks("From a live VM", "sh")[0])


class PackerTest(VMTest):
    """The Packer recipe, in a container that stands for the VM that Packer is logged in to."""

    def setUp(self) -> None:
        super().setUp()
        self.tree = Tree(self.directory, ("python3", *AGENTS))
        self.tmp = self.directory / "tmp"
        copy_project(self.tmp / "azure-provision")
        write(self.tree.root, "usr/bin/sudo", '#!/bin/sh\nexec "$@"\n', 0o755)

    def shell_provisioner(self) -> str:
        """What it runs: https://developer.hashicorp.com/packer/docs/provisioners/shell."""
        (recipe,) = blocks("With Packer", "hcl")
        (inline,) = re.findall(r" inline += (\[.*\])", recipe)
        write(self.tmp, "script_1234.sh", "\n".join(["#!/bin/sh -e", *json.loads(inline), ""]))
        (quoted,) = re.findall(r'execute_command += (".*")', recipe)
        execute: str = json.loads(quoted)
        execute = execute.replace("{{ .Path }}", "/tmp/script_1234.sh")
        execute = execute.replace("{{ .Vars }}", "PACKER_BUILD_NAME='image'")
        self.assertNotIn("{{", execute)
        return execute

    def run_in_tree(self, line: str, status: int = 0) -> str:
        """Run a line of shell, which must end with STATUS; return what it says."""
        done = attempt(
            *("systemd-nspawn", "--quiet", "--pipe", "--register=no", "--keep-unit"),
            *(f"--machine={self.directory.name}", "--private-network"),
            *(f"--bind={self.tmp}:/tmp", f"--directory={self.tree.root}"),
            *("/bin/sh", "-c", line),
        )
        self.assertEqual(done.returncode, status, done.stdout)
        return done.stdout

    def assert_sound(self, said: str) -> None:
        self.assertIn("No problem was found in this machine.", said)
        self.assertEqual(list(self.tree.root.glob("etc/ssh/ssh_host_*")), [])
        self.assertEqual((self.tree.root / "etc/machine-id").read_text(), "")
        command(INSTALLER, "--check", DESTDIR=self.tree.root)

    def test_installer_that_refuses_fails_the_build(self) -> None:
        self.tree.systemctl("mask", UNIT)
        self.assertIn("masks the unit", self.run_in_tree(self.shell_provisioner(), status=1))

    def test_image_is_sound_and_so_is_that_of_its_vm(self) -> None:
        self.assert_sound(self.run_in_tree(self.shell_provisioner()))

        first_boot = f"systemctl disable {UNIT} && ssh-keygen -A && systemd-machine-id-setup"
        check = "cd /tmp/azure-provision && ./install.sh --check"
        said = self.run_in_tree(f"{first_boot} && {check}", status=1)
        self.assertIn("is disabled, as on a provisioned VM", said)
        (again,) = re.findall(r"`(sh .*)`\s+again", README)
        self.assert_sound(self.run_in_tree(f"cd /tmp/azure-provision && {again}"))

    def test_netplan_has_the_same_match(self) -> None:
        (netplan,) = re.findall(r"`(\{network: .*\})`", README)
        write(self.tmp, "root/etc/netplan/80-dhcp.yaml", netplan)
        self.run_in_tree("netplan generate --root-dir /tmp/root")
        (network,) = (self.tmp / "root/run/systemd/network").iterdir()
        text = network.read_text(encoding="utf-8")
        self.assertIn("[Match]\nDriver=hv_netvsc virtio_net\n\n[Network]\nDHCP=ipv4\n", text)


# On Azure, and nothing that only takes time: neither mirrors nor locales.
CLOUD_INIT = """\
datasource_list: [ Azure ]
cloud_config_modules: []
cloud_final_modules: []
"""

# What no two VMs of an image may share: the machine-id and the host keys.
IDENTITY = """\
keys=$(for key in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -lf "$key"; done | cut -d " " -f 2)
echo $(cat /etc/machine-id) $keys, sshd $(systemctl is-active ssh)
"""

# On the builder, once cloud-init is done: what an engineer would do who is logged in.
BUILD = """\
cat /etc/netplan/50-cloud-init.yaml
cd /srv/azure-provision
sh -e live.sh
echo "recipe: status $?"
systemctl --quiet disable build.service
rm -rf /srv/azure-provision /usr/local/build /etc/systemd/system/build.service
sync
systemctl poweroff
"""


def identities(console: str) -> List[List[str]]:
    """Those that were said on the console, one of each boot."""
    said = re.findall(r"identity\[\d+\]: (\w+(?: SHA256:\S+)+), sshd active", console)
    return [identity.split() for identity in said]


class ImageTest(VMTest):
    """A recipe that makes an image."""

    def add_identity_service(self, tree: Tree) -> None:
        """Have it say who it is before the login prompt, which tests.rehearse awaits."""
        prompt = "serial-getty@ttyS0.service"
        add_service(tree.root, "identity", IDENTITY, after="ssh.service", before=prompt)

    def rehearse(self, disk: Path, builder: Sequence[str] = ()) -> None:
        """DISK provisions, and each VM of it has an identity of its own, and keeps it."""
        console = self.directory / "console"
        options = (f"--timeout={TIMEOUT}", f"--console={console}")
        done = attempt(sys.executable, "-m", "tests.rehearse", disk, *options, cwd=ROOT)
        note(done.stdout)
        said = console.read_text(encoding="utf-8")
        self.assertEqual(done.returncode, 0, f"{done.stdout}\n{said}")
        first, second, again = identities(said)
        self.assertEqual(second, again)
        everything = [*first, *second, *builder]
        self.assertEqual(len(set(everything)), len(everything), everything)


class LiveTest(ImageTest):
    def test_vm_of_cloud_init_becomes_an_image_whose_vms_provision(self) -> None:
        tree = Tree(self.directory / "tree", ("python3", *AGENTS))
        tree.write("etc/cloud/cloud.cfg.d/90-azure.cfg", CLOUD_INIT)
        self.add_identity_service(tree)
        agents = "cloud-final.service walinuxagent.service identity.service"
        add_service(tree.root, "build", BUILD, after=f"multi-user.target {agents}")
        copy_project(tree.root / "srv/azure-provision")

        image = self.directory / "image.qcow2"
        with VM(tree.disk(), number=7) as vm, vm.boot() as boot:
            self.assertTrue(boot.wait(boot.off.is_set, TIMEOUT), boot.console)
            self.assertTrue(vm.azure.ready.is_set(), boot.console)
            self.assertRegex(boot.console, f'macaddress: "?{vm.mac}')
            self.assertIn("recipe: status 0", boot.console)
            (builder,) = identities(boot.console)
            disk = [f"driver=qcow2,file.filename={vm.path('disk')}"]
            disk += [f"backing.{option}" for option in split_options(vm.image.options)]
            command("qemu-img", "convert", "--image-opts", ",".join(disk), "-O", "qcow2", image)
        self.rehearse(image, builder)


class Unpacked(Tree):
    """The tree in an archive, as it is."""

    def __init__(self, directory: Path, archive: Path) -> None:
        self.directory, self.root = directory, directory / "root"
        self.root.mkdir()
        command("tar", "-x", "--numeric-owner", "-C", self.root, "-f", archive)


class DirectoryTest(ImageTest):
    def test_tree_of_mmdebstrap_becomes_a_disk_whose_vms_provision(self) -> None:
        (mmdebstrap, _) = blocks("Into a directory", "sh")
        project = self.directory / "azure-provision"
        copy_project(project)
        command("sh", "-e", "-c", mmdebstrap, cwd=project)
        tree = Unpacked(self.directory, project / "image.tar")
        self.add_identity_service(tree)
        self.rehearse(tree.disk())


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


class MkosiTest(VMTest):
    """The recipe for mkosi, with the one of Debian 13."""

    def test_unit_is_enabled_after_presets_that_disable_everything(self) -> None:
        (_, script) = blocks("Into a directory", "sh")
        root = self.directory / "root"
        mkosi = image("mkosi", "trixie", ["mkosi", "ca-certificates"])
        command("cp", "--archive", "--reflink=auto", mkosi, root)
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", str(root / "etc"))
        work = root / "work"
        copy_project(work / "azure-provision")
        write(work, "mkosi.conf", MKOSI_CONF)
        write(work, "mkosi.postinst", script, 0o755)
        sources = "mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources"
        write(work, sources, MKOSI_SOURCES.format(mirror=mirror()[0]))
        # As Fedora and RHEL have it. mkosi applies the presets after the script.
        presets = "mkosi.extra/usr/lib/systemd/system-preset/99-default.preset"
        write(work, presets, "disable *\n")
        isolated = ("unshare", "--mount", "--pid", "--fork")
        done = attempt(*isolated, "sh", "-e", "-c", RUN_MKOSI, cwd=self.directory)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("No problem was found in", done.stdout)
        wants = work / "image/etc/systemd/system/multi-user.target.wants"
        enabled = [link.name for link in wants.iterdir()]
        self.assertIn(UNIT, enabled)
        self.assertNotIn("ssh.service", enabled, "the presets were not applied")
