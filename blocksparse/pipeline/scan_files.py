"""The files of a sensitivity scan: its rows as CSV, and what they hold for, as JSON."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blocksparse.sparsity.sensitivity import Row
from blocksparse.whole_file import write_whole

__all__ = ["COLUMNS", "ScanFiles", "fingerprint"]

COLUMNS = ("layer", "weights", "sparsity", "loss", "accuracy", "drop")


@dataclass(frozen=True)
class ScanFiles:
    """Where a scan lies, and whether what lies there is of the same network and settings.

    Parameters
    ----------
    folder
        The folder of a run.
    """

    folder: Path

    @property
    def rows_path(self) -> Path:
        """The CSV: one row per layer and sparsity, the dense network first."""
        return self.folder / "sensitivity.csv"

    @property
    def settings_path(self) -> Path:
        """The JSON: what was evaluated and how, and the fingerprint of both."""
        return self.folder / "sensitivity.json"

    def start(self, settings: Mapping[str, Any], key: str) -> list[Row]:
        """Begin a scan or go on with one, and return the rows there are already.

        Raises
        ------
        ValueError
            If the rows are of other weights, images or settings.
        """
        if self.settings_path.exists():
            return self.read(settings, key)
        text = json.dumps({**settings, "fingerprint": key}, indent=2) + "\n"
        write_whole(self.settings_path, text)
        return []

    def read(self, settings: Mapping[str, Any], key: str) -> list[Row]:
        """Return the rows, if they hold for these settings, images and weights.

        Raises
        ------
        FileNotFoundError
            If there is no scan in the folder.
        ValueError
            If it is another one, or a row is damaged; the text says which settings differ.
        """
        if not self.settings_path.is_file():
            raise FileNotFoundError(
                f"{self.folder} holds no sensitivity scan ({self.settings_path.name} is missing). "
                "Name the folder of a run of task=sensitivity, or leave task.scan out to scan now"
            )
        saved = json.loads(self.settings_path.read_text(encoding="utf-8"))
        if saved.pop("fingerprint", None) != key:
            differ = [
                f"{name} was {saved.get(name)}, is {value}"
                for name, value in settings.items()
                if saved.get(name) != value
            ]
            raise ValueError(
                f"{self.rows_path}: a scan of something else: "
                f"{'; '.join(differ) or 'the weights or the images are others'}. Use the network, "
                "data and settings it was made with, or scan again in a folder of its own"
            )
        return self._rows()

    def write(self, rows: Iterable[Row]) -> None:
        """Write all rows: whole or not at all, so that a scan broken off leaves what it had."""
        lines = [",".join(COLUMNS)]
        lines += [
            f"{_quoted(row.layer)},{row.weights},{row.sparsity:.6f},{row.loss:.6f},"
            f"{row.accuracy:.6f},{row.drop:.6f}"
            for row in rows
        ]
        write_whole(self.rows_path, "\n".join(lines) + "\n")

    def _rows(self) -> list[Row]:
        if not self.rows_path.exists():
            return []
        with self.rows_path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = []
            for row in reader:
                try:
                    rows.append(
                        Row(
                            row["layer"],
                            int(row["weights"]),
                            float(row["sparsity"]),
                            float(row["loss"]),
                            float(row["accuracy"]),
                            float(row["drop"]),
                        )
                    )
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{self.rows_path}, line {reader.line_num}: not a row of "
                        f"{', '.join(COLUMNS)} ({error}). Remove the line, and it is made again"
                    ) from error
        return rows


def fingerprint(
    settings: Mapping[str, Any], network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> str:
    """Return a hash of settings, weights and images: two scans with the same give the same rows."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for images, labels in batches:
        digest.update(images.contiguous().numpy().tobytes())
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


def _quoted(name: str) -> str:
    return f'"{name}"' if "," in name else name
