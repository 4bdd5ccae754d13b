#!/bin/sh
# Make TREE, or this machine if it is /, one that any number of VMs can start from: a network
# that fits each of them, no identity, our unit.
set -eu
tree=${1:?usage: generalize.sh TREE}
tree=${tree%/}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
etc=$tree/etc

# NetworkManager asks for an address everywhere if it is not told otherwise, systemd-networkd nowhere.
if [ ! -e "$tree/usr/sbin/NetworkManager" ]; then
    mkdir -p "$etc/systemd/network"
    cp "$here/80-dhcp.network" "$etc/systemd/network/"
    systemctl --root="$tree/" enable systemd-networkd
fi
mkdir -p "$etc/udev/rules.d"
cp "$here/68-azure-sriov-unmanaged.rules" "$etc/udev/rules.d/"

# Nothing in Debian and Ubuntu creates host keys that are missing; Fedora and RHEL do.
if [ -e "$tree/usr/lib/systemd/system/ssh.service" ] || [ -e "$tree/lib/systemd/system/ssh.service" ]; then
    mkdir -p "$etc/systemd/system/ssh.service.d"
    cp "$here/host-keys.conf" "$etc/systemd/system/ssh.service.d/"
fi

DESTDIR=$tree "$here/../../install.sh"

rm -f "$etc"/ssh/ssh_host_*
[ ! -d "$tree/var/lib/dbus" ] || ln -sf /etc/machine-id "$tree/var/lib/dbus/machine-id"
: >"$etc/machine-id"
echo localhost >"$etc/hostname"
