"""Predictions of a head on held-out draft tokens, compared with those of its untrained start."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.calibration import calibration
from drafttrain.eval.result import HeadFigures
from drafttrain.heads import TokenHead
from drafttrain.heads.folder import load_head
from drafttrain.heads.rows import HeadRows
from drafttrain.heads.token_head import probabilities


def held_out_estimate(head: TokenHead, rows: HeadRows) -> dict[str, Any]:
    """Return the validation figures of training by name, and `message`: the line that is logged."""
    figures = calibration(probabilities(head, rows), rows.labels_N)
    message = f"held-out log-likelihood {figures.log_likelihood:.4f}  AUC {figures.auc:.3f}  ECE {figures.ece:.4f}"
    return asdict(figures) | {"message": message}


def head_figures(folder: Path, start: Path, rows: HeadRows, *, kind: str) -> HeadFigures:
    """Return the figures of an exported head, read from its files."""
    loaded = load_head(folder, kind=kind)
    variants = {
        "untrained": probabilities(load_head(start, kind=kind).head, rows),
        "trained": probabilities(loaded.head, rows),
    }
    with torch.no_grad():
        uncorrected = loaded.head.uncorrected(rows.features_ND)
    if uncorrected is not None:
        variants["trained, not prior-corrected"] = uncorrected
    return HeadFigures(
        kind=kind,
        made_for=loaded.made_for,
        parameters=sum(p.numel() for p in loaded.head.parameters()),
        settings=asdict(loaded.head.settings),
        rows=len(rows),
        held_out={name: calibration(predicted_N, rows.labels_N) for name, predicted_N in variants.items()},
    )
