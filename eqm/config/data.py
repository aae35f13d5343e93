"""Configs of what images become: source, autoencoder, extractors, references, latents."""

from dataclasses import dataclass, field
from typing import Literal

from eqm.config.checks import fraction, is_sha256, known, positive, seed_in_range
from eqm.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which images, at what size, and how they are split."""

    kind: Literal["digits", "folder", "imagenet", "webdataset", "parquet"] = "digits"
    """What lies at ``source_uri``, on this machine or under s3://: "folder": one folder of images a
    class; "imagenet": the tars of ILSVRC2012 as distributed; "webdataset": tars of images with
    labels beside them; "parquet": files with a column of image bytes. "digits": the 1,797 of
    scikit-learn, from nowhere."""
    image_size_px: int = 16
    channels: int = 1
    """1 (grayscale) or 3 (RGB)."""
    mirror: bool = False
    """Whether the left-right mirror of an image is an image of its class as well."""
    held_out_fraction: float = 0.2
    """Share of the keys kept from training, chosen by a hash of the key. For "imagenet", 0 keeps
    the official validation images, which must be there; a share is one of the training images,
    and is refused where validation images lie beside them."""
    split_seed: int = 0
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """What to do about images that cannot be decoded. Skipped ones are named in the manifest."""
    exif_rotation: bool = False
    """Whether images are turned upright as their EXIF says, before the crop. ADM, and so the
    reference batches of the field, ignore it."""
    image_column: str = "image"
    """Of "parquet": image bytes, or a struct with a field ``bytes``, as Hugging Face writes it."""
    label_column: str = "label"
    """Of "parquet": integers from 0, or names of classes."""

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), "source.channels", self.channels, "1 or 3")
        size = self.image_size_px
        require(4 <= size <= 4096, "source.image_size_px", size, "from 4 to 4096")
        fraction(self, "source", "held_out_fraction")
        seed_in_range(self, "source", "split_seed")
        require(
            not (self.kind == "digits" and self.mirror),
            "source.mirror",
            self.mirror,
            "false for digits: a mirrored digit is not a digit",
        )
        require(
            not (self.kind == "digits" and self.exif_rotation),
            "source.exif_rotation",
            self.exif_rotation,
            "false for digits: they have no EXIF",
        )
        for name, default in (("image_column", "image"), ("label_column", "label")):
            value = getattr(self, name)
            rule = f"{default!r}, or source.kind 'parquet'"
            require(self.kind == "parquet" or value == default, f"source.{name}", value, rule)
            require(value != "", f"source.{name}", value, "the name of a column")
        columns = (self.image_column, self.label_column)
        require(len(set(columns)) == 2, "source.label_column", columns[1], "another column")


@dataclass(frozen=True, kw_only=True)
class AutoencoderFit:
    """How a small AutoencoderKL is fitted where no pretrained one is given."""

    latent_channels: int = 4
    widths: tuple[int, ...] = (16, 32)
    """Channels of each resolution; every one after the first halves the size."""
    images: int = 20_000
    batch_size: int = 32
    learning_rate: float = 4e-3
    kl_weight: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        section = "autoencoder.fit"
        positive(self, section, "latent_channels", "images", "batch_size", "learning_rate")
        require(len(self.widths) > 0, f"{section}.widths", self.widths, "at least one width")
        for width in self.widths:
            require(width > 0 and width % 8 == 0, f"{section}.widths", width, "multiples of 8")
        require(self.kl_weight >= 0, f"{section}.kl_weight", self.kl_weight, "0 or greater")
        seed_in_range(self, section)


@dataclass(frozen=True, kw_only=True)
class PretrainedFile:
    """Weights that somebody else made: where they lie and what they must hash to."""

    uri: str
    """A local path, an s3:// URI, or a hub id."""
    sha256: str
    """Of the weights file; checked before it is parsed."""
    revision: str | None = None
    """Commit of the hub repository; required for a hub id."""

    def __post_init__(self) -> None:
        ok = is_sha256(self.sha256)
        named = f"sha256 of {self.uri}"
        require(ok, named, self.sha256, "64 hexadecimal digits, as sha256sum prints")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What maps pixels to moments and latents back to pixels."""

    kind: Literal["fit", "identity", "pretrained"] = "fit"
    fit: AutoencoderFit = field(default_factory=AutoencoderFit)
    pretrained: PretrainedFile | None = None

    def __post_init__(self) -> None:
        if self.kind == "pretrained" and self.pretrained is None:
            raise ConfigError(
                "autoencoder.kind is 'pretrained', but autoencoder.pretrained is missing: "
                "give its uri and sha256"
            )


@dataclass(frozen=True, kw_only=True)
class ExtractorFit:
    """How a small feature extractor is fitted where no Inception weights are given."""

    width: int = 32
    dimension: int = 64
    images: int = 24_000
    batch_size: int = 32
    learning_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("width", "dimension", "images", "batch_size", "learning_rate")
        positive(self, "extractor.fit", *names)
        require(self.width % 8 == 0, "extractor.fit.width", self.width, "a multiple of 8")
        seed_in_range(self, "extractor.fit")


INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of torch-fidelity's weights-inception-2015-12-05-6726825d.pth: with these, a distance is an FID.
"""


EXTRACTOR_FILES = {
    "inception": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
    "dinov2": "DINOv2's own dinov2_vits14_pretrain.pth, or that of b, l or g, or of a Hugging Face "
    "folder with model.safetensors",
    "clip": "the state dict of CLIP's vision transformer, plain tensors (visual.…), or of a "
    "Hugging Face folder with model.safetensors",
}
"""Kind of extractor -> the file that it needs."""


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """What maps images to the features that distances are computed on."""

    kind: Literal["fit", "inception", "dinov2", "clip"] = "fit"
    """"fit": a small classifier, fitted on the training images. "inception": the features of FID.
    "dinov2" and "clip": the class token of a vision transformer, as torch-fidelity takes it."""
    fit: ExtractorFit = field(default_factory=ExtractorFit)
    pretrained: PretrainedFile | None = None

    def __post_init__(self) -> None:
        known(self, "extractor")
        if self.kind != "fit" and self.pretrained is None:
            raise ConfigError(
                f"extractor.kind is {self.kind!r}, but extractor.pretrained is missing: give the "
                f"uri and sha256 of {EXTRACTOR_FILES[self.kind]}"
            )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What is kept of the real images that samples are held against, beside moments of them all."""

    keep_features: int = 10_000
    """Images of each side of the split whose features are kept, for KID, precision and recall: as
    many as ADM's reference batches hold. Sources mix their images, so it is the first ones."""
    file: PretrainedFile | None = None
    """A reference batch of ADM (.npz) in place of the training images: its moments ``mu`` and
    ``sigma``, ``mu_s`` and ``sigma_s`` for Inception, its images ``arr_0`` for the rest."""
    file_images: int | None = None
    """Images that the moments in the file were taken of, which it does not say."""

    def __post_init__(self) -> None:
        positive(self, "reference", "keep_features")
        count, rule = self.file_images, "at least 2 with reference.file, else null"
        ok = count is None or (count >= 2 and self.file is not None)
        require(ok, "reference.file_images", count, rule)


@dataclass(frozen=True, kw_only=True)
class FurtherConfig:
    """Another extractor, under which the same samples are measured as well: ``[further.NAME]``."""

    extractor: ExtractorConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """What is kept of the real images as it sees them."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How images become shards."""

    shard_images: int = 1024
    batch_size: int = 128
    """Images a call of the autoencoder; a batch never spans two shards."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the autoencoder computes in. Moments leave it as float32 and are stored as float16."""

    def __post_init__(self) -> None:
        known(self, "encode")
        positive(self, "encode", "shard_images", "batch_size")
