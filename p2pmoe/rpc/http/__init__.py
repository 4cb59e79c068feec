"""The transport over HTTP: aiohttp's client and server."""
