"""Train a network, prune it, export it to one compact file, and measure it.

Or, with ``task=``, find out which layers are easy to prune, and how to share sparsity out.
``python train.py --help`` lists what can be set; ``configs/train.yaml`` is where it starts.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from blocksparse.pipeline.folders import register_resolvers
from blocksparse.pipeline.program import call, importing

register_resolvers()


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one job and return an accuracy, 0..1, for sweepers: that of the exported network."""
    with importing():  # here, as `--help` need not wait for PyTorch
        from blocksparse.pipeline.entry import run_job

    return run_job(cfg)


if __name__ == "__main__":
    call(main)
