"""Imported once, by the server that ranks are forked from, so that no job repeats this work.

Of a job of four steps on four small ranks the imports, the first plan on the meta device and the first step's
dispatch take 1.8 of 2.2 seconds of processor time per rank. No process group is left, and no thread.
"""

from __future__ import annotations

import gc
import logging
import threading
import warnings

import torch
from hydra import compose
from torch._subclasses.fake_tensor import FakeTensorMode

from tpresearch.config.compose import register_schema, to_config
from tpresearch.config.world import World
from tpresearch.data.pipeline import prepare
from tpresearch.launch.composition import initialize_conf
from tpresearch.launch.resolvers import register_resolvers
from tpresearch.parallel.device import FAKE, keep_freed_memory
from tpresearch.verify.trace import trace_run

SMALL = (
    "model=llama2_debug",
    "data=random_tokens",
    "data.seq_len=16",
    "tokenizer.vocab_size=260",
    "train.global_batch_size=8",
    "train.eval_rows=4",
)
PLANS = ("parallel=fsdp_tp", "parallel=ddp")


def warm_up() -> None:
    """Run a step of the largest plan and of the simplest, as rank 0 of four fake ranks.

    Call it in a separate thread: torch caches by mesh, with the groups of the first of equal meshes, and a mesh equals
    only those that were made in the same thread. So nothing cached for the fake groups is used for real ones.
    """
    register_schema()
    register_resolvers()
    with initialize_conf():
        for plan in PLANS:
            cfg = to_config(compose("train", overrides=[*SMALL, plan]))
            trace_run(cfg, prepare(cfg.data, cfg.tokenizer), World(size=4, local_size=4), 1, FAKE)


torch.set_num_threads(1)  # whose pools of threads a fork would not have
keep_freed_memory()  # before a thread has memory of its own, which threads of the forks would share
warnings.filterwarnings("ignore")
logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
# Not where torch is built for CUDA: backward would start threads for GPUs, and forks are then refused; and fake tensors ask
# the driver whether there is one, after which no fork can use it.
if not torch.backends.cuda.is_built():
    with FakeTensorMode():
        pass  # in this thread first: where another one used it alone, a fork that does crashes (torch 2.11)
    thread = threading.Thread(target=warm_up)
    thread.start()
    thread.join()
gc.collect()
gc.freeze()  # so that reference counts do not make each rank copy these pages
