"""An interface's byte counters, and how many of those bytes are payload.

A rank reads the counters of the host that it is on, while all ranks wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from two_hosts.hosts import INTERFACE

HEADER_BYTES = 14 + 20 + 32
"""Ethernet, IPv4, and TCP with its timestamps, once a packet that the interface is given."""
SEGMENT_BYTES = 1500 - 20 - 32
"""The most that one TCP segment carries at an MTU of 1,500."""


@dataclass(frozen=True)
class Sent:
    """What a host has given its interface to send; a difference of two of these is what it sent in between."""

    tx_bytes: int
    """As counted: headers, acknowledgements and repeated segments included."""
    tx_packets: int
    """As handed over. A packet may be up to 64 KiB: cutting it into frames is a network card's work, and a veth
    has none to do."""
    repeated_segments: int
    """TCP segments sent again."""

    def __sub__(self, before: Sent) -> Sent:
        return Sent(
            self.tx_bytes - before.tx_bytes,
            self.tx_packets - before.tx_packets,
            self.repeated_segments - before.repeated_segments,
        )

    @property
    def payload_bytes(self) -> int:
        """What programs wrote to their sockets: no headers (an acknowledgement is nothing else), no repetition."""
        return self.tx_bytes - HEADER_BYTES * self.tx_packets - SEGMENT_BYTES * self.repeated_segments


def sent_so_far() -> Sent:
    """The counters of this process's network namespace."""
    (line,) = [line for line in _lines("/proc/net/dev") if line.strip().startswith(f"{INTERFACE}:")]
    numbers = [int(word) for word in line.partition(":")[2].split()]
    names, values = (line.split()[1:] for line in _lines("/proc/net/snmp") if line.startswith("Tcp:"))
    repeated = int(values[names.index("RetransSegs")])
    return Sent(tx_bytes=numbers[8], tx_packets=numbers[9], repeated_segments=repeated)


def settled() -> Sent:
    """The counters at a moment when no rank has anything under way."""
    dist.barrier()
    sent = sent_so_far()
    dist.barrier()
    return sent


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
