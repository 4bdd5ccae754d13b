"""The recipes in tests/recipes, run as they are, up to VMs that provision.

`python3 -m unittest tests.boot.recipes`, as root; BOOT_FIGURES is a file for what the VMs say.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, Sequence

from azure_provision import UNIT
from tests.boot.container import add_service, image, mirror, write
from tests.boot.disk import Tree, mounted
from tests.boot.host import attempt, command, note, skip_if, which
from tests.boot.in_a_vm import VMTest
from tests.boot.network import Namespace
from tests.plain.harness import ROOT
from tests.vm import VM, Setup, inspect

RECIPE_TIMEOUT = 600  # seconds, for what a VM does under emulation

RECIPES = "tests/recipes"
INSTALLED_RULE = "etc/udev/rules.d/68-azure-sriov-unmanaged.rules"

# What such a VM on Azure has: Debian's cloud-init and waagent, which the recipe removes.
AZURE_AGENTS = ["cloud-init", "waagent", "netplan.io", "isc-dhcp-client"]
LIVE_PACKAGES = ["python3", "sudo", *AZURE_AGENTS, "openssh-server"]

# What no two VMs of an image may share, the machine-id and the host keys; and what has failed.
IDENTITY = """\
keys=$(for key in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -lf "$key"; done | cut -d " " -f 2)
echo $({login} cat /etc/machine-id) $keys, failed: $(systemctl list-units --failed --no-legend)
"""
# The user of the image logs in, and is root.
OPTIONS = "-i /usr/local/key -o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR"
LOG_IN = f"ssh {OPTIONS} azureuser@localhost sudo"


def add_identity_service(root: Path, login: str = "") -> None:
    """Have it say who it is before the login prompt, which tests.rehearse awaits."""
    script = IDENTITY.format(login=login)
    add_service(root, "identity", script, after="ssh.service", before="serial-getty@ttyS0.service")


def said_identities(console: str) -> List[List[str]]:
    """Those that were said on the console, one of each boot."""
    said = re.findall(r"identity\[\d+\]: (\w+(?: SHA256:\S+)+), failed: *\n", console)
    return [identity.split() for identity in said]


class RecipeTest(VMTest):
    """A test with a copy of this repository, `self.project`, and a key, whose owner may log in."""

    def setUp(self) -> None:
        super().setUp()
        self.project = self.directory / "azure provision"
        ours = shutil.ignore_patterns(".*", "build", "__pycache__")
        shutil.copytree(str(ROOT), str(self.project), ignore=ours)
        self.recipes = self.project / RECIPES
        self.key = self.directory / "key"
        command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
        self.public_key = self.key.with_suffix(".pub").read_text(encoding="utf-8")
        write(self.recipes, "authorized_keys", self.public_key)

    def add_identity_to(self, disk: Path) -> None:
        """Add the service to the root of DISK."""
        with mounted(disk) as root:
            add_identity_service(root, LOG_IN)
            shutil.copy(str(self.key), str(root / "usr/local/key"))

    def rehearse(self, disk: Path, generation: int, builder: Sequence[str] = ()) -> None:
        """DISK provisions, and each VM of it has an identity of its own, and keeps it."""
        console = self.directory / "console"
        options = (
            f"--generation={generation}",
            f"--timeout={RECIPE_TIMEOUT}",
            f"--console={console}",
        )
        done = attempt(sys.executable, "-m", "tests.rehearse", disk, *options, cwd=ROOT)
        note(done.stdout)
        said = console.read_text(encoding="utf-8")
        self.assertNotIn("\n?", said)  # GRUB's carriage returns
        self.assertEqual(done.returncode, 0, f"{done.stdout}\n{said}")
        self.assertEqual(len(said_identities(said)), 3, said)
        first, second, again = said_identities(said)
        self.assertEqual(second, again)
        everything = [*first, *second, *builder]
        self.assertEqual(len(set(everything)), len(everything), everything)


class PackerTest(RecipeTest):
    """Packer, with a container of Debian that stands for the VM."""

    def setUp(self) -> None:
        skip_if([] if which("packer") else ["packer"])
        super().setUp()
        self.tree = Tree(self.directory, LIVE_PACKAGES)
        command("chroot", self.tree.root, "useradd", "--create-home", "packer")
        self.tree.write("home/packer/.ssh/authorized_keys", self.public_key)
        self.tree.write("etc/sudoers.d/packer", "packer ALL=(ALL) NOPASSWD: ALL\n")
        self.network = Namespace()
        self.addCleanup(self.network.remove)

    def container(self, line: str) -> List[str]:
        """The command that runs a line of shell in the tree."""
        network = f"--network-namespace-path={self.network.path}"
        return [
            *("systemd-nspawn", "--quiet", "--pipe", "--register=no", "--keep-unit", network),
            *(f"--machine={self.directory.name}", f"--directory={self.tree.root}"),
            *(f"--bind={self.project}:/srv/project", "--kill-signal=SIGKILL"),
            *("/bin/sh", "-c", line),
        ]

    def packer(self, status: int) -> str:
        """Run the provisioners; return what Packer says."""
        sshd = self.container("mkdir -p /run/sshd && exec /usr/sbin/sshd -D")
        build = ("packer", "build", "-color=false", "-only=null.*", self.recipes / "packer.pkr.hcl")
        with subprocess.Popen(sshd, stderr=subprocess.DEVNULL) as machine:
            try:
                done = attempt(
                    *("ip", "netns", "exec", self.network.name, "ssh-agent", "sh", "-ec"),
                    *('ssh-add "$0" && exec "$@"', self.key, *build),
                    CHECKPOINT_DISABLE=1,  # it would ask whether there is a newer Packer
                )
            finally:
                machine.terminate()
        self.assertEqual(done.returncode, status, done.stdout)
        return done.stdout

    def check(self, status: int) -> None:
        """What tests.check makes of the tree."""
        found = attempt(sys.executable, "-m", "tests.check", self.tree.root, cwd=ROOT)
        self.assertEqual(found.returncode, status, found.stdout)

    def test_installer_that_refuses_fails_the_build(self) -> None:
        self.tree.systemctl("mask", UNIT)
        self.assertRegex(self.packer(status=1), "install.sh: .* masked")

    def test_image_is_sound_and_so_is_that_of_its_vm(self) -> None:
        command("packer", "validate", self.recipes / "packer.pkr.hcl", CHECKPOINT_DISABLE=1)
        self.packer(status=0)
        self.check(status=0)
        self.assertTrue((self.tree.root / INSTALLED_RULE).exists())
        self.assertEqual(command("ls", self.tree.root / "home"), "azureuser\n")

        first_boot = f"systemctl disable {UNIT} && ssh-keygen -A && systemd-machine-id-setup"
        command(*self.container(first_boot))
        self.check(status=1)
        command(*self.container(f"/srv/project/{RECIPES}/live.sh"))
        self.check(status=0)


# On Azure, and nothing that only takes time: neither mirrors nor locales.
CLOUD_CONFIG = """\
datasource_list: [ Azure ]
cloud_config_modules: []
cloud_final_modules: []
"""
# On the builder, once cloud-init is done: what an engineer would do who is logged in. Then its
# interface becomes a slave, like that of accelerated networking, and the rule takes its driver.
BUILD = f"""\
cat /etc/netplan/50-cloud-init.yaml
"/srv/azure provision/{RECIPES}/live.sh"
echo "recipe: status $?"
systemctl --quiet disable build.service
rm -rf /srv/azure* /usr/local/build /etc/systemd/system/build.service
mkdir -p /run/udev/rules.d
sed s/mana/virtio_net/ /{INSTALLED_RULE} >/run/udev/rules.d/68-test.rules
interface=$(basename /sys/class/net/e*)
properties() {{ udevadm test /sys/class/net/$interface 2>&1 | grep -c ^AZURE_UNMANAGED; }}
echo "properties before: $(properties)"
ip link add bond0 type bond && ip link set $interface down && ip link set $interface master bond0
echo "properties of a slave: $(properties)"
systemctl poweroff
"""


class LiveTest(RecipeTest):
    def test_vm_of_cloud_init_becomes_an_image_whose_vms_provision(self) -> None:
        tree = Tree(self.directory / "tree", LIVE_PACKAGES)
        tree.write("etc/cloud/cloud.cfg.d/90-azure.cfg", CLOUD_CONFIG)
        add_identity_service(tree.root)
        agents = "cloud-final.service walinuxagent.service identity.service"
        add_service(tree.root, "build", BUILD, after=f"multi-user.target {agents}")
        shutil.copytree(str(self.project), str(tree.root / "srv" / self.project.name))

        disk = self.directory / "image.qcow2"
        with VM(tree.disk(), number=7) as vm, vm.boot() as boot:
            self.assertTrue(boot.wait(boot.off.is_set, RECIPE_TIMEOUT), boot.console)
            self.assertTrue(vm.azure.ready.is_set(), boot.console)
            self.assertRegex(boot.console, f'macaddress: "?{vm.mac}')
            for text in ("recipe: status 0", "properties before: 0", "properties of a slave: 1"):
                self.assertIn(text, boot.console)
            (builder,) = said_identities(boot.console)
            backing = [f",backing.{option}" for option in vm.image.options]
            source = f"driver=qcow2,file.filename={vm.path('disk')}" + "".join(backing)
            command("qemu-img", "convert", "--image-opts", source, "-O", "qcow2", disk)
        self.rehearse(disk, 1, builder)


class MmdebstrapTest(RecipeTest):
    def test_disk_provisions_and_boots_in_both_generations(self) -> None:
        command(self.recipes / "mmdebstrap.sh", self.directory / "an image")
        disk = self.directory / "an image/disk.vhd"
        with mounted(disk) as root:
            command(sys.executable, "-m", "tests.check", root, cwd=ROOT)
        self.add_identity_to(disk)
        self.rehearse(disk, 1)
        with VM(disk, Setup(2)) as vm, vm.boot() as boot:
            self.assertTrue(boot.wait(vm.azure.ready.is_set, RECIPE_TIMEOUT), boot.console)


# This machine's mirror, which may have neither security updates nor debugging symbols.
SOURCES = """\
Types: deb
URIs: {mirror}
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
RUN_MKOSI = """\
mount --bind root root
mount -t proc proc root/proc
for name in dev sys; do mount --rbind /$name root/$name; done
mount -t tmpfs tmpfs root/run
mount --bind -o X-mount.mkdir "$0" "root/a clone"
exec chroot root sh -c 'cd "/a clone/tests/recipes/mkosi" && exec mkosi --force build'
"""


class MkosiTest(RecipeTest):
    def test_disk_provisions_after_presets_that_disable_everything(self) -> None:
        root = self.directory / "root"
        mkosi = image("mkosi", "trixie", ["mkosi", "ca-certificates"])  # Debian 12's is too old
        command("cp", "--archive", "--reflink=auto", mkosi, root)
        command("cp", "/etc/resolv.conf", "/etc/hosts", root / "etc")
        recipe = self.recipes / "mkosi"
        sources = "mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources"
        write(recipe, sources, SOURCES.format(mirror=mirror()[0]))
        isolated = ("unshare", "--mount", "--pid", "--fork", "sh", "-ec", RUN_MKOSI)
        done = attempt(*isolated, self.project, cwd=self.directory)
        self.assertEqual(done.returncode, 0, done.stdout)
        raw = recipe / "build/image.raw"
        command("sh", "-ec", "\n".join(inspect(raw).upload_commands()), cwd=self.directory)
        self.assertEqual(inspect(self.directory / "disk.vhd").obstacle, "")
        command(self.recipes / "vhd.sh", raw)
        disk = recipe / "build/image.vhd"
        self.add_identity_to(disk)
        self.rehearse(disk, 2)
