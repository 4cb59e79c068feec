"""Who a peer is: its key (`keys`), the certificate that proves the key to callers (`certificate`), shared secrets."""

from p2pmoe.identity.keys import (
    NODE_ID_BYTES,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    node_id_of,
    peer_id_from_node_id,
    peer_id_of,
    verify,
)
from p2pmoe.identity.private_files import MAX_KEY_FILE_BYTES
from p2pmoe.identity.secrets import SwarmKey, load_admin_token, save_new_admin_token

__all__ = [
    "MAX_KEY_FILE_BYTES",
    "NODE_ID_BYTES",
    "PUBLIC_KEY_BYTES",
    "SIGNATURE_BYTES",
    "Identity",
    "SwarmKey",
    "load_admin_token",
    "node_id_of",
    "peer_id_from_node_id",
    "peer_id_of",
    "save_new_admin_token",
    "verify",
]
