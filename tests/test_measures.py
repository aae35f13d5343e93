"""Numbers about samples: their names, and what they are where the answer is known."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eqm import frechet, intervals, measures
from eqm.config import SourceConfig
from eqm.features import INCEPTION
from eqm.frechet import Moments
from eqm.images import open_source
from eqm.measures import Samples, title
from eqm.records import Metric
from eqm.statistics import Pictures, Side


def side(features: Any, spatial: Any = None, logits: Any = None) -> Side:
    rows = np.asarray(features, dtype=np.float32)
    return Side(
        moments=Moments.of(rows),
        spatial=None if spatial is None else Moments.of(spatial),
        features=rows,
        logits=logits,
    )


class Real(SimpleNamespace):
    """A reference in memory, its pictures in parts of 100."""

    def pictures(self, name: str) -> Iterator[Pictures]:
        images, labels = self.shown[name]
        for start in range(0, len(images), 100):
            yield Pictures(images[start : start + 100], labels[start : start + 100])

    def first_pictures(self, name: str, count: int) -> Pictures:
        images, labels = self.shown[name]
        return Pictures(images[:count], labels[:count])


def samples(features: Any, images: Any = None, labels: Any = None, **more: Any) -> Samples:
    rows = np.asarray(features, dtype=np.float32)
    none = np.zeros((0, 1, 8, 8), dtype=np.uint8)
    return Samples(
        features=rows,
        logits=more.get("logits"),
        spatial=more.get("spatial"),
        labels=np.zeros(len(rows), dtype=np.int64) if labels is None else labels,
        images=none if images is None else images,
    )


@pytest.mark.parametrize(
    ("kind", "extractor", "count", "name"),
    [
        ("FD", INCEPTION, 50_000, "FID"),
        ("FD", INCEPTION, 5000, "FID-5000"),
        ("sFD", INCEPTION, 50_000, "sFID"),
        ("IS", INCEPTION, 50_000, "IS"),
        ("KID", INCEPTION, 49_999, "KID-49999"),
        ("FD", INCEPTION, 50_001, "FID-50001"),
        ("FD", "digits-cnn", 1797, "FD[digits-cnn]-1797"),
        ("FD", "dinov2-vit-s-14", 50_000, "FD[dinov2-vit-s-14]-50000"),
        ("IS", "digits-cnn", 1797, "IS[digits-cnn]-1797"),
        ("FD", "inception-v3-0123abcd", 50_000, "FD[inception-v3-0123abcd]-50000"),
    ],
)
def test_names_tell_the_truth(kind: str, extractor: str, count: int, name: str) -> None:
    assert title(kind, extractor, count) == name


def test_distances_of_enough_samples_have_intervals_and_an_end() -> None:
    generator = np.random.default_rng(0)
    train, held, made = (generator.normal(size=(count, 6)) for count in (300, 150, 200))
    reference: Any = Real(training=side(train), held_out=side(held), extractor="some")
    found = measures.distances(samples(made), reference)
    plain, endless = found["distance"], found["distance_endless"]
    assert plain.low < plain.value < plain.high  # type: ignore[operator]
    # The same distribution; what is left is the reference's own fewness, which is taken as given.
    assert endless.low <= endless.value < endless.high  # type: ignore[operator]
    assert endless.value < plain.value
    assert (plain.name, endless.name) == ("FD[some]-200", "FD-infinity[some]")
    reference.extractor = INCEPTION
    found = measures.distances(samples(made), reference)
    assert found["distance"].name == "FID-200"
    assert found["distance_endless"].name == "FID-infinity"


def test_too_few_samples_a_dimension_have_no_end_and_say_so() -> None:
    generator = np.random.default_rng(1)
    train, held = (generator.normal(size=(count, 70)) for count in (300, 130))
    reference: Any = Real(training=side(train), held_out=side(held), extractor="some")
    found = measures.distances(samples(generator.normal(size=(139, 70))), reference)
    assert set(found) == {"distance", "distance_held_out"}
    assert found["distance"].low is not None
    why = "FD-infinity[some] takes 2 samples a dimension, there are fewer"
    assert found["distance"].note.endswith(why)
    found = measures.distances(samples(generator.normal(size=(140, 70))), reference)
    assert why not in found["distance"].note
    # There are fewer held-out images than that.
    assert found["distance_endless"].beside is None


def test_samples_that_are_training_images_are_perfect() -> None:
    """The numbers themselves, on an answer that is known."""
    source = open_source(SourceConfig(image_size_px=8), None)
    numbers = source.numbers(held_out=False)[:600]
    pixels = np.stack([source.read(i).numpy() for i in numbers])
    labels = np.array([source.entries[i].label for i in numbers], dtype=np.int64)
    features = pixels.reshape(600, -1)[:, 20:30].astype(np.float32)
    spatial, logits = features[:, :4], 50 * np.eye(10, dtype=np.float32)[labels]
    both = side(features, spatial, logits)
    shown = {name: (pixels, labels) for name in ("training", "held-out")}
    reference: Any = Real(training=both, held_out=both, extractor="pixels", shown=shown)
    made = samples(features, pixels, labels, spatial=spatial, logits=logits)
    found = measures.measure(made, reference, neighbours=3)
    assert found["distance"].name == "FD[pixels]-600"
    for name in ("distance", "distance_held_out", "spatial_distance"):
        assert found[name].value == pytest.approx(0, abs=1e-2)
    assert found["precision"].value == found["recall"].value == 1
    assert found["precision"].note == "3 neighbours; against all 600 training images"
    # Certain of every sample, and as many of each class as there are: the score is their number.
    assert found["score"].value == pytest.approx(10, rel=0.1)
    assert found["score"].beside == found["score"].value
    assert measures.read_labels(made, reference)["label_agreement"].value > 0.99
    near = measures.nearest_training_images(made.images, reference)
    assert near.numbers.tolist() == list(range(600))
    nearest = measures.memorisation(near, reference, made.images)["nearest"]
    assert nearest.value == nearest.beside == 0


def test_each_number_and_the_one_beside_it_are_of_their_own_images() -> None:
    """Three sets of features of different widths and sizes: none may stand for another."""
    generator = np.random.default_rng(2)

    def rows(count: int, wide: float) -> Any:
        return (wide * generator.normal(size=(count, 4))).astype(np.float32)

    train, held, made = rows(300, 1.0), rows(130, 1.6), rows(200, 0.7)
    reference: Any = Real(
        training=side(train, train[:, :2]), held_out=side(held, held[:, :2]), extractor="some"
    )
    found = measures.measure(samples(made, spatial=made[:, :2]), reference, neighbours=2)

    def apart(a: Any, b: Any) -> Any:
        return pytest.approx(frechet.frechet_from_features(a, b))

    assert found["distance"].value == apart(made, train)
    assert found["distance"].beside == apart(held, train)
    assert found["distance_held_out"].value == apart(made, held)
    assert found["spatial_distance"].value == apart(made[:, :2], train[:, :2])
    assert found["spatial_distance"].beside == apart(held[:, :2], train[:, :2])
    real = side(train).gaussian()
    for name, of in (("value", made), ("beside", held)):
        endless = intervals.frechet_intervals(of, real)
        assert endless is not None
        assert endless.endless is not None
        assert getattr(found["distance_endless"], name) == endless.endless.value
        assert getattr(found["kid"], name) == pytest.approx(frechet.kernel_distance(of, train).mean)
        both = frechet.precision_recall(train, of, neighbours=2)
        assert (getattr(found["precision"], name), getattr(found["recall"], name)) == both
    # As sure as so many samples are; of recall, no surer than so many training images.
    hits = round(found["precision"].value * len(made))
    share = intervals.share_interval(hits, len(made))
    assert 0 < share.low < share.high
    assert (found["precision"].low, found["precision"].high) == (share.low, share.high)
    recall = intervals.recall_interval(train, made, neighbours=2)
    assert recall is not None
    assert (found["recall"].low, found["recall"].high) == (recall.low, recall.high)


def test_what_stands_beside_a_number_is_that_of_held_out_images() -> None:
    """As if they were the samples: for every number, and of numbers that differ from each other."""
    generator = np.random.default_rng(0)

    def drawn(count: int, spread: float) -> dict[str, Any]:
        labels = np.arange(count) % 2
        noise = generator.integers(0, 90, (count, 1, 8, 8)) * spread
        return {
            "features": generator.normal(size=(count, 4)) * spread + [0.2, 0, 0, 0],
            "spatial": generator.normal(size=(count, 3)) * spread + 0.1,
            "logits": generator.normal(size=(count, 5)) * 3 * spread,
            "images": (20 * labels[:, None, None, None] * spread + noise).astype(np.uint8),
            "labels": labels,
        }

    training, held, made = drawn(300, 1.0), drawn(80, 0.7), drawn(120, 1.5)
    shown = {"training": training, "held-out": held}
    reference: Any = Real(
        training=side(*(training[name] for name in ("features", "spatial", "logits"))),
        held_out=side(*(held[name] for name in ("features", "spatial", "logits"))),
        extractor="x",
        shown={name: (one["images"], one["labels"]) for name, one in shown.items()},
    )

    def all_of(one: dict[str, Any]) -> dict[str, Metric]:
        some = samples(**one)
        near = measures.nearest_training_images(some.images, reference)
        return {
            **measures.measure(some, reference, neighbours=3),
            **measures.read_labels(some, reference),
            **measures.memorisation(near, reference, some.images),
        }

    found, of_held = all_of(made), all_of(held)
    beside = {name: one.beside for name, one in found.items() if one.beside is not None}
    assert set(found) - set(beside) <= {"distance_held_out", "distance_endless"}
    assert beside == {name: pytest.approx(of_held[name].value) for name in beside}
    assert len({round(value, 6) for value in beside.values()}) == len(beside)
    # Wide samples reach what training images are like, and much else.
    assert found["precision"].value < 0.8 < found["recall"].value
    wide = measures.Gaussian.of(np.float32(made["features"]))
    narrow = measures.Gaussian.of(np.float32(held["features"]))
    assert found["distance_held_out"].value == pytest.approx(wide.distance(narrow))


def test_a_tenth_of_copies_is_told() -> None:
    generator = np.random.default_rng(0)
    real = generator.integers(0, 256, (1000, 1, 8, 8), dtype=np.uint8)
    train, held, new = real[:400], real[400:700], real[700:]
    labels = np.zeros(400, dtype=np.int64)
    shown = {"training": (train, labels), "held-out": (held, labels[:300])}
    reference: Any = Real(shown=shown)

    def told(copies: int) -> Metric:
        images = np.concatenate([train[:copies], new[copies:]])
        near = measures.nearest_training_images(images, reference)
        return measures.memorisation(near, reference, images)["copies"]

    none, tenth = told(0), told(30)
    assert none.low is not None
    assert none.high is not None
    assert none.low <= 0.05 <= none.high
    assert none.beside == 0.05
    # Those thirty, and a twentieth of the others.
    assert tenth.value == pytest.approx(0.1 + 0.05 * 0.9, abs=0.02)
    assert tenth.low is not None
    assert tenth.low > 0.05
    assert "300 held-out images" in tenth.note


def test_distances_between_pictures_are_in_levels_of_gray() -> None:
    flat = np.full((300, 1, 8, 8), 100, dtype=np.uint8)
    flat[250] = 110
    shown = {"training": (flat, np.zeros(300, dtype=np.int64))}
    reference: Any = Real(shown=shown)
    near = measures.nearest_training_images(np.stack([flat[250] + 3, flat[0] - 7]), reference)
    # The first lies in the third part, of which the numbers go on.
    assert near.numbers.tolist() == [250, 0]
    assert near.distances.tolist() == pytest.approx([3.0, 7.0])


def test_large_images_are_compared_small() -> None:
    block = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
    large = np.kron(block, np.ones((1, 1, 4, 4), dtype=np.uint8))
    shown = {name: (block, np.zeros(20, dtype=np.int64)) for name in ("training", "held-out")}
    reference: Any = Real(shown=shown)
    near = measures.nearest_training_images(large, reference)
    assert near.numbers.tolist() == list(range(20))
    assert not near.distances.any()
    assert "at 16 px" in measures.memorisation(near, reference, large)["nearest"].note


def test_labels_are_read_only_where_there_are_some_and_not_too_many() -> None:
    images = np.zeros((300, 1, 8, 8), dtype=np.uint8)
    for labels in (np.full(300, -1), np.arange(300)):
        reference: Any = Real(shown={"training": (images, labels), "held-out": (images, labels)})
        made = samples(np.zeros((300, 2)), images, labels)
        assert measures.read_labels(made, reference) == {}


def test_the_images_that_are_kept_have_the_first_labels() -> None:
    source = open_source(SourceConfig(image_size_px=8), None)
    pixels = np.stack([source.read(i).numpy() for i in range(400)])
    labels = np.array([source.entries[i].label for i in range(400)], dtype=np.int64)
    reference: Any = Real(shown={name: (pixels, labels) for name in ("training", "held-out")})
    # Forty of a hundred samples are kept; the labels of the others are no digits.
    of_all = np.concatenate([labels[:40], np.full(60, 10)])
    made = samples(np.zeros((100, 2)), pixels[:40], of_all)
    found = measures.read_labels(made, reference)["label_agreement"]
    assert (found.value, found.n) == (1.0, 40)
    assert (found.low, found.high) == (intervals.share_interval(40, 40).low, 1.0)


def test_without_features_of_real_images_there_are_distances_alone() -> None:
    """As of a file with moments and no images."""
    rows = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    train = Side(moments=Moments.of(rows), spatial=None, features=rows[:0], logits=None)
    reference: Any = Real(training=train, held_out=side(rows), extractor=INCEPTION)
    found = measures.measure(samples(rows), reference, neighbours=3)
    assert set(found) == {"distance", "distance_held_out", "distance_endless"}
