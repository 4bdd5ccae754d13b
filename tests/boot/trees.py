"""tests.check on real trees: what the tools of distributions make, sound and then broken.

`python3 -m unittest tests.boot.trees`, as root.
"""

import contextlib
import unittest
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Sequence

from azure_provision import UNIT
from tests.boot.container import DBUS, image, write
from tests.boot.host import attempt, command, missing, new_directory, remove_tree, skip_if
from tests.check import problems
from tests.plain.harness import INSTALLER, ROOT

Files = Dict[str, str]

KERNEL = ["linux-image-cloud-amd64"]
NETWORK, NETPLAN = "etc/systemd/network/80-dhcp.network", "etc/netplan/80-dhcp.yaml"
INTERFACES, RULES = "etc/network/interfaces", "etc/udev/rules.d/10-azure-unmanaged-sriov.rules"
PROFILE = "etc/NetworkManager/system-connections/a.nmconnection"
NO_AUTO_DEFAULT = {"etc/NetworkManager/conf.d/a.conf": "[main]\nno-auto-default=*\n"}
SYSLINUX = "boot/syslinux/syslinux.cfg"
BY_DRIVER = "[Match]\nDriver=hv_netvsc virtio_net\n[Network]\nDHCP=yes\n"
RULE = (
    'SUBSYSTEM=="net", ACTION!="remove", DRIVERS=="mana|mlx4_core|mlx5_core", '
    'ATTR{flags}=="0x?[89ABCDEF]??", ENV{ID_NET_MANAGED_BY}="unmanaged", ENV{NM_UNMANAGED}="1"\n'
)
KEYGEN = {
    "etc/systemd/system/ssh.service.d/host-keys.conf": "[Service]\nExecStartPre=\n"
    "ExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n"
}
HELPER = {  # as in Debian's cloud images
    INTERFACES: "auto lo\niface lo inet loopback\nsource-directory /run/network/interfaces.d\n",
    "etc/network/cloud-interfaces-template": "auto $INTERFACE\niface $INTERFACE inet dhcp\n",
    "etc/udev/rules.d/75-cloud-ifupdown.rules": 'SUBSYSTEM=="net", ACTION=="add|remove", '
    'RUN+="/etc/network/cloud-ifupdown-helper"\n',
}


class Broken(NamedTuple):
    """What breaks a sound tree, and what the only problem says."""

    says: str
    files: Files = {}
    run: str = ""  # in a shell whose directory is the tree's root


class Case(NamedTuple):
    """A tree of PACKAGES with these files, which is sound, and ways to break it."""

    packages: Sequence[str]
    files: Files
    broken: Sequence[Broken]
    run: str = ""
    suite: str = "bookworm"


def stanza(text: str) -> Files:
    return {INTERFACES: f"auto lo\niface lo inet loopback\n{text}\n"}


def profile(kind: str, more: str) -> Files:
    text = f"[connection]\nid=a\nuuid=3eb4a1d0-8a5a-4b1e-9c11-6e1c1f9f1b6a\ntype={kind}\n{more}\n"
    return {PROFILE: f"{text}[ipv4]\nmethod=auto\n", **NO_AUTO_DEFAULT}


CASES = {
    "networkd": Case(
        ["udev"],
        {NETWORK: BY_DRIVER, SYSLINUX: "APPEND root=LABEL=root ro console=ttyS0 net.ifnames=0\n"},
        [
            Broken(
                "is for ens3",
                {NETWORK: BY_DRIVER.replace("Driver=hv_netvsc virtio_net", "Name=ens3")},
            ),
            Broken(
                "is for Path=pci-0000:00:03.0",
                {
                    NETWORK: BY_DRIVER.replace(
                        "Driver=hv_netvsc virtio_net", "Path=pci-0000:00:03.0"
                    )
                },
            ),
            Broken(
                "second device",
                {NETWORK: BY_DRIVER.replace("Driver=hv_netvsc virtio_net", "Name=en* eth*")},
            ),
            Broken("is not enabled: no DHCP", run="systemctl --root=. disable systemd-networkd"),
            Broken(
                "only a preset enables systemd-networkd.service",
                run="systemctl --root=. disable systemd-networkd; echo uninitialized >etc/machine-id",
            ),
            Broken("sends no name", {NETWORK: BY_DRIVER + "[DHCPv4]\nSendHostname=no\n"}),
            Broken(
                "does not start multi-user.target",
                run="systemctl --root=. set-default rescue.target",
            ),
            Broken("as on a provisioned VM", run=f"systemctl --root=. disable {UNIT}"),
            Broken("masked", run=f"rm etc/systemd/system/{UNIT}; systemctl --root=. mask {UNIT}"),
            Broken("/usr/bin/python3: no such program", run="rm usr/bin/python3.*"),
            Broken("without console=ttyS0", {SYSLINUX: "APPEND root=LABEL=root ro quiet\n"}),
            Broken(
                "systemd.hostname=a is", {SYSLINUX: "APPEND systemd.hostname=a console=ttyS0\n"}
            ),
        ],
        "systemctl --root=. enable systemd-networkd",
    ),
    "netplan": Case(
        ["netplan.io", "udev", "openssh-server", *KERNEL],
        {
            NETPLAN: "{network: {version: 2, ethernets: {any: {match: {driver: [hv_netvsc, virtio_net]}, dhcp4: true}}}}",
            **KEYGEN,
        },
        [
            Broken(
                "is for enp0s3",
                {NETPLAN: "network:\n  version: 2\n  ethernets:\n    enp0s3:\n      dhcp4: true\n"},
            ),
            Broken(
                "is for macaddress: 00:22:48:12:34:56",
                {
                    NETPLAN: "network:\n  ethernets:\n    eth0:\n      dhcp4: true\n      match:\n        macaddress: 00:22:48:12:34:56\n      set-name: eth0\n"
                },
            ),
            Broken(
                "systemd-networkd.service is masked", run="systemctl --root=. mask systemd-networkd"
            ),
            Broken(
                "nothing that is enabled makes them", run="rm etc/systemd/system/ssh.service.d/*"
            ),
            Broken(
                "ssh_host_ed25519_key: would be shared",
                run="ssh-keygen -q -t ed25519 -N '' -f etc/ssh/ssh_host_ed25519_key",
            ),
            Broken(
                "has no hv_storvsc",
                run="rm lib/modules/*/kernel/drivers/scsi/hv_storvsc.ko; depmod -b . $(ls lib/modules)",
            ),
        ],
    ),
    "NetworkManager": Case(
        ["network-manager"],
        {RULES: RULE},
        [
            Broken("second device", run=f"rm {RULES}"),
            Broken("is for ens192", profile("ethernet", "interface-name=ens192")),
            Broken("there is no profile for eth0", profile("wifi", "[wifi]\nssid=a")),
            Broken(
                "NetworkManager.service is not enabled",
                run="systemctl --root=. disable NetworkManager",
            ),
        ],
    ),
    "ifupdown": Case(
        ["ifupdown", "isc-dhcp-client"],
        stanza("allow-hotplug eth0\niface eth0 inet dhcp"),
        [
            Broken("is for ens3", stanza("allow-hotplug ens3\niface ens3 inet dhcp")),
            Broken("nothing starts eth0", stanza("iface eth0 inet dhcp")),
            Broken(
                "networking.service is not enabled",
                stanza("auto eth0\niface eth0 inet dhcp"),
                "systemctl --root=. disable networking",
            ),
            Broken(
                "always sends the name golden",
                {"etc/dhcp/dhclient.conf": 'send host-name "golden";\n'},
            ),
            Broken(
                "no DHCP client is installed",
                run="dpkg --root=. --force-depends --purge isc-dhcp-client",
            ),
        ],
    ),
    "Debian's cloud image": Case(
        ["ifupdown", "isc-dhcp-client"],
        HELPER,
        [Broken("no DHCP client is enabled", run="rm etc/udev/rules.d/75-*")],
    ),
    "ifupdown with dhcpcd": Case(
        ["ifupdown", "dhcpcd-base", "openssh-server"],
        stanza("auto eth0\niface eth0 inet dhcp"),
        [
            Broken("is for ens3", stanza("auto ens3\niface ens3 inet dhcp")),
            Broken("only runs if /etc/machine-id says uninitialized", {"etc/machine-id": ""}),
        ],
        "echo uninitialized >etc/machine-id",
        "trixie",
    ),
    "dhcpcd, dracut, GRUB": Case(
        ["dhcpcd5", "dracut", "grub-pc", "udev", *KERNEL],
        {},
        [
            Broken("sends no name", run="sed -i '/^hostname$/d' etc/dhcpcd.conf"),
            Broken("no DHCP client is enabled", run="systemctl --root=. disable dhcpcd"),
            Broken("without console=ttyS0", run="sed -i s/console=ttyS0/quiet/ etc/default/grub"),
            Broken(
                "has no hv_netvsc",
                run="rm lib/modules/*/kernel/drivers/net/hyperv/*; depmod -b . $(ls lib/modules)",
            ),
        ],
        "echo hostname >>etc/dhcpcd.conf; sed -i '/^GRUB_CMDLINE_LINUX=/s/\"/\"console=ttyS0 /' etc/default/grub",
    ),
    "agents": Case(
        ["cloud-init", "waagent", "network-manager"],
        {RULES: RULE, "etc/cloud/cloud-init.disabled": ""},
        [
            Broken(
                "cloud-init-local.service: also reports", run="rm etc/cloud/cloud-init.disabled"
            ),
            Broken(
                "systemctl mask walinuxagent",
                run="systemctl --root=. unmask walinuxagent; systemctl --root=. enable walinuxagent",
            ),
        ],
        "systemctl --root=. mask walinuxagent",
    ),
}


class TreesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        skip_if(missing())

    @contextlib.contextmanager
    def tree(self, case: Case) -> Iterator[Path]:
        """A sound tree of CASE: a layer over its image."""
        lower = image("tree", case.suite, [*DBUS, *case.packages])
        directory = new_directory()
        for name in ("upper", "work", "root"):
            (directory / name).mkdir()
        layers = f"lowerdir={lower},upperdir=upper,workdir=work"
        command("mount", "-t", "overlay", "-o", layers, "overlay", "root", cwd=directory)
        root = directory / "root"
        self.change(
            root, {"etc/machine-id": "", **case.files}, f"rm -f etc/ssh/ssh_host_*; {case.run}"
        )
        command(INSTALLER, DESTDIR=root)
        try:
            yield root
        finally:
            remove_tree(directory)

    def change(self, root: Path, files: Files, run: str) -> None:
        for name, text in files.items():
            write(root, name, text, 0o600 if "Manager" in name or "netplan" in name else 0o644)
        command("sh", "-ec", run, cwd=root)

    def test_sound_trees_get_no_line_and_each_fault_gets_one(self) -> None:
        for name, case in CASES.items():
            with self.subTest(name):
                with self.tree(case) as root:
                    self.assertEqual(problems(str(root)), [])
                for broken in case.broken:
                    with self.subTest(name, broken=broken), self.tree(case) as root:
                        self.change(root, broken.files, broken.run)
                        (problem,) = problems(str(root))
                        self.assertIn(broken.says, problem)

    def test_a_user_who_cannot_read_a_profile_is_told(self) -> None:
        with self.tree(CASES["NetworkManager"]) as root:
            self.change(root, profile("ethernet", ""), "")
            nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
            done = attempt(*nobody, "/usr/bin/python3", "-B", "-m", "tests.check", root, cwd=ROOT)
        self.assertEqual(done.returncode, 1)
        self.assertIn(
            f"/{PROFILE}: cannot be read, so it was not checked: run it as root", done.stdout
        )
