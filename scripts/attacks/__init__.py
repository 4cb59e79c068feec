"""Attacks against a running node, by name: `scripts/attack`."""
