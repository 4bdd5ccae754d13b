"""Look for what would make the VMs of an image fail on Azure, in this machine or in a tree.

It changes nothing, and runs nothing of the tree. Each problem is one line: the file, what happens
on Azure, the fix. Exit status: 0 nothing found, 1 problems, 2 wrong usage.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Iterator, List

from azure_provision import UNIT
from tests import image_network as net
from tests.image_files import ImageFiles, last, settings, variables, words, yaml, yes
from tests.image_network import ETH0, MANAGER, NETWORKD, configurations

HERE = Path(__file__).resolve().parent.parent
AGAIN = "run install.sh again"
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # by the sandbox, or cleaned at boot
MODULES = ("http/client.py", "xml/etree/ElementTree.py")  # not in Debian's python3-minimal
MAC_PATTERN = r"[0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}){5}"
NAMES_MAC = (
    rf"(?mi)address\}}==\"{MAC_PATTERN}.*NAME|"
    rf"^(Permanent)?MACAddress[ \t]*=[ \t]*{MAC_PATTERN}[^\[]*^\[Link\][^\[]*^Name[ \t]*="
)
# Files that give a device a MAC address of their own, and how.
SETS_MAC = (
    ("systemd/network/*.*", r"\[Link\][^\[]*\n[ \t]*MACAddress[ \t]*="),
    ("NetworkManager/*/*", r"cloned-mac-address[ \t]*="),
    ("sysconfig/network*/ifcfg-*", r"(?:^|\n)(?:MACADDR|LLADDR)="),
    ("network/interfaces*", r"\n[ \t]*hwaddress(?:[ \t]+ether)?[ \t]+"),
    ("network/interfaces.d/*", r"\n[ \t]*hwaddress(?:[ \t]+ether)?[ \t]+"),
)
AGENTS = r"(cloud-init-(local|main)|wa(linux)?agent|azure-init|afterburn.*checkin)\.service$"
KEYGEN = "ssh-keygen|sshd-keygen|dpkg-reconfigure .*openssh-server"
HEALTH = "comp=health|/provisioning/health"  # to what an agent of another kind reports
DRIVERS = ("hv_netvsc", "hv_storvsc", "nvme")
# Disks that no VM on Azure has, as a boot loader names them that was set up without udev.
BUILDERS_DISK = r"(root=)?/dev/((mapper/)?loop\d\S*|nbd\d\S*|x?vd[a-z]\d*)\Z"
# Without either, as autopkgtest's images are, no interface is renamed.
NAMING = ("udev/rules.d/80-net-setup-link.rules", "systemd/network/99-default.link")
SECOND = r"mlx|\bmana\b|hv_pci|SRIOV"  # in a rule for the second device of accelerated networking


def installation(image: ImageFiles) -> Iterator[str]:
    """Script and unit are this version's, and start at the first boot."""
    file = image.unit_file(UNIT)
    text = image.read(file)
    if not file:
        yield f"/etc/systemd/system/{UNIT}: missing, so no VM reports Ready: run install.sh"
    elif not text:
        yield f"{file}: masked, so no VM reports Ready: delete it, {AGAIN}"
    if not text:
        return
    if image.off(UNIT):
        yield f"{file}: {image.off(UNIT)}, as on a provisioned VM, so no VM reports Ready: {AGAIN}"
    if not image.default_target:
        target = image.unit_file("default.target")
        fix = "delete it" if target.startswith("/etc/") else "link it to multi-user.target"
        target = target or "/etc/systemd/system/default.target"
        yield f"{target}: does not start multi-user.target, so no VM reports Ready: {fix}"
    for drop_in in image.layered(f"systemd/system/{UNIT}.d/*.conf"):
        yield f"{drop_in}: changes the unit, which may then fail: delete it"
    exec_start = r"(?m)^ExecStart=(\S+)( .*)? (\S+)$"  # PYTHON and PREFIX are of one's own choice
    ours, command = (HERE / UNIT).read_text(encoding="utf-8"), re.search(exec_start, text)
    if not command or re.sub(exec_start, r"\2", text) != re.sub(exec_start, r"\2", ours):
        yield f"{file}: is not this version's, so it was not tested: {AGAIN}"
    if command:
        yield from programs(image, command.group(1), command.group(3))


def programs(image: ImageFiles, python: str, script: str) -> Iterator[str]:
    """The script is this version's, and the interpreter has what it needs."""
    fails = "so no VM reports Ready"
    if not image.stat(script):
        yield f"{script}: missing, {fails}: {AGAIN}"
    elif image.read(script) != (HERE / "azure_provision.py").read_text(encoding="utf-8"):
        yield f"{script}: is not this version's, so it was not tested: {AGAIN}"
    real = image.resolve(python)
    version = re.search(r"3\.\d+$", real)
    too_old = re.search(r"python(2|3\.[0-5]$)", real)
    prefix = os.path.dirname(os.path.dirname(real))
    if not image.stat(python) & 0o111:
        yield f"{python}: no such program, {fails}: install python3"
    elif too_old:
        yield f"{python}: is {real}, {fails}: install Python 3.6 or newer"
    elif version:
        places = [f"{prefix}/{lib}/python{version.group()}" for lib in ("lib", "lib64")]
        library = next((place for place in places if image.stat(f"{place}/os.py")), None)
        for file in (f"{library}/{module}" for module in MODULES if library):
            if not image.stat(file):
                yield f"{file}: missing, {fails}: install python3 with its whole library"
    for path in (script, python):
        for hidden in HIDDEN:
            if f"{image.resolve(path)}/".startswith(f"{image.resolve(hidden)}/"):
                yield f"{path}: the sandbox hides {hidden} or a boot cleans it, {fails}: move it"


def network(image: ImageFiles) -> Iterator[str]:
    """A DHCP client is enabled, and configured for Azure's eth0 rather than the builder's NIC."""
    found = configurations(image)
    fitting = [config for config in found if config.fits(ETH0)]
    if any(not config.off for config in fitting):
        return
    bound = [config for config in found if not config.off and not config.fits(ETH0)]
    for config in bound:
        what = config.never or ", ".join([*config.names, *config.drivers])
        yield (
            f"{config.file}: is for {what}, but Azure's is eth0 (driver hv_netvsc), so no "
            "VM has a network: match Driver=hv_netvsc, or name eth0"
        )
    if not bound:
        why = "; ".join(dict.fromkeys(f"{config.file}: {config.off}" for config in fitting))
        yield (
            f"{why or '/etc'}: no DHCP client is enabled and configured, so no VM has a network: "
            "enable one, for example systemd-networkd, with DHCP=yes for Driver=hv_netvsc"
        )


def mac_address(image: ImageFiles) -> Iterator[str]:
    """No VM gets the builder's MAC address: Azure drops what comes from another than its own."""
    said = "gives every VM one MAC address, whose packets Azure drops: delete that line"
    for file in image.layered("udev/rules.d/*.rules") + image.layered("systemd/network/*.link"):
        if re.search(NAMES_MAC, image.text_of(file)):
            yield f"{file}: names the interface of one MAC address, the builder's: delete it"
    for pattern, setting in SETS_MAC:
        for file in image.layered(pattern):
            if re.search(rf"{setting}[ \t\"']*{MAC_PATTERN}", image.text_of(file)):
                yield f"{file}: {said}"
    found, files = net.netplan_files(image)
    for name, file in files.items():
        if f"network/ethernets/{name}/macaddress" in found:
            yield f"{file}: {said}"


def accelerated_networking(image: ImageFiles) -> Iterator[str]:
    """The second device, a PCI one with the MAC address of eth0, is left alone."""
    name = "eth1" if "net.ifnames=0" in image.command_line else "enP1s1"
    second = (name, "mlx5_core")
    rules = [r for r in image.text("udev/rules.d/*.rules").split("\n") if re.search(SECOND, r)]
    left = {
        MANAGER: net.unmanaged_by_manager(image, second) or "NM_UNMANAGED" in "".join(rules),
        NETWORKD: "ID_NET_MANAGED_BY" in "".join(rules) and not 0 < image.systemd_version() < 255,
    }
    for file in image.layered("systemd/network/*.network"):
        found = settings(image.read(file))
        if re.search(SECOND, last(found, "Match.Driver")):
            left[NETWORKD] = left[NETWORKD] or yes(last(found, "Link.Unmanaged"))
    for config in configurations(image):
        if config.fits(second) and not config.off and not left.get(config.service, True):
            fix = "match Driver=hv_netvsc instead of a name"
            if config.service == MANAGER:
                fix = "copy tests/recipes/68-azure-sriov-unmanaged.rules to /etc/udev/rules.d"
            second_device = "is also for the second device of accelerated networking"
            yield f"{config.file}: {second_device}: a VM may lose its network: {fix}"


def dhcp_name(image: ImageFiles) -> Iterator[str]:
    """The name that DHCP tells Azure's DNS is the hostname."""
    lost = "so Azure's DNS never learns the name of a VM: have it send the hostname"
    for config in configurations(image):
        if not config.fits(ETH0) or config.off:
            continue
        if config.hostname:
            yield f"{config.file}: {config.hostname}, {lost}"
        if config.service == NETWORKD and image.unit("dbus.socket") is None:
            late = "sends the name of a VM only from its second boot on: install dbus"
            yield f"{config.file}: without D-Bus systemd-networkd {late}"
    for file, line in image.boot_loaders:
        for word in re.findall(r"(?<!\S)systemd\.hostname=\S*", line):
            yield f"{file}: {word} is the name of every VM from its second boot on: delete it"


def identities(image: ImageFiles) -> Iterator[str]:
    """No VM has another's identity, and each gets SSH host keys of its own."""
    keys = image.list("etc/ssh/ssh_host_*_key")
    ids = ("/etc/machine-id", "/var/lib/dbus/machine-id")
    if keys and not image.live:  # a live machine needs them until it is captured
        yield f"{keys[0]}: would be shared by all VMs: rm -f /etc/ssh/ssh_host_*"
    if not image.live and image.read(ids[0]).strip() not in ("", "uninitialized"):
        yield f"{ids[0]}: would be shared by all VMs: truncate -s 0 /etc/machine-id"
    if image.resolve(ids[1]) == ids[1] and image.read(ids[1]):  # systemd copies it
        yield f"{ids[1]}: would be shared by all VMs: ln -sf /etc/machine-id {ids[1]}"
    sshd = [f"{n}.{kind}" for n in ("ssh", "sshd") for kind in ("service", "socket")]
    sshd = [unit for unit in sshd if unit in image.started]
    makers = [
        (unit, yes(last(found, "Unit.ConditionFirstBoot")))
        for unit, found in image.started.items()
        if re.search(KEYGEN, image.programs(found))
    ]
    if not sshd or any(not first or image.first_boot for _, first in makers):
        return
    why = "nothing that is enabled makes them"
    if makers:
        why = f"{makers[0][0]} only runs if /etc/machine-id says uninitialized"
    fix = "add ExecStartPre=/usr/bin/ssh-keygen -A"
    file = image.unit_file(sshd[0])
    yield f"{file}: no VM has SSH host keys, so nobody can log in ({why}): {fix}"


def agents(image: ImageFiles) -> Iterator[str]:
    """Nothing else reports Ready."""
    # Since 2.2.45, of 2019, waagent ignores Provisioning.Enabled.
    settings = variables(image.read("/etc/waagent.conf"))
    disabled = settings.get("Provisioning.Agent") == "disabled"
    sources: List[str] = []
    for file in ["/etc/cloud/cloud.cfg", *image.list("etc/cloud/cloud.cfg.d/*.cfg")]:
        sources = words(yaml(image.read(file)), "datasource_list") or sources
    for unit, found in sorted(image.started.items()):
        off = disabled if unit.startswith("wa") else bool(sources) and "Azure" not in sources
        if unit == UNIT or (off and unit.startswith(("wa", "cloud-init"))):
            continue
        if re.match(AGENTS, unit) or re.search(HEALTH, image.programs(found)):
            fix = f"systemctl mask {unit}"
            fix = "touch /etc/cloud/cloud-init.disabled" if "cloud-init" in unit else fix
            yield f"{image.unit_file(unit)}: also reports to Azure, and may rename the VM: {fix}"


def boots(image: ImageFiles) -> Iterator[str]:
    """The kernel has the drivers of Azure, and its messages go to boot diagnostics."""
    files = image.list("usr/lib/modules/*/modules.dep") + image.list("lib/modules/*/modules.dep")
    for file in sorted(set(map(image.resolve, files))):
        builtin = image.read(file.replace("modules.dep", "modules.builtin"))
        for driver in DRIVERS:
            if not re.search(rf"/{driver}\.ko\b", image.read(file) + builtin):
                lost = "network" if driver == "hv_netvsc" else "disk, on some sizes"
                yield f"{file}: no {driver}, so a VM has no {lost}: install another kernel"
    for file, line in image.boot_loaders:
        for word in [word for word in line.split() if word.startswith("root=")][-1:]:  # it counts
            if re.match(BUILDERS_DISK, word):
                yield f"{file}: {word} is the builder's disk: name it by root=UUID="
    for line in image.read("/etc/fstab").splitlines():
        disk, _, kind, flags, *_ = (*line.split(), "", "", "", "")
        if (
            re.match(BUILDERS_DISK, disk)
            and kind != "swap"
            and not re.search("nofail|noauto", flags)
        ):
            yield f"/etc/fstab: {disk} is the builder's disk: name it by UUID="
    arm = image.exists("/lib/ld-linux-aarch64.so.1")
    console = "console=ttyAMA0" if arm else "console=ttyS0"
    if image.boot_loaders and not any(w.startswith(console) for w in image.command_line):
        file = image.boot_loaders[0][0]
        yield (
            f"{file}: without {console} Azure's boot diagnostics stay empty: add it to the kernel "
            "command line (and net.ifnames=0: a rehearsal then has eth0, as Azure has)"
        )


CHECKS = [installation, network, mac_address, accelerated_networking]
CHECKS += [dhcp_name, identities, agents, boots]


def problems(root: str) -> List[str]:
    """All problems of the image at ROOT, one line each."""
    image = ImageFiles(root)
    found = [problem for check in CHECKS for problem in check(image)]
    unreadable = "cannot be read, so it was not checked: run it as root"
    found += [f"{file}: {unreadable}" for file in sorted(image.unreadable)]
    escaped = (re.sub(r"[^ -~]", lambda c: ascii(c.group())[1:-1], line) for line in found)
    return list(dict.fromkeys(escaped))


def rehearsal_note(image: ImageFiles) -> str:
    """What a rehearsal will see otherwise: QEMU's interface has another name and driver."""
    renamed = all(map(image.layered, NAMING)) and "net.ifnames=0" not in image.command_line
    name = "ens3" if renamed else "eth0"
    device = (name, "virtio_net")
    if any(config.fits(device) and not config.off for config in configurations(image)):
        return ""
    return (
        f" A rehearsal will find no network, as QEMU's interface is {name} (virtio_net): add that "
        "driver to the match, or net.ifnames=0 to the kernel command line, which names it eth0."
    )


def main(arguments: List[str]) -> int:
    parser = argparse.ArgumentParser("python3 -m tests.check", description=__doc__)
    parser.add_argument("tree", nargs="?", default="/", help="its root (default: this machine)")
    tree = parser.parse_args(arguments).tree
    if not os.path.isdir(tree):
        parser.error(f"{tree!a} is no directory; mount a disk image: systemd-dissect --mount")
    if not os.path.isdir(os.path.join(tree, "usr")):
        parser.error(f"{tree!a} has no usr directory: it is not the root of an image")
    found = problems(tree)
    text = "\n".join(found) or f"Nothing was found in {tree!a}.{rehearsal_note(ImageFiles(tree))}"
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
