#!/bin/sh
# Make a disk of Debian that boots in VMs of both generations, DIRECTORY/disk.raw, and disk.vhd. Its
# boot chain is signed for Secure Boot, which we did not try. Needs root, and the packages mmdebstrap,
# fdisk, dosfstools, mtools, e2fsprogs and qemu-utils.
set -eu
directory=${1:?usage: mmdebstrap.sh DIRECTORY [SUITE]} suite=${2:-bookworm}
recipes=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
[ -s "$recipes/authorized_keys" ] || {
    echo "mmdebstrap.sh: $recipes/authorized_keys: put the public keys of azureuser there" >&2
    exit 1
}
mkdir -p "$directory"
directory=$(CDPATH='' cd -- "$directory" && pwd)
tree=$directory/tree disk=$directory/disk.raw root=$directory/root

mmdebstrap --variant=minbase --include="systemd-sysv,systemd-resolved,libnss-myhostname,dbus,\
udev,python3,openssh-server,sudo,linux-image-cloud-amd64,grub-cloud-amd64" "$suite" "$tree"
cat >"$tree/etc/fstab" <<EOF
LABEL=root / ext4 defaults 0 1
LABEL=ESP /boot/efi vfat umask=0077 0 1
EOF
cat >"$tree/etc/default/grub.d/azure.cfg" <<'EOF'
# Azure shows the serial port as boot diagnostics, and its network interface is always eth0. Where
# no udev tells what the root's UUID is, update-grub writes the builder's loop device before this.
GRUB_CMDLINE_LINUX="root=LABEL=root console=ttyS0 net.ifnames=0"
GRUB_TIMEOUT=1
EOF
touch "$tree/etc/grub.d/enable_cloud" # GRUB installs itself again when it is upgraded in a VM
"$recipes/user.sh" "$tree" "$recipes/authorized_keys"
"$recipes/generalize.sh" "$tree"
(cd "$recipes/../.." && python3 -m tests.check "$tree")

# Space for GRUB's code of generation 1, a file system for that of generation 2, the root.
truncate -s 2G "$disk"
sfdisk --quiet "$disk" <<EOF
label: gpt
size=1MiB, type=21686148-6449-6E6F-744E-656564454649
size=127MiB, type=uefi
type=linux
EOF
# Microsoft's key has signed shim, which checks GRUB, which checks the kernel. GRUB starts here.
esp=$disk@@2M
mkfs.vfat -F 16 -n ESP --offset 4096 "$disk" $((127 * 1024))
mmd -i "$esp" ::EFI ::EFI/BOOT ::EFI/debian
mcopy -i "$esp" "$tree/usr/lib/shim/shimx64.efi.signed" ::EFI/BOOT/BOOTX64.EFI
mcopy -i "$esp" "$tree/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed" ::EFI/BOOT/grubx64.efi
mcopy -i "$esp" - ::EFI/debian/grub.cfg <<'EOF'
search --label root --set root
set prefix=($root)/boot/grub
configfile $prefix/grub.cfg
EOF

mkdir -p "$root"
loop=$(losetup --find --show "$disk")
clean_up() {
    ! mountpoint --quiet "$root" || umount --recursive "$root"
    partx --delete "$loop"
    losetup --detach "$loop"
}
trap clean_up EXIT
partx --update "$loop" # where losetup left some behind, --add would fail
mke2fs -q -t ext4 -L root -d "$tree" "${loop}p3"
mount "${loop}p3" "$root"
for name in dev proc sys; do mount --rbind --make-rslave "/$name" "$root/$name"; done
chroot "$root" sh -euc "grub-install --target=i386-pc '$loop' && update-grub"
trap - EXIT
clean_up
"$recipes/vhd.sh" "$disk"
