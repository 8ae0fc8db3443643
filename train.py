"""Train the composed config: `torchrun --nproc-per-node=4 train.py parallel=fsdp_tp train.steps=20`."""

from tpresearch.train.__main__ import main

if __name__ == "__main__":
    main()
