"""Boots of a real image under a real systemd, at the platform's real addresses.

They need root, systemd-nspawn, mmdebstrap, ip and dnsmasq. BOOT_SUITE says which Debian they boot:
bookworm (the default), bullseye, trixie or sid. The images are built once, into BOOT_CACHE.
"""
