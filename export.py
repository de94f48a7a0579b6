"""Export a run, or any dense-with-zeros checkpoint, to one compact file, verified.

``python export.py --help`` lists what can be set; ``configs/export.yaml`` is where it starts.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from blocksparse.pipeline.program import call


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    """Export what `cfg` names, and print what was done."""
    from blocksparse.pipeline.export_job import run  # imports torch: `--help` need not wait for it

    run(cfg)


if __name__ == "__main__":
    call(main)
