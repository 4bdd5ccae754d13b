#!/bin/sh
# From the VM on which live.sh was run to a VM of its image: sh capture.sh, after "az login" and
# after filling in this. The first VM cannot be started again. Needs azure-cli.
group=images builder=builder # the first VM
gallery=images image=debian12 version=1.0.0
publisher=example offer=debian sku=12 # any names of yours; the three together are unique
vm=web-prod-01 size=Standard_D2s_v5

# What the first VM is; an image definition cannot be changed afterwards.
generation=V2 architecture=x64
security=TrustedLaunch # or Standard; "az vm create" makes such a VM of most images of generation 2
controllers=SCSI,NVMe # SCSI, if it is V1, or its initramfs lacks nvme: no v6 or v7 sizes then

# We ran none of this on Azure. CI has azure-cli parse its commands.
set -eu
az vm deallocate -g "$group" -n "$builder" -o none
az vm generalize -g "$group" -n "$builder" -o none
source=$(az vm show -g "$group" -n "$builder" --query id -o tsv)

az sig create -g "$group" -r "$gallery" -o none
az sig image-definition create -g "$group" -r "$gallery" -i "$image" -p "$publisher" -f "$offer" \
    -s "$sku" --os-type Linux --os-state Generalized --hyper-v-generation "$generation" \
    --architecture "$architecture" -o none \
    --features "SecurityType=$security DiskControllerTypes=$controllers"
id=$(az sig image-version create -g "$group" -r "$gallery" -i "$image" -e "$version" \
    --virtual-machine "$source" --query id -o tsv)

# There is no agent to run extensions. The key is not installed, az only wants one: log in as the
# user that is in the image.
az vm create -g "$group" -n "$vm" --image "$id" --size "$size" --security-type "$security" \
    --enable-agent false --generate-ssh-keys
