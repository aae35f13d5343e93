"""Do a model's scores tell other images from those it was trained on, and does anything simpler?

Images are scored at their mean latents, without a label. Every score is HIGH outside:

    gradient_norm       ||gradient||, which is zero at data
    descent_length      length of the way down, in a stated number of updates
    energy              of explicit energies (EqM-E), which rise toward noise
    pixel_gaussian      Gaussian on pixels, negative log-likelihood in nats
    pixel_pca           probabilistic PCA on pixels, the same
    feature_gaussian    Gaussian on features (Mahalanobis), the same
    feature_neighbours  distance to the k-th nearest training image, in features

The last four are baselines: they are fitted on training images alone and know nothing of the model.
Sets of images come from eqm.image_sets, measures of scores from eqm.ood. Called by evaluate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eqm import image_sets, ood, sampling
from eqm.baselines import ROUNDING_VARIANCE, Gaussian, Neighbours, PrincipalComponents
from eqm.config import IN_DISTRIBUTION, Baseline, OODConfig, OODSet, SamplerConfig
from eqm.errors import DataError
from eqm.features import FeatureExtractor, extract
from eqm.images import ImageSource
from eqm.latents import mean_latents
from eqm.model import Model
from eqm.policy import MethodScore
from eqm.precision import full_precision
from eqm.progress import Progress
from eqm.records import OODRow, to_json

BATCH = 256
LARGEST_SIDE_PX = 32
"""Baselines on pixels see larger images averaged to this: a covariance has (channels side^2)^2
numbers."""

Array = NDArray[np.float64]
Scores = Mapping[str, Mapping[str, Array]]
"""Score -> set -> scores (N,); the held-out images are among the sets."""
Scorer = Callable[[Tensor], Array]
"""Scores (N,) of uint8 images (N, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whose scores are asked for, and what they are held against."""

    model: Model
    sampler: SamplerConfig
    """Whose rule descends."""
    source: ImageSource
    extractor: FeatureExtractor


def out_of_distribution(
    config: OODConfig, subject: Subject, progress: Callable[[str, int], Progress]
) -> tuple[tuple[OODRow, ...], dict[str, Tensor]]:
    """A row for each score of each set, and all scores by "score/set"; none without a null label.

    Raises DataError, IntegrityError, StoreError for sets that cannot be used.
    """
    model, source = subject.model, subject.source
    if not model.spec.null_label:
        return (), {}
    names = scores_of(config, model)
    numbers = source.numbers(held_out=True)[: config.images]
    if len(numbers) < image_sets.LEAST_IMAGES:
        raise DataError(
            f"there are {len(numbers) or 'no'} held-out images to tell others from: set "
            f"source.held_out_fraction ({source.config.held_out_fraction}) higher, or add images"
        )
    inside = torch.cat(list(source.read_many([numbers])))
    images = {
        IN_DISTRIBUTION: inside,
        **{one.name: image_sets.read_set(one, inside, config.images) for one in config.sets},
    }
    baselines = fitted_baselines(config, subject, progress)
    total = sum(map(len, images.values()))
    with progress("images scored", total) as bar:
        found = {score: dict[str, Array]() for score in (*names, *baselines)}
        for name, pixels in images.items():
            latents = latents_of(model, pixels)
            for score in names:
                found[score][name] = model_scores(score, config, subject, latents)
            for score, scorer in baselines.items():
                found[score][name] = scorer(pixels)
            bar.advance(len(pixels))
    ranked = {score: finite(by_set) for score, by_set in found.items()}
    sealed = {
        f"{score}/{name}": torch.from_numpy(values)
        for score, by_set in ranked.items()
        for name, values in by_set.items()
    }
    return rows_of(config, ranked), sealed


def rows_of(config: OODConfig, scores: Scores) -> tuple[OODRow, ...]:
    """Every measure of every score of every set; the same for the same scores. Raises DataError."""
    main = next((score for score in config.scores if score in scores), None)
    return tuple(
        _row(score, main, one, by_set[IN_DISTRIBUTION], by_set[one.name])
        for score, by_set in scores.items()
        for one in config.sets
    )


def protocol(config: OODConfig) -> dict[str, Any]:
    """All that must be equal for rows to be comparable: not where files lie, nor what is gated."""
    sets = [
        {k: v for k, v in to_json(one).items() if k not in ("uri", "gated")} for one in config.sets
    ]
    return {**to_json(config), "sets": sets}


def _row(score: str, main: str | None, one: OODSet, inside: Array, outside: Array) -> OODRow:
    found = ood.compare(inside, outside)
    baseline = score in get_args(Baseline)
    return OODRow(
        name=one.name,
        score=score,
        role="baseline" if baseline else "main" if score == main else "score",
        count=found.out_count,
        held_out=found.in_count,
        auroc=found.auroc,
        auroc_low=found.auroc_interval[0],
        auroc_high=found.auroc_interval[1],
        aupr=found.aupr_out,
        aupr_low=found.aupr_out_interval[0],
        aupr_high=found.aupr_out_interval[1],
        aupr_in=found.aupr_in,
        aupr_in_low=found.aupr_in_interval[0],
        aupr_in_high=found.aupr_in_interval[1],
        fpr95_in=found.fpr95_in,
        fpr95_in_low=found.fpr95_in_interval[0],
        fpr95_in_high=found.fpr95_in_interval[1],
        fpr95_out=found.fpr95_out,
        fpr95_out_low=found.fpr95_out_interval[0],
        fpr95_out_high=found.fpr95_out_interval[1],
        # What a baseline tells says nothing of the model.
        gated=one.gated and not baseline,
    )


def finite(by_set: Mapping[str, Array]) -> dict[str, Array]:
    """Scores of which the infinite ones are the next number above all others.

    A descent that blew up has no length that could be measured, and is as far outside as can be:
    such images share the first rank. NaN stays, and is refused where scores are compared.
    """
    known = np.concatenate(list(by_set.values()))
    known = known[np.isfinite(known)]
    above = np.nextafter(known.max(), np.inf) if len(known) else 0.0
    return {name: np.where(values == np.inf, above, values) for name, values in by_set.items()}


# -- scores of the model ------------------------------------------------------------------------


def scores_of(config: OODConfig, model: Model) -> tuple[MethodScore, ...]:
    """Those of the configured scores that a model has. Raises DataError for none."""
    conditioned = model.field.conditioned
    lacking: dict[MethodScore, bool] = {
        # An energy that rises toward noise is read without being told how noisy the image is.
        "energy": conditioned or model.field.kind == "implicit",
        # Flow matching has no descent that could begin at an image.
        "descent_length": conditioned or not model.spec.objective.is_equilibrium,
    }
    has = {score for score in config.scores if not lacking.get(score, False)}
    found: tuple[MethodScore, ...] = tuple(score for score in config.scores if score in has)
    if not found:
        raise DataError(
            f"evaluate.ood.scores are {config.scores}, and this model ({model.field.kind}) has "
            "none of them: add 'gradient_norm', which every model has"
        )
    return found


def latents_of(model: Model, pixels: Tensor) -> Tensor:
    """Mean latents (N, C, H, W) of uint8 images, in the dtype of the model."""
    moments = [model.autoencoder.encode(batch.to(model.device)) for batch in pixels.split(BATCH)]
    return mean_latents(torch.cat(moments), model.spec.latent).to(model.dtype)


@full_precision()
def model_scores(score: MethodScore, config: OODConfig, subject: Subject, latents: Tensor) -> Array:
    """One score of latents (N, C, H, W), (N,); infinite where a descent blew up."""
    model = subject.model
    found = []
    for x in latents.split(BATCH):
        if score == "gradient_norm":
            # A baseline that is conditioned on the noise level is asked where data are.
            gamma = x.new_ones(len(x)) if model.field.conditioned else None
            values = model.gradient(x, gamma=gamma).flatten(1).norm(dim=1)
        elif score == "energy":
            values = model.energy(x)
        else:
            rule, updates = sampling.rule_of(subject.sampler), config.descent_updates
            values = sampling.score(model, x, rule=rule, updates=updates).descent_length
        found.append(values.double().cpu().numpy())
    return np.concatenate(found)


# -- baselines ----------------------------------------------------------------------------------


def fitted_baselines(
    config: OODConfig, subject: Subject, progress: Callable[[str, int], Progress]
) -> dict[str, Scorer]:
    """The configured baselines, fitted on training images alone. Raises DataError."""
    source, extractor = subject.source, subject.extractor
    views: dict[str, Scorer] = {
        "pixel": pixel_rows,
        "feature": lambda images: extract(
            extractor, [batch.to(subject.model.device) for batch in images.split(BATCH)]
        ).astype(np.float64),
    }
    used = {
        view: read
        for view, read in views.items()
        if any(_view(b) == view for b in config.baselines)
    }
    if not used:
        return {}
    numbers = source.numbers(held_out=False)[: config.baseline_images]
    rows: dict[str, list[Array]] = {view: [] for view in used}
    blocks = [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]
    with progress("training images for baselines", len(numbers)) as bar:
        for images in source.read_many(blocks):
            for view, read in used.items():
                rows[view].append(read(images))
            bar.advance(len(images))
    fits: dict[str, Callable[[Array], Any]] = {
        "pixel_gaussian": Gaussian,
        "pixel_pca": partial(
            PrincipalComponents, share=config.pca_variance, least_variance=ROUNDING_VARIANCE
        ),
        "feature_gaussian": Gaussian,
        "feature_neighbours": partial(Neighbours, k=config.neighbours),
    }
    fitted = {
        name: fits[name](np.concatenate(rows[_view(name)])).score for name in config.baselines
    }
    return {name: _seen(used[_view(name)], score) for name, score in fitted.items()}


def _view(baseline: str) -> str:
    return baseline.partition("_")[0]


def _seen(view: Scorer, score: Callable[[Array], Array]) -> Scorer:
    return lambda images: score(view(images))


def pixel_rows(images: Tensor) -> Array:
    """Pixels of images (N, C, H, W) as rows (N, D), averaged to LARGEST_SIDE_PX where larger."""
    pixels = images.double()
    if max(images.shape[2:]) > LARGEST_SIDE_PX:
        pixels = F.adaptive_avg_pool2d(pixels, LARGEST_SIDE_PX)
    return pixels.flatten(1).numpy()
