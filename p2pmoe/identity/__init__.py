"""Who a peer is: its key (`keys`), and the certificate that proves the key to callers (`certificate`)."""

from p2pmoe.identity.keys import (
    MAX_KEY_FILE_BYTES,
    NODE_ID_BYTES,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    node_id_of,
    peer_id_from_node_id,
    peer_id_of,
    verify,
)

__all__ = [
    "MAX_KEY_FILE_BYTES",
    "NODE_ID_BYTES",
    "PUBLIC_KEY_BYTES",
    "SIGNATURE_BYTES",
    "Identity",
    "node_id_of",
    "peer_id_from_node_id",
    "peer_id_of",
    "verify",
]
