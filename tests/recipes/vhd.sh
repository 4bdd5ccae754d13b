#!/bin/sh
# Make DISK.vhd of DISK.raw as Azure takes it: of fixed size, a whole number of MiB.
set -eu
raw=${1:?usage: vhd.sh DISK.raw}
truncate -s %1M "$raw"
sfdisk --quiet --relocate gpt-bak-std "$raw" # the second partition table goes to the new end
qemu-img convert -f raw -O vpc -o subformat=fixed,force_size "$raw" "${raw%.raw}.vhd"
