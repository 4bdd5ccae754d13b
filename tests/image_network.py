"""An image's network: for each program that sets it up, what asks DHCP on which device."""

import os
import re
from fnmatch import fnmatchcase
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from tests.image_files import ImageFiles, Settings, last, no, settings, variables, words, yaml, yes

NETWORKD, MANAGER = "systemd-networkd.service", "NetworkManager.service"
MANAGER_CONF = "/etc/NetworkManager/NetworkManager.conf"
FIXED = "a fixed address, no DHCP=yes"
GENERATOR = "systemd/system-generators/netplan"
NETWORK_SCRIPTS = "/etc/sysconfig/network-scripts/"
BACKUP = r"(~|\.(bak|orig|rpmsave|rpmnew))$"  # names of files that are not read
# What systemd knows in a [Match] section; a file without any of them is ignored.
MATCHES = (
    r"Match\.((Permanent)?MACAddress|Path|Driver|Type|Kind|Property|Name|WLAN.*|B?SSID|Host"
    r"|Virtualization|Kernel.*|Credential|Architecture|Firmware)$"
)
ETH0 = ("eth0", "hv_netvsc")  # the name and driver of Azure's interface


class Config(NamedTuple):
    """A network configuration: the devices that it is for, and what it does with them."""

    file: str
    names: Sequence[str] = ()  # patterns; none fits all
    drivers: Sequence[str] = ()
    never: str = ""  # a condition that no device of Azure meets
    off: str = ""  # why it sends no DHCP request
    hostname: str = ""  # what is wrong with the name that it sends
    service: str = ""

    def fits(self, device: Tuple[str, str]) -> bool:
        return not self.never and all(map(matches, (self.names, self.drivers), device))


def matches(patterns: Sequence[str], value: str) -> bool:
    """As systemd.network(5) matches: no pattern fits anything, and "!" inverts all of them."""
    found = any(fnmatchcase(value, pattern.lstrip("!=")) for pattern in patterns)
    return not patterns or found != patterns[0].startswith("!")


def hostname(suppressed: Optional[str], name: Optional[str]) -> str:
    """What two settings do to the name that is sent."""
    if no(suppressed):
        return "sends no name"
    return f"always sends the name {name}" if name else ""


def networkd(image: ImageFiles) -> Iterator[Config]:
    """systemd.network(5): the first file that matches a device is used, also of netplan's."""
    named = [(f"10-netplan-{name}.network", config) for name, config in netplan(image)]
    named += [(os.path.basename(config.file), config) for config in networkd_files(image)]
    taken = False
    for _, config in sorted(named, key=lambda pair: pair[0]):
        first = config.service == NETWORKD and config.fits(ETH0)
        if not (first and taken):
            yield config
        taken = taken or first


def networkd_files(image: ImageFiles) -> Iterator[Config]:
    """Its own files."""
    old = 0 < image.systemd_version() < 244
    for file in image.layered("systemd/network/*.network"):
        drop_ins = image.text(f"systemd/network/{os.path.basename(file)}.d/*.conf")
        found = settings(f"{image.read(file)}\n{drop_ins}")
        if not old and not any(re.match(MATCHES, name) for name in found if found[name]):
            yield Config(file, off="is ignored, as [Match] says nothing (add Driver= or Name=)")
            continue
        wired = matches(words(found, "Match.Type"), "ether")
        if not wired or last(found, "Match.Virtualization") == "container":
            continue
        bound = ("MACAddress", "PermanentMACAddress", "Path")
        never = [f"{name}={v}" for name in bound for v in found.get(f"Match.{name}", ())]
        sent = [last(found, f"DHCP.{n}", f"DHCPv4.{n}") for n in ("SendHostname", "Hostname")]
        dhcp = last(found, "Network.DHCP")
        dhcp_on = yes(dhcp) or dhcp in ("both", "ipv4", "v4")
        fixed = "Network.Address" in found or "Address.Address" in found
        off = networkd_off(image) if dhcp_on else f"has {FIXED if fixed else 'no DHCP=yes'}"
        policy = last(found, "Link.ActivationPolicy")
        if yes(last(found, "Link.Unmanaged")) or policy in ("manual", "down", "always-down"):
            off = "leaves the interface down or alone (Unmanaged=, ActivationPolicy=)"
        names, drivers = words(found, "Match.Name"), words(found, "Match.Driver")
        yield Config(file, names, drivers, " ".join(never), off, hostname(*sent), NETWORKD)


def netplan_files(image: ImageFiles) -> Tuple[Settings, Dict[str, str]]:
    """What all files say, as of the last that says it; and the last file of each interface."""
    found: Settings = {}
    files: Dict[str, str] = {}
    for file in image.layered("netplan/*.yaml"):
        more = yaml(image.read(file))
        found.update(more)
        names = (key.split("/")[2:3] for key in more if key.startswith("network/ethernets/"))
        files.update((name, file) for (name,) in names)
    return found, files


def networkd_off(image: ImageFiles) -> str:
    """Why it does not start; netplan's generator starts it, unless it is masked."""
    off = image.off(NETWORKD)
    by_netplan = image.layered(GENERATOR) and netplan_files(image)[1]
    return "" if by_netplan and not off.endswith("masked") else off


def netplan(image: ImageFiles) -> Iterator[Tuple[str, Config]]:
    """Its definitions, by name."""
    found, files = netplan_files(image)
    for name, file in files.items():
        key = f"network/ethernets/{name}"
        renderer = last(found, "network/renderer", f"{key}/renderer")
        service = MANAGER if renderer == "NetworkManager" else NETWORKD
        off = image.off(MANAGER) if service == MANAGER else networkd_off(image)
        if not image.layered(GENERATOR):
            off, service = "netplan is not installed", ""
        off = off if yes(last(found, f"{key}/dhcp4")) else "has no dhcp4: true"
        if last(found, f"{key}/activation-mode") in ("manual", "off"):
            off = "has an activation-mode that leaves it down"
        names = words(found, f"{key}/match/name") if f"{key}/match" in found else [name]
        mac, drivers = last(found, f"{key}/match/macaddress"), words(found, f"{key}/match/driver")
        sent = [last(found, f"{key}/dhcp4-overrides/{n}") for n in ("send-hostname", "hostname")]
        never = f"macaddress: {mac}" if mac else ""
        yield name, Config(file, names, drivers, never, off, hostname(*sent), service)


def manager_lists(devices: str, device: Tuple[str, str]) -> bool:
    """Whether a list of devices has one: NetworkManager.conf(5), "Device List Format"."""
    own = ("type:ethernet", f"driver:{device[1]}", f"interface-name:{device[0]}", device[0])
    parts = re.split(r"[,;\s]+", devices.replace("=", ""))
    fitting = [p for p in parts if any(fnmatchcase(o, re.sub("^except:", "", p)) for o in own)]
    return bool(fitting) and not any(part.startswith("except:") for part in fitting)


def manager_conf(image: ImageFiles) -> Settings:
    """All of NetworkManager.conf(5)."""
    files = [MANAGER_CONF, *image.layered("NetworkManager/conf.d/*.conf")]
    return settings("\n".join(map(image.read, files)))


def unmanaged_by_manager(image: ImageFiles, device: Tuple[str, str]) -> bool:
    """Whether NetworkManager leaves a device alone; netplan overrides the list of these."""
    conf = manager_conf(image)
    for name in filter(re.compile(r"device.*\.managed$").match, conf):
        devices = last(conf, name.replace(".managed", ".match-device")) or "*"
        if no(last(conf, name)) and manager_lists(devices, device):
            return True
    listed = manager_lists(last(conf, "keyfile.unmanaged-devices"), device)
    return listed and last(netplan_files(image)[0], "network/renderer") != "NetworkManager"


def network_manager(image: ImageFiles) -> Iterator[Config]:
    """Profiles; and a device without one gets DHCP, unless told otherwise."""
    conf, off = manager_conf(image), image.off(MANAGER)
    others = [config for config in ifcfg(image) if config.file.startswith(NETWORK_SCRIPTS)]
    others += [config for _, config in netplan(image) if config.service == MANAGER]
    profile = any(config.fits(ETH0) for config in others)
    fixed = any(config.fits(ETH0) and FIXED in config.off for config in networkd(image))
    if fixed and not networkd_off(image):
        off = off or "NetworkManager leaves eth0 to systemd-networkd, which is earlier"
    if unmanaged_by_manager(image, ETH0):
        off = off or "NetworkManager is told not to manage eth0"
    profiles = "NetworkManager/system-connections/*"
    for file in image.list(f"etc/{profiles}") + image.list(f"usr/lib/{profiles}"):
        found = settings(image.read(file))
        kind = last(found, "connection.type")
        if kind not in ("ethernet", "802-3-ethernet", "") or re.search(BACKUP, file):
            continue
        why = "" if last(found, "ipv4.method") in ("auto", "") else "has no method=auto for IPv4"
        if no(last(found, "connection.autoconnect")):
            why = "has autoconnect=false"
        mac = last(found, "ethernet.mac-address", "802-3-ethernet.mac-address")
        never = f"mac-address={mac}" if mac else ""
        names = words(found, "connection.interface-name", "match.interface-name")
        sent = hostname(last(found, "ipv4.dhcp-send-hostname"), last(found, "ipv4.dhcp-hostname"))
        drivers = words(found, "match.driver")
        ignored = file.startswith("/etc/") and image.stat(file) & 0o077
        why = "is ignored, as not only root can read it (chmod 600)" if ignored else why
        config = Config(file, names, drivers, never, off or why, sent, MANAGER)
        profile = profile or (config.fits(ETH0) and not ignored)
        yield config
    if not profile and image.unit_file(MANAGER):
        if manager_lists(last(conf, "main.no-auto-default"), ETH0):
            off = off or "has no-auto-default, and there is no profile for eth0"
        yield Config(MANAGER_CONF, off=off, service=MANAGER)


def ifcfg(image: ImageFiles) -> Iterator[Config]:
    """RHEL's files, for NetworkManager or the init script of RHEL 7, and those of SUSE's wicked."""
    script = image.list("etc/rc.d/rc3.d/S*network")
    for file in image.list("etc/sysconfig/network*/ifcfg-*"):
        suse = not file.startswith(NETWORK_SCRIPTS)
        found = variables(image.read(file))
        device = file.rpartition("/ifcfg-")[2] if suse else found.get("DEVICE", "")
        other = device == "lo" or found.get("TYPE", "Ethernet") != "Ethernet"
        if other or re.search(BACKUP, file):
            continue
        off = image.off("wicked.service") if suse else "" if script else image.off(MANAGER)
        if no(found.get("ONBOOT")) or found.get("STARTMODE") in ("off", "manual"):
            off = "is not started at boot"
        if no(found.get("NM_CONTROLLED")) and not script:
            off = "has NM_CONTROLLED=no, but there is no other program for it"
        off = off if found.get("BOOTPROTO", "").startswith("dhcp") else "has no BOOTPROTO=dhcp"
        never = f"HWADDR={found['HWADDR']}" if found.get("HWADDR") else ""
        sent = hostname(found.get("DHCP_SEND_HOSTNAME"), found.get("DHCP_HOSTNAME"))
        service = "" if suse or script else MANAGER
        yield Config(file, [device] if device else [], (), never, off, sent, service)


def interface_lines(image: ImageFiles) -> List[Tuple[str, List[str]]]:
    """The lines of interfaces(5) and of the files that it sources, each with its file."""
    lines: List[Tuple[str, List[str]]] = []
    files = ["/etc/network/interfaces"]
    for file in files:
        for line in filter(None, map(str.split, image.text_of(file).split("\n"))):
            lines.append((file, line))
            if line[0] in ("source", "source-directory"):
                path = os.path.join(os.path.dirname(file), line[-1])
                sourced = image.list(path)
                if line[0] == "source-directory":
                    sourced = [f for f in image.list(f"{path}/*") if re.search(r"/[\w-]+$", f)]
                files.extend(other for other in sourced if other not in files)
    return lines


def sent_by(image: ImageFiles, client: str) -> str:
    """What is wrong with the name that a client's own configuration has it send."""
    if client == "dhclient":
        conf, line = image.read("/etc/dhcp/dhclient.conf"), "send host-name = gethostname();"
        found = re.search(r"(?m)^[ \t]*send\s+(?:host-name|fqdn\.fqdn)[\s=]*([^\s;]*)", conf)
    else:
        conf, line = image.read("/etc/dhcpcd.conf"), "hostname"
        found = re.search(r"(?m)^[ \t]*hostname\b[ \t]*(\S*)", conf)
    if client not in ("dhclient", "dhcpcd") or (found and "gethostname" in found.group(1)):
        return ""
    if not found:
        return f"sends no name (there is no `{line}` in {client}.conf)"
    return hostname("", found.group(1).strip('"'))


def ifupdown(image: ImageFiles) -> Iterator[Config]:
    """Debian's stanzas, started by networking.service, or by a udev rule (allow-hotplug)."""
    if not (image.stat("/usr/sbin/ifup") or image.stat("/sbin/ifup")):
        return
    clients = [
        client  # ifupdown takes the first
        for client in ("dhclient", "udhcpc", "dhcpcd")
        if image.list(f"*bin/{client}") + image.list(f"usr/*bin/{client}")
    ]
    sent = sent_by(image, clients[0]) if clients else ""
    lines = interface_lines(image)
    started: Dict[str, str] = {}  # a name or pattern of interfaces: why its class is not started
    for _, (keyword, *names) in lines:
        if keyword in ("auto", "allow-auto", "allow-hotplug"):
            off = "" if keyword == "allow-hotplug" else image.off("networking.service")
            started.update((name.lstrip("/"), off) for name in names)
    for file, stanza in lines:
        if stanza[0] == "iface" and stanza[2:4] == ["inet", "dhcp"]:
            off = f"nothing starts {stanza[1]}: add allow-hotplug {stanza[1]}"
            off = next((o for name, o in started.items() if fnmatchcase(stanza[1], name)), off)
            off = off if clients else "no DHCP client is installed: isc-dhcp-client, dhcpcd-base"
            yield Config(file, [stanza[1]], off=off, hostname=sent)
    # Debian's cloud images make a stanza for each interface that comes.
    for rules in image.layered("udev/rules.d/*.rules"):
        if clients and re.search(r"ifup@|cloud-ifupdown-helper", image.text_of(rules)):
            yield Config(rules, hostname=sent)


def other_clients(image: ImageFiles) -> Iterator[Config]:
    """Units that run a DHCP client: dhcpcd.service, dhclient@eth0.service, connman.service."""
    for unit, found in image.started.items():
        command = last(found, "Service.ExecStart")
        client = re.search(r"\b(dhcpcd|dhclient|udhcpc|connmand)\b", command)
        if client:
            names = re.findall(r"@(.+)\.service$", unit)
            yield Config(image.unit_file(unit), names, hostname=sent_by(image, client.group()))


def configurations(image: ImageFiles) -> List[Config]:
    """All that there are."""
    stacks = (networkd, network_manager, ifcfg, ifupdown, other_clients)
    return [config for stack in stacks for config in stack(image)]
