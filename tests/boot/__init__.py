"""Boots of a real image under a real systemd; tests/README.md says what they need."""
