"""An image's network: what asks DHCP on which device, for each program that does in a distribution."""

import os
import re
from fnmatch import fnmatchcase
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from tests.image_files import ImageFiles, Settings, last, settings, variables, words, yaml

YES = ("yes", "y", "true", "t", "on", "1")
NO = ("no", "n", "false", "f", "off", "0")
NETWORKD, MANAGER = "systemd-networkd.service", "NetworkManager.service"
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
        return "sends no name with its DHCP request"
    return f"always sends the name {name}" if name else ""


def mapping(value: Any) -> Dict[str, Any]:
    return value if isinstance(value, dict) else {}


def networkd(image: ImageFiles) -> Iterator[Config]:
    """systemd.network(5): the first file that matches a device is used."""
    taken = False
    for file in image.layered("systemd/network/*.network"):
        drop_ins = image.text(f"systemd/network/{os.path.basename(file)}.d/*.conf")
        found = settings(f"{image.read(file)}\n{drop_ins}")
        if (
            any(kind[0] != "!" for kind in words(found, "Match.Kind"))
            or not matches(words(found, "Match.Type"), "ether")
            or last(found, "Match.Virtualization") not in ("", "vm", "microsoft", *YES)
        ):
            continue  # for containers, tunnels, wireless networks
        never = [
            f"{name}={value}"
            for name in ("MACAddress", "PermanentMACAddress", "Path", "Property")
            for value in found.get(f"Match.{name}", ())
            if not (name == "Path" and any(matches(value.split(), vmbus) for vmbus in VMBUS))
            and not (name == "Property" and "hv_netvsc" in value)
        ]
        dhcp = last(found, "Network.DHCP") in (*YES, "both", "ipv4", "v4")
        config = Config(
            file,
            words(found, "Match.Name"),
            words(found, "Match.Driver"),
            " ".join(never),
            image.off(NETWORKD) if dhcp else "has no DHCP=yes",
            hostname(
                *[last(found, f"DHCP.{n}", f"DHCPv4.{n}") for n in ("SendHostname", "Hostname")]
            ),
            NETWORKD,
        )
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
        match, overrides = mapping(found.get("match")), mapping(found.get("dhcp4-overrides"))
        drivers = match.get("driver", [])
        yield Config(
            file,
            [str(match["name"])] if "name" in match else [] if "match" in found else [name],
            drivers if isinstance(drivers, list) else [drivers],
            f"macaddress: {match['macaddress']}" if "macaddress" in match else "",
            off if found.get("dhcp4") in YES else "has no dhcp4: true",
            hostname(overrides.get("send-hostname"), overrides.get("hostname")),
            service,
        )


def manager_lists(devices: str, device: Tuple[str, str]) -> bool:
    """Whether a list of devices has one: NetworkManager.conf(5), "Device List Format"."""
    found = False
    for part in re.split(r"[,;\s]+", devices):
        spec = part[7:] if part.startswith("except:") else part
        kind, _, value = spec.partition(":") if ":" in spec else ("interface-name", "", spec)
        index = {"interface-name": 0, "driver": 1}.get(kind)
        if spec == "type:ethernet" or (
            index is not None and fnmatchcase(device[index], value.lstrip("="))
        ):
            if spec != part:
                return False
            found = True
    return found


def manager_conf(image: ImageFiles) -> Settings:
    """All of NetworkManager.conf(5), the last word last."""
    files = image.layered("NetworkManager/conf.d/*.conf")
    own = [file for file in files if file.startswith("/etc/")]
    packaged = [file for file in files if file not in own]
    main = "/etc/NetworkManager/NetworkManager.conf"
    return settings("\n".join(map(image.read, [*packaged, main, *own])))


def unmanaged_by_manager(image: ImageFiles, device: Tuple[str, str]) -> bool:
    """Whether NetworkManager leaves a device alone; netplan overrides that for all."""
    listed = manager_lists(last(manager_conf(image), "keyfile.unmanaged-devices"), device)
    return listed and netplan_files(image)[0].get("renderer") != "NetworkManager"


def network_manager(image: ImageFiles) -> Iterator[Config]:
    """Profiles; and a device without one gets DHCP, unless told otherwise."""
    conf, main = manager_conf(image), "/etc/NetworkManager/NetworkManager.conf"
    off = image.off(MANAGER)
    if unmanaged_by_manager(image, ETH0):
        off = off or "eth0 is among NetworkManager's unmanaged-devices"
    profile = False
    for file in image.list("etc/NetworkManager/system-connections/*") + image.list(
        "usr/lib/NetworkManager/system-connections/*"
    ):
        found = settings(image.read(file))
        if last(found, "connection.type") not in ("ethernet", "802-3-ethernet", ""):
            continue
        macs = [last(found, f"{section}.mac-address") for section in ("ethernet", "802-3-ethernet")]
        never = [f"mac-address={mac}" for mac in macs if mac]
        never += [f"path={path}" for path in words(found, "match.path") if "pci" in path]
        automatic = last(found, "connection.autoconnect") not in NO
        config = Config(
            file,
            words(found, "connection.interface-name") or words(found, "match.interface-name"),
            words(found, "match.driver"),
            " ".join(never),
            off
            or ("" if automatic else "has autoconnect=false")
            or (
                "" if last(found, "ipv4.method") in ("auto", "") else "has no method=auto for IPv4"
            ),
            hostname(last(found, "ipv4.dhcp-send-hostname"), last(found, "ipv4.dhcp-hostname")),
            MANAGER,
        )
        profile = profile or (automatic and config.fits(ETH0))
        yield config
    if not profile and image.unit_file(MANAGER):
        none = manager_lists(last(conf, "main.no-auto-default"), ETH0)
        off = off or ("has no-auto-default, and there is no profile for eth0" if none else "")
        name = hostname(
            last(conf, "connection.ipv4.dhcp-send-hostname"),
            last(conf, "connection.ipv4.dhcp-hostname"),
        )
        yield Config(main, off=off, hostname=name, service=MANAGER)


def ifcfg(image: ImageFiles) -> Iterator[Config]:
    """RHEL's files, for NetworkManager or the init script of RHEL 7, and those of SUSE's wicked."""
    script = image.list("etc/rc3.d/S*network") or image.list("etc/rc.d/rc3.d/S*network")
    for file in image.list("etc/sysconfig/network*/ifcfg-*") + image.list(
        "etc/sysconfig/network-scripts/ifcfg-*"
    ):
        suse = file.startswith("/etc/sysconfig/network/")
        found = variables(image.read(file))
        device = file.rpartition("/ifcfg-")[2] if suse else found.get("DEVICE", "")
        kind = found.get("TYPE", "Ethernet").lower()
        if device == "lo" or kind != "ethernet" or file.endswith(("~", ".bak", ".template")):
            continue
        off = image.off("wicked.service") if suse else "" if script else image.off(MANAGER)
        if found.get("ONBOOT", "").lower() in NO or found.get("STARTMODE") in ("off", "manual"):
            off = "is not started at boot"
        never = f"HWADDR={found['HWADDR']}" if found.get("HWADDR") else ""
        off = off if found.get("BOOTPROTO", "").startswith("dhcp") else "has no BOOTPROTO=dhcp"
        name = hostname(found.get("DHCP_SEND_HOSTNAME"), found.get("DHCP_HOSTNAME"))
        if suse and not name:
            option = variables(image.read("/etc/sysconfig/network/dhcp"))
            value = option.get("DHCLIENT_HOSTNAME_OPTION", "AUTO")
            name = "" if value == "AUTO" else hostname("" if value else "no", value)
        service = "" if suse or script else MANAGER
        yield Config(file, [device] if device else [], (), never, off, name, service)


def interfaces(
    image: ImageFiles, file: str = "/etc/network/interfaces", depth: int = 0
) -> List[Tuple[str, List[str]]]:
    """The lines of interfaces(5) with the files that they stand in, those of other files included."""
    lines: List[Tuple[str, List[str]]] = []
    for line in image.read(file).replace("\\\n", " ").split("\n"):
        line_words = line.split("#")[0].split() if line.strip().startswith("#") else line.split()
        if line_words[:1] == ["source"] and depth < 9:
            for included in image.list(line_words[-1]):
                lines += interfaces(image, included, depth + 1)
        elif line_words[:1] == ["source-directory"] and depth < 9:
            for included in image.list(line_words[-1] + "/*"):
                lines += interfaces(image, included, depth + 1)
        elif line_words:
            lines.append((file, line_words))
    return lines


def sent_by_client(image: ImageFiles) -> str:
    """What is wrong with the name that dhclient or dhcpcd sends."""
    if image.stat("/usr/sbin/dhclient") or image.stat("/sbin/dhclient"):
        conf = image.read("/etc/dhcp/dhclient.conf") or image.read("/etc/dhclient.conf")
        send = re.search(r'(?m)^\s*send\s+(?:host-name|fqdn\.fqdn)\s*=?\s*("?)([^";]*)', conf)
        return hostname("" if send else "no", send.group(2) if send and send.group(1) else "")
    conf = image.read("/etc/dhcpcd.conf")
    send = re.search(r"(?m)^\s*hostname\b[ \t]*(\S*)", conf)
    return hostname("" if send or not conf else "no", send.group(1) if send else "")


def ifupdown(image: ImageFiles) -> Iterator[Config]:
    """Debian's stanzas, started by networking.service, or by a udev rule (allow-hotplug)."""
    if not (image.stat("/usr/sbin/ifup") or image.stat("/sbin/ifup")):
        return
    programs = [
        f"{d}/{n}"
        for d in ("/usr/sbin", "/sbin", "/usr/bin")
        for n in ("dhclient", "dhcpcd", "udhcpc")
    ]
    client = any(map(image.stat, programs))
    lines = interfaces(image)
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
        for pattern, off in started.items():
            physical, _, logical = pattern.partition("=")
            if logical == name or fnmatchcase(name, physical.lstrip("/")):
                break
        else:
            physical, off = name, "is neither auto nor allow-hotplug"
        option = ""
        for _, (keyword, *values) in lines[number + 1 :]:
            if keyword in ("iface", "auto", "mapping") or keyword.startswith("allow-"):
                break
            option = values[0] if keyword == "hostname" and values else option
        mac = physical.startswith(("/mac/", "mac/"))
        yield Config(
            file,
            [physical.lstrip("/") if logical == name else name],
            never=physical if mac else "",
            off=off
            or ("" if client else "has no DHCP client: install isc-dhcp-client or dhcpcd-base"),
            hostname=hostname("", option) or sent_by_client(image),
        )
    # Debian's cloud images make a stanza for each interface that comes.
    for rules in image.layered("udev/rules.d/*.rules"):
        if re.search(r"(?m)^[^#\n]*(ifup@|cloud-ifupdown-helper)", image.read(rules)) and client:
            yield Config(rules, hostname=sent_by_client(image))


def other_clients(image: ImageFiles) -> Iterator[Config]:
    """Units that run a DHCP client: dhcpcd.service, dhclient@eth0.service, connman.service."""
    conf = settings(re.sub(r"(?m)^\s*(\w+)\s+", r"\1=", image.read("/etc/dhcpcd.conf")))
    for unit, found in image.started.items():
        client = re.search(
            r"\b(dhcpcd|dhclient|udhcpc|connmand)\b", last(found, "Service.ExecStart")
        )
        if client and unit.endswith(".service"):
            instance = re.findall(r"@(.+)\.service$", unit)
            names, denied = instance, ""
            if client.group(1) == "dhcpcd":
                names = instance or words(conf, ".allowinterfaces")
                denied = " ".join(words(conf, ".denyinterfaces"))
            off = "denies eth0" if denied and matches(denied.split(), ETH0[0]) else ""
            name = sent_by_client(image) if client.group(1) in ("dhcpcd", "dhclient") else ""
            yield Config(image.unit_file(unit), names, off=off, hostname=name)


def configurations(image: ImageFiles) -> List[Config]:
    """All that there are."""
    stacks = (networkd, netplan, network_manager, ifcfg, ifupdown, other_clients)
    return [config for stack in stacks for config in stack(image)]
