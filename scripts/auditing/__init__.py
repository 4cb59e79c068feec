"""Checks what p2pmoe stands on: that what is installed is what is pinned, whole, and not known to be flawed."""
