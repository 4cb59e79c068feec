"""Bytes and values. No I/O, no clock."""
