"""Tests that drive the real script, unit and installer; `python3 -m unittest` runs them."""
