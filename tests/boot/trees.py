"""tests.check on real trees: what the tools of a distribution make, sound and then broken.

`python3 -m unittest tests.boot.trees`, as root.
"""

import contextlib
import unittest
from pathlib import Path
from typing import Dict, Iterator, NamedTuple

from azure_provision import UNIT
from tests.boot.container import DBUS, image
from tests.boot.host import command, missing, new_directory, remove_tree, skip_if
from tests.check import problems
from tests.plain.harness import INSTALLER


class TreeCase(NamedTuple):
    """The packages of an image, of which the first is its variant, and what makes it sound.

    BROKEN has what breaks it, in shell, by the only problem that there is then.
    """

    packages: str
    sound: str
    broken: Dict[str, str]
    suite: str = "bookworm"


NETWORK, SYSLINUX = "etc/systemd/network/80-dhcp.network", "boot/syslinux/syslinux.cfg"
NETPLAN, INTERFACES = "etc/netplan/80-dhcp.yaml", "etc/network/interfaces"
PROFILE = "etc/NetworkManager/system-connections/a.nmconnection"
RULES, SSH = "etc/udev/rules.d/10-azure.rules", "etc/systemd/system/ssh.service.d"
MAC = "00:22:48:12:34:56"
DISABLE, MASK = "systemctl --root=. disable", "systemctl --root=. mask"
BY_DRIVER = f"""
printf 'network:\\n  ethernets:\\n    any:\\n      dhcp4: true\\n      match:\\n' >{NETPLAN}
echo '        driver: [hv_netvsc, virtio_net]' >>{NETPLAN}
"""
ONLY_PROFILE = f"""
printf '[main]\\nno-auto-default=*\\n' >etc/NetworkManager/conf.d/a.conf
install -m 600 /dev/null {PROFILE}
printf '[connection]\\nid=a\\ntype=%b\\n[ipv4]\\nmethod=auto\\n' >{PROFILE} """


# Shell functions that take the words after them.
STANZA = f'stanza() {{ printf "$1 $2\\niface $2 inet dhcp\\n" >{INTERFACES}; }}; stanza'
LOSE = "lose() { rm lib/modules/*/kernel/drivers/$1.ko; depmod -b . $(ls lib/modules); }; lose"


TREE_CASES = [
    TreeCase(
        "plain",
        f"""
        systemctl --root=. enable systemd-networkd
        printf '[Match]\\nDriver=hv_netvsc virtio_net\\n[Network]\\nDHCP=yes\\n' >{NETWORK}
        mkdir -p boot/syslinux && echo APPEND root=LABEL=root ro console=ttyS0 >{SYSLINUX}
        """,
        {
            f"/{NETWORK}: is for ens3": f"sed -i s/Driver=.*/Name=ens3/ {NETWORK}",
            f"/{NETWORK}: is for Path=pci-0:3": f"sed -i s/Driver=.*/Path=pci-0:3/ {NETWORK}",
            f"/{NETWORK}: is for MACAddress=": f"sed -i s/Driver=.*/MACAddress={MAC}/ {NETWORK}",
            f"/{NETWORK}: is also for the second": f"sed -i 's/Driver=.*/Name=en* eth*/' {NETWORK}",
            f"/{NETWORK}: sends no": f"printf '[DHCPv4]\\nSendHostname=no\\n' >>{NETWORK}",
            "systemd-networkd.service is not enabled": f"{DISABLE} systemd-networkd",
            "only a preset": f"{DISABLE} systemd-networkd; echo uninitialized >etc/machine-id",
            "does not start multi-user.target": "systemctl --root=. set-default rescue.target",
            f"/{UNIT}: {UNIT} is not enabled, as on a provisioned VM": f"{DISABLE} {UNIT}",
            f"/{UNIT}: masked": f"rm etc/systemd/system/{UNIT} && {MASK} {UNIT}",
            "/usr/bin/python3: no such program": "rm usr/bin/python3.*",
            f"/{SYSLINUX}: without console=ttyS0": f"sed -i s/console=.*/quiet/ {SYSLINUX}",
            f"/{SYSLINUX}: systemd.hostname=a": f"sed -i s/$/\\ systemd.hostname=a/ {SYSLINUX}",
        },
    ),
    TreeCase(
        "netplan openssh-server linux-image-cloud-amd64",
        f"{BY_DRIVER} mkdir {SSH}; echo '[Service]\nExecStartPre=ssh-keygen -A' >{SSH}/a.conf",
        {
            f"/{NETPLAN}: is for enp0s3": f"sed -i '/match/,$d; s/any:/enp0s3:/' {NETPLAN}",
            f"is for macaddress: {MAC}": f"sed -i 's/driver.*/macaddress: {MAC}/' {NETPLAN}",
            "systemd-networkd.service is masked": f"{MASK} systemd-networkd",
            "nobody can log in (nothing": f"rm {SSH}/*",
            "/etc/ssh/ssh_host_ecdsa_key: would be shared": "chroot . /usr/bin/ssh-keygen -A",
            "no hv_storvsc": f"{LOSE} scsi/hv_storvsc",
        },
    ),
    TreeCase(
        "network-manager",
        f"""echo 'DRIVERS=="mana|mlx5_core", ENV{{NM_UNMANAGED}}="1"' >{RULES}""",
        {
            "NetworkManager.conf: is also for the second device": f"rm {RULES}",
            "there is no profile for eth0": f"{ONLY_PROFILE} wifi",
            f"/{PROFILE}: is for ens192": f"{ONLY_PROFILE} 'ethernet\\ninterface-name=ens192'",
            "the name golden": f"{ONLY_PROFILE} ethernet; echo dhcp-hostname=golden >>{PROFILE}",
            "NetworkManager.service is not enabled": f"{DISABLE} NetworkManager",
        },
    ),
    TreeCase(
        "ifupdown",
        f"{STANZA} allow-hotplug eth0",
        {
            f"/{INTERFACES}: is for ens3": f"{STANZA} allow-hotplug ens3",
            f"/{INTERFACES}: nothing starts eth0": f"{STANZA} '#' eth0",
            "networking.service is not enabled": f"{STANZA} auto eth0; {DISABLE} networking",
            "always sends the name a,": "echo send host-name '\"a\";' >etc/dhcp/dhclient.conf",
            "no DHCP client is installed": "rm sbin/dhclient",
        },
    ),
    TreeCase(  # as Debian's cloud image
        "ifupdown",
        f"""
        mkdir -p etc/udev/rules.d
        echo source-directory /run/network/interfaces.d >{INTERFACES}
        echo 'RUN+="/etc/network/cloud-ifupdown-helper"' >etc/udev/rules.d/75-cloud-ifupdown.rules
        """,
        {"no DHCP client is enabled": "rm etc/udev/rules.d/75-*"},
    ),
    TreeCase(
        "trees ifupdown dhcpcd-base openssh-server",
        f"{STANZA} auto eth0; echo uninitialized >etc/machine-id",
        {"only runs if /etc/machine-id says uninitialized": ": >etc/machine-id"},
        "trixie",
    ),
    TreeCase(
        "trees dhcpcd5 dracut grub-pc linux-image-cloud-amd64",
        """
        echo hostname >>etc/dhcpcd.conf
        sed -i '/^GRUB_CMDLINE_LINUX=/s/""/"console=ttyS0"/' etc/default/grub
        """,
        {
            "(there is no `hostname` in dhcpcd.conf)": "sed -i /^hostname/d etc/dhcpcd.conf",
            "no DHCP client is enabled": f"{DISABLE} dhcpcd",
            "/etc/default/grub: without console=ttyS0": "sed -i s/ttyS0/tty0/ etc/default/grub",
            "no hv_netvsc": f"{LOSE} net/hyperv/hv_netvsc",
        },
    ),
    TreeCase(
        "netplan cloud-init waagent",
        f"{BY_DRIVER} touch etc/cloud/cloud-init.disabled; {MASK} walinuxagent",
        {
            "/cloud-init-local.service: also reports": "rm etc/cloud/cloud-init.disabled",
            "systemctl mask walinuxagent.service": "rm etc/systemd/system/walinuxagent.service",
        },
    ),
]


# What tests.check says of trees that tests.boot.rehearsals boots, by the name of what makes them.
REHEARSED = {
    "sound": r"\A\Z",
    "names_eth0": r"\A\Z",  # on Azure it does
    "extensions": r"\A\Z",
    "bound_to_mac_address": "is for MACAddress=",
    "bound_to_ens3": "is for ens3",
    "no_dhcp_client": "no DHCP client is enabled",
    "names_vda": "/etc/fstab: /dev/vda1 is the builder's disk",
    "not_enabled": f"{UNIT} is not enabled",
    "python_minimal": "http/client.py: missing",
    "two_agents": "also reports to Azure",
}


class TreesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        skip_if(missing())

    @contextlib.contextmanager
    def tree(self, case: TreeCase) -> Iterator[Path]:
        """A sound tree of CASE: a layer over its image."""
        directory = new_directory()
        for name in ("upper", "work", "root"):
            (directory / name).mkdir()
        variant, *others = case.packages.split()
        others = [*DBUS, *others] if variant == "trees" else others
        (directory / "image").symlink_to(image(variant, case.suite, others))
        layers = "lowerdir=image,upperdir=upper,workdir=work"
        command("mount", "-t", "overlay", "-o", layers, "overlay", "root", cwd=directory)
        root = directory / "root"
        clean = "rm -f etc/ssh/ssh_host_*; : >etc/machine-id"
        command("sh", "-ec", f"{clean}; {case.sound}", cwd=root)
        command(INSTALLER, DESTDIR=root)
        try:
            yield root
        finally:
            remove_tree(directory)

    def test_sound_trees_get_no_line_and_each_fault_gets_one(self) -> None:
        for case in TREE_CASES:
            with self.subTest(case.packages), self.tree(case) as root:
                self.assertEqual(problems(str(root)), [])
            for says, breaks in case.broken.items():
                with self.subTest(case.packages, breaks=breaks), self.tree(case) as root:
                    command("sh", "-ec", breaks, cwd=root)
                    (problem,) = problems(str(root))
                    self.assertIn(says, problem)
