"""Trainers of the tests: on the CPU, and nothing written or printed."""

from __future__ import annotations

import lightning.pytorch as pl


def quiet_trainer(**options) -> pl.Trainer:
    """A Lightning trainer without logs, checkpoints, bars and summaries."""
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
