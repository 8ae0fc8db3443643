"""Whether a host can be reached, as the libraries that ask for it would find it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tpresearch.config.network import is_reachable


@pytest.fixture
def proxy() -> Iterator[str]:
    """Host and port of something that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", "http://someone:secret@", ""])
def test_a_proxy_is_found_as_http_clients_find_it(
    proxy: str, monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    monkeypatch.setenv(name, scheme + proxy)
    assert is_reachable("https://host.invalid")
    monkeypatch.setenv("no_proxy", "host.invalid")
    assert not is_reachable("https://host.invalid")


@pytest.mark.parametrize(
    "url", ["http://host:port", "http://127.0.0.1:99999", "https://two..dots", "", "host.invalid"]
)
def test_what_is_no_address_cannot_be_reached(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_reachable(url)
    monkeypatch.setenv("https_proxy", url or "http://:0")
    assert not is_reachable("https://host.invalid")
