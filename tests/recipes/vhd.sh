#!/bin/sh
# Make DISK.vhd of DISK.raw as Azure takes it: of fixed size, a whole number of MiB. Needs qemu-utils
# and, for a GPT, fdisk.
set -eu
raw=${1:?usage: vhd.sh DISK.raw}
PATH=$PATH:/usr/sbin:/sbin
# MBR's signature; a typo or a qcow2 would be padded with zeros
[ "$(od -An -tx1 -j510 -N2 "$raw" | tr -d ' ')" = 55aa ] || {
    echo "vhd.sh: $raw is not a raw disk" >&2
    exit 1
}
truncate -s %1M "$raw"
if [ "$(od -An -tx1 -j450 -N1 "$raw" | tr -d ' ')" = ee ]; then # GPT: its copy goes to the new end
    sfdisk --quiet --relocate gpt-bak-std "$raw"
fi
qemu-img convert -f raw -O vpc -o subformat=fixed,force_size "$raw" "${raw%.raw}.vhd"
