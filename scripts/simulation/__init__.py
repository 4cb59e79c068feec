"""The DHT on a simulated network. `scripts/simulate` runs it."""
