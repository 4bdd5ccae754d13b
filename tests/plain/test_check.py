"""tests.check on small trees that stand for distributions, sound and then broken in one way."""

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
from tests.check import NAMING, problems
from tests.plain.harness import ROOT, SCRIPT, UNIT_FILE

Files = Dict[str, str]  # path: content, or "-> target" for a symlink; "" removes it

SYSTEM, LIB = "etc/systemd/system", "usr/lib/systemd/system"
WANTS, SYSTEM_UNIT = f"{SYSTEM}/multi-user.target.wants", f"{SYSTEM}/{UNIT}"
SCRIPT_PATH, LIBRARY = "usr/local/sbin/azure_provision.py", "usr/lib64/python3.9"
NETWORK, NETPLAN = "etc/systemd/network/10-a.network", "etc/netplan/a.yaml"
FIRST, LINK = "etc/systemd/network/05.network", "etc/systemd/network/a.link"
NM, NM_MAIN = "NetworkManager.service", "etc/NetworkManager/NetworkManager.conf"
KEYFILE = "etc/NetworkManager/system-connections/Wired connection 1.nmconnection"
DEFAULT = "usr/lib/NetworkManager/conf.d/00-server.conf"
NM_CONF, RULES = "etc/NetworkManager/conf.d/a.conf", "etc/udev/rules.d/70-a.rules"
IFCFG, SUSE = "etc/sysconfig/network-scripts/ifcfg-eth0", "etc/sysconfig/network/ifcfg-eth0"
INTERFACES, GENERATOR = "etc/network/interfaces", "usr/lib/systemd/system-generators/netplan"
GRUB, MODULES = "boot/grub/grub.cfg", "usr/lib/modules/6.1/modules."
PYTHON, ENTRIES = "etc/alternatives/python3", "boot/loader/entries"
HERE, MAC = "# only a comment\n", "00:22:48:AA:bb:cc"
SRIOV_RULE = 'DRIVERS=="mana", ENV{ID_NET_MANAGED_BY}="unmanaged", ENV{NM_UNMANAGED}="1"\n'


def service(name: str, command: str = "/bin/true", more: str = "") -> Files:
    """A unit that is enabled."""
    text = f"[Unit]\n{more}\n[Service]\nExecStart={command}\n"
    return {f"{LIB}/{name}": text, f"{WANTS}/{name}": f"-> /{LIB}/{name}"}


# What all images have.
SYSTEMD: Files = {
    f"{LIB}/default.target": "-> multi-user.target",
    f"{LIB}/multi-user.target": HERE,
    f"{LIB}/dbus.socket": "[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
    "lib": "-> usr/lib",
    "etc/machine-id": "\n",
    "usr/bin/python3": "-> /etc/alternatives/python3",
    PYTHON: "-> /usr/bin/python3.9",
    "usr/bin/python3.9": "#!",
    **dict.fromkeys((f"{LIBRARY}/{name}.py" for name in ("os", "http/client")), HERE),
    f"{LIBRARY}/xml/etree/ElementTree.py": HERE,
    SYSTEM_UNIT: UNIT_FILE.read_text(encoding="utf-8"),
    f"{WANTS}/{UNIT}": f"-> /{SYSTEM_UNIT}",
    SCRIPT_PATH: SCRIPT.read_text(encoding="utf-8"),
}
NETWORKD: Files = {
    **service("systemd-networkd.service", "/usr/lib/systemd/systemd-networkd"),
    "usr/lib/systemd/network/80-container-host0.network": "[Match]\nVirtualization=container\n"
    "Name=host0\n[Network]\nDHCP=yes\n",
    NETWORK: "[Match]\nDriver=hv_netvsc virtio_net\n[Network]\nDHCP=yes\n",
}
NETWORKD_BY_PRESET: Files = {
    **NETWORKD,
    f"{WANTS}/systemd-networkd.service": "",
    f"{LIB}/systemd-networkd.service": "[Install]\nWantedBy=multi-user.target\n",
    "usr/lib/systemd/system-preset/90.preset": "enable systemd-networkd.service\n",
    "etc/machine-id": "uninitialized\n",
}
WAAGENT, FSTAB = "etc/waagent.conf", "etc/fstab"
UBUNTU: Files = {
    GENERATOR: "#!",
    NETPLAN: "network: # {a: [b\n  ethernets:\n    a:\n      match:\n        driver: hv_netvsc\n"
    "      dhcp4: true\n",
    **service("ssh.socket"),
    f"{LIB}/ssh.service": "[Service]\nExecStartPre=/usr/bin/ssh-keygen -A\n",
    GRUB: "menuentry a {\n\tlinux\t/vmlinuz root=LABEL=root ro net.ifnames=0 console=ttyS0\n}\n",
    f"{MODULES}dep": "net/hv_netvsc.ko.zst: a.ko\nscsi/hv_storvsc.ko.zst: b.ko\n",
    f"{MODULES}builtin": "kernel/drivers/nvme/host/nvme.ko\n",
    **service("cloud-init-main.service"),
    "etc/cloud/cloud.cfg.d/90_dpkg.cfg": "datasource_list:\n- NoCloud\n- None\n",
    **service("walinuxagent.service"),
    WAAGENT: "Provisioning.Agent=disabled\n",
    "var/lib/dbus/machine-id": "-> /etc/machine-id",
}
RHEL: Files = {
    **service(NM),
    KEYFILE: "[connection]\ntype=ethernet\n[ipv4]\nmethod=auto\n",
    DEFAULT: "[main]\nno-auto-default=*\n",
    NM_CONF: "[keyfile]\nunmanaged-devices=*,except:type:ethernet\n",
    RULES: SRIOV_RULE,
    **service("sshd.service", "/usr/sbin/sshd -D", "Wants=sshd-keygen.target"),
    f"{LIB}/sshd-keygen.target": "[Unit]\nWants=sshd-keygen@rsa.service\n",
    f"{LIB}/sshd-keygen@.service": "[Service]\nExecStart=/usr/libexec/openssh/sshd-keygen %i\n",
    f"{ENTRIES}/a.conf": "linux /vmlinuz\noptions root=/dev/sda ro console=ttyS0,115200\n",
    "boot/grub2/grub.cfg": "blscfg\n",
}
RHEL_8: Files = {**RHEL, KEYFILE: "", IFCFG: 'DEVICE=eth0\nBOOTPROTO="dhcp" # all\nONBOOT=yes\n'}
SLES: Files = {
    **service("wicked.service"),
    SUSE: "BOOTPROTO='dhcp'\nSTARTMODE='auto'\n",
    **service("sshd.service", "/usr/sbin/sshd-gen-keys-start"),
    "usr/sbin/sshd-gen-keys-start": "#!/bin/sh\nssh-keygen -A\n",
}
DEBIAN: Files = {
    **service("networking.service"),
    **dict.fromkeys(("usr/sbin/ifup", "usr/sbin/dhclient"), "\x7fELF"),
    "etc/dhcp/dhclient.conf": "send host-name = gethostname();\n",
    INTERFACES: "allow-hotplug eth0\niface eth0 inet dhcp\n",
}
SOUND_TREE = (NETWORKD, NETWORKD_BY_PRESET, UBUNTU, RHEL, RHEL_8, SLES, DEBIAN)


def match(what: str, more: str = "") -> Files:
    return {NETWORK: f"[Match]\n{what}\n[Network]\nDHCP=yes\n{more}\n"}


def plan(interfaces: str) -> Files:
    return {NETPLAN: f"network: {{ethernets: {{{interfaces}}}}}\n"}


def keyfile(what: str = "", more: str = "") -> Files:
    return {KEYFILE: f"[connection]\ntype=ethernet\n{what}\n[ipv4]\nmethod=auto\n{more}\n"}


NONE, READY = "no DHCP client is enabled", "so no VM reports Ready"
SHARED, FIXED, ONE_MAC = "would be shared by all", "always sends the name golden", "one MAC address"
HOME = {f"home/me/sbin/{SCRIPT.name}": SYSTEMD[SCRIPT_PATH], SCRIPT_PATH: ""}
UNMANAGED = "[keyfile]\nunmanaged-devices=*,except:type:wifi\n"
RC_LOCAL = {f"{LIB}/rc-local.service": "[Service]\nExecStart=/etc/rc.local start\n"}
NO_KEYS = {**RHEL, **RC_LOCAL, f"{LIB}/sshd-keygen@.service": ""}
KEYGEN_FIX = "test -e /a ||\\\n dpkg-reconfigure -f noninteractive openssh-server\n"
SHARED_LIB = "usr/lib/systemd/libsystemd-shared"
DEVICE = "[device-a]\nmatch-device=%s\nmanaged=0\n"
DEFAULT_GRUB = {"etc/default/grub": "GRUB_CMDLINE_LINUX=console=ttyS0\nGRUB_TIMEOUT=1\n"}
MORE, STANZA = "etc/network/more", DEBIAN[INTERFACES]
STATIC = "[Match]\nName=eth0\n[Network]\nAddress=10.0.0.4/24\n"
IDLE = ("Unmanaged=True", "ActivationPolicy=manual", "ActivationPolicy=down")
REPORTS = {"opt/a": "curl 168.63.129.16/machine?comp=health"}

# A distribution, and what does not break it.
ALSO_SOUND: List[Tuple[Files, Files]] = [
    (UBUNTU, {NETPLAN: f"---\n{UBUNTU[NETPLAN]}"}),
    (UBUNTU, {NETPLAN: f"%YAML 1.1\n--- # a\n{UBUNTU[NETPLAN]}"}),
    *((UBUNTU, plan(f"eth0: {{dhcp4: {yes}}}")) for yes in ("True", "Yes", "On", "YES")),
    (NETWORKD, {NETWORK: NETWORKD[NETWORK].replace("yes", "Yes")}),
    (NO_KEYS, {"etc/rc.local": f"#!/bin/sh\n{KEYGEN_FIX}"}),
    (NO_KEYS, {"etc/rc.local": "#!/bin/sh\nssh-keygen -A\n"}),
    (NO_KEYS, {**service("a.service", "/bin/sh /opt/keys"), "opt/keys": KEYGEN_FIX}),
    (NETWORKD, {FIRST: "[Network]\nAddress=10.0.0.4/24\n"}),
    (RHEL, {FIRST: STATIC}),  # systemd-networkd is not enabled
    (NETWORKD, {**plan("eth0: {}"), NETWORK: "", f"{NETWORK[:-12]}20.network": NETWORKD[NETWORK]}),
    (UBUNTU, {FIRST: NETWORKD[NETWORK]}),
    (NETWORKD, {RULES: f'# ATTR{{address}}=="{MAC}", NAME="eth0"\n'}),
    (NETWORKD_BY_PRESET, {"etc/default/grub": 'GRUB_CMDLINE_LINUX="rw console=ttyS0"\n'}),
    (DEBIAN, {INTERFACES: "source-directory more\n", f"{MORE}/a": STANZA}),
    (DEBIAN, {INTERFACES: "source more/*.cfg\n", f"{MORE}/a.cfg": STANZA}),
    (UBUNTU, plan("a: {match: {driver: !!str &d hv_netvsc}, dhcp4: !!bool true}")),
    (UBUNTU, plan("a: &a {match: {driver: hv_netvsc}, dhcp4: &y true}, b: *a")),
    (UBUNTU, plan("a: &a {match: {driver: &d veth}, dhcp4: &y true}, eth0: {dhcp4: *y}")),
    (NETWORKD, {**match("Name=e*"), RULES: SRIOV_RULE}),
    (RHEL, {NM_CONF: DEVICE % "driver:mlx5_core;driver:mana", RULES: ""}),
    (DEBIAN, {f"{LIB}/dbus.socket": ""}),
    (RHEL, {NM_CONF: DEVICE.replace("0", "1") % "interface-name:eth*"}),
    (NETWORKD, {**match("Name=e*"), RULES: SRIOV_RULE, f"{SHARED_LIB}-255.4-1.fc40.so": "-"}),
    (RHEL, {KEYFILE: f"{RHEL[KEYFILE]}# 0644", DEFAULT: ""}),
    (RHEL, {f"{KEYFILE}.bak": "[connection]\nautoconnect=no\n", KEYFILE: "", DEFAULT: ""}),
    (UBUNTU, {"etc/cloud/cloud.cfg.d/90_dpkg.cfg": "# a\n---\ndatasource_list: [None]\n"}),
    (UBUNTU, {GRUB: UBUNTU[GRUB].replace("LABEL=root", "/dev/vda/loop0")}),  # of LVM
    (UBUNTU, {GRUB: UBUNTU[GRUB].replace("root=", "root=/dev/loop0p1 ro root=")}),
    (
        NETWORKD,
        {FSTAB: "\n#\n/dev/vda2 none swap sw\n/dev/vdb1 /d ext4 nofail\n/dev/sr0 /c auto\n"},
    ),
]

# A distribution, what breaks it, and what is said: of the first file, unless another is named.
BROKEN: List[Tuple[Any, ...]] = [
    (NETWORKD, {SYSTEM_UNIT: "", f"{WANTS}/{UNIT}": ""}, f"missing, {READY}: run install.sh"),
    (NETWORKD, {SYSTEM_UNIT: "[Service]\nExecStart=/bin/true\n"}, "not this version's"),
    (NETWORKD, {f"{LIB}/default.target": "-> a.target", f"{LIB}/a.target": HERE}, "link it to"),
    (NETWORKD, {f"{SYSTEM}/default.target": HERE}, "delete it"),
    (NETWORKD, {PYTHON: "-> python3.5", f"{PYTHON}.5": "#!"}, "3.6 or newer", "usr/bin/python3"),
    (RHEL, {f"{ENTRIES}/b.conf": "options ro systemd.hostname=a\n"}, "systemd.hostname=a is"),
    (NETWORKD, {SCRIPT_PATH: "old"}, "not this version's"),
    (NETWORKD, {SCRIPT_PATH: ""}, f"missing, {READY}"),
    (NETWORKD, {f"{SYSTEM_UNIT}.d/a.conf": "[Unit]\n"}, "changes the unit"),
    (NETWORKD, {f"{LIBRARY}/http/client.py": ""}, f"missing, {READY}: install python3 with"),
    (NETWORKD, {"usr/local": "-> ../home/me", **HOME}, "sandbox hides /home", SCRIPT_PATH),
    (NETWORKD, match("Driver=virtio_net"), "is for virtio_net"),
    (NETWORKD, match("PermanentMACAddress=0022.48aa.bbcc"), "is for PermanentMACAddress="),
    (UBUNTU, plan("a: {match: {name: ens*}, dhcp4: yes}"), r"is for ens\*"),
    (RHEL, keyfile(f"[ethernet]\nmac-address={MAC}"), "is for mac-address="),
    (RHEL_8, {IFCFG: "DEVICE=ens192\nBOOTPROTO=dhcp\n"}, "is for ens192"),
    (RHEL_8, {IFCFG: f"HWADDR={MAC}\nBOOTPROTO=dhcp\n"}, "is for HWADDR="),
    (SLES, {SUSE.replace("eth0", "ens3"): "BOOTPROTO=dhcp\n", SUSE: ""}, "is for ens3"),
    (NETWORKD, {NETWORK: STATIC}, "has a fixed address, no DHCP=yes"),
    (NETWORKD, {FIRST: "[Match]\nName=eth0\n"}, "has no DHCP=yes"),
    *((NETWORKD, match("Name=eth0", f"[Link]\n{idle}"), f"leaves .*{NONE}") for idle in IDLE),
    (NETWORKD, match("Interface=eth0"), f"Match. says nothing .*{NONE}"),
    (UBUNTU, plan("a: &a {match: {name: a}}, eth0: {<<: *a, dhcp4: true}"), "is for a"),
    (UBUNTU, plan("a: {match: {name: '!eth*'}, dhcp4: yes}"), r"is for !eth\*"),
    (UBUNTU, plan("eth0: {dhcp4: on, activation-mode: manual}"), f"activation-mode .*{NONE}"),
    (UBUNTU, plan("a: {match: {name: e*}}, eth0: {dhcp4: true}"), "has no dhcp4: true"),
    (NETWORKD, {FIRST: STATIC, **service(NM)}, f"has a fixed address.*; .*{NONE}"),
    (UBUNTU, {**service(NM), **plan("eth0: {renderer: NetworkManager}")}, "has no dhcp4", NETPLAN),
    (UBUNTU, {FIRST: "[Match]\nName=eth0\n"}, "has no DHCP=yes"),
    (NETWORKD_BY_PRESET, DEFAULT_GRUB, "only a preset enables", NETWORK),
    (NETWORKD_BY_PRESET, {"etc/machine-id": "\n"}, "networkd.service is not enabled", NETWORK),
    (UBUNTU, {GENERATOR: ""}, f"netplan is not installed: {NONE}", NETPLAN),
    (NETWORKD, {NETWORK: NETWORKD[NETWORK].replace("yes", "IPv4")}, "has no DHCP=yes"),
    (RHEL, {**keyfile("autoconnect=False"), DEFAULT: ""}, "has autoconnect=false", KEYFILE),
    *(
        (RHEL, {IFCFG: f"DEVICE=eth0\n{why}=no\n{dhcp}", KEYFILE: "", DEFAULT: ""}, says)
        for why, dhcp, says in (
            ("ONBOOT", "BOOTPROTO=dhcp", "is not started at boot"),
            ("NM_CONTROLLED", "BOOTPROTO=dhcp", "has NM_CONTROLLED=no"),
            ("DEFROUTE", "BOOTPROTO=none", "has no BOOTPROTO=dhcp"),
        )
    ),
    (RHEL, {KEYFILE: "", f"{KEYFILE}~": RHEL[KEYFILE]}, "no profile for eth0", NM_MAIN),
    (RHEL_8, {IFCFG: "", f"{IFCFG}.rpmsave": RHEL_8[IFCFG]}, "no profile for eth0", NM_MAIN),
    (RHEL, {KEYFILE: f"{RHEL[KEYFILE]}# 0644"}, "chmod 600"),
    (RHEL, {NM_CONF: UNMANAGED}, NONE, KEYFILE),
    (DEBIAN, {INTERFACES: "source-directory more\n", f"{MORE}/a.bak": STANZA}, NONE, "etc"),
    (RHEL, {NM_CONF: DEVICE % "interface-name:eth*;driver:veth"}, NONE, KEYFILE),
    (SLES, {SUSE: "BOOTPROTO=dhcp\nSTARTMODE=manual\n"}, NONE),
    (NETWORKD, match("Name=eth0", f"[Link]\nMACAddress={MAC}"), ONE_MAC),
    (UBUNTU, plan(f"eth0: {{dhcp4: true, macaddress: {MAC}}}"), ONE_MAC),
    (NETWORKD, {RULES: f'ATTR{{address}}=="{MAC}", NAME="eth0"\n'}, "the builder's"),
    (NETWORKD, {LINK: f"[Match]\nMACAddress={MAC}\n[Link]\nName=a\n"}, "the builder's"),
    (RHEL, keyfile("", f"[ethernet]\ncloned-mac-address={MAC}"), ONE_MAC),
    (RHEL_8, {IFCFG: f"{RHEL_8[IFCFG]}MACADDR={MAC}\n"}, ONE_MAC),
    (DEBIAN, {INTERFACES: f"{DEBIAN[INTERFACES]} hwaddress ether {MAC}\n"}, ONE_MAC),
    (UBUNTU, plan("a: {match: {name: eth*}, dhcp4: true}"), "second device"),
    (
        NETWORKD,
        {**match("Name=e*"), RULES: SRIOV_RULE, f"{SHARED_LIB}-254.so": "-"},
        "second device",
    ),
    (NETWORKD, {**match("Interface=eth0"), f"{SHARED_LIB}-243.so": "\x7fELF"}, "second device"),
    (RHEL, {RULES: SRIOV_RULE.replace("mana", "veth")}, "second device", KEYFILE),
    (NETWORKD, {f"{NETWORK}.d/a.conf": "[DHCPv4]\nHostname=golden\n"}, FIXED, NETWORK),
    (UBUNTU, plan("eth0: {dhcp4: true, dhcp4-overrides: {hostname: golden}}"), FIXED),
    (RHEL, keyfile("", "dhcp-send-hostname=false"), "sends no name"),
    (RHEL_8, {IFCFG: f"{RHEL_8[IFCFG]}DHCP_HOSTNAME=golden\n"}, FIXED),
    (RHEL, {"etc/machine-id": "0" * 32 + "\n"}, SHARED),
    (RHEL, {"var/lib/dbus/machine-id": "0" * 32}, SHARED),
    (UBUNTU, {WAAGENT: "Provisioning.Enabled=n\n"}, "mask wali", f"{LIB}/walinuxagent.service"),
    (NETWORKD, {FSTAB: "/dev/vda1 /boot/efi vfat defaults 0 1\n"}, "/dev/vda1 is the builder's"),
    (NETWORKD, service("azure-init.service"), "mask azure-init.service"),
    (NETWORKD, service("afterburn-checkin.service"), "mask afterburn-checkin.service"),
    (NETWORKD, {**service("a.service", "/usr/bin/python3 -I /opt/a"), **REPORTS}, "mask a.service"),
    (NO_KEYS, {"etc/rc.local": KEYGEN_FIX}, "nobody can log in", f"{LIB}/sshd.service"),
    (NO_KEYS, {"etc/rc.local": "#!/bin/sh\n# ssh-keygen\n"}, "nobody", f"{LIB}/sshd.service"),
    (NETWORKD, {f"{LIB}/dbus.socket": ""}, "install dbus", NETWORK),
    (UBUNTU, {f"{LIB}/dbus.socket": ""}, "install dbus", NETPLAN),
    (UBUNTU, {f"{MODULES}builtin": ""}, "no nvme", f"{MODULES}dep"),
    (
        NETWORKD,
        {GRUB: "linux /vmlinuz ro\nlinux /memtest console=ttyS0\n"},
        "without console=ttyS0",
    ),
    *(
        (UBUNTU, {GRUB: UBUNTU[GRUB].replace("LABEL=root", disk)}, f"root={disk} is the builder's")
        for disk in ("/dev/loop0p1", "/dev/mapper/loop0p1", "/dev/vda1")
    ),
]


class CheckTest(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="azure check "))
        self.addCleanup(shutil.rmtree, str(self.directory))
        self.directory.chmod(0o755)
        self.root = self.directory / "a tree"

    def tree(self, *sets: Files) -> List[str]:
        """Begin again, with what all images have and SETS of files; return the problems."""
        shutil.rmtree(str(self.root), ignore_errors=True)
        files: Files = {}
        for more in (SYSTEMD, *sets):
            files.update(more)
        for name, content in ((name, text) for name, text in files.items() if text):
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content.startswith("-> "):
                path.symlink_to(content[3:])
            else:
                path.write_bytes(content.encode())
                private = name.startswith(KEYFILE) and "# 0644" not in content
                mode = 0o600 if private else 0o644
                path.chmod(0o755 if content.startswith("#!") else mode)
        return problems(str(self.root))

    def run_check(self, *arguments: str) -> Tuple[int, str]:
        command = [sys.executable, "-m", "tests.check", *arguments]
        done = subprocess.run(command, stdout=-1, stderr=-2, cwd=str(ROOT), timeout=30)
        return done.returncode, done.stdout.decode("ascii")

    def test_sound_trees_get_no_line(self) -> None:
        for base in SOUND_TREE:
            self.assertEqual(self.tree(base), [])
        for base, files in ALSO_SOUND:
            with self.subTest(files=files):
                self.assertEqual(self.tree(base, files), [])

    def test_each_fault_gets_one_line_that_names_the_file(self) -> None:
        for base, files, says, *other in BROKEN:
            with self.subTest(says, files=files):
                (problem,) = self.tree(base, files)
                file = re.escape((other or list(files))[0])
                self.assertRegex(problem, f"^(/{file}|.*; /{file}): .*")
                self.assertRegex(problem, says)

    def test_odd_files_neither_stop_it_nor_lead_it_out_of_the_tree(self) -> None:
        sourced = "source /etc/network/*\n" * 99 + "source /" + "*/" * 99
        loops = {"etc/network/more": "-> .", "etc/netplan": "-> netplan"}
        root = {"etc/ssh": "-> ../../../"}  # as / has no parent
        self.tree(NETWORKD, {"usr/sbin/ifup": HERE, INTERFACES: sourced, **loops, **root})
        os.mkfifo(str(self.root / "etc/systemd/network/20-fifo.network"))
        (self.directory / "outside.network").write_text("[Match]\nMACAddress=00:22:48:00:00:00\n")
        for target in ("30-4.network", "../" * 30 + str(self.directory), "/dev/zero", "/dev/tty"):
            (self.root / f"etc/systemd/network/30-{len(target)}.network").symlink_to(target)
        (self.root / "ssh_host_a\nb\x1b[2J_key").write_bytes(bytes(range(256)))
        said = f"/etc/ssh/ssh_host_a\\nb\\x1b[2J_key: {SHARED} VMs: rm -f /etc/ssh/ssh_host_*\n"
        self.assertEqual(self.run_check(str(self.root)), (1, said))

    def test_garbage_in_any_file_is_survived(self) -> None:
        yaml = b"a: &a {b: &b [c" + b", *a, *b" * 99
        garbages = (bytes(range(256)), b"[" * 999, b"{a: [" * 999, b"\n" * 99999, b"- " * 999, yaml)
        for garbage in garbages:
            for base in SOUND_TREE:
                self.tree(base)
                for path in (self.root / name for name in base):
                    if path.is_file() and not path.is_symlink():
                        path.write_bytes(garbage)
                problems(str(self.root))

    def test_what_cannot_be_read_is_a_problem(self) -> None:
        self.tree(RHEL)
        (self.root / KEYFILE).chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            found = problems(str(self.root))
        finally:
            os.seteuid(user)
        self.assertIn(f"/{KEYFILE}: cannot be read, so it was not checked: run it as root", found)

    def test_all_problems_are_told_at_once_and_status_says_whether_there_are_any(self) -> None:
        self.tree(NETWORKD)
        sound = self.run_check(str(self.root))
        self.assertEqual(sound, (0, f"Nothing was found in '{self.root}'.\n"))
        named = {f"usr/lib/{file}": "-" for file in NAMING}
        by_name, kept = match("Name=eth0"), {f"etc/{NAMING[0]}": "-> /dev/null"}
        for files in (match("Driver=hv_netvsc"), by_name, {**by_name, **kept}):
            self.tree(NETWORKD, named, files)
            found = "A rehearsal will find no network" in self.run_check(str(self.root))[1]
            self.assertEqual(found, len(files) == 1)
        self.tree(NETWORKD, {"usr/bin/python3": "", NETWORK: "", f"{WANTS}/{UNIT}": ""})
        status, output = self.run_check(str(self.root))
        self.assertEqual((status, len(output.splitlines())), (1, 3))
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "tests.check", str(self.root)]
        done = subprocess.run(command, stdout=writer, stderr=-1, cwd=str(ROOT))
        os.close(writer)
        self.assertEqual((done.returncode, done.stderr), (1, b""))
        for argument, says in (
            (str(ROOT / "install.sh"), "mount a disk image: systemd-dissect --mount"),
            (str(self.directory), "has no usr directory"),
            ("--bogus", "unrecognized arguments"),
        ):
            status, output = self.run_check(argument)
            self.assertEqual((status, says in output), (2, True), output)
