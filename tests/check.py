"""Look for what would make the VMs of an image fail on Azure, in this machine or in a tree.

`python3 -m tests.check [TREE]` reads and changes nothing, and runs nothing of the tree. Each problem
is one line: the file, what happens on Azure, the fix. Exit status: 0 nothing found, 1 problems,
2 wrong usage.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Iterator, List

from azure_provision import UNIT
from tests.image_files import ImageFiles, last, settings, variables, yaml
from tests.image_network import (
    ETH0,
    MANAGER,
    NETWORKD,
    YES,
    configurations,
    mapping,
    netplan_files,
    unmanaged_by_manager,
)

HERE = Path(__file__).resolve().parent.parent
AGAIN = "run install.sh again"
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # by the sandbox, or cleaned at boot
MODULES = ("http/client.py", "xml/etree/ElementTree.py")  # not in Debian's python3-minimal
MAC = r"[0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}){5}"
# Files that give a device an address of their own, and how.
SETS_MAC = (
    ("systemd/network/*.*", r"\[Link\][^\[]*\n[ \t]*MACAddress[ \t]*="),
    ("NetworkManager/conf.d/*.conf", r"cloned-mac-address[ \t]*="),
    ("NetworkManager/system-connections/*", r"cloned-mac-address[ \t]*="),
    ("sysconfig/network*/ifcfg-*", r"(?:^|\n)(?:MACADDR|LLADDR)="),
    ("network/interfaces", r"\n\s*hwaddress(?:\s+ether)?\s+"),
    ("network/interfaces.d/*", r"\n\s*hwaddress(?:\s+ether)?\s+"),
)
DRIVERS = ("hv_netvsc", "hv_storvsc", "nvme")
SECOND = r"mlx|\bmana\b|hv_pci|SRIOV"  # in a rule for the second device of accelerated networking


def installation(image: ImageFiles) -> Iterator[str]:
    """Script and unit are this version's, and start at the first boot."""
    if not any(map(image.stat, ("/usr/lib/systemd/systemd", "/lib/systemd/systemd"))):
        yield "/usr/lib/systemd/systemd: missing, and nothing else starts the unit: install systemd"
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
    if "multi-user.target" not in image.started:
        target = "/etc/systemd/system/default.target"
        yield f"{target}: does not start multi-user.target, so no VM reports Ready: delete it"
    for drop_in in image.layered(f"systemd/system/{UNIT}.d/*.conf"):
        yield f"{drop_in}: changes the unit, which may then fail: delete it"
    exec_start = r"(?m)^ExecStart=(\S+) -I -S (\S+)$"
    ours, command = (HERE / UNIT).read_text(encoding="utf-8"), re.search(exec_start, text)
    if not command or re.sub(exec_start, "", text) != re.sub(exec_start, "", ours):
        yield f"{file}: is not this version's, so it was not tested: {AGAIN}"
    if command:
        yield from programs(image, *command.groups())


def programs(image: ImageFiles, python: str, script: str) -> Iterator[str]:
    """The script is this version's, and the interpreter has what it needs."""
    fails = "so no VM reports Ready"
    if not image.stat(script):
        yield f"{script}: missing, {fails}: {AGAIN}"
    elif image.read(script) != (HERE / "azure_provision.py").read_text(encoding="utf-8"):
        yield f"{script}: is not this version's, so it was not tested: {AGAIN}"
    real = image.resolve(python)
    version = re.search(r"3\.\d+$", real)
    prefix = os.path.dirname(os.path.dirname(real))
    if not image.stat(python) & 0o111:
        yield f"{python}: no such program, {fails}: install python3"
    elif version:
        places = [f"{prefix}/{lib}/python{version.group()}" for lib in ("lib", "lib64")]
        library = next((place for place in places if image.stat(f"{place}/os.py")), None)
        for module in MODULES:
            if library and not image.stat(f"{library}/{module}"):
                yield f"{library}/{module}: missing, {fails}: install all of Python, not a minimal one"
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
        fix = "match by Driver=hv_netvsc, or name eth0"
        yield (
            f"{config.file}: is for {what}, which Azure's eth0 (driver hv_netvsc) is not, so no VM "
            f"has a network: {fix}"
        )
    for rules in image.layered("udev/rules.d/*.rules") + image.layered("systemd/network/*.link"):
        pattern = rf"(?mi)^[^#\n]*(address\}}==\"{MAC}|^(Permanent)?MACAddress\s*=\s*{MAC})"
        if re.search(pattern, image.read(rules)):
            yield f"{rules}: names the interface of one MAC address, the builder's: delete it"
    if not bound:
        why = "; ".join(sorted({f"{config.file}: {config.off}" for config in fitting}))
        yield (
            f"{why or '/etc'}: no DHCP client is enabled and configured, so no VM has a network: "
            "enable one, such as systemd-networkd with DHCP=yes in /etc/systemd/network/80-dhcp.network"
        )


def mac_address(image: ImageFiles) -> Iterator[str]:
    """No VM gets the builder's MAC address: Azure drops what comes from another than its own."""
    said = "gives every VM one MAC address, whose packets Azure drops: delete that line"
    for pattern, setting in SETS_MAC:
        for file in image.layered(pattern):
            if re.search(rf"{setting}[ \t\"']*{MAC}", image.text_of(file)):
                yield f"{file}: {said}"
    for file, definition in netplan_files(image)[1].values():
        if re.match(MAC, str(definition.get("macaddress", ""))):
            yield f"{file}: {said}"


def accelerated_networking(image: ImageFiles) -> Iterator[str]:
    """The second device, a PCI one with the MAC address of eth0, is left alone."""
    name = "eth1" if "net.ifnames=0" in image.command_line else "enP1s1"
    second = (name, "mlx5_core")
    rules = [
        line for line in image.text("udev/rules.d/*.rules").split("\n") if re.search(SECOND, line)
    ]
    left = {
        MANAGER: unmanaged_by_manager(image, second)
        or any("NM_UNMANAGED" in line for line in rules),
        NETWORKD: any("ID_NET_MANAGED_BY" in line for line in rules)
        or any(
            last(found, "Link.Unmanaged") in YES
            and re.search(SECOND, last(found, "Match.Driver", "Match.Property"))
            for found in (
                settings(image.read(f)) for f in image.layered("systemd/network/*.network")
            )
        ),
    }
    for config in configurations(image):
        if config.fits(second) and not config.off and not left.get(config.service, True):
            fix = "install azure-vm-utils, or its 10-azure-unmanaged-sriov.rules"
            if config.service == NETWORKD:
                fix = "match by Driver=hv_netvsc"
            yield (
                f"{config.file}: also asks DHCP on the second device of accelerated networking, which "
                f"must be left alone: {fix}"
            )


def dhcp_name(image: ImageFiles) -> Iterator[str]:
    """The name that DHCP tells Azure's DNS is the hostname."""
    fix = "delete that setting"
    for config in configurations(image):
        if config.hostname and config.fits(ETH0) and not config.off:
            yield f"{config.file}: {config.hostname}, so Azure's DNS never learns the VM's name: {fix}"
    for word in image.command_line:
        if word.startswith("systemd.hostname="):
            file = image.boot_loaders[0]
            yield f"{file}: {word} is the name of every VM from its second boot on: delete it"


def identities(image: ImageFiles) -> Iterator[str]:
    """No VM has another's identity, and each gets SSH host keys of its own."""
    keys, ids = (
        image.list("etc/ssh/ssh_host_*_key"),
        ("/etc/machine-id", "/var/lib/dbus/machine-id"),
    )
    if keys and not image.live:  # a live machine needs them until it is captured
        yield f"{keys[0]}: would be shared by all VMs: rm -f /etc/ssh/ssh_host_*"
    if not image.live and image.read(ids[0]).strip() not in ("", "uninitialized"):
        yield f"{ids[0]}: would be shared by all VMs: truncate -s 0 /etc/machine-id"
    if image.resolve(ids[1]) == ids[1] and image.read(ids[1]):  # systemd copies it
        yield f"{ids[1]}: would be shared by all VMs: ln -sf /etc/machine-id {ids[1]}"
    sshd = [f"{n}.{kind}" for n in ("ssh", "sshd") for kind in ("service", "socket")]
    sshd = [unit for unit in sshd if unit in image.started]
    makers = [
        (unit, last(found, "Unit.ConditionFirstBoot") in YES)
        for unit, found in image.started.items()
        if re.search("ssh-keygen|sshd-keygen", image.programs(found))
    ]
    if not sshd or any(not first or image.first_boot for _, first in makers):
        return
    if "ssh-keygen" not in image.read("/etc/rc.local"):
        file = image.unit_file(sshd[0])
        why = f"{makers[0][0]} only runs if /etc/machine-id says uninitialized" if makers else ""
        yield (
            f"{file}: no VM has SSH host keys, so nobody can log in "
            f"({why or 'nothing that is enabled makes them'}): add ExecStartPre=/usr/bin/ssh-keygen -A"
        )


def agents(image: ImageFiles) -> Iterator[str]:
    """Nothing else reports Ready."""
    waagent = variables(image.read("/etc/waagent.conf"))
    disabled = waagent.get("Provisioning.Enabled") == "n"
    disabled = disabled or waagent.get("Provisioning.Agent") == "disabled"
    sources: List[str] = []
    for file in ["/etc/cloud/cloud.cfg", *image.list("etc/cloud/cloud.cfg.d/*.cfg")]:
        listed = mapping(yaml(image.read(file))).get("datasource_list")
        sources = listed if isinstance(listed, list) else sources
    for unit, found in sorted(image.started.items()):
        agent = re.match(
            r"(cloud-init-local|cloud-init-main|waagent|walinuxagent|azure-init|afterburn.*checkin)\.service$",
            unit,
        )
        if (
            unit == UNIT
            or (unit.startswith("wa") and disabled)
            or (unit.startswith("cloud-init") and sources and "Azure" not in sources)
        ):
            continue
        if agent or re.search(r"comp=health|/provisioning/health", image.programs(found)):
            fix = (
                "touch /etc/cloud/cloud-init.disabled"
                if "cloud" in unit
                else f"systemctl mask {unit}"
            )
            yield f"{image.unit_file(unit)}: also reports to Azure, and may rename the VM: {fix}"


def boots(image: ImageFiles) -> Iterator[str]:
    """The kernel has the drivers of Azure, and its messages go to boot diagnostics."""
    for file in image.list("usr/lib/modules/*/modules.dep") + image.list(
        "lib/modules/*/modules.dep"
    ):
        builtin = image.read(file.replace("modules.dep", "modules.builtin"))
        for driver in DRIVERS:
            if not re.search(rf"/{driver}\.ko\b", image.read(file) + builtin):
                lost = "no network" if driver == "hv_netvsc" else "no disk on some sizes"
                yield f"{file}: the kernel has no {driver}, so a VM has {lost}: install one that has"
    arm = image.exists("/lib/ld-linux-aarch64.so.1")
    console = "console=ttyAMA0" if arm else "console=ttyS0"
    if image.boot_loaders and not any(w.startswith(console) for w in image.command_line):
        yield (
            f"{image.boot_loaders[0]}: without {console} Azure's boot diagnostics stay empty: add it to "
            "the kernel command line (and net.ifnames=0, with which a rehearsal has eth0 like Azure)"
        )


CHECKS = (
    installation,
    network,
    mac_address,
    accelerated_networking,
    dhcp_name,
    identities,
    agents,
    boots,
)


def problems(root: str) -> List[str]:
    """All problems of the image at ROOT, one line each."""
    image = ImageFiles(root)
    found = [problem for check in CHECKS for problem in check(image)]
    found += [
        f"{file}: cannot be read, so it was not checked: run it as root"
        for file in sorted(image.unreadable)
    ]
    return list(
        dict.fromkeys(re.sub(r"[^ -~]", lambda c: ascii(c.group())[1:-1], p) for p in found)
    )


def main(arguments: List[str]) -> int:
    parser = argparse.ArgumentParser("python3 -m tests.check", description=__doc__)
    parser.add_argument(
        "tree", nargs="?", default="/", help="the image's root directory (this machine)"
    )
    tree = parser.parse_args(arguments).tree
    if not os.path.isdir(tree):
        parser.error(f"{tree!a} is no directory; mount a disk image: systemd-dissect --mount")
    if not os.path.isdir(os.path.join(tree, "usr")):
        parser.error(f"{tree!a} has no usr directory: it is not the root of an image")
    found = problems(tree)
    print("\n".join(found) or f"Nothing was found in {tree!a}.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
