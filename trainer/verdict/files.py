"""The verdict in a folder: verdict.html, verdict.md, verdict.json, verdict.png; each whole or not at all."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.storage import write_atomic
from trainer.options import PROTOCOLS
from trainer.verdict.claim import OWN, Difference, Judge
from trainer.verdict.groups import Group
from trainer.verdict.page import page
from trainer.verdict.plot import draw
from trainer.verdict.report import Report
from trainer.verdict.runs import DENSE
from trainer.verdict.sentences import RESAMPLED
from trainer.verdict.statistics import DRAWS, LEVEL, Estimate
from trainer.verdict.weights import Part, Square, WeightClaim


def write_files(report: Report, folder: Path) -> list[Path]:
    """Write all four, the picture first, and say where.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "verdict.png": draw(report),
        "verdict.html": page(report),
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
        **({"weights": _weights(report, judge)} if judge.ticketed else {}),
    }


def _weights(report: Report, judge: Judge) -> dict[str, Any]:
    """Groups with weight tickets, and the claims on them; plain (dense) runs stand among the model's groups."""
    claims = zip(report.weight_claims(judge), report.weight_sentences(judge), strict=True)
    return {
        "groups": [_ticketed(report, judge, group) for group in judge.ticketed],
        "claims": [_claim(report, claim, sentence) for claim, sentence in claims],
    }


def _ticketed(report: Report, judge: Judge, group: Group) -> dict[str, Any]:
    costs = ("updates", "mining_updates", "train_gmacs", "sparse_gmacs", "dense_gmacs", "seconds")
    return {
        **_weight_names(report, group),
        "own_protocol": group.own,
        "seeds": [run.seed for run in group.runs],
        "runs": [str(run.folder) for run in group.runs],
        "top1": _accuracies(judge, group),
        **{name: group.cost(name) for name in costs},
    }


def _claim(report: Report, claim: WeightClaim, sentence: str) -> dict[str, Any]:
    return {
        "claim": claim.name,
        **_weight_names(report, claim.winning),
        "outcome": claim.outcome,
        "level": claim.level,
        "parts": [_part(report, part) for part in claim.parts],
        "rows": [_weight_difference(report, row) for row in claim.rows],
        "square": _square(claim.square) if claim.square else None,
        "missing": claim.missing,
        "sentence": sentence,
    }


def _part(report: Report, part: Part) -> dict[str, Any]:
    return {**_weight_difference(report, part.difference), "bound": part.bound, "outcome": part.outcome}


def _weight_difference(report: Report, found: Difference) -> dict[str, Any]:
    sides = {"first": _weight_names(report, found.first), "second": _weight_names(report, found.second)}
    return {"kind": found.kind, **sides, **asdict(found.estimate)}


def _square(square: Square) -> dict[str, Any]:
    """Mean top-1 of the four, each as it is trained."""
    groups = {name: getattr(square, name) for name in ("neither", "weights", "data", "both")}
    means = {name: float(group.top1(group.own).mean()) if group else None for name, group in groups.items()}
    return {**means, "interaction": asdict(square.interaction) if square.interaction else None}


def _weight_names(report: Report, group: Group) -> dict[str, Any]:
    weights = group.weights or DENSE
    names = {"weight_arm": weights.arm, "weight_method": weights.method, "weight_sparsity": weights.sparsity}
    return {**_names(report, group), **names, "weight_group_id": weights.plan}


def _intervals(judge: Judge) -> dict[str, Any]:
    if judge.resampled:
        return {"over": "images", "meaning": RESAMPLED, "draws": DRAWS}
    spreads = {name: {"sd": s.sd, "df": s.df} for name, s in judge.spreads.items() if s.df}
    return {"over": "seeds", "meaning": "Student's t, standard deviation pooled over groups", "pooled": spreads}


def _group(report: Report, judge: Judge, group: Group) -> dict[str, Any]:
    reference = judge.reference(group)
    return {
        **_names(report, group),
        "own_protocol": group.own,
        "seeds": [run.seed for run in group.runs],
        "runs": [str(run.folder) for run in group.runs],
        "top1": _accuracies(judge, group),
        "train_gmacs": group.cost("train_gmacs"),
        "train_share_of_full": judge.share(group),
        "seconds": group.cost("seconds"),
        "seconds_of_full": reference.cost("seconds") if reference else None,
        "dense_gmacs": group.cost("dense_gmacs"),
        "test_gmacs": {name: group.test_gmacs(name) for name in PROTOCOLS},
    }


def _accuracies(judge: Judge, group: Group) -> dict[str, Any]:
    accuracy: dict[str, Any] = {}
    for name in (*PROTOCOLS, OWN):
        estimate: Estimate | None = judge.accuracy(group, name)
        values = [] if estimate is None else group.top1(group.own if name == OWN else name).tolist()
        accuracy[name] = None if estimate is None else {**asdict(estimate), "half": estimate.half, "runs": values}
    return accuracy


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
