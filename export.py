"""Export a run, or any dense-with-zeros checkpoint, to one compact file, verified.

``python export.py --help`` lists what can be set; ``configs/export.yaml`` is where it starts.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig
from rich.text import Text

from blocksparse.pipeline.console import console


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    """Export what `cfg` names, and print what was done."""
    from blocksparse.pipeline.export_job import run  # imports torch: `--help` need not wait for it

    try:
        run(cfg)
    except (ValueError, OSError) as error:
        console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
