"""Tests that need nothing but Python: the script, the installer and the tools."""
