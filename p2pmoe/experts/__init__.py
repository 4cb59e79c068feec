"""Expert uids, and finding experts in the DHT."""
