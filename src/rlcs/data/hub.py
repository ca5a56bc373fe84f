"""Whether the Hugging Face hub can be reached; where it cannot, its libraries read their cache at once.

Left alone, they try again for half a minute, and say so in ten lines, before they look into the cache.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from rlcs.storage import at_home

_LOG = logging.getLogger("rlcs")
_LIMIT_S = 5.0


@contextmanager
def cache_where_unreachable(name: str) -> Iterator[None]:
    """Within it the model or data set `name` comes from the cache, if it is on a hub that does not answer."""
    if at_home(name).exists() or is_reachable():
        yield
        return
    from huggingface_hub import constants

    _LOG.info("the hub cannot be reached: %s is read from the cache", name)
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_reachable() -> bool:
    """Whether something listens where the hub should be (`HF_ENDPOINT`).

    With a proxy this is not known without asking it, and taken to be so.
    """
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if address.hostname is None or getproxies().keys() & {"http", "https", "all"}:
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=_LIMIT_S).close()
    except OSError:
        return False
    return True
