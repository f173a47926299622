"""The verdict in a folder: verdict.md, verdict.json, verdict.png; each whole or not at all."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.storage import write_atomic
from trainer.options import PROTOCOLS
from trainer.verdict.claim import OWN, Difference, Judge
from trainer.verdict.groups import Group
from trainer.verdict.plot import draw
from trainer.verdict.report import Report
from trainer.verdict.sentences import RESAMPLED
from trainer.verdict.statistics import DRAWS, LEVEL, Estimate


def write_files(report: Report, folder: Path) -> list[Path]:
    """Write all three, the picture first, and say where.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "verdict.png": draw(report),
        "verdict.md": report.markdown().encode(),
        "verdict.json": (json.dumps(as_json(report), indent=1, allow_nan=False) + "\n").encode(),
    }
    for name, content in data.items():
        write_atomic(folder / name, content)
    return [folder / name for name in data]


def as_json(report: Report) -> dict[str, Any]:
    """Every figure, unrounded."""
    return {
        "margin": report.margin,
        "level": LEVEL,
        "models": [_model(report, judge) for judge in report.judges],
        "runs": [str(run.folder) for run in report.runs],
    }


def _model(report: Report, judge: Judge) -> dict[str, Any]:
    claims = judge.claims(report.margin)
    sentences = report.sentences(judge)
    found = [difference for claim in claims for difference in claim.differences]
    return {
        "model": judge.model,
        "patches": judge.patches,
        "intervals": _intervals(judge),
        "groups": [_group(report, judge, group) for group in judge.groups],
        "differences": [_difference(report, d) for d in [*found, *judge.differences()]],
        "verdicts": [
            {
                "set_id": claim.set_id,
                "set": report.set_names[claim.set_id] if claim.set_id else None,
                "tokens": claim.tokens,
                "differs": dict(claim.a.differs) if claim.a else {},
                "outcome": claim.outcome,
                "a_minus_c": asdict(claim.ac.estimate) if claim.ac else None,
                "a_minus_b": asdict(claim.ab.estimate) if claim.ab else None,
                "missing": claim.missing or None,
                "sentence": sentence,
            }
            for claim, sentence in zip(claims, sentences, strict=True)
        ],
        "notes": [*report.model_notes(judge), *report.notes()],
    }


def _intervals(judge: Judge) -> dict[str, Any]:
    if judge.resampled:
        return {"over": "images", "meaning": RESAMPLED, "draws": DRAWS}
    spreads = {name: {"sd": s.sd, "df": s.df} for name, s in judge.spreads.items() if s.df}
    return {"over": "seeds", "meaning": "Student's t, standard deviation pooled over groups", "pooled": spreads}


def _group(report: Report, judge: Judge, group: Group) -> dict[str, Any]:
    accuracy: dict[str, Any] = {}
    for name in (*PROTOCOLS, OWN):
        estimate: Estimate | None = judge.accuracy(group, name)
        values = [] if estimate is None else group.top1(group.own if name == OWN else name).tolist()
        accuracy[name] = None if estimate is None else {**asdict(estimate), "half": estimate.half, "runs": values}
    reference = judge.reference(group)
    return {
        **_names(report, group),
        "own_protocol": group.own,
        "seeds": [run.seed for run in group.runs],
        "runs": [str(run.folder) for run in group.runs],
        "top1": accuracy,
        "train_gmacs": group.cost("train_gmacs"),
        "train_share_of_full": judge.share(group),
        "seconds": group.cost("seconds"),
        "seconds_of_full": reference.cost("seconds") if reference else None,
        "dense_gmacs": group.cost("dense_gmacs"),
        "test_gmacs": {name: group.test_gmacs(name) for name in PROTOCOLS},
    }


def _names(report: Report, group: Group) -> dict[str, Any]:
    names = {"arm": group.arm, "tokens": group.tokens, "differs": dict(group.differs)}
    return {**names, "set_id": group.set_id, "set": report.set_names[group.set_id] if group.set_id else None}


def _difference(report: Report, found: Difference) -> dict[str, Any]:
    return {
        "kind": found.kind,
        "first": {**_names(report, found.first), "protocol": found.first_protocol},
        "second": {**_names(report, found.second), "protocol": found.second_protocol},
        **asdict(found.estimate),
    }
