"""Single experts' numbers by a pattern of uids: what `/metrics?experts=ffn.3.*` gives."""

from __future__ import annotations

from p2pmoe.errors import BadRequestError, InvalidUidError
from p2pmoe.experts.uid import UidPattern
from p2pmoe.metrics import NodeMetrics


def render_experts(metrics: NodeMetrics, pattern: str, after: str) -> tuple[bytes, str]:
    """See `NodeMetrics.render_experts`. Raises BadRequestError for what is no pattern."""
    try:
        wanted = UidPattern.parse(pattern)
    except InvalidUidError as error:
        raise BadRequestError(str(error)) from error
    return metrics.render_experts(wanted.matches, after)
