#!/bin/sh
# From a finished VHD to a VM: sh upload.sh DISK.vhd, after "az login" and after filling in this.
# Needs azure-cli and AzCopy 10.
group=images location=westeurope # a resource group for it all
gallery=images image=debian12 version=1.0.0
publisher=example offer=debian sku=12 # any names of yours; the three together are unique
vm=web-prod-01 size=Standard_D2s_v5

# What the image is. An image definition cannot be changed afterwards.
generation=V2 # or V1: what tests.rehearse says
architecture=x64 # or Arm64, which needs generation 2 and such a size
security=Standard # or TrustedLaunch, if the boot loader and the kernel are signed for Secure Boot
controllers=SCSI,NVMe # SCSI, if it is V1, or its initramfs lacks nvme: no v6 or v7 sizes then

# We ran none of this on Azure. CI has azure-cli parse its commands, and does not have AzCopy.
set -eu
vhd=${1:?usage: upload.sh DISK.vhd}
az group create -n "$group" -l "$location" -o none
az disk create -g "$group" -n "$image" -l "$location" --os-type Linux --sku Standard_LRS \
    --hyper-v-generation "$generation" --architecture "$architecture" \
    --upload-type Upload --upload-size-bytes "$(wc -c <"$vhd")" -o none
sas=$(az disk grant-access -g "$group" -n "$image" --access-level Write \
    --duration-in-seconds 86400 --query 'accessSAS || accessSas' -o tsv) # it has had both names
azcopy copy "$vhd" "$sas" --blob-type PageBlob
az disk revoke-access -g "$group" -n "$image" -o none
disk=$(az disk show -g "$group" -n "$image" --query id -o tsv)

az sig create -g "$group" -r "$gallery" -o none
# Without a SecurityType azure-cli adds that an image of generation 2 supports Trusted Launch.
az sig image-definition create -g "$group" -r "$gallery" -i "$image" -p "$publisher" -f "$offer" \
    -s "$sku" --os-type Linux --os-state Generalized --hyper-v-generation "$generation" \
    --architecture "$architecture" -o none \
    --features "SecurityType=$security DiskControllerTypes=$controllers"
# --os-snapshot takes the id of a disk, too.
id=$(az sig image-version create -g "$group" -r "$gallery" -i "$image" -e "$version" \
    --os-snapshot "$disk" --query id -o tsv)
az disk delete -g "$group" -n "$image" --yes -o none

# There is no agent to run extensions. The key is not installed, az only wants one: log in as the
# user that is in the image.
az vm create -g "$group" -n "$vm" --image "$id" --size "$size" --security-type "$security" \
    --enable-agent false --generate-ssh-keys
