"""The Kademlia node: signed, expiring records."""
