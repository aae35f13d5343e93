"""What a candidate must show to become champion: a policy, checked when it is built.

It is the table ``[policy]`` of a config, or a TOML file of its own (docs/policy.toml). eqm.gate
holds evaluations against it. Pure.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from eqm.errors import require

MethodScore: TypeAlias = Literal["gradient_norm", "descent_length", "energy"]
"""Scores of the model that tell images of a set from held-out ones (eqm.outliers)."""
BOUNDS = (
    "maximum",
    "minimum",
    "maximum_ratio",
    "maximum_increase",
    "minimum_ratio",
    "maximum_decrease",
)
POINT_OR_INTERVAL = ("point", "interval")


@dataclass(frozen=True, kw_only=True)
class MetricRule:
    """Bounds of one metric; what is null is not asked for."""

    maximum: float | None = None
    minimum: float | None = None
    by: Literal["point", "interval"] = "point"
    """What those two are held against: the value, or that end of its 95 % interval which is nearer
    to the bound."""
    maximum_ratio: float | None = None
    """At most so many times the champion's: for what is better when lower."""
    maximum_increase: float | None = None
    """At most so much above the champion's."""
    minimum_ratio: float | None = None
    """At least so many times the champion's: for what is better when higher."""
    maximum_decrease: float | None = None
    """At most so much below the champion's."""
    against: Literal["point", "interval", "apart"] = "point"
    """How those four are held. "point": value against value. "interval": by the worse end of the
    interval of the difference (it is shown not to be worse, or by no more than the bound allows).
    "apart": the worse end of the candidate's interval against the better end of the champion's; at
    a ratio of 1 or a margin of 0, intervals that overlap are refused (it is shown to be better)."""

    @property
    def comparisons(self) -> dict[str, float]:
        """The bounds that are relative to the champion, by name."""
        found = {name: getattr(self, name) for name in BOUNDS[2:]}
        return {name: value for name, value in found.items() if value is not None}

    def check(self, where: str) -> None:
        """Refuse a rule that asks for nothing, or for what cannot be. Raises ConfigError."""
        _one_of(self.by, POINT_OR_INTERVAL, f"{where}.by")
        _one_of(self.against, (*POINT_OR_INTERVAL, "apart"), f"{where}.against")
        bounds = {"maximum": self.maximum, "minimum": self.minimum, **self.comparisons}
        given = {name: value for name, value in bounds.items() if value is not None}
        require(bool(given), where, given, f"a table with one of {', '.join(BOUNDS)}")
        for name, value in given.items():
            require(math.isfinite(value), f"{where}.{name}", value, "a finite number")
        if self.maximum is not None and self.minimum is not None:
            rule = f"at most maximum ({self.maximum:g})"
            require(self.minimum <= self.maximum, f"{where}.minimum", self.minimum, rule)
        for name, value in self.comparisons.items():
            if name.endswith("ratio"):
                require(value > 0, f"{where}.{name}", value, "greater than 0")
            require(value >= 0, f"{where}.{name}", value, "0 or greater")


@dataclass(frozen=True, kw_only=True)
class OODRule:
    """Floor of one set of out-of-distribution images."""

    minimum_auroc: float
    by: Literal["point", "interval"] = "interval"
    """What it is held against: the AUROC, or the lower end of its 95 % interval."""

    def check(self, where: str) -> None:
        """Refuse what is no floor. Raises ConfigError."""
        least = self.minimum_auroc
        require(0 <= least <= 1, f"{where}.minimum_auroc", least, "from 0 to 1")
        _one_of(self.by, POINT_OR_INTERVAL, f"{where}.by")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What a candidate must show to become champion."""

    name: str = "default"
    minimum_samples: int = 50_000
    maximum_distance: float | None = None
    """Frechet distance to the training images; null: no absolute bound."""
    maximum_distance_ratio: float = 1.0
    """Distance of the candidate over that of the champion, at the same protocol. It gives way to
    any comparison in ``metrics.distance``."""
    minimum_recall: float = 0.0
    minimum_precision: float = 0.0
    minimum_label_agreement: float = 0.0
    minimum_auroc: dict[str, float] = field(default_factory=dict)
    """OOD set -> least AUROC of the model's main score; "set/score" names another of its scores."""
    metrics: dict[str, MetricRule] = field(default_factory=dict)
    """Metric -> bounds, for any metric that evaluations have; beside the short settings above."""
    ood: dict[str, OODRule] = field(default_factory=dict)
    """OOD set, or set/score, -> floor."""
    required_studies: tuple[str, ...] = ()
    """Studies that must be sealed for the candidate."""
    maximum_age_days: float | None = None
    """How old an evaluation may be when it is judged; null: any age."""

    def __post_init__(self) -> None:
        for name in ("minimum_samples", "maximum_distance_ratio"):
            value = getattr(self, name)
            require(value > 0, f"policy.{name}", value, "greater than 0")
        for name in ("minimum_recall", "minimum_precision", "minimum_label_agreement"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"policy.{name}", value, "from 0 to 1")
        for name in (*self.minimum_auroc, *self.ood):
            _, slash, score = name.partition("/")
            known = get_args(MethodScore)
            rule = f"the name of a set, or set/score with a score of {known}"
            table = "minimum_auroc" if name in self.minimum_auroc else "ood"
            require(not slash or score in known, f"policy.{table}", name, rule)
        for name, value in self.minimum_auroc.items():
            require(0 <= value <= 1, f"policy.minimum_auroc.{name}", value, "from 0 to 1")
        for name, rule in self.metrics.items():
            rule.check(f"policy.metrics.{name}")
        for name, floor in self.ood.items():
            floor.check(f"policy.ood.{name}")
            once = name not in self.minimum_auroc
            require(once, f"policy.ood.{name}", floor.minimum_auroc, _ONCE.format("minimum_auroc"))
        studies = self.required_studies
        once = len(set(studies)) == len(studies) and all(studies)
        require(once, "policy.required_studies", studies, "names, each once")
        age = self.maximum_age_days
        require(age is None or age > 0, "policy.maximum_age_days", age, "greater than 0, or null")
        _ = self.rules

    @property
    def rules(self) -> dict[str, MetricRule]:
        """Metric -> all its bounds, those of the short settings among them. Raises ConfigError."""
        short: dict[str, dict[str, float]] = {
            "distance": {"maximum_ratio": self.maximum_distance_ratio}
        }
        if self.maximum_distance is not None:
            short["distance"]["maximum"] = self.maximum_distance
        for key in ("recall", "precision", "label_agreement"):
            if least := getattr(self, f"minimum_{key}"):
                short[key] = {"minimum": least}
        found = dict(self.metrics)
        for key, bounds in short.items():
            found[key] = _joined(key, self.metrics.get(key), bounds)
        return found


_ONCE = "given here or as policy.{}, not as both"


def _joined(key: str, rule: MetricRule | None, short: dict[str, float]) -> MetricRule:
    """A rule with the short settings of the same metric."""
    if rule is None:
        return MetricRule(**short)  # type: ignore[arg-type]
    added: dict[str, Any] = {}
    for name, value in short.items():
        if name == "maximum_ratio" and rule.comparisons:
            continue
        given = getattr(rule, name)
        short_name = f"{name}_{key}"
        require(given is None, f"policy.metrics.{key}.{name}", given, _ONCE.format(short_name))
        added[name] = value
    return dataclasses.replace(rule, **added)


def _one_of(value: str, choices: tuple[str, ...], where: str) -> None:
    require(value in choices, where, value, f"one of {', '.join(choices)}")
