"""An image's network: for each program that sets it up, what asks DHCP on which device."""

import os
import re
from fnmatch import fnmatchcase
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from tests.image_files import ImageFiles, Settings, last, settings, variables, words, yaml

YES = ("yes", "y", "true", "t", "on", "1")
NO = ("no", "n", "false", "f", "off", "0")
NETWORKD, MANAGER = "systemd-networkd.service", "NetworkManager.service"
MANAGER_CONF = "/etc/NetworkManager/NetworkManager.conf"
ETH0 = ("eth0", "hv_netvsc")  # the name and driver of Azure's interface
VMBUS = ("acpi-VMBUS:01", "acpi-MSFT1000:00")  # what udev calls its path


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


def hostname(suppressed: Any, name: Any) -> str:
    """What two settings do to the name that is sent."""
    if suppressed in NO:
        return "sends no name"
    return f"always sends the name {name}" if name else ""


def mapping(value: Any) -> Dict[str, Any]:
    return value if isinstance(value, dict) else {}


def networkd(image: ImageFiles) -> Iterator[Config]:
    """systemd.network(5): the first file that matches a device is used."""
    taken = False
    for file in image.layered("systemd/network/*.network"):
        drop_ins = image.text(f"systemd/network/{os.path.basename(file)}.d/*.conf")
        found = settings(f"{image.read(file)}\n{drop_ins}")
        other = [kind for kind in words(found, "Match.Kind") if kind[0] != "!"]
        wired = matches(words(found, "Match.Type"), "ether") and not other
        if not wired or last(found, "Match.Virtualization") not in ("", "vm", "microsoft", *YES):
            continue  # for wireless networks, tunnels, containers
        never = [
            f"{name}={value}"
            for name in ("MACAddress", "PermanentMACAddress", "Path", "Property")
            for value in found.get(f"Match.{name}", ())
            if not (name == "Path" and any(matches(value.split(), path) for path in VMBUS))
            and not (name == "Property" and "hv_netvsc" in value)
        ]
        sent = [last(found, f"DHCP.{n}", f"DHCPv4.{n}") for n in ("SendHostname", "Hostname")]
        dhcp = last(found, "Network.DHCP") in (*YES, "both", "ipv4", "v4")
        off = image.off(NETWORKD) if dhcp else "has no DHCP=yes"
        names, drivers = words(found, "Match.Name"), words(found, "Match.Driver")
        config = Config(file, names, drivers, " ".join(never), off, hostname(*sent), NETWORKD)
        if not (taken and config.fits(ETH0)):
            yield config
        taken = taken or config.fits(ETH0)


def netplan_files(image: ImageFiles) -> Tuple[Dict[str, Any], Dict[str, Tuple[str, Any]]]:
    """The global settings; and of each interface its last file, and what all files say of it."""
    network: Dict[str, Any] = {}
    interfaces: Dict[str, Tuple[str, Any]] = {}
    for file in image.layered("netplan/*.yaml"):
        found = mapping(mapping(yaml(image.read(file))).get("network"))
        network.update(found)
        for name, definition in mapping(found.get("ethernets")).items():
            earlier = interfaces.get(name, ("", {}))[1]
            interfaces[name] = (file, {**earlier, **mapping(definition)})
    return network, interfaces


def netplan(image: ImageFiles) -> Iterator[Config]:
    """Its generator starts systemd-networkd, unless that is masked."""
    network, interfaces = netplan_files(image)
    generator = image.layered("systemd/system-generators/netplan")
    for name, (file, found) in interfaces.items():
        renderer = found.get("renderer", network.get("renderer"))
        service = MANAGER if renderer == "NetworkManager" else NETWORKD
        off = image.off(service)
        if not generator:
            off = "netplan is not installed"
        elif service == NETWORKD and not off.endswith("masked"):
            off = ""
        off = off if found.get("dhcp4") in YES else "has no dhcp4: true"
        match, overrides = mapping(found.get("match")), mapping(found.get("dhcp4-overrides"))
        names = [str(match["name"])] if "name" in match else [] if "match" in found else [name]
        drivers = match.get("driver", [])
        drivers = drivers if isinstance(drivers, list) else [drivers]
        never = f"macaddress: {match['macaddress']}" if "macaddress" in match else ""
        sent = hostname(overrides.get("send-hostname"), overrides.get("hostname"))
        yield Config(file, names, drivers, never, off, sent, service)


def manager_lists(devices: str, device: Tuple[str, str]) -> bool:
    """Whether a list of devices has one: NetworkManager.conf(5), "Device List Format"."""
    found = False
    for part in re.split(r"[,;\s]+", devices):
        kind, _, value = re.sub(r"^except:|=", "", part).rpartition(":")
        property = {"type": "ethernet", "driver": device[1], "": device[0]}.get(kind, device[0])
        if kind != "mac" and fnmatchcase(property, value):
            if part.startswith("except:"):
                return False
            found = True
    return found


def manager_conf(image: ImageFiles) -> Settings:
    """All of NetworkManager.conf(5), in order."""
    files = image.layered("NetworkManager/conf.d/*.conf")
    packaged = [file for file in files if not file.startswith("/etc/")]
    own = [file for file in files if file.startswith("/etc/")]
    return settings("\n".join(map(image.read, [*packaged, MANAGER_CONF, *own])))


def unmanaged_by_manager(image: ImageFiles, device: Tuple[str, str]) -> bool:
    """Whether NetworkManager leaves a device alone; netplan overrides that for all."""
    listed = manager_lists(last(manager_conf(image), "keyfile.unmanaged-devices"), device)
    return listed and netplan_files(image)[0].get("renderer") != "NetworkManager"


def network_manager(image: ImageFiles) -> Iterator[Config]:
    """Profiles; and a device without one gets DHCP, unless told otherwise."""
    conf, off, profile = manager_conf(image), image.off(MANAGER), False
    if unmanaged_by_manager(image, ETH0):
        off = off or "eth0 is among NetworkManager's unmanaged-devices"
    profiles = "NetworkManager/system-connections/*"
    for file in image.list(f"etc/{profiles}") + image.list(f"usr/lib/{profiles}"):
        found = settings(image.read(file))
        if last(found, "connection.type") not in ("ethernet", "802-3-ethernet", ""):
            continue
        why = "" if last(found, "ipv4.method") in ("auto", "") else "has no method=auto for IPv4"
        if last(found, "connection.autoconnect") in NO:
            why = "has autoconnect=false"
        never = [f"path={path}" for path in words(found, "match.path") if "pci" in path]
        mac = last(found, "ethernet.mac-address", "802-3-ethernet.mac-address")
        never += [f"mac-address={mac}"] if mac else []
        names = words(found, "connection.interface-name") or words(found, "match.interface-name")
        sent = hostname(last(found, "ipv4.dhcp-send-hostname"), last(found, "ipv4.dhcp-hostname"))
        drivers = words(found, "match.driver")
        config = Config(file, names, drivers, " ".join(never), off or why, sent, MANAGER)
        profile = profile or (config.fits(ETH0) and "autoconnect" not in why)
        yield config
    if not profile and image.unit_file(MANAGER):
        if manager_lists(last(conf, "main.no-auto-default"), ETH0):
            off = off or "has no-auto-default, and there is no profile for eth0"
        sent = hostname(last(conf, "connection.ipv4.dhcp-send-hostname"), "")
        yield Config(MANAGER_CONF, off=off, hostname=sent, service=MANAGER)


def ifcfg(image: ImageFiles) -> Iterator[Config]:
    """RHEL's files, for NetworkManager or the init script of RHEL 7, and those of SUSE's wicked."""
    script = image.list("etc/rc3.d/S*network") or image.list("etc/rc.d/rc3.d/S*network")
    for file in image.list("etc/sysconfig/network*/ifcfg-*"):
        suse = file.startswith("/etc/sysconfig/network/")
        found = variables(image.read(file))
        device = file.rpartition("/ifcfg-")[2] if suse else found.get("DEVICE", "")
        if device == "lo" or found.get("TYPE", "Ethernet") != "Ethernet":
            continue
        off = image.off("wicked.service") if suse else "" if script else image.off(MANAGER)
        if found.get("ONBOOT", "").lower() in NO or found.get("STARTMODE") in ("off", "manual"):
            off = "is not started at boot"
        off = off if found.get("BOOTPROTO", "").startswith("dhcp") else "has no BOOTPROTO=dhcp"
        never = f"HWADDR={found['HWADDR']}" if found.get("HWADDR") else ""
        sent = hostname(found.get("DHCP_SEND_HOSTNAME"), found.get("DHCP_HOSTNAME"))
        service = "" if suse or script else MANAGER
        yield Config(file, [device] if device else [], (), never, off, sent, service)


def interface_lines(image: ImageFiles, file: str, seen: List[str]) -> List[Tuple[str, List[str]]]:
    """Lines, those of sourced files too, with the file that each stands in: interfaces(5)."""
    lines: List[Tuple[str, List[str]]] = []
    if file not in seen:
        seen.append(file)
        for line in map(str.split, image.text_of(file).split("\n")):
            if line[:1] in (["source"], ["source-directory"]):
                for included in image.list(line[-1] + ("/*" if "-" in line[0] else "")):
                    lines += interface_lines(image, included, seen)
            elif line:
                lines.append((file, line))
    return lines


def sent_by(image: ImageFiles, client: str) -> str:
    """What is wrong with the name that a client's own configuration has it send."""
    if client == "dhclient":
        conf = image.read("/etc/dhcp/dhclient.conf") or image.read("/etc/dhclient.conf")
        option, line = r"send\s+(?:host-name|fqdn\.fqdn)", "send host-name = gethostname();"
    else:
        conf, option, line = image.read("/etc/dhcpcd.conf"), "hostname", "hostname"
    found = re.search(rf'(?m)^[ \t]*{option}\b[ \t=]*("?)([^\s";]*)', conf)
    if client not in ("dhclient", "dhcpcd") or (found and "gethostname" in found.group(2)):
        return ""
    if not found:
        return f"sends no name (there is no `{line}` in {client}.conf)"
    return hostname("", found.group(2))


def ifupdown(image: ImageFiles) -> Iterator[Config]:
    """Debian's stanzas, started by networking.service, or by a udev rule (allow-hotplug)."""
    if not (image.stat("/usr/sbin/ifup") or image.stat("/sbin/ifup")):
        return
    places = ("/usr/sbin", "/sbin", "/usr/bin")
    clients = [
        client
        for client in ("dhclient", "udhcpc", "dhcpcd")  # ifupdown takes the first
        if any(image.stat(f"{place}/{client}") for place in places)
    ]
    sent = sent_by(image, clients[0]) if clients else ""
    lines = interface_lines(image, "/etc/network/interfaces", [])
    started: Dict[str, str] = {}  # a name or pattern of interfaces: why its class is not started
    for _, (keyword, *names) in lines:
        if keyword in ("auto", "allow-auto", "allow-hotplug"):
            for name in names:
                off = "" if keyword == "allow-hotplug" else image.off("networking.service")
                started.setdefault(name, off)
    for number, (file, stanza) in enumerate(lines):
        if stanza[0] != "iface" or stanza[2:4] != ["inet", "dhcp"]:
            continue
        name = stanza[1]
        physical, off = name, f"nothing starts {name}: add allow-hotplug {name}"
        for pattern, class_off in started.items():
            interface, _, logical = pattern.partition("=")
            if name in (interface, logical) or fnmatchcase(name, interface.lstrip("/")):
                physical = interface if logical == name else name
                off = class_off
        option = ""
        for _, (keyword, *values) in lines[number + 1 :]:
            if keyword in ("iface", "auto", "mapping") or keyword.startswith("allow-"):
                break
            option = " ".join(values) if keyword == "hostname" else option
        off = off if clients else "no DHCP client is installed: isc-dhcp-client, dhcpcd-base"
        never = physical if re.match("/?mac/", physical) else ""
        yield Config(file, [physical.lstrip("/")], (), never, off, hostname("", option) or sent)
    # Debian's cloud images make a stanza for each interface that comes.
    for rules in image.layered("udev/rules.d/*.rules"):
        if clients and re.search(r"ifup@|cloud-ifupdown-helper", image.text_of(rules)):
            yield Config(rules, hostname=sent)


def other_clients(image: ImageFiles) -> Iterator[Config]:
    """Units that run a DHCP client: dhcpcd.service, dhclient@eth0.service, connman.service."""
    allowed = re.findall(r"(?m)^[ \t]*allowinterfaces\s+(\S+)", image.read("/etc/dhcpcd.conf"))
    for unit, found in image.started.items():
        command = last(found, "Service.ExecStart")
        client = re.search(r"\b(dhcpcd|dhclient|udhcpc|connmand)\b", command)
        if client:
            names = re.findall(r"@(.+)\.service$", unit) or (
                allowed if client.group() == "dhcpcd" else []
            )
            yield Config(image.unit_file(unit), names, hostname=sent_by(image, client.group()))


def configurations(image: ImageFiles) -> List[Config]:
    """All that there are."""
    stacks = (networkd, netplan, network_manager, ifcfg, ifupdown, other_clients)
    return [config for stack in stacks for config in stack(image)]
