"""tests.check on real trees: what the tools of a distribution make, sound and then broken.

`python3 -m unittest tests.boot.trees`, as root.
"""

import contextlib
import unittest
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

from azure_provision import UNIT
from tests.boot.container import DBUS, image
from tests.boot.host import attempt, command, missing, new_directory, remove_tree, skip_if
from tests.check import problems
from tests.plain.harness import INSTALLER, ROOT


class Case(NamedTuple):
    """An image with these other packages that SOUND makes sound, in shell.

    BROKEN has for the only problem of each broken tree what breaks it, in shell.
    """

    variant: str
    others: List[str]
    sound: str
    broken: Dict[str, str]
    suite: str = "bookworm"


NETWORK, SYSLINUX = "etc/systemd/network/80-dhcp.network", "boot/syslinux/syslinux.cfg"
NETPLAN = "etc/netplan/80-dhcp.yaml"
INTERFACES = "etc/network/interfaces"
PROFILE = "etc/NetworkManager/system-connections/a.nmconnection"
RULES = "etc/udev/rules.d/10-azure-unmanaged-sriov.rules"
MAC = "00:22:48:12:34:56"
DISABLE, MASK = "systemctl --root=. disable", "systemctl --root=. mask"
BY_DRIVER = f"""
echo '{{network: {{version: 2, ethernets: {{any: {{' \\
    'match: {{driver: [hv_netvsc, virtio_net]}}, dhcp4: true}}}}}}}}' >{NETPLAN}
"""
UNMANAGED = f"""
echo 'SUBSYSTEM=="net", ACTION!="remove", DRIVERS=="mana|mlx4_core|mlx5_core",' \\
    'ATTR{{flags}}=="0x?[89ABCDEF]??", ENV{{NM_UNMANAGED}}="1"' >{RULES}
"""
ONLY_PROFILE = f"""
printf '[main]\\nno-auto-default=*\\n' >etc/NetworkManager/conf.d/a.conf
printf '[connection]\\nid=a\\ntype=%b\\n[ipv4]\\nmethod=auto\\n' >{PROFILE} """


def stanza(name: str, start: str = "allow-hotplug") -> str:
    return f"printf '{start} {name}\\niface {name} inet dhcp\\n' >{INTERFACES}"


def lose_driver(path: str) -> str:
    return f"rm lib/modules/*/kernel/drivers/{path}.ko && depmod --basedir . $(ls lib/modules)"


CASES = {
    "networkd": Case(
        "plain",
        [],
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
            "only a preset enables systemd-networkd.service": f"""
                {DISABLE} systemd-networkd && echo uninitialized >etc/machine-id""",
            "does not start multi-user.target": "systemctl --root=. set-default rescue.target",
            f"/{UNIT}: {UNIT} is not enabled, as on a provisioned VM": f"{DISABLE} {UNIT}",
            f"/{UNIT}: masked": f"rm etc/systemd/system/{UNIT} && {MASK} {UNIT}",
            "/usr/bin/python3: no such program": "rm usr/bin/python3.*",
            f"/{SYSLINUX}: without console=ttyS0": f"sed -i s/console=.*/quiet/ {SYSLINUX}",
            f"/{SYSLINUX}: systemd.hostname=a": f"sed -i s/$/\\ systemd.hostname=a/ {SYSLINUX}",
        },
    ),
    "netplan, initramfs-tools, openssh": Case(
        "netplan",
        ["openssh-server", "linux-image-cloud-amd64"],
        f"""
        {BY_DRIVER}
        mkdir etc/systemd/system/ssh.service.d
        printf '[Service]\\nExecStartPre=\\nExecStartPre=/usr/bin/ssh-keygen -A\\n' \\
            >etc/systemd/system/ssh.service.d/host-keys.conf
        """,
        {
            f"/{NETPLAN}: is for enp0s3": f"""
                printf 'network:\\n  ethernets:\\n    enp0s3:\\n      dhcp4: true\\n' >{NETPLAN}""",
            f"/{NETPLAN}: is for macaddress: {MAC}": f"""
                printf 'network:\\n  ethernets:\\n    eth0:\\n      match:\\n' >{NETPLAN}
                printf '        macaddress: {MAC}\\n      dhcp4: true\\n' >>{NETPLAN}""",
            "systemd-networkd.service is masked": f"{MASK} systemd-networkd",
            "nobody can log in (nothing": "rm etc/systemd/system/ssh.service.d/host-keys.conf",
            "/etc/ssh/ssh_host_ecdsa_key: would be shared": "chroot . /usr/bin/ssh-keygen -A",
            "no hv_storvsc": lose_driver("scsi/hv_storvsc"),
        },
    ),
    "NetworkManager": Case(
        "network-manager",
        [],
        UNMANAGED,
        {
            "NetworkManager.conf: is also for the second device": f"rm {RULES}",
            "there is no profile for eth0": f"{ONLY_PROFILE} wifi",
            f"/{PROFILE}: is for ens192": f"{ONLY_PROFILE} 'ethernet\\ninterface-name=ens192'",
            f"/{PROFILE}: always sends the name golden": f"""
                {ONLY_PROFILE} ethernet && echo dhcp-hostname=golden >>{PROFILE}""",
            "NetworkManager.service is not enabled": f"{DISABLE} NetworkManager",
        },
    ),
    "ifupdown with dhclient": Case(
        "ifupdown",
        [],
        stanza("eth0"),
        {
            f"/{INTERFACES}: is for ens3": stanza("ens3"),
            f"/{INTERFACES}: nothing starts eth0": stanza("eth0", "#"),
            "networking.service is not enabled": f"{stanza('eth0', 'auto')}; {DISABLE} networking",
            "always sends the name a,": "echo send host-name '\"a\";' >etc/dhcp/dhclient.conf",
            "no DHCP client is installed": "rm sbin/dhclient",
        },
    ),
    "ifupdown in Debian's cloud image": Case(
        "ifupdown",
        [],
        f"""
        mkdir -p etc/udev/rules.d
        echo source-directory /run/network/interfaces.d >{INTERFACES}
        echo 'SUBSYSTEM=="net", RUN+="/etc/network/cloud-ifupdown-helper"' \\
            >etc/udev/rules.d/75-cloud-ifupdown.rules
        """,
        {"no DHCP client is enabled": "rm etc/udev/rules.d/75-*"},
    ),
    "ifupdown with dhcpcd, openssh": Case(
        "trees",
        [*DBUS, "ifupdown", "dhcpcd-base", "openssh-server"],
        f"{stanza('eth0', 'auto')}; echo uninitialized >etc/machine-id",
        {
            f"/{INTERFACES}: is for ens3": stanza("ens3", "auto"),
            "only runs if /etc/machine-id says uninitialized": ": >etc/machine-id",
        },
        "trixie",
    ),
    "dhcpcd, dracut, GRUB": Case(
        "trees",
        [*DBUS, "dhcpcd5", "dracut", "grub-pc", "linux-image-cloud-amd64"],
        """
        echo hostname >>etc/dhcpcd.conf
        sed -i '/^GRUB_CMDLINE_LINUX=/s/""/"console=ttyS0"/' etc/default/grub
        """,
        {
            "(there is no `hostname` in dhcpcd.conf)": "sed -i /^hostname/d etc/dhcpcd.conf",
            "no DHCP client is enabled": f"{DISABLE} dhcpcd",
            "/etc/default/grub: without console=ttyS0": "sed -i s/ttyS0/tty0/ etc/default/grub",
            "no hv_netvsc": lose_driver("net/hyperv/hv_netvsc"),
        },
    ),
    "agents": Case(
        "netplan",
        ["cloud-init", "waagent"],
        f"{BY_DRIVER} touch etc/cloud/cloud-init.disabled; {MASK} walinuxagent",
        {
            "/cloud-init-local.service: also reports": "rm etc/cloud/cloud-init.disabled",
            "systemctl mask walinuxagent.service": "rm etc/systemd/system/walinuxagent.service",
        },
    ),
}


# What tests.check says of trees that tests.boot.rehearsals boots, by the name of what makes them.
REHEARSED = {
    "sound": r"\A\Z",
    "names_eth0": r"\A\Z",  # on Azure it does
    "bound_to_mac_address": "is for MACAddress=",
    "bound_to_ens3": "is for ens3",
    "no_dhcp_client": "no DHCP client is enabled",
    "not_enabled": f"{UNIT} is not enabled",
    "python_minimal": "http/client.py: missing",
    "two_agents": "also reports to Azure",
}


class TreesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        skip_if(missing())

    @contextlib.contextmanager
    def tree(self, case: Case) -> Iterator[Path]:
        """A sound tree of CASE: a layer over its image."""
        directory = new_directory()
        for name in ("upper", "work", "root"):
            (directory / name).mkdir()
        (directory / "image").symlink_to(image(case.variant, case.suite, case.others))
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
        for name, case in CASES.items():
            with self.subTest(name), self.tree(case) as root:
                self.assertEqual(problems(str(root)), [])
            for says, breaks in case.broken.items():
                with self.subTest(name, breaks=breaks), self.tree(case) as root:
                    command("sh", "-ec", breaks, cwd=root)
                    (problem,) = problems(str(root))
                    self.assertIn(says, problem)

    def test_a_user_who_cannot_read_a_profile_is_told(self) -> None:
        with self.tree(CASES["NetworkManager"]) as root:
            command("sh", "-ec", f"{ONLY_PROFILE} ethernet; chmod 600 {PROFILE}", cwd=root)
            nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
            done = attempt(*nobody, "/usr/bin/python3", "-B", "-m", "tests.check", root, cwd=ROOT)
        self.assertEqual(done.returncode, 1)
        self.assertIn(f"/{PROFILE}: cannot be read, so it was not checked: run it", done.stdout)
