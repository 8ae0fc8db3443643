"""One collective at a time between the two hosts: what gloo sends for each byte of the ring formulas.

Run by `measure.py` on 2 x 2 ranks inside the namespaces; rank 0 writes its rows to the file named as argument.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tpresearch.ledger.entries import ring_bytes

sys.path.append(str(Path(__file__).parents[1]))
from two_hosts.wire import settled

TENSOR_BYTES = 16 << 20
GROUPS = {"all four ranks": [[0, 1, 2, 3]], "two pairs, each across": [[0, 2], [1, 3]]}
"""Of ranks 0 1 | 2 3 on the two hosts: as fsdp's and tp's one ring, and as the outer axis of fsdp_tp and hsdp."""


def main() -> None:
    dist.init_process_group("gloo")
    rows = []
    for name, members in GROUPS.items():
        group, _ = dist.new_subgroups_by_enumeration(members)
        assert isinstance(group, dist.ProcessGroup)
        size = len(members[0])
        for collective, call in calls(size, group, TENSOR_BYTES).items():
            call()  # the first one may connect
            before = settled()
            call()
            sent = settled() - before
            ring = ring_bytes(collective, TENSOR_BYTES, size) * len(members)
            rows.append(
                {
                    "collective": collective,
                    "groups": name,
                    "tensor_bytes": TENSOR_BYTES,
                    "ring_bytes": ring,
                    **asdict(sent),
                    "payload_bytes": sent.payload_bytes,
                    "payload_per_ring_byte": round(sent.payload_bytes / ring, 5),
                }
            )
    mine = {"host": os.environ["HOST_NAME"], "rows": rows}
    of_all: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    if dist.get_rank() == 0:
        by_host = {told["host"]: told["rows"] for told in of_all}
        Path(sys.argv[1]).write_text(json.dumps([{"host": h, **row} for h in "ab" for row in by_host[h]]))
    dist.destroy_process_group()


def calls(ranks: int, group: dist.ProcessGroup, tensor_bytes: int) -> dict[str, Callable[[], object]]:
    """Each collective on a whole tensor of this size, as FSDP and DTensor call them."""
    whole = torch.ones(tensor_bytes // 4)
    part = torch.ones(tensor_bytes // 4 // ranks)

    def all_gather() -> None:
        dist.all_gather_into_tensor(whole, part, group=group)

    def reduce_scatter() -> None:
        dist.reduce_scatter_tensor(part, whole, group=group)

    def all_reduce() -> Tensor:
        dist.all_reduce(whole, group=group)
        return whole

    return {"all_gather": all_gather, "reduce_scatter": reduce_scatter, "all_reduce": all_reduce}


if __name__ == "__main__":
    main()
