"""What an export did, layer by layer and in bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blocksparse.whole_file import write_whole


@dataclass(frozen=True)
class LayerRow:
    """One layer that has a weight.

    Attributes
    ----------
    name : str
        Name of the node in the file.
    op : str
        ``conv2d`` or ``linear``.
    shape : tuple of int
        Dense shape of the weight, ``[K, C/groups, kh, kw]`` or ``[O, F]``.
    layout : str
        ``"dense"``, ``"bsr 8x8"`` or ``"nm 2:4"``.
    density : float
        Nonzero fraction of the weight, 0..1.
    bytes : int
        Bytes of the stored weight, values and indices; the bias is not in it.
    dense_bytes : int
        Bytes of the same weight stored densely in float32.
    reason : str
        Why this layout was taken.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    layout: str
    density: float
    bytes: int
    dense_bytes: int
    reason: str


@dataclass(frozen=True)
class Verification:
    """How the file was compared with the model.

    Attributes
    ----------
    images : int
        Images whose logits were compared, those of the validation loader included.
    same_argmax : int
        How many of them got the same top class from both.
    max_error : float
        Largest absolute difference between two logits.
    tolerance : float
        What was allowed in that batch, see `blocksparse.export.verify.tolerance`.
    max_logit : float
        Largest absolute logit of the model in that batch.
    engine : str
        Engine of the runtime that ran the file.
    val_images : int
        Images of the validation loader; 0 where there was none.
    accuracy_torch, accuracy_runtime : float or None
        Top-1 accuracy on them, 0..1.
    """

    images: int
    same_argmax: int
    max_error: float
    tolerance: float
    max_logit: float
    engine: str
    val_images: int = 0
    accuracy_torch: float | None = None
    accuracy_runtime: float | None = None


@dataclass(frozen=True)
class ExportReport:
    """The whole of an export.

    Attributes
    ----------
    path : Path
        The file that was written.
    layers : tuple of LayerRow
        Layers with a weight, in execution order.
    values_bytes, indices_bytes, metadata_bytes, file_bytes : int
        The file is values (weights, biases, scales), indices, and the rest: header and graph.
    dense_bytes : int
        Bytes of the same network with every weight stored densely.
    flushed : int
        Values below the smallest normal float32 that became zero.
    verification : Verification
        The comparison with the model.
    """

    path: Path
    layers: tuple[LayerRow, ...]
    values_bytes: int
    indices_bytes: int
    metadata_bytes: int
    file_bytes: int
    dense_bytes: int
    flushed: int
    verification: Verification

    @property
    def ratio(self) -> float:
        """File size over the size of the same network stored densely."""
        return self.file_bytes / self.dense_bytes

    def table(self) -> list[dict[str, str]]:
        """Rows for a table, one per layer and a total; keys are the column titles."""
        rows = [
            {
                "layer": row.name,
                "op": row.op,
                "shape": "x".join(map(str, row.shape)),
                "layout": row.layout,
                "density": f"{row.density:.1%}",
                "bytes": f"{row.bytes:,}",
                # The layout has a column of its own.
                "reason": row.reason.removeprefix(f"{row.layout}: "),
            }
            for row in self.layers
        ]
        rows.append(
            {
                "layer": "file",
                "op": "",
                "shape": "",
                "layout": "",
                "density": "",
                "bytes": f"{self.file_bytes:,}",
                "reason": (
                    f"values {self.values_bytes:,}, indices {self.indices_bytes:,}, "
                    f"metadata {self.metadata_bytes:,}; {self.ratio:.2f} of dense"
                ),
            }
        )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {**asdict(self), "path": str(self.path), "ratio": self.ratio}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all.

        Parameters
        ----------
        path : str or Path
            Missing folders are made.
        """
        write_whole(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")
