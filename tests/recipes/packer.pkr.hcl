# An image of a VM on Azure: fill in the variables, put your public keys into the file
# authorized_keys in this directory, log in with "az login", and run
#     packer build -only='azure-arm.*' packer.pkr.hcl
# We did not run it there. CI runs the provisioners in a container of Debian:
#     packer build -only='null.*' -var ssh_host=... packer.pkr.hcl

variable "group" {
  default = "images"
}

variable "location" {
  default = "westeurope"
}

variable "ssh_host" {
  default = "127.0.0.1"
}

source "azure-arm" "image" {
  use_azure_cli_auth                = true
  location                          = var.location
  os_type                           = "Linux"
  image_publisher                   = "Debian"
  image_offer                       = "debian-12"
  image_sku                         = "12-gen2"
  vm_size                           = "Standard_D2s_v5"
  ssh_username                      = "packer"
  managed_image_resource_group_name = var.group
  managed_image_name                = "debian12-provisioned-{{timestamp}}"
}

# A machine that is there already.
source "null" "machine" {
  communicator   = "ssh"
  ssh_host       = var.ssh_host
  ssh_username   = "packer"
  ssh_agent_auth = true
}

build {
  sources = ["source.azure-arm.image", "source.null.machine"]

  # What the recipe needs, and no image that another recipe has built here.
  provisioner "shell-local" {
    inline = [
      "cd '${path.root}/../..'",
      "mkdir -p tests/recipes/build",
      "tar -czf tests/recipes/build/azure-provision.tar.gz --exclude=build --exclude=.git .",
    ]
  }

  provisioner "file" {
    source      = "${path.root}/build/azure-provision.tar.gz"
    destination = "/tmp/azure-provision.tar.gz"
    generated   = true
  }

  provisioner "shell" {
    # Without -e Packer would take the image even if a line fails.
    execute_command = "sudo env {{ .Vars }} sh -e {{ .Path }}"
    skip_clean      = true # the user who would do it is gone by then
    inline = [
      "mkdir /root/azure-provision",
      "cd /root/azure-provision",
      "tar -xzf /tmp/azure-provision.tar.gz",
      "tests/recipes/user.sh / tests/recipes/authorized_keys",
      "tests/recipes/live.sh",
      "cd /",
      "rm -rf /root/azure-provision /tmp/azure-provision.tar.gz",
      "userdel --force --remove \"$SUDO_USER\"",
      "sync",
    ]
  }
}
