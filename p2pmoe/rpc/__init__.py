"""Calls between peers: what a transport is, over HTTP and in memory."""
