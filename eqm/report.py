"""All that a report shows, and its JSON; same input, same bytes.

It holds configs, digests and values alone: no times and no machines, which differ from run to run.
The page for people is that of eqm.report_page. Called by flows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eqm.errors import DataError
from eqm.figures import Images, check_images
from eqm.records import Decision, Evaluation, Json, Record, canonical_bytes, to_json

SCHEMA = "eqm-report/1"
BETTER: dict[str, Literal["lower", "higher"]] = {
    "distance": "lower",
    "distance_endless": "lower",
    "distance_held_out": "lower",
    "kid": "lower",
    "precision": "higher",
    "recall": "higher",
    "label_agreement": "higher",
}
"""Which way a metric improves; the distance to the nearest training image has no better side."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportInput:
    """All that a report shows. Raises DataError where its parts do not belong together."""

    title: str
    model_name: str
    evaluation: Evaluation
    decision: Decision | None = None
    champion: Evaluation | None = None
    """What was measured of the champion that stood when this was judged."""
    chain: tuple[Record, ...]
    """The evaluation and all that it was built on, in the order of the story."""
    history: Mapping[str, list[float]]
    """Training curve: lists "images", "loss", "gradient_norm"."""
    sample_images: Images
    """(K, R, C, H, W): R samples of each of K classes."""
    real_images: Images
    """(K, R, C, H, W): held-out images of the same classes."""
    class_names: Sequence[str]
    ood_scores: Mapping[str, list[float]]
    """Set -> scores; "held-out" is among them unless there are none."""
    trajectory: Images | None = None
    """(T, K, C, H, W): one image of each class along the descent."""
    trajectory_updates: Sequence[int] = ()
    generated_with: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the sampler, and seeds."""

    def __post_init__(self) -> None:
        check_images(self.sample_images, 5, "samples")
        check_images(self.real_images, 5, "real images")
        counts = len(self.sample_images), len(self.real_images), len(self.class_names)
        if len(set(counts)) != 1:
            raise DataError(
                f"{counts[0]} classes of samples, {counts[1]} of real images, {counts[2]} names: "
                "give as many of each"
            )
        if self.trajectory is not None:
            check_images(self.trajectory, 5, "trajectory")
            if len(self.trajectory) != len(self.trajectory_updates):
                raise DataError(
                    f"{len(self.trajectory)} moments of the descent have "
                    f"{len(self.trajectory_updates)} numbers of updates: give one for each"
                )
        if self.decision and self.chain and self.decision.candidate != self.chain[-1].ref:
            raise DataError(
                f"the decision judges evaluation {self.decision.candidate.digest[:12]}, the chain "
                f"ends in {self.chain[-1].digest[:12]}: judge again"
            )


# -- JSON ---------------------------------------------------------------------------------------


def render_json(report: ReportInput) -> bytes:
    """All numbers, the decision and the chain. Raises ConfigError for NaN and infinities."""
    return canonical_bytes(_document(report)) + b"\n"


def _document(report: ReportInput) -> Json:
    pictures = {"samples": report.sample_images, "real": report.real_images}
    if report.trajectory is not None:
        pictures["trajectory"] = report.trajectory
    return {
        "schema": SCHEMA,
        "title": report.title,
        "model": report.model_name,
        "evaluation": _evaluation_json(report.evaluation),
        "decision": to_json(report.decision),
        "champion": _evaluation_json(report.champion) if report.champion else None,
        "chain": [_record_json(record) for record in report.chain],
        "history": to_json(report.history),
        "ood_scores": to_json(report.ood_scores),
        "classes": list(report.class_names),
        "generated_with": to_json(report.generated_with),
        "trajectory_updates": list(report.trajectory_updates),
        "images": {name: _picture_json(images) for name, images in pictures.items()},
    }


def _evaluation_json(evaluation: Evaluation) -> Json:
    return {**to_json(evaluation), "protocol_digest": evaluation.protocol_digest}


def _record_json(record: Record) -> Json:
    body = to_json(record)
    sealed = {k: v for k, v in body.items() if k not in ("logs", "provenance")}
    return {"digest": record.digest, "content": record.content, **sealed}


def _picture_json(images: Images) -> Json:
    return {"shape": list(images.shape), "sha256": hashlib.sha256(images.tobytes()).hexdigest()}
