"""tests.check on small trees: each stands for a distribution, sound and then broken in one way."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, List, Tuple

from azure_provision import UNIT
from tests.check import problems
from tests.plain.harness import ROOT, SCRIPT, UNIT_FILE

Files = Dict[str, str]  # path: content, or "-> target" for a symlink; "" removes it

SYSTEM, LIB = "etc/systemd/system", "usr/lib/systemd/system"
WANTS = f"{SYSTEM}/multi-user.target.wants"
LINK, DROP_IN = f"{WANTS}/{UNIT}", f"{SYSTEM}/{UNIT}.d/a.conf"
MAC = "00:22:48:AA:bb:cc"
NETWORK, NETPLAN = "etc/systemd/network/10-a.network", "etc/netplan/a.yaml"
NM_CONF, NM_LIB = "etc/NetworkManager/conf.d/a.conf", "usr/lib/NetworkManager/conf.d/a.conf"
PROFILE = "etc/NetworkManager/system-connections/Wired connection 1.nmconnection"
IFCFG, SUSE = "etc/sysconfig/network-scripts/ifcfg-eth0", "etc/sysconfig/network/ifcfg-eth0"
INTERFACES, RULES = "etc/network/interfaces", "etc/udev/rules.d/70-a.rules"
MODULES, GRUB = "usr/lib/modules/6.1/modules.dep", "boot/grub/grub.cfg"
EMPTY = "# nothing\n"  # in the tree, as "" removes a file
SYSTEM_UNIT, SCRIPT_PATH = f"{SYSTEM}/{UNIT}", "usr/local/sbin/azure_provision.py"
ENABLED, GENERATOR = (
    f"{WANTS}/systemd-networkd.service",
    "usr/lib/systemd/system-generators/netplan",
)
CLOUD, CLOUD_INIT = "etc/cloud/cloud-init.disabled", f"{LIB}/cloud-init-local.service"
WAAGENT = {"etc/waagent.conf": "Provisioning.Agent=auto\n"}
BUILTIN = MODULES.replace("dep", "builtin")

RULE = (
    'SUBSYSTEM=="net", DRIVERS=="mana|mlx4_core|mlx5_core", ENV{ID_NET_MANAGED_BY}="unmanaged", '
    'ENV{NM_UNMANAGED}="1"\n'
)


def service(name: str, command: str = "/bin/true", more: str = "", wants: str = WANTS) -> Files:
    """A unit that is enabled."""
    unit = (
        f"[Unit]\n{more}\n[Service]\nExecStart={command}\n[Install]\nWantedBy=multi-user.target\n"
    )
    return {f"{LIB}/{name}": unit, f"{wants}/{name}": f"-> /{LIB}/{name}"}


# What all images have.
SYSTEMD: Files = {
    "usr/lib/systemd/systemd": "\x7fELF",
    f"{LIB}/default.target": "-> graphical.target",
    f"{LIB}/graphical.target": "[Unit]\nRequires=multi-user.target\n",
    f"{LIB}/multi-user.target": "[Unit]\nRequires=basic.target\n",
    f"{LIB}/basic.target": "[Unit]\nWants=sockets.target\n",
    "lib": "-> usr/lib",
    "etc/machine-id": "\n",
    "usr/bin/python3": "-> /etc/alternatives/python3",
    "etc/alternatives/python3": "-> /usr/bin/python3.9",
    "usr/bin/python3.9": "#!",
    "usr/lib64/python3.9/os.py": EMPTY,
    "usr/lib64/python3.9/http/client.py": EMPTY,
    "usr/lib64/python3.9/xml/etree/ElementTree.py": EMPTY,
    SYSTEM_UNIT: UNIT_FILE.read_text(encoding="utf-8"),
    LINK: f"-> /{SYSTEM_UNIT}",
    SCRIPT_PATH: SCRIPT.read_text(encoding="utf-8"),
}
HOME = {
    "usr/local": "-> ../home/me",
    f"home/me/sbin/{SCRIPT.name}": SYSTEMD[SCRIPT_PATH],
    SCRIPT_PATH: "",
}

NETWORKD: Files = {
    **service("systemd-networkd.service"),
    NETWORK: "[Match]\nDriver=hv_netvsc virtio_net\n[Network]\nDHCP=yes\n",
    f"{LIB[:-6]}network/80-container-host0.network": "[Match]\nName=host0\nVirtualization=container\n"
    "[Network]\nDHCP=yes\n",
}
UBUNTU: Files = {
    f"{LIB}/systemd-networkd.service": "[Service]\n",
    "usr/lib/systemd/system-generators/netplan": "#!",
    NETPLAN: "network:\n  version: 2\n  ethernets:\n    any:\n      match:\n        driver: hv_netvsc\n"
    "      dhcp4: true # any\n",
    **service("ssh.socket", wants=f"{SYSTEM}/sockets.target.wants"),
    f"{LIB}/ssh.service": "[Service]\nExecStartPre=/usr/bin/ssh-keygen -A\n",
    f"{LIB}/sockets.target": EMPTY,
    GRUB: "menuentry a {\n\tlinux\t/vmlinuz root=LABEL=root ro net.ifnames=0 console=ttyS0\n}\n",
    MODULES: "kernel/net/hv_netvsc.ko.zst: a.ko\nkernel/scsi/hv_storvsc.ko.zst: b.ko\n",
    MODULES.replace("dep", "builtin"): "kernel/drivers/nvme/host/nvme.ko\n",
}
RHEL: Files = {
    **service("NetworkManager.service"),
    "usr/lib/NetworkManager/conf.d/00-server.conf": "[main]\nno-auto-default=*\n",
    PROFILE: "[connection]\ntype=ethernet\n[ipv4]\nmethod=auto\n",
    RULES: RULE,
    **service("sshd.service", "/usr/sbin/sshd -D", "Wants=sshd-keygen.target"),
    f"{LIB}/sshd-keygen.target": "[Unit]\nWants=sshd-keygen@rsa.service\n",
    f"{LIB}/sshd-keygen@.service": "[Service]\nExecStart=/usr/libexec/openssh/sshd-keygen %i\n",
    "boot/loader/entries/a.conf": "linux /vmlinuz\noptions root=/dev/sda2 ro console=tty1 console=ttyS0,115200\n",
    "boot/grub2/grub.cfg": "blscfg\n",
}
FEDORA: Files = {
    **{name: content for name, content in RHEL.items() if "00-server" not in name},
    PROFILE: "[connection]\ntype=wifi\ninterface-name=wlan0\n[ipv4]\nmethod=auto\n",
}
RHEL_8: Files = {**RHEL, PROFILE: "", IFCFG: 'DEVICE=eth0\nBOOTPROTO="dhcp" # all\nONBOOT=yes\n'}
SLES: Files = {
    **service("wicked.service"),
    SUSE: "BOOTPROTO='dhcp'\nSTARTMODE='auto'\n",
    **service("sshd.service", "/usr/sbin/sshd-gen-keys-start"),
    "usr/sbin/sshd-gen-keys-start": "#!/bin/sh\nssh-keygen -A\n",
}
DEBIAN: Files = {
    **service("networking.service"),
    "usr/sbin/ifup": "\x7fELF",
    "usr/sbin/dhclient": "\x7fELF",
    "etc/dhcp/dhclient.conf": "send host-name = gethostname();\n",
    INTERFACES: "auto lo\niface lo inet loopback\nsource /etc/network/interfaces.d/*\n",
    "etc/network/interfaces.d/a": "allow-hotplug eth0\niface eth0 inet dhcp\n",
}
DEBIAN_CLOUD: Files = {
    **DEBIAN,
    "etc/network/interfaces.d/a": "",
    RULES: 'SUBSYSTEM=="net", ACTION=="add", RUN+="/etc/network/cloud-ifupdown-helper"\n',
}
DHCPCD: Files = {
    **service("dhcpcd.service", "/usr/sbin/dhcpcd -q -b"),
    "etc/dhcpcd.conf": "hostname\nduid\n",
}
OTHERS: Files = {
    "usr/bin/cloud-init": EMPTY,
    "etc/cloud/cloud-init.disabled": EMPTY,
    "usr/lib/systemd/system-generators/cloud-init-generator": "#!",
    **service("cloud-init-local.service", wants=f"{SYSTEM}/cloud-init.target.wants"),
    f"{LIB}/cloud-init.target": EMPTY,
    **service("walinuxagent.service"),
    "etc/waagent.conf": "Provisioning.Agent=disabled\n",
    f"{LIB}/azure-init.service": EMPTY,  # not enabled
    "var/lib/dbus/machine-id": "-> /etc/machine-id",
}
SOUND = (NETWORKD, UBUNTU, RHEL, FEDORA, RHEL_8, SLES, DEBIAN, DEBIAN_CLOUD, DHCPCD)
NONE = "no DHCP client is enabled"
SHARED, FIXED, ONE_MAC = "would be shared by all", "always sends the name golden", "one MAC address"
CARD, MANAGER = "etc/network/interfaces.d/a", "etc/NetworkManager/NetworkManager.conf"
CLIENT, ENS3 = f"{LIB}/dhcpcd.service", SUSE.replace("eth0", "ens3")
MASKED, NOT_FIRST = (
    "-> /dev/null",
    "[Unit]\nConditionFirstBoot=yes\n[Service]\nExecStart=ssh-keygen\n",
)
HTTP, HEALTH = (
    "usr/lib64/python3.9/http/client.py",
    "#!/bin/sh\ncurl 168.63.129.16/machine?comp=health",
)
RESCUE = {
    f"{SYSTEM}/default.target": "-> /lib/systemd/system/rescue.target",
    f"{LIB}/rescue.target": f"[Unit]\nWants={UNIT} systemd-networkd.service",
}
DHCPCD_3 = {**service("dhcpcd@ens3.service", "/usr/sbin/dhcpcd %I"), f"{WANTS}/dhcpcd.service": ""}


def match(what: str, more: str = "") -> Files:
    return {NETWORK: f"[Match]\n{what}\n[Network]\nDHCP=yes\n{more}\n"}


def plan(interfaces: str) -> Files:
    return {NETPLAN: f"network: {{ethernets: {{{interfaces}}}}}\n"}


def stanza(start: str, name: str, more: str = "") -> Files:
    return {INTERFACES: f"{start}\niface {name} inet dhcp\n  {more}\n", CARD: ""}


def profile(what: str = "", more: str = "") -> Files:
    return {PROFILE: f"[connection]\ntype=ethernet\n{what}\n[ipv4]\nmethod=auto\n{more}\n"}


# A distribution, what breaks it, and what the one problem says; the file is the first one, unless
# another is named.
BROKEN: List[Tuple[Any, ...]] = [
    # installation
    (NETWORKD, {SYSTEM_UNIT: "", LINK: ""}, "missing, so no VM reports Ready: run install.sh"),
    (NETWORKD, {LINK: ""}, "not enabled, as on a provisioned VM", SYSTEM_UNIT),
    (NETWORKD, {SYSTEM_UNIT: MASKED}, "masked, so no VM reports Ready"),
    (NETWORKD, {SYSTEM_UNIT: "[Service]\nExecStart=/bin/true\n"}, "not this version's"),
    (NETWORKD, {SCRIPT_PATH: "old"}, "not this version's"),
    (NETWORKD, {SCRIPT_PATH: ""}, "missing, so no VM reports Ready"),
    (NETWORKD, {DROP_IN: "[Unit]\nConditionPathExists=/no\n"}, "changes the unit"),
    (NETWORKD, RESCUE, "does not start multi-user.target"),
    (NETWORKD, {"usr/bin/python3.9": ""}, "no such program", "usr/bin/python3"),
    (NETWORKD, {HTTP: ""}, "missing, so no VM reports Ready: install all of Python"),
    (NETWORKD, HOME, "the sandbox hides /home", SCRIPT_PATH),
    # the builder's NIC
    (NETWORKD, match("Name=ens3"), "is for ens3"),
    (NETWORKD, match("Path=pci-0000:00:03.0"), "is for Path=pci-0000"),
    (NETWORKD, match("Driver=virtio_net"), "is for virtio_net"),
    (NETWORKD, match(f"MACAddress={MAC}"), "is for MACAddress="),
    (NETWORKD, match("PermanentMACAddress=0022.48aa.bbcc"), "is for PermanentMACAddress="),
    (UBUNTU, plan("enp0s3: {dhcp4: true}"), "is for enp0s3"),
    (UBUNTU, plan("a: {match: {name: ens*}, dhcp4: yes}"), "is for ens*"),
    (UBUNTU, plan(f"a: {{match: {{macaddress: '{MAC}'}}, dhcp4: true}}"), "is for macaddress: "),
    (RHEL, profile("interface-name=ens192"), "is for ens192"),
    (RHEL, profile(f"[ethernet]\nmac-address={MAC}"), "is for mac-address="),
    (RHEL_8, {IFCFG: "DEVICE=ens192\nBOOTPROTO=dhcp\n"}, "is for ens192"),
    (RHEL_8, {IFCFG: f"HWADDR={MAC}\nBOOTPROTO=dhcp\n"}, "is for HWADDR="),
    (SLES, {ENS3: "BOOTPROTO=dhcp\n", SUSE: ""}, "is for ens3"),
    (DEBIAN, stanza("allow-hotplug ens3", "ens3"), "is for ens3"),
    (DHCPCD, DHCPCD_3, "is for ens3"),
    # DHCP
    (NETWORKD, {ENABLED: ""}, f"systemd-networkd.service is not enabled: {NONE}", NETWORK),
    (
        NETWORKD,
        {NETWORK: "[Match]\nName=eth0\n[Network]\nAddress=10.0.0.4/24\n"},
        "has no DHCP=yes",
    ),
    (UBUNTU, {f"{SYSTEM}/systemd-networkd.service": MASKED}, "networkd.service is masked", NETPLAN),
    (UBUNTU, {GENERATOR: ""}, f"netplan is not installed: {NONE}", NETPLAN),
    (RHEL, {PROFILE: FEDORA[PROFILE]}, "there is no profile for eth0", MANAGER),
    (RHEL, profile("autoconnect=false"), f"has autoconnect=false; .*{NONE}"),
    (FEDORA, {NM_CONF: "[keyfile]\nunmanaged-devices=*,except:type:wifi\n"}, NONE, MANAGER),
    (DEBIAN, stanza("", "eth0"), f"nothing starts eth0: add allow-hotplug eth0: {NONE}"),
    (DEBIAN, {INTERFACES: EMPTY}, NONE, "etc"),
    (DEBIAN, {"usr/sbin/dhclient": ""}, "no DHCP client is installed", CARD),
    (DEBIAN_CLOUD, {RULES: "# cloud-ifupdown-helper\n"}, NONE, "etc"),
    (SLES, {SUSE: "BOOTPROTO=dhcp\nSTARTMODE=manual\n"}, NONE),
    (DHCPCD, {f"{WANTS}/dhcpcd.service": ""}, NONE, "etc"),
    # a MAC address for all
    (NETWORKD, match("Name=eth0", f"[Link]\nMACAddress={MAC}"), ONE_MAC),
    (UBUNTU, plan(f"eth0: {{dhcp4: true, macaddress: {MAC}}}"), ONE_MAC),
    (RHEL, profile("", f"[ethernet]\ncloned-mac-address={MAC}"), ONE_MAC),
    (RHEL_8, {IFCFG: f"{RHEL_8[IFCFG]}MACADDR={MAC}\n"}, ONE_MAC),
    (DEBIAN, stanza("auto eth0", "eth0", f"hwaddress ether {MAC}"), ONE_MAC),
    # accelerated networking
    (NETWORKD, match("Name=e*"), "second device"),
    (UBUNTU, plan("a: {match: {name: eth*}, dhcp4: true}"), "second device"),
    (FEDORA, {RULES: ""}, "second device", MANAGER),
    (RHEL, {RULES: RULE.replace("mana|mlx4_core|mlx5_core", "veth")}, "second device", PROFILE),
    # the name sent to DHCP
    (NETWORKD, match("Name=eth0", "[DHCPv4]\nSendHostname=no"), "sends no name"),
    (NETWORKD, {f"{NETWORK}.d/a.conf": "[DHCPv4]\nHostname=golden\n"}, FIXED, NETWORK),
    (UBUNTU, plan("eth0: {dhcp4: true, dhcp4-overrides: {hostname: golden}}"), FIXED),
    (RHEL, profile("", "dhcp-hostname=golden"), FIXED),
    (RHEL, profile("", "dhcp-send-hostname=false"), "sends no name"),
    (RHEL_8, {IFCFG: f"{RHEL_8[IFCFG]}DHCP_HOSTNAME=golden\n"}, FIXED),
    (DEBIAN, {"etc/dhcp/dhclient.conf": 'send host-name "golden";\n'}, FIXED, CARD),
    (DHCPCD, {"etc/dhcpcd.conf": "#hostname\n"}, "sends no name", CLIENT),
    (
        UBUNTU,
        {GRUB: UBUNTU[GRUB].replace(" ro ", " systemd.hostname=a ")},
        "systemd.hostname=a is the",
    ),
    # identities
    (RHEL, {"etc/ssh/ssh_host_rsa_key": "key"}, SHARED),
    (RHEL, {"etc/machine-id": "0" * 32 + "\n"}, SHARED),
    (RHEL, {"var/lib/dbus/machine-id": "0" * 32}, SHARED),
    (RHEL, {f"{SYSTEM}/sshd-keygen.target": MASKED}, "nobody can log in", f"{LIB}/sshd.service"),
    (UBUNTU, {f"{LIB}/ssh.service": NOT_FIRST}, "says uninitialized"),
    # agents
    (NETWORKD, {**OTHERS, CLOUD: ""}, "touch /etc/cloud/cloud-init.disabled", CLOUD_INIT),
    (NETWORKD, {**OTHERS, **WAAGENT}, "mask walinuxagent.service", f"{LIB}/walinuxagent.service"),
    (NETWORKD, service("azure-init.service"), "mask azure-init.service"),
    (NETWORKD, service("afterburn-checkin.service"), "mask afterburn-checkin.service"),
    (NETWORKD, {**service("a.service", "/opt/a"), "opt/a": HEALTH}, "mask a.service"),
    # boots on Azure
    (UBUNTU, {MODULES: UBUNTU[MODULES].replace("hv_netvsc", "virtio_net")}, "no hv_netvsc"),
    (UBUNTU, {BUILTIN: ""}, "no nvme", MODULES),
    (UBUNTU, {GRUB: UBUNTU[GRUB].replace("console=ttyS0", "quiet")}, "without console=ttyS0"),
]


class CheckTest(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="azure check "))
        self.addCleanup(shutil.rmtree, str(self.directory))
        self.root = self.directory / "a tree"

    def tree(self, *sets: Files) -> None:
        """Begin again, with what all images have and SETS of files."""
        shutil.rmtree(str(self.root), ignore_errors=True)
        files: Files = {}
        for more in (SYSTEMD, *sets):
            files.update(more)
        for name, content in files.items():
            path = self.root / name
            if content:
                path.parent.mkdir(parents=True, exist_ok=True)
            if content.startswith("-> "):
                path.symlink_to(content[3:])
            elif content:
                path.write_text(content, encoding="utf-8")
                path.chmod(0o755 if content.startswith("#!") else 0o644)

    def run_check(self, *arguments: str) -> Tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.check", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=str(ROOT),
            timeout=30,
        )
        return done.returncode, done.stdout.decode("ascii")

    def test_sound_trees_get_no_line(self) -> None:
        for number, files in enumerate(SOUND):
            with self.subTest(number):
                self.tree(files)
                self.assertEqual(problems(str(self.root)), [])
                self.tree(files, OTHERS)
                self.assertEqual(problems(str(self.root)), [])

    def test_each_fault_gets_one_line_that_names_the_file(self) -> None:
        for base, files, says, *other in BROKEN:
            with self.subTest(says, files=files):
                self.tree(base, files)
                (problem,) = problems(str(self.root))
                self.assertRegex(problem, f"^/{re.escape((other or list(files))[0])}: .*")
                self.assertRegex(problem, says.replace("*:", r"\*:"))

    def test_odd_files_neither_stop_it_nor_lead_it_out_of_the_tree(self) -> None:
        self.tree(NETWORKD)
        os.mkfifo(str(self.root / "etc/systemd/network/20-fifo.network"))
        (self.directory / "outside").write_text("key")
        for target in (
            "loop",
            "../" * 30 + str(self.directory)[1:],
            str(self.directory),
            "/dev/zero",
        ):
            link = self.root / f"etc/systemd/network/30-{len(target)}.network"
            link.symlink_to(target)
        (self.root / "etc/systemd/network/loop").symlink_to("loop")
        (self.root / "etc/ssh").symlink_to("../../")  # the tree's root, as / has no parent
        (self.root / "ssh_host_a\nb\x1b[2J_key").write_bytes(bytes(range(256)))
        (self.root / "etc/netplan").symlink_to(str(self.directory))
        status, output = self.run_check(str(self.root))
        self.assertEqual(status, 1)
        shared = f"/etc/ssh/ssh_host_a\\nb\\x1b[2J_key: {SHARED} VMs: rm -f /etc/ssh/ssh_host_*\n"
        self.assertEqual(output, shared)

    def test_garbage_in_any_file_is_survived(self) -> None:
        for garbage in (
            bytes(range(256)) * 9,
            b"[" * 9999,
            b"{a: [" * 999,
            b"\xef\xbb\xbf[Match\r\n",
        ):
            for base in SOUND:
                self.tree(base)
                for name in base:
                    if (self.root / name).is_file():
                        (self.root / name).write_bytes(garbage)
                problems(str(self.root))

    def test_a_bom_and_line_ends_of_windows_change_nothing(self) -> None:
        for base in (NETWORKD, UBUNTU, RHEL, DEBIAN):
            self.tree(base)
            for name, content in base.items():
                if content and not content.startswith("-> "):
                    (self.root / name).write_text("\ufeff" + content.replace("\n", "\r\n"))
            self.assertEqual(problems(str(self.root)), [])

    def test_what_cannot_be_read_is_a_problem(self) -> None:
        self.tree(RHEL)
        self.directory.chmod(0o755)
        (self.root / PROFILE).chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            found = problems(str(self.root))
        finally:
            os.seteuid(user)
        self.assertIn(f"/{PROFILE}: cannot be read, so it was not checked: run it as root", found)

    def test_presets_enable_units_at_a_first_boot_unless_the_root_is_read_only(self) -> None:
        preset = {"usr/lib/systemd/system-preset/90.preset": "enable systemd-networkd.service\n"}
        boot = {GRUB: "linux /vmlinuz root=a {} console=ttyS0\n"}
        for machine_id, mode, says in (
            ("uninitialized\n", "rw", ""),
            (
                "uninitialized\n",
                "ro",
                "only a preset enables systemd-networkd.service, which a root",
            ),
            ("\n", "rw", "systemd-networkd.service is not enabled"),
        ):
            grub = {GRUB: boot[GRUB].format(mode)}
            self.tree(NETWORKD, preset, grub, {ENABLED: "", "etc/machine-id": machine_id})
            self.assertRegex(
                "".join(problems(str(self.root))), f"^{says and f'/{NETWORK}: {says}'}"
            )

    def test_all_problems_are_told_at_once_and_status_says_whether_there_are_any(self) -> None:
        self.tree(NETWORKD)
        self.assertEqual(
            self.run_check(str(self.root)), (0, f"Nothing was found in '{self.root}'.\n")
        )
        for name in ("usr/bin/python3", NETWORK, LINK):
            (self.root / name).unlink()
        status, output = self.run_check(str(self.root))
        self.assertEqual((status, len(output.splitlines())), (1, 3))

    def test_wrong_usage_is_told(self) -> None:
        for argument, says in (
            (str(ROOT / "install.sh"), "mount a disk image: systemd-dissect --mount"),
            (str(self.directory), "has no usr directory"),
            ("--bogus", "unrecognized arguments"),
        ):
            status, output = self.run_check(argument)
            self.assertEqual((status, says in output), (2, True), output)
