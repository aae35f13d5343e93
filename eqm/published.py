"""What papers say of systems on class-conditional ImageNet 256 x 256, and when it may be compared.

Numbers as the paper prints them ("Equilibrium Matching", arXiv 2510.02300); none was measured here.
Called by report and report_page.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eqm.records import Evaluation

PAPER = "arXiv 2510.02300"
FID_SAMPLES = 50_000
PROTOCOL = (
    "FID of 50,000 samples, class-conditional ImageNet 256 x 256, "
    "against ADM's reference statistics"
)
NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number."""

    system: str
    family: str
    """GAN, diffusion, flow matching or equilibrium matching."""
    sampler: str
    guidance: str
    """Scale of classifier-free guidance."""
    fid: float
    """Lower is better; papers give no interval."""
    source: str


def _eqm(sampler: str, fid: float, source: str) -> Published:
    # The scale is in the README of the authors' code alone; the paper does not mention guidance.
    return Published(
        system="EqM-XL/2",
        family="equilibrium matching",
        sampler=sampler,
        guidance="1.5 (README of the authors' code)",
        fid=fid,
        source=source,
    )


def _other(system: str, family: str, sampler: str, fid: float, source: str) -> Published:
    return Published(
        system=system,
        family=family,
        sampler=sampler,
        guidance=NOT_STATED,
        fid=fid,
        source=source,
    )


TABLE_1, TABLE_2 = f"{PAPER}, Table 1", f"{PAPER}, Table 2"
SYSTEMS = (
    _other("StyleGAN-XL", "GAN", NOT_STATED, 2.30, TABLE_1),
    _other("VDM++", "diffusion", NOT_STATED, 2.12, TABLE_1),
    _other("DiT-XL/2", "diffusion", NOT_STATED, 2.27, TABLE_1),
    _other("SiT-XL/2", "flow matching", "Heun (SDE), step 0.0040", 2.06, f"{TABLE_1} and 2"),
    _other("SiT-XL/2", "flow matching", "Euler (ODE), step 0.0040", 2.10, TABLE_2),
    _eqm("NAG, step 0.0017, momentum 0.3", 1.90, f"{TABLE_1} and 2"),
    _eqm("GD, step 0.0017", 1.93, TABLE_2),
    _eqm("Euler (ODE), step 0.0017", 1.93, TABLE_2),
)
"""1,400 epochs of training for EqM-XL/2 (README of the authors' code)."""


def departures(evaluation: Evaluation) -> tuple[str, ...]:
    """In what an evaluation's protocol is not the published one; empty where it is."""
    images: Mapping[str, Any] = evaluation.protocol.get("images", {})
    extractor: Mapping[str, Any] = evaluation.protocol.get("extractor", {})
    wanted = (
        ("images", images.get("kind"), "imagenet"),
        ("image size", images.get("image_size_px"), 256),
        ("features", extractor.get("name"), "inception-v3-compat"),
        ("samples", evaluation.samples, FID_SAMPLES),
    )
    found = [f"{what}: {have}, not {want}" for what, have, want in wanted if have != want]
    reference: Mapping[str, Any] = evaluation.protocol.get("reference_images", {})
    # Whether it is the batch of this data set, its digest in the protocol says to who knows it.
    if not reference.get("file"):
        found.append("reference: the source's own images, not a reference batch of ADM")
    if images.get("kind") == "imagenet" and images.get("channels", 3) != 3:
        found.append("colour: images are gray")
    level = evaluation.protocol.get("generate", {}).get("noise_level", 1)
    if level != 1:
        found.append(f"starts: held-out images with noise of level {level:g}, not noise alone")
    return tuple(found)
