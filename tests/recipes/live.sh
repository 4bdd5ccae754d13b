#!/bin/sh
# Make an image of this VM of Debian, Ubuntu or RHEL, which an agent provisioned: run this as root
# in a copy of the repository on the VM. Then deallocate, generalize and capture it.
set -eu
recipes=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

export DEBIAN_FRONTEND=noninteractive
for package in cloud-init waagent walinuxagent; do # the latter two are Debian's and Ubuntu's
    ! dpkg-query -s "$package" >/dev/null 2>&1 || apt-get purge -qy "$package"
done
! command -v dnf >/dev/null || dnf remove -qy cloud-init WALinuxAgent

# cloud-init's network survives its package, and is bound to this VM's MAC address.
rm -f /etc/netplan/50-cloud-init.yaml /etc/network/interfaces.d/50-cloud-init* \
    /etc/systemd/network/10-cloud-init-* /etc/udev/rules.d/*-cloud-init-* \
    /etc/NetworkManager/system-connections/cloud-init-* /etc/NetworkManager/conf.d/*cloud-init*
{ grep -ls 'Created by cloud-init' /etc/sysconfig/network-scripts/ifcfg-* || :; } | xargs rm -f
rm -rf /etc/cloud /var/lib/cloud /var/lib/waagent

"$recipes/generalize.sh" /
cd "$recipes/../.."
"${PYTHON:-python3}" -m tests.check
sync
