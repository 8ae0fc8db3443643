"""Whether a host can be reached, checked before a library would wait for it in vain."""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit

TIMEOUT_S = 3.0
"""Timeout for a host to accept a connection."""


def is_reachable(url: str) -> bool:
    """Whether something accepts a TCP connection at the URL's host, or at the proxy that leads there."""
    target, proxies = urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")  # as HTTP clients complete it
    try:
        port = target.port or (443 if target.scheme == "https" else 80)
        socket.create_connection((target.hostname or "", port), TIMEOUT_S).close()
    except (OSError, ValueError):  # of an address that cannot be one
        return False
    return True
