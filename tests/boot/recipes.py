"""The recipes in tests/recipes, run as they are, up to VMs that provision.

`python3 -m unittest tests.boot.recipes`, as root; BOOT_FIGURES is a file for what the VMs say.
They run in a copy of this repository, in a directory with a space in its name.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, List, Sequence

from azure_provision import UNIT
from tests.boot.container import add_service, image, mirror, write
from tests.boot.disk import Tree
from tests.boot.host import attempt, command, note, skip_if, which
from tests.boot.in_a_vm import VMTest
from tests.boot.network import Namespace
from tests.plain.harness import ROOT
from tests.vm import VM, Setup, split_options

TIMEOUT = 600  # seconds, for what a VM does under emulation

# What such a VM on Azure has: Debian's cloud-init and waagent, which the recipe removes.
AGENTS = ("cloud-init", "waagent", "netplan.io", "isc-dhcp-client", "openssh-server")

RECIPES = "tests/recipes"
RULE = "etc/udev/rules.d/68-azure-sriov-unmanaged.rules"

# What no two VMs of an image may share: the machine-id and the host keys. And what has failed.
IDENTITY = """\
keys=$(for key in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -lf "$key"; done | cut -d " " -f 2)
echo $({login} cat /etc/machine-id) $keys, failed: $(systemctl list-units --failed --no-legend)
"""
# The user of the image logs in.
LOGIN = (
    "ssh -i /usr/local/key -o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR"
    " azureuser@localhost sudo"
)


def copy_project(directory: Path) -> Path:
    """A copy of this repository in DIRECTORY, with a key, whose private half is DIRECTORY/key."""
    project = directory / "azure provision"
    hidden = shutil.ignore_patterns(".*", "build", "__pycache__")
    shutil.copytree(str(ROOT), str(project), ignore=hidden)
    command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "key")
    shutil.copy(str(directory / "key.pub"), str(project / RECIPES / "authorized_keys"))
    return project


def identities(console: str) -> List[List[str]]:
    """Those that were said on the console, one of each boot."""
    said = re.findall(r"identity\[\d+\]: (\w+(?: SHA256:\S+)+), failed: *\n", console)
    return [identity.split() for identity in said]


def add_identity_service(root: Path, login: str = "") -> None:
    """Have it say who it is before the login prompt, which tests.rehearse awaits."""
    write(root, "etc/systemd/system-preset/00-identity.preset", "enable identity.service\n")
    script = IDENTITY.format(login=login)
    add_service(root, "identity", script, after="ssh.service", before="serial-getty@ttyS0.service")


@contextlib.contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    """Mount the last partition of DISK, its root, beside it."""
    root = disk.with_name("mounted")
    root.mkdir()
    table = json.loads(command("sfdisk", "--json", disk))["partitiontable"]
    start = table["partitions"][-1]["start"] * table.get("sectorsize", 512)
    command("mount", "-o", f"loop,offset={start}", disk, root)
    try:
        yield root
    finally:
        command("umount", root)


class ImageTest(VMTest):
    """A recipe that makes an image."""

    def setUp(self) -> None:
        super().setUp()
        self.started = time.monotonic()
        self.addCleanup(lambda: self.figure("all"))
        self.project = copy_project(self.directory)

    def figure(self, what: str) -> None:
        note(
            f"{self.id().rsplit('.', 1)[-1]}: {what} after {time.monotonic() - self.started:.0f} s"
        )

    def add_identity_to(self, disk: Path) -> None:
        with mounted(disk) as root:
            add_identity_service(root, LOGIN)
            shutil.copy(str(self.directory / "key"), str(root / "usr/local/key"))

    def rehearse(self, disk: Path, generation: int, builder: Sequence[str] = ()) -> None:
        """DISK provisions, and each VM of it has an identity of its own, and keeps it."""
        self.figure("built")
        console = self.directory / "console"
        options = (f"--generation={generation}", f"--timeout={TIMEOUT}", f"--console={console}")
        done = attempt(sys.executable, "-m", "tests.rehearse", disk, *options, cwd=ROOT)
        note(done.stdout)
        said = console.read_text(encoding="utf-8")
        self.assertEqual(done.returncode, 0, f"{done.stdout}\n{said}")
        self.assertEqual(len(identities(said)), 3, said)
        first, second, again = identities(said)
        self.assertEqual(second, again)
        everything = [*first, *second, *builder]
        self.assertEqual(len(set(everything)), len(everything), everything)


class PackerTest(ImageTest):
    """Packer, in a container of Debian that stands for the VM."""

    def setUp(self) -> None:
        skip_if([] if which("packer") else ["packer"])
        super().setUp()
        self.tree = Tree(self.directory, ("python3", "sudo", *AGENTS))
        command("chroot", self.tree.root, "useradd", "--create-home", "packer")
        keys = (self.directory / "key.pub").read_text(encoding="utf-8")
        self.tree.write("home/packer/.ssh/authorized_keys", keys)
        self.tree.write("etc/sudoers.d/packer", "packer ALL=(ALL) NOPASSWD: ALL\n")
        self.network = Namespace()
        self.addCleanup(self.network.remove)

    def container(self, line: str) -> List[str]:
        """Run a line of shell in the tree."""
        return [
            *("systemd-nspawn", "--quiet", "--pipe", "--register=no", "--keep-unit"),
            *(f"--machine={self.directory.name}", f"--directory={self.tree.root}"),
            *(
                f"--bind={self.project}:/srv/project",
                f"--network-namespace-path={self.network.path}",
            ),
            *("--kill-signal=SIGKILL", "/bin/sh", "-c", line),
        ]

    def packer(self) -> "subprocess.CompletedProcess[str]":
        line = "mkdir -p /run/sshd && exec /usr/sbin/sshd -D"
        with subprocess.Popen(self.container(line), stderr=subprocess.DEVNULL) as machine:
            try:
                template = self.project / RECIPES / "packer.pkr.hcl"
                build = ("packer", "build", "-color=false", "-only=null.*", template)
                return attempt(
                    *("ip", "netns", "exec", self.network.name, "ssh-agent", "sh", "-ec"),
                    *('ssh-add "$0" && exec "$@"', self.directory / "key", *build),
                    CHECKPOINT_DISABLE=1,
                )
            finally:
                machine.terminate()

    def assert_sound(self, said: str) -> None:
        found = attempt(sys.executable, "-m", "tests.check", self.tree.root, cwd=ROOT)
        self.assertEqual(found.returncode, 0, f"{found.stdout}\n{said}")
        root = self.tree.root
        self.assertEqual(list(root.glob("etc/ssh/ssh_host_*")), [])
        self.assertEqual((root / "etc/machine-id").read_text(), "")

    def test_installer_that_refuses_fails_the_build(self) -> None:
        self.tree.systemctl("mask", UNIT)
        done = self.packer()
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertRegex(done.stdout, "install.sh: .* masked")

    def test_image_is_sound_and_so_is_that_of_its_vm(self) -> None:
        command(
            "packer", "validate", self.project / RECIPES / "packer.pkr.hcl", CHECKPOINT_DISABLE=1
        )
        root = self.tree.root
        done = self.packer()
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assert_sound(done.stdout)
        self.assertTrue((root / RULE).exists())
        users = (root / "etc/passwd").read_text()
        self.assertNotIn("packer", users)
        self.assertIn("azureuser", users)
        self.assertFalse((root / "root/azure-provision").exists())

        first_boot = f"systemctl disable {UNIT} && ssh-keygen -A && systemd-machine-id-setup"
        command(*self.container(first_boot))
        found = attempt(sys.executable, "-m", "tests.check", root, cwd=ROOT)
        self.assertEqual(found.returncode, 1, found.stdout)
        self.assert_sound(command(*self.container(f"/srv/project/{RECIPES}/live.sh")))


# On Azure, and nothing that only takes time: neither mirrors nor locales.
CLOUD_INIT = """\
datasource_list: [ Azure ]
cloud_config_modules: []
cloud_final_modules: []
"""
# On the builder, once cloud-init is done: what an engineer would do who is logged in. Then its
# interface becomes a slave, as that of accelerated networking is, and the rule's driver is QEMU's.
BUILD = f"""\
cat /etc/netplan/50-cloud-init.yaml
"/srv/azure provision/{RECIPES}/live.sh"
echo "recipe: status $?"
systemctl --quiet disable build.service
rm -rf /srv/azure* /usr/local/build /etc/systemd/system/build.service
sync
sed s/mana/virtio_net/ /{RULE} >/run/udev/rules.d/68-test.rules
interface=$(basename $(ls -d /sys/class/net/en*))
properties() {{ udevadm test /sys/class/net/$interface 2>&1 | grep -c UNMANAGED; }}
echo "properties before: $(properties)"
ip link add bond0 type bond && ip link set $interface down && ip link set $interface master bond0
echo "properties of a slave: $(properties)"
systemctl poweroff
"""


class LiveTest(ImageTest):
    def test_vm_of_cloud_init_becomes_an_image_whose_vms_provision(self) -> None:
        tree = Tree(self.directory / "tree", ("python3", "sudo", *AGENTS))
        tree.write("etc/cloud/cloud.cfg.d/90-azure.cfg", CLOUD_INIT)
        add_identity_service(tree.root)
        agents = "cloud-final.service walinuxagent.service identity.service"
        add_service(tree.root, "build", BUILD, after=f"multi-user.target {agents}")
        shutil.copytree(str(self.project), str(tree.root / "srv" / self.project.name))

        disk = self.directory / "image.qcow2"
        with VM(tree.disk(), number=7) as vm, vm.boot() as boot:
            self.assertTrue(boot.wait(boot.off.is_set, TIMEOUT), boot.console)
            self.assertTrue(vm.azure.ready.is_set(), boot.console)
            self.assertRegex(boot.console, f'macaddress: "?{vm.mac}')
            self.assertIn("recipe: status 0", boot.console)
            self.assertIn("properties before: 0", boot.console)
            self.assertIn("properties of a slave: 3", boot.console)
            (builder,) = identities(boot.console)
            source = [f"driver=qcow2,file.filename={vm.path('disk')}"]
            source += [f"backing.{option}" for option in split_options(vm.image.options)]
            command("qemu-img", "convert", "--image-opts", ",".join(source), "-O", "qcow2", disk)
        self.rehearse(disk, 1, builder)


class MmdebstrapTest(ImageTest):
    def test_disk_provisions_and_boots_in_both_generations(self) -> None:
        out = self.directory / "out"
        command(self.project / RECIPES / "mmdebstrap.sh", out)
        disk = out / "disk.vhd"
        self.add_identity_to(disk)
        self.rehearse(disk, 1)
        with VM(disk, Setup(2)) as vm, vm.boot() as boot:
            self.assertTrue(boot.wait(vm.azure.ready.is_set, TIMEOUT), boot.console)


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
mount --rbind /sys root/sys
mount --rbind /dev root/dev
mount -t tmpfs tmpfs root/run
mkdir root/work
mount --bind "$0" root/work
exec chroot root sh -c 'cd "/work/tests/recipes/mkosi" && exec mkosi build'
"""


class MkosiTest(ImageTest):
    """With the mkosi of Debian 13."""

    def test_disk_provisions_although_presets_disable_everything(self) -> None:
        root = self.directory / "root"
        mkosi = image("mkosi", "trixie", ["mkosi", "ca-certificates"])
        command("cp", "--archive", "--reflink=auto", mkosi, root)
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", str(root / "etc"))
        recipe = self.project / RECIPES / "mkosi"
        # This machine's mirror may be without security updates.
        sources = "mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources"
        write(recipe, sources, SOURCES.format(mirror=mirror()[0]))
        # As Fedora and RHEL have it. mkosi applies the presets after its postinst.
        presets = "mkosi.extra/usr/lib/systemd/system-preset/99-default.preset"
        write(recipe, presets, "disable *\n")
        isolated = ("unshare", "--mount", "--pid", "--fork")
        done = attempt(*isolated, "sh", "-ec", RUN_MKOSI, self.project, cwd=self.directory)
        self.assertEqual(done.returncode, 0, done.stdout)
        command(self.project / RECIPES / "vhd.sh", recipe / "build/image.raw")
        disk = recipe / "build/image.vhd"
        self.add_identity_to(disk)
        self.rehearse(disk, 2)
