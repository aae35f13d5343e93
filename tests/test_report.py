"""The page: the same bytes again, nothing from outside, nothing lost, nothing executed."""

import dataclasses
import hashlib
import html
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from eqm import published
from eqm.errors import ConfigError, DataError
from eqm.figures import (
    GRID_GAP_PX,
    common_edges,
    curve_svg,
    histogram_svg,
    sample_grid,
    strip_png,
)
from eqm.gate import decide
from eqm.names import further_key
from eqm.policy import PolicyConfig
from eqm.records import (
    Blob,
    Evaluation,
    Metric,
    OODRow,
    Record,
    Ref,
    canonical_bytes,
    from_json,
    sha256,
    to_json,
)
from eqm.report import BETTER, OOD_NAMES, SCHEMA, ReportInput, better_of, render_json
from eqm.report_page import render_html

HOSTILE = "\"><script>alert(1)</script><img src=http://x.example/y onerror=z>&'$x^{"
VOID = {"meta", "img", "line", "circle"}


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def record(stage, inputs, **values):
    return Record(
        stage=stage,
        algorithm=7,
        config={"of": stage},
        inputs=inputs,
        outputs={"out": Blob(sha256=sha256(stage.encode()), size_bytes=3)},
        values=values,
        logs={"log": Blob(sha256="f" * 64, size_bytes=1)},
        provenance={"host": "machine-of-somebody", "at": "2026-01-01T00:00:00"},
    )


def evaluation(factor=1.0, name="photographs"):
    return Evaluation(
        protocol={"generate": {"samples": 100, "updates": 5}, "neighbours": 3},
        samples=1797,
        metrics={
            "distance": Metric(
                name="FD[cnn]-1797", value=6.12345 * factor, beside=4.87654, note="to training"
            ),
            "kid": Metric(name="KID[cnn]-1797", value=-0.002134, beside=0.000123),
            "recall": Metric(name="recall[cnn]-1797", value=0.731987),
            "unknown": Metric(name="a metric of tomorrow", value=12.5),
        },
        ood=(
            OODRow(
                name=name,
                count=360,
                auroc=0.98765,
                auroc_low=0.97654,
                auroc_high=0.99876,
                aupr=0.96543,
                fpr95_in=0.04321,
                gated=True,
            ),
        ),
        mean_field_evaluations=248.5,
    )


SOURCE = Ref(stage="source", digest=sha256(b"source"), content=sha256(b"listing"))


def chain(measured):
    latents = record("latents", {"source": SOURCE})
    trained = record("train", {"latents": latents.ref})
    samples = record("samples", {"train": trained.ref})
    inputs = {"samples": samples.ref, "source": SOURCE}
    return latents, trained, samples, record("evaluation", inputs, evaluation=to_json(measured))


def report(name="7", *, refused=False, **changes):
    measured = evaluation(name=name)
    records = chain(measured)
    champion = Ref(stage="evaluation", digest="1" * 64, content="2" * 64)
    policy = PolicyConfig(name=name, minimum_samples=2000 if refused else 1)
    decision = decide(
        measured, records[-1].ref, policy, champion=evaluation(1.1), champion_ref=champion
    )
    rng = np.random.default_rng(1)
    values = {
        "title": f"report {name}",
        "model_name": f"model {name}",
        "evaluation": measured,
        "decision": decision,
        "champion": evaluation(1.1),
        "chain": records,
        "history": {
            "images": [100, 200, 300],
            "loss": [9.0, 3.0, 0.123456],
            "gradient_norm": [3.0, 2.0, 1.5],
        },
        "sample_images": images(2, 3, 1, 8, 8),
        "real_images": images(2, 3, 1, 8, 8),
        "class_names": (name, "other"),
        "ood_scores": {
            "gradient_norm": {
                "held-out": rng.gamma(9, 1, 40).tolist(),
                name: rng.gamma(60, 1, 40).tolist(),
            },
        },
        "trajectory": images(3, 2, 1, 8, 8),
        "trajectory_updates": [0, 2, 5],
        "generated_with": {"rule": "nag", "seeds": "0 to 99"},
        **changes,
    }
    return ReportInput(**values)


class Page(HTMLParser):
    """Checks that elements nest, and keeps what it sees."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page.decode())
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_the_same_bytes_again():
    assert render_html(report()) == render_html(report())
    assert render_json(report()) == render_json(report())


def test_the_same_bytes_in_another_process(tmp_path):
    # A person's own matplotlib settings must not matter either.
    (tmp_path / "matplotlibrc").write_text("axes.labelsize: 20\nxtick.direction: in\n")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_report import render_html, render_json, report\n"
        "open('page.html', 'wb').write(render_html(report()))\n"
        "open('page.json', 'wb').write(render_json(report()))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "page.html").read_bytes() == render_html(report())
    assert (tmp_path / "page.json").read_bytes() == render_json(report())


def test_another_number_gives_another_page():
    other = report(evaluation=evaluation(1.0000001), decision=None)
    assert render_html(other) != render_html(report(decision=None))


def test_times_and_machines_are_not_in_it():
    for data in (render_html(report()), render_json(report())):
        assert b"machine-of-somebody" not in data
        assert b"2026" not in data
        assert b"matplotlib" not in data.lower()


def test_nothing_from_outside():
    page = render_html(report())
    assert b"http:" not in page
    assert b"https:" not in page
    assert b"@import" not in page
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    for name, value in parsed.attributes:
        if name == "src":
            assert value.startswith("data:image/png;base64,")
        if name == "href":
            assert value.startswith("#")
    (policy,) = [m["content"] for m in parsed.of("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'")


def test_links_lead_somewhere_and_ids_are_unique():
    parsed = Page(render_html(report()))
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [v[1:] for name, v in parsed.attributes if name == "href"]
    clips = re.findall(r"url\(#([^)]*)\)", render_html(report()).decode())
    assert {*links, *clips} <= set(ids)
    assert clips


def test_hostile_names_are_text():
    page = render_html(report(HOSTILE))
    parsed = Page(page)
    calm = Page(render_html(report()))
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in calm.tags]
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert html.escape(HOSTILE).encode() in page
    assert HOSTILE in parsed.text
    assert json.loads(render_json(report(HOSTILE)))["classes"][0] == HOSTILE


def test_every_number_and_digest_is_in_the_page():
    content = report()
    page = render_html(content).decode()
    exact = {d["value"] for d in Page(page.encode()).of("data")}
    for metric in content.evaluation.metrics.values():
        assert metric.name in page
        assert repr(metric.value) in exact
        assert metric.beside is None or repr(metric.beside) in exact
    for name in ("count", "auroc", "auroc_low", "auroc_high", "aupr", "fpr95_in"):
        assert repr(getattr(content.evaluation.ood[0], name)) in exact
    for sealed in (*(r.ref for r in content.chain), SOURCE):
        assert f"<code>{sealed.digest}</code>" in page
        assert f"<code>{sealed.content}</code>" in page
    assert content.evaluation.protocol_digest in page
    assert repr(content.champion.metrics["distance"].value) in exact
    assert sha256(render_json(content)) in page


def test_numbers_are_readable():
    text = "".join(Page(render_html(report())).text)
    for shown in ("6.123", "4.877", "\N{MINUS SIGN}0.002134", "0.732", "1,797", "248.5"):
        assert shown in text


@pytest.mark.parametrize(
    ("content", "verdict", "mark"),
    [
        (report(), "Passed", "✓"),
        (report(refused=True), "Not promoted", "✗"),
        (report(decision=None), "No decision", None),
    ],
)
def test_the_verdict(content, verdict, mark):
    text = Page(render_html(content)).text
    assert verdict in text
    assert ("✗" in text) == (mark == "✗")
    for reason in content.decision.reasons if content.decision else ():
        assert reason.text in text


def test_champions_of_another_protocol_are_not_compared():
    other = dataclasses.replace(evaluation(1.1), protocol={"neighbours": 5})
    text = " ".join(Page(render_html(report(champion=other))).text)
    assert "the protocols differ in generate, neighbours" in text
    assert "this model" not in text


def test_what_is_optional_may_be_absent():
    bare = report(
        decision=None,
        champion=None,
        trajectory=None,
        trajectory_updates=(),
        ood_scores={},
        history={},
        chain=(),
        evaluation=dataclasses.replace(evaluation(), metrics={}, ood=()),
        generated_with={},
    )
    text = Page(render_html(bare)).text
    assert "no distance was measured" in text
    assert json.loads(render_json(bare))["champion"] is None


def test_pictures_have_words():
    parsed = Page(render_html(report()))
    assert all(image["alt"] for image in parsed.of("img"))
    drawings = [svg for svg in parsed.of("svg") if svg.get("aria-hidden") != "true"]
    assert len(drawings) == 3
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawings)
    assert all("scope" in head for head in parsed.of("th"))
    assert len(parsed.of("caption")) == len(parsed.of("table"))


def test_what_there_is_of_a_class_is_shown_and_no_more():
    # A picture may be black: what there is of each class is counted.
    real = images(2, 3, 1, 8, 8)
    real[1, 1:] = 0
    counts = {"real_counts": (3, 1), "sample_counts": (2, 0)}
    parsed = Page(render_html(report(real_images=real, **counts)))
    alts = [image["alt"] for image in parsed.of("img")]
    assert "3 real images of class 7" in alts
    assert "1 real image of class other" in alts
    assert "2 samples of class 7" in alts
    assert "none was made" in "".join(parsed.text)
    black = np.zeros((2, 3, 1, 8, 8), dtype=np.uint8)
    page = render_html(report(sample_images=black, sample_counts=(3, 3))).decode()
    assert "none was made" not in page


def test_a_class_without_held_out_images_says_so():
    assert "none is held out" not in Page(render_html(report())).text
    real = images(2, 3, 1, 8, 8)
    real[1] = 0
    parsed = Page(render_html(report(real_images=real)))
    assert "none is held out" in "".join(parsed.text)


def test_json_round_trip():
    content = report()
    data = render_json(content)
    body = json.loads(data)
    assert body["schema"] == "eqm-report/2"
    assert canonical_bytes(body) + b"\n" == data
    stated = body["evaluation"].pop("protocol_digest")
    assert from_json(Evaluation, body["evaluation"]) == content.evaluation
    assert stated == content.evaluation.protocol_digest
    assert from_json(type(content.decision), body["decision"]) == content.decision
    for kept, sealed in zip(body["chain"], content.chain, strict=True):
        assert (kept.pop("digest"), kept.pop("content")) == (sealed.digest, sealed.content)
        again = from_json(Record, kept)
        assert (again.digest, again.content) == (sealed.digest, sealed.content)
    assert body["images"]["samples"] == {
        "shape": [2, 3, 1, 8, 8],
        "sha256": hashlib.sha256(content.sample_images.tobytes()).hexdigest(),
    }


# -- the schema of the JSON ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema():
    text = resources.files("eqm").joinpath("schemas/report-2.json").read_text()
    Draft202012Validator.check_schema(json.loads(text))
    return json.loads(text)


def with_intervals(factor=1.0, **changes):
    """An evaluation some of whose numbers tell how sure they are."""
    plain = evaluation(factor)
    sure = dataclasses.replace(plain.metrics["distance"], low=5.0 * factor, high=7.0 * factor)
    some = dataclasses.replace(plain.metrics["recall"], n=40)
    metrics = {**plain.metrics, "distance": sure, "recall": some}
    return dataclasses.replace(plain, metrics=metrics, **changes)


def reports():
    yield report()
    yield report(refused=True)
    yield report(decision=None, champion=None, trajectory=None, trajectory_updates=())
    yield report(evaluation=with_intervals(), champion=with_intervals(1.1), decision=None)
    yield report(champion=dataclasses.replace(evaluation(), protocol={"neighbours": 5}))


def test_the_json_is_as_its_schema_says(schema):
    for content in reports():
        body = json.loads(render_json(content))
        assert [e.message for e in Draft202012Validator(schema).iter_errors(body)] == []
        assert schema["properties"]["schema"]["const"] == body["schema"] == SCHEMA
        del body["numbers"][0]["better"]
        assert not Draft202012Validator(schema).is_valid(body)


def test_every_field_is_described(schema):
    def fields(node):
        if isinstance(node, dict):
            if {"type", "enum", "const", "anyOf", "$ref"} & node.keys() and "$schema" not in node:
                yield node
            for name, inner in node.items():
                yield from fields(
                    list(inner.values()) if name in ("properties", "$defs") else inner
                )
        elif isinstance(node, list):
            for inner in node:
                yield from fields(inner)

    found = list(fields(schema))
    assert len(found) > 100
    bare = [field for field in found if "description" not in field]
    # What is only referred to is described where it is defined.
    assert [f for f in bare if "$ref" not in f and f != {"type": "null"}] == []


def test_every_number_has_name_count_interval_and_direction():
    body = json.loads(render_json(report(evaluation=with_intervals(), decision=None)))
    numbers = {number["key"]: number for number in body["numbers"]}
    assert numbers["metrics.distance"] == {
        "key": "metrics.distance",
        "name": "FD[cnn]-1797",
        "value": 6.12345,
        "interval": {"level": 0.95, "low": 5.0, "high": 7.0},
        "n": 1797,
        "beside": 4.87654,
        "better": "lower",
    }
    assert numbers["metrics.recall"]["n"] == 40
    assert numbers["metrics.unknown"]["better"] is None
    auroc = numbers["ood.photographs.gradient_norm.auroc"]
    assert auroc["interval"] == {"level": 0.95, "low": 0.97654, "high": 0.99876}
    assert (auroc["n"], auroc["better"]) == (360, "higher")
    assert numbers["ood.photographs.gradient_norm.fpr95_in"]["better"] == "lower"


# -- beside others ------------------------------------------------------------------------------


def test_differences_to_the_champion_have_intervals():
    content = report(evaluation=with_intervals(), champion=with_intervals(2.0), decision=None)
    body = json.loads(render_json(content))["comparison"]
    assert body["comparable"]
    change = {c["key"]: c for c in body["changes"]}["metrics.distance"]
    mine, other = (6.12345, 5.0, 7.0), (2 * 6.12345, 10.0, 14.0)
    difference = mine[0] - other[0]
    low = difference - math.hypot(mine[0] - mine[1], other[2] - other[0])
    high = difference + math.hypot(mine[2] - mine[0], other[0] - other[1])
    assert change["difference"] == pytest.approx(difference)
    assert change["interval"]["low"] == pytest.approx(low)
    assert change["interval"]["high"] == pytest.approx(high)
    assert high < 0
    rows = " ".join(Page(render_html(content)).text)
    assert "better" in rows
    swapped = report(evaluation=with_intervals(2.0), champion=with_intervals(), decision=None)
    assert "worse" in Page(render_html(swapped)).text
    same = report(evaluation=with_intervals(), champion=with_intervals(1.01), decision=None)
    text = Page(render_html(same)).text
    assert "not told apart" in text
    assert "worse" not in text


def test_an_interval_that_ends_at_zero_holds_it():
    """Equal numbers without spread have the interval 0 to 0: they are not told apart."""
    equal = with_intervals()
    same = dataclasses.replace(equal.metrics["distance"], low=6.12345, high=6.12345)
    equal = dataclasses.replace(equal, metrics={"distance": same})
    text = Page(render_html(report(evaluation=equal, champion=equal, decision=None))).text
    assert "not told apart" in text
    assert "±0" in text
    assert not {"better", "worse"} & set(text[text.index("reads as") :])


def test_a_difference_is_told_as_a_share_of_the_champions_too():
    half = report(evaluation=with_intervals(), champion=with_intervals(2.0), decision=None)
    assert " (\N{MULTIPLICATION SIGN} 0.500)" in Page(render_html(half)).text


def test_of_scores_the_main_one_alone_is_held_against_the_champions():
    """A baseline knows nothing of either model: it is the same of both, and says nothing."""
    (main,) = evaluation().ood
    others = [
        dataclasses.replace(main, score="pixel_pca", role="baseline"),
        dataclasses.replace(main, score="energy", role="score"),
    ]
    both = dataclasses.replace(evaluation(), ood=(main, *others))
    body = json.loads(render_json(report(evaluation=both, champion=both, decision=None)))
    compared = [c["key"] for c in body["comparison"]["changes"] if c["key"].startswith("ood.")]
    assert compared
    assert all(key.startswith("ood.photographs.gradient_norm.") for key in compared)


def test_what_is_better_of_every_metric():
    higher = ("score", "precision", "recall", "label_agreement")
    lower = ("distance", "distance_endless", "distance_held_out", "spatial_distance", "kid")
    assert {k for k, side in BETTER.items() if side == "higher"} == set(higher)
    assert {k for k, side in BETTER.items() if side == "lower"} == set(lower)
    assert better_of(further_key("recall", "clip")) == "higher"
    assert better_of(further_key("distance", "clip")) == "lower"
    # Nearer to training images is no better, and farther is none.
    assert {better_of(k) for k in ("nearest", "copies", "tomorrow")} == {None}
    areas = {k: better for k, (_, better) in OOD_NAMES.items()}
    assert {k for k, better in areas.items() if better == "lower"} == {"fpr95_in", "fpr95_out"}
    assert {k for k, better in areas.items() if better == "higher"} == {"auroc", "aupr", "aupr_in"}


def test_a_metric_that_was_another_is_not_compared():
    renamed = dataclasses.replace(evaluation().metrics["kid"], name="KID[cnn]-500")
    other = dataclasses.replace(evaluation(), metrics={**evaluation().metrics, "kid": renamed})
    body = json.loads(render_json(report(champion=other, decision=None)))
    compared = {change["key"] for change in body["comparison"]["changes"]}
    assert "metrics.distance" in compared
    assert "metrics.kid" not in compared


def test_nothing_is_compared_across_protocols():
    other = dataclasses.replace(evaluation(1.1), protocol={"neighbours": 5})
    body = json.loads(render_json(report(champion=other, decision=None)))["comparison"]
    assert body == {
        "comparable": False,
        "protocols_differ_in": ["generate", "neighbours"],
        "changes": [],
    }


IMAGENET = {
    "generate": {"noise_level": 1.0},
    "images": {"kind": "imagenet", "image_size_px": 256, "channels": 3},
    "extractor": {"name": "inception-v3-compat"},
    "reference_images": {"file": "a" * 64},
}


@pytest.mark.parametrize(
    ("changes", "departure"),
    [
        ({}, "samples: 1797, not 50000"),
        ({"images": {"kind": "digits", "image_size_px": 256}}, "images: digits, not imagenet"),
        ({"images": {"kind": "imagenet", "image_size_px": 64}}, "image size: 64, not 256"),
        ({"extractor": {"name": "digits-cnn"}}, "features: digits-cnn, not inception-v3-compat"),
        (
            {"reference_images": {"file": None}},
            "reference: the source's own images, not a reference batch of ADM",
        ),
        (
            {"images": {"kind": "imagenet", "image_size_px": 256, "channels": 1}},
            "colour: images are gray",
        ),
        (
            {"generate": {"noise_level": 0.5}},
            "starts: held-out images with noise of level 0.5, not noise alone",
        ),
    ],
)
def test_published_numbers_of_another_protocol_are_set_apart(changes, departure):
    of_the_field = 50_000 if changes else 1797
    measured = dataclasses.replace(
        evaluation(), protocol={**IMAGENET, **changes}, samples=of_the_field
    )
    # Each by itself is enough.
    assert published.departures(measured) == (departure,)
    text = " ".join(Page(render_html(report(evaluation=measured, decision=None))).text)
    assert "None of this evaluation's numbers may be compared" in text
    assert departure in text
    assert "its FID may be compared" not in text


def test_published_numbers_of_this_very_protocol_are_set_beside():
    measured = dataclasses.replace(evaluation(), protocol=IMAGENET, samples=50_000)
    assert published.departures(measured) == ()
    text = " ".join(Page(render_html(report(evaluation=measured, decision=None))).text)
    assert "its FID may be compared" in text
    assert "measured here" in text
    body = json.loads(render_json(report(evaluation=measured, decision=None)))["published"]
    first = {s["system"]: s["fid"] for s in reversed(body["systems"])}
    assert first == {
        "StyleGAN-XL": 2.30,
        "VDM++": 2.12,
        "DiT-XL/2": 2.27,
        "SiT-XL/2": 2.06,
        "EqM-XL/2": 1.90,
    }


@pytest.mark.parametrize("render", [render_html, render_json])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused(render, value):
    broken = (
        report(evaluation=evaluation(value), decision=None),
        report(champion=evaluation(value)),
        report(history={"images": [1], "loss": [value], "gradient_norm": [1.0]}),
        report(ood_scores={"energy": {"held-out": [1.0, 2.0], "x": [value]}}),
        report(generated_with={"step_size": value}),
    )
    for content in broken:
        with pytest.raises(ConfigError, match="finite"):
            render(content)


REFUSED = {
    "floats": ({"sample_images": np.zeros((2, 3, 1, 8, 8))}, "uint8"),
    "flat": ({"real_images": images(2, 1, 8, 8)}, "5 dimensions"),
    "channels": ({"sample_images": images(2, 3, 4, 8, 8)}, "1 or 3 channels"),
    "none": ({"sample_images": images(2, 0, 1, 8, 8)}, "no images"),
    "names": ({"class_names": ("a",)}, "2 classes of samples, 2 of real images, 1 names"),
    "updates": ({"trajectory_updates": [0]}, "3 moments"),
    "another evaluation": ({"chain": chain(evaluation(2.0))}, "judge again"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_parts_that_do_not_belong_together_are_refused(changes, words):
    with pytest.raises(DataError, match=words):
        report(**changes)


# -- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_every_pixel_where_it_belongs(channels):
    made, scale = images(3, 4, channels, 5, 6), 7
    png = sample_grid(made, ["a", "a longer name", HOSTILE], scale)
    assert png == sample_grid(made, ["a", "a longer name", HOSTILE], scale)
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    h, w = 5 * scale + GRID_GAP_PX, 6 * scale + GRID_GAP_PX
    assert len(sheet) == 3 * h + GRID_GAP_PX
    left = sheet.shape[1] - 4 * w
    assert left > GRID_GAP_PX
    for k in range(3):
        for r in range(4):
            cell = sheet[GRID_GAP_PX + k * h :, left + r * w :][: 5 * scale, : 6 * scale]
            wanted = np.broadcast_to(made[k, r].transpose(1, 2, 0), (5, 6, 3))
            np.testing.assert_array_equal(cell[::scale, ::scale], wanted)
            np.testing.assert_array_equal(cell[scale - 1 :: scale, scale - 1 :: scale], wanted)
    assert (sheet[:GRID_GAP_PX, left:] == 255).all()
    assert (sheet[-GRID_GAP_PX:] == 255).all()


def test_grid_names_its_rows():
    made = images(2, 1, 1, 8, 8)
    assert sample_grid(made, ["a", "b"], 4) != sample_grid(made, ["b", "a"], 4)
    with pytest.raises(DataError, match="2 classes was given 1 names"):
        sample_grid(made, ["a"], 4)


def test_grid_has_no_metadata():
    png = sample_grid(images(1, 1, 1, 8, 8), ["a"], 1)
    assert not Image.open(io.BytesIO(png)).info


@pytest.mark.parametrize("down", [False, True])
def test_strip_enlarges_small_images_exactly(down):
    made = images(3, 1, 8, 8)
    sheet = np.asarray(Image.open(io.BytesIO(strip_png(made, cell_px=96, down=down))))
    sheet = sheet.swapaxes(0, 1) if down else sheet
    assert sheet.shape == (96, 3 * 96 + 2 * 6, 4)
    for i in range(3):
        cell = sheet[6::12, i * 102 :][:, :96][:, 6::12]
        np.testing.assert_array_equal(cell[..., 0], made[i, 0].T if down else made[i, 0])
    assert (sheet[:, 96:102, 3] == 0).all()


def test_strip_averages_large_images_down():
    made = images(2, 3, 256, 128)
    sheet = np.asarray(Image.open(io.BytesIO(strip_png(made, cell_px=64))))
    assert sheet.shape == (64, 2 * 32 + 4, 4)
    blocks = made[0].reshape(3, 64, 4, 32, 4).mean(axis=(2, 4)).transpose(1, 2, 0)
    np.testing.assert_allclose(sheet[:, :32, :3], blocks, atol=1)


def test_curves_say_what_they_show():
    svg = curve_svg([1e3, 2e3], [5.0, 6.0], title="a <b>", x_label="images seen", y_label="loss")
    assert 'aria-label="a &lt;b&gt;"' in svg
    assert "images seen" in svg
    assert "var(--sample" in svg
    assert "<style" not in svg
    steep = curve_svg([1, 2], [1.0, 100.0], title="t", x_label="x", y_label="y")
    assert ">100</text>" in steep


def test_a_curve_of_one_point_is_drawn():
    svg = curve_svg([5], [2.0], title="t", x_label="x", y_label="y")
    assert "<use" in svg


def test_common_edges_hold_every_score():
    edges = common_edges([[1.0, 5.0], [2.0, 300.0]])
    assert edges[0] == pytest.approx(1.0)
    assert edges[-1] == pytest.approx(300.0)
    assert edges[1] / edges[0] == pytest.approx(edges[-1] / edges[-2])
    same = common_edges([[2.0, 2.0]])
    assert same[0] < 2.0 < same[-1]
    assert histogram_svg([2.0, 2.0], [2.0], same, title="t", label="norm").count("<path") > 2
