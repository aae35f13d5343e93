"""A report that nobody touched is verified; one value that was changed, anywhere, is found."""

import json
import math
import random
from dataclasses import replace
from datetime import timedelta

import chain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqm import dossier, gate, recomputation, verification
from eqm.checkpoint import tensors_from_bytes, tensors_to_bytes
from eqm.config import Runtime
from eqm.discrepancies import apart, of_bytes, of_documents, of_values, told
from eqm.errors import AwayError, DataError
from eqm.generate import remake
from eqm.recomputation import Again, check_numbers, check_samples, compute_again, is_same_kind
from eqm.records import Reason, Ref, record_to_bytes, to_json
from eqm.report import render_json, report_key
from eqm.report_page import render_html
from eqm.samples import config_of, part_of
from eqm.stage import open_ref
from eqm.storage import LocalStore, record_key
from eqm.verification import (
    Renderer,
    Stored,
    check_chain,
    check_decision,
    check_report,
    stored_as,
    verify,
)

TITLE, MODEL = "tiny: Equilibrium Matching", "eqm-tiny"
ASKED = ("title", "model", "decision")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain")


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory) -> LocalStore:
    """A store of its own, with a report in it."""
    store = chain.copied(tiny, tmp_path_factory.mktemp("verified") / "store", without=())
    record = tiny["evaluation"]
    found = dossier.evaluation_of(record)
    better = {k: replace(m, value=m.value * 0.9) for k, m in found.metrics.items()}
    values = {**record.values, "evaluation": to_json(replace(found, metrics=better))}
    # A champion that was measured under the same protocol, from other inputs.
    inputs = {**record.inputs, "samples": replace(record.inputs["samples"], content="0" * 64)}
    champion = store.seal(replace(record, inputs=inputs, values=values))
    decision = gate.decide(
        found,
        record.ref,
        tiny.config.policy,
        champion=dossier.evaluation_of(champion),
        champion_ref=champion.ref,
    )
    content = dossier.collect(store, record, title=TITLE, model_name=MODEL, decision=decision)
    key = report_key(record.digest, TITLE, MODEL, decision)
    store.write_once(f"{key}.json", render_json(content))
    store.write_once(f"{key}.html", render_html(content))
    return store


@pytest.fixture(scope="module")
def evaluated(tiny):
    return tiny["evaluation"]


@pytest.fixture(scope="module")
def runtime(store) -> Runtime:
    return Runtime(store=store.uri, device="cpu")


@pytest.fixture(scope="module")
def again(store, evaluated, runtime) -> Again:
    """All that the checks compare with, computed once."""
    return compute_again(store, evaluated, runtime, seeds=3, exact=True)


@pytest.fixture(scope="module")
def renderer(store, evaluated) -> Renderer:
    return Renderer(store, evaluated)


@pytest.fixture(scope="module")
def report(store, evaluated) -> Stored:
    (found,) = verification.stored_reports(store, evaluated.digest)
    return found


def test_seeds_on_the_page_make_its_pictures_again(store, evaluated):
    samples = open_ref(store, evaluated.inputs["samples"])
    shown = dossier.collect(store, evaluated, title="t", model_name="m", decision=None)
    assert len(shown.sample_seeds) == len(shown.sample_images)
    for seeds, images in list(zip(shown.sample_seeds, shown.sample_images, strict=True))[:3]:
        made = remake(store, samples, seeds, exact=True)["images"]
        assert torch.equal(made, torch.from_numpy(images))
    page = render_html(shown).decode()
    assert f"eqm samples remake {samples.digest[:16]} --seed" in page
    assert ", ".join(map(str, shown.sample_seeds[2])) in page


def test_seeds_on_the_page_begin_where_the_samples_did(store, evaluated):
    samples, trained = (open_ref(store, evaluated.inputs[name]) for name in ("samples", "train"))
    generated = {**samples.config["generate"], "first_seed": 1003}
    later = replace(samples, config={"generate": generated})
    shown = dossier.seeds_shown(store, later, trained, (3, 2))
    assert shown == [[1010, 1020], [1011, 1021], [1012, 1022]]


def copied(store, folder, without=()):
    return chain.copied(chain.Chain(chain.tiniest(), store, {}), folder / "copy", without=without)


def leaves(value, path=()):
    """Where the leaves of a JSON value are."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def dotted(path):
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path).lstrip(".")


def changed(value, path):
    """The same with one leaf that is another."""
    if not path:
        return another(value)
    whole = dict(value) if isinstance(value, dict) else list(value)
    whole[path[0]] = changed(value[path[0]], path[1:])
    return whole


def another(leaf):
    """The closest value there is."""
    if isinstance(leaf, bool):
        return not leaf
    if isinstance(leaf, float):
        return math.nextafter(leaf, math.inf)
    if leaf is None:
        return 0
    return leaf + 1 if isinstance(leaf, int) else f"{leaf}x"


def differing(checks):
    return [difference for check in checks for difference in check.differences]


def as_bytes(body):
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# -- untouched ----------------------------------------------------------------------------------


def test_an_untouched_report_is_verified(store, evaluated, runtime):
    checks = verify(store, evaluated.digest, runtime, seeds=3)
    assert [c.name for c in checks] == [
        *("record", "chain", "numbers", "samples"),
        *("name", "decision", "JSON", "page"),
    ]
    assert differing(checks) == []
    assert "7 records" in checks[1].text
    assert "equal to the last bit" in checks[2].text


def test_whole_batches_are_made_again_to_the_last_bit(again):
    (check,) = again.remade
    assert check.passed
    assert "to the last bit" in check.text


def test_of_an_evaluation_that_is_not_there(store, runtime):
    with pytest.raises(DataError, match=r"evaluation ffffffffffff is not sealed in .*"):
        verify(store, "f" * 64, runtime)


def test_of_an_evaluation_without_a_report(tiny, runtime, again, monkeypatch):
    monkeypatch.setattr(verification, "compute_again", lambda *_, **__: again)
    with pytest.raises(DataError, match="has no report in"):
        verify(tiny.store, tiny["evaluation"].digest, runtime)


# -- every value of the report ------------------------------------------------------------------


@pytest.mark.parametrize("step", [100, pytest.param(40, marks=pytest.mark.slow)])
def test_every_changed_value_of_the_json_is_found_and_named(report, renderer, step):
    """Each is changed in the part in which it lies, and every so many go through all checks."""
    assert differing(check_report(report, renderer)) == []
    body = json.loads(report.data)
    assert len(list(leaves(body))) > 1000
    for part, value in body.items():
        for path in leaves(value):
            found = of_values(changed(value, path), value, part)
            assert [d.place for d in found] == [dotted((part, *path))]
    for path in [path for path in leaves(body) if path[0] not in (*ASKED, "schema")][::step]:
        forged = replace(report, data=as_bytes(changed(body, path)) + b"\n")
        found = differing(check_report(forged, renderer))
        assert [d.place for d in found] == [dotted(path)]


def test_every_changed_value_that_names_the_report_is_found(report, renderer):
    body = json.loads(report.data)
    for path in [path for path in leaves(body) if path[0] in (*ASKED, "schema")]:
        forged = replace(report, data=as_bytes(changed(body, path)) + b"\n")
        found = differing(check_report(forged, renderer))
        told_of = " ".join(f"{d.place} {d.sealed} {d.found}" for d in found)
        named = ("title, model or decision", dotted(path), "eqm-report/2x")
        assert any(name in told_of for name in named), path


def test_a_judged_number_is_named_in_the_decision(report, renderer):
    body = json.loads(report.data)
    path = ("decision", "reasons", 0, "text")
    found = differing(check_report(replace(report, data=as_bytes(changed(body, path))), renderer))
    assert "decision.reasons[0].text" in [d.place for d in found]
    path = ("decision", "policy", "minimum_samples")
    found = differing(check_report(replace(report, data=as_bytes(changed(body, path))), renderer))
    assert "decision.reasons[0].text" in [d.place for d in found]


def decided(evaluated, *, days, maximum=1.0):
    """A decision on the evaluation when it was so many days old, by a policy that limits that."""
    policy = replace(chain.tiniest().policy, minimum_samples=10, maximum_age_days=maximum)
    ended = dossier.ended(evaluated)
    return gate.decide(
        dossier.evaluation_of(evaluated),
        evaluated.ref,
        policy,
        evaluated=ended,
        now=ended + timedelta(days=days),
    )


@pytest.mark.parametrize("days", [-3.0, -0.02, 0.0, 0.3, 0.9999, 1.0001, 40.0])
def test_the_age_is_judged_again_on_the_day_that_the_decision_names(evaluated, renderer, days):
    decision = decided(evaluated, days=days)
    assert decision.promote == (-0.04 < days <= 1)
    assert differing([check_decision(renderer, decision)]) == []


def test_an_age_that_was_hidden_or_forged_is_found(evaluated, renderer):
    late, fresh = decided(evaluated, days=30), decided(evaluated, days=0.1)
    without = tuple(r for r in late.reasons if r.check != "freshness")
    (said,) = [r for r in late.reasons if r.check == "freshness"]
    (well,) = [r for r in fresh.reasons if r.check == "freshness"]
    assert all(r.passed for r in without)
    for reason in (
        None,
        replace(said, passed=True),
        replace(said, passed=True, text="as fresh as can be"),
        replace(well, text=well.text.replace(f"{dossier.ended(evaluated):%Y-%m-%d}", "2020-01-01")),
        replace(well, text="judged on 2026-99-99; it is fresh"),
    ):
        forged = tuple(reason if r is said else r for r in late.reasons if reason or r is not said)
        decision = replace(late, promote=True, reasons=forged)
        assert differing([check_decision(renderer, decision)]), reason


def test_that_a_model_was_rolled_back_speaks_against_it_alone(evaluated, renderer):
    decision = decided(evaluated, days=0, maximum=None)
    assert decision.promote
    refused = Reason(check="rollback", passed=False, text="version 1 was rolled back")
    against = replace(decision, promote=False, reasons=(*decision.reasons, refused))
    assert check_decision(renderer, against).passed
    for forged in (
        replace(against, promote=True),
        replace(decision, reasons=(*decision.reasons, replace(refused, passed=True))),
    ):
        assert not check_decision(renderer, forged).passed


def test_studies_are_sealed_and_of_this_model(tiny, store, evaluated, tmp_path):
    copy = copied(store, tmp_path)
    renderer = Renderer(copy, evaluated)
    policy = replace(tiny.config.policy, minimum_samples=10, required_studies=("sweep",))

    def check(ref):
        found = dossier.evaluation_of(evaluated)
        decision = gate.decide(found, evaluated.ref, policy, studies={"sweep": ref})
        assert decision.promote
        return check_decision(renderer, decision)

    def study(name, cell):
        return copy.seal(
            replace(evaluated, stage="study", config={"study": name}, inputs={"0-0": cell})
        ).ref

    assert check(study("sweep", evaluated.ref)).passed
    unsealed = Ref(stage="study", digest="a" * 64, content="b" * 64)
    for ref in (
        unsealed,
        study("another", evaluated.ref),
        study("sweep", tiny["reference"].ref),
        evaluated.ref,
    ):
        (found,) = check(ref).differences
        assert "cannot be made again" in check(ref).text
        assert "is not sealed" in found.found or "is no study 'sweep' of train" in found.found


def test_a_value_that_is_gone_or_added_is_named(report, renderer):
    body = json.loads(report.data)
    less = {k: v for k, v in body.items() if k != "classes"}
    more = {**body, "extra": 1}
    for forged, place in ((less, "classes"), (more, "extra")):
        found = differing(check_report(replace(report, data=as_bytes(forged)), renderer))
        assert [d.place for d in found] == [place]


def test_the_same_values_in_other_bytes_are_told(report, renderer):
    spaced = json.dumps(json.loads(report.data)).encode()
    (found,) = differing(check_report(replace(report, data=spaced), renderer))
    assert found.place.startswith("JSON, byte")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"7", b'{"schema":"eqm-report/1"}', b"\xff"])
def test_what_is_no_report_is_told(report, renderer, data):
    (found,) = differing(check_report(replace(report, data=data), renderer))
    assert found.place == "JSON"


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: {**body, "title": math.nan},
        lambda body: {**body, "title": "\ud800"},
        lambda body: {**body, "decision": {**body["decision"], "policy": {"a": math.inf}}},
        lambda body: {**body, "decision": {**body["decision"], "champion": body["chain"][0]}},
    ],
)
def test_values_that_no_report_can_have_are_told(report, renderer, edit):
    forged = replace(report, data=json.dumps(edit(json.loads(report.data))).encode())
    assert differing(check_report(forged, renderer))


def test_a_report_deeper_than_can_be_read_is_told(report, renderer):
    (found,) = differing(check_report(replace(report, data=b"[" * 100_000), renderer))
    assert found.place == "JSON"


def test_a_champion_that_is_no_evaluation_is_told(evaluated, renderer):
    decision = replace(decided(evaluated, days=0), champion=evaluated.inputs["train"])
    check = check_decision(renderer, decision)
    assert check.text == "cannot be made again"
    assert "KeyError" in check.differences[0].found


def test_any_changed_byte_of_the_page_is_found(report, renderer):
    chance = random.Random(0)
    for _ in range(50):
        at = chance.randrange(len(report.page))
        forged = bytearray(report.page)
        forged[at] ^= 1
        (found,) = differing(check_report(replace(report, page=bytes(forged)), renderer))
        assert found.place == f"page, byte {at}"
    cut = replace(report, page=report.page[:-1])
    assert differing(check_report(cut, renderer))


# -- every value of the evaluation --------------------------------------------------------------


def test_every_changed_value_of_the_evaluation_is_found_and_named(store, evaluated, again):
    """Also where its digests were made right again."""
    assert again.same_kind
    assert check_numbers(store, evaluated, again).passed
    places = list(leaves(evaluated.values))
    assert len(places) > 60
    for path in places:
        forged = replace(evaluated, values=changed(evaluated.values, path))
        found = check_numbers(store, forged, again).differences
        assert [d.place for d in found] == [dotted(path)]


def test_an_edited_record_is_told_and_its_value_named(
    store, evaluated, runtime, again, report, monkeypatch, tmp_path
):
    monkeypatch.setattr(verification, "compute_again", lambda *_, **__: again)
    copy = copied(store, tmp_path)
    file = copy.root / record_key("evaluation", evaluated.digest)
    whole = file.read_bytes()
    for path in random.Random(0).sample(list(leaves(evaluated.values)), 6):
        body = json.loads(whole)
        body["values"] = changed(body["values"], path)
        file.chmod(0o644)
        file.write_text(json.dumps(body))
        found = differing(verify(copy, evaluated.digest, runtime, reports=[]))
        assert found[0].place == f"evaluation {evaluated.digest[:12]}"
        assert "does not match its own digest" in found[0].found
        assert dotted(path) in [d.place for d in found]
    # Sealed anew by somebody who knows how: the report still says what it rests on.
    forged = changed(evaluated.values, ("evaluation", "metrics", "distance", "value"))
    file.write_bytes(record_to_bytes(replace(evaluated, values=forged)))
    found = {d.place for d in differing(verify(copy, evaluated.digest, runtime, reports=[report]))}
    assert "evaluation.metrics.distance.value" in found
    assert "decision.candidate.content" in found


@pytest.mark.parametrize(
    "lost", [("inputs", "samples"), ("inputs", "train"), ("values", "classes"), ("outputs",)]
)
def test_a_record_of_which_something_is_gone_is_told(
    store, evaluated, runtime, again, report, monkeypatch, tmp_path, lost
):
    if lost[0] != "inputs":
        monkeypatch.setattr(verification, "compute_again", lambda *_, **__: again)
    copy = copied(store, tmp_path)
    file = copy.root / record_key("evaluation", evaluated.digest)
    body = json.loads(file.read_bytes())
    if len(lost) == 1:
        body[lost[0]] = {}
    else:
        del body[lost[0]][lost[1]]
    file.chmod(0o644)
    file.write_text(json.dumps(body))
    checks = verify(copy, evaluated.digest, runtime, reports=[report], seeds=0)
    assert not checks[0].passed
    assert not checks[-1].passed


def test_a_record_that_is_none_is_told(store, evaluated, runtime, tmp_path):
    copy = copied(store, tmp_path)
    file = copy.root / record_key("evaluation", evaluated.digest)
    file.chmod(0o644)
    file.write_text("{")
    (check,) = verify(copy, evaluated.digest, runtime)
    assert not check.passed


def test_every_damaged_blob_of_the_chain_is_named(store, evaluated, tmp_path):
    copy = copied(store, tmp_path)
    assert check_chain(copy, evaluated).passed
    named = {
        blob.key: f"{record.stage} {record.digest[:12]}"
        for record in dossier.chain_of(copy, evaluated)
        for blob in {**record.outputs, **record.logs}.values()
    }
    assert len(named) > 20
    for key, place in named.items():
        file, data = copy.root / key, (copy.root / key).read_bytes()
        file.chmod(0o644)
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        (found,) = check_chain(copy, evaluated).differences
        assert found.place.startswith(place)
        file.unlink()
        (found,) = check_chain(copy, evaluated).differences
        assert found.place.startswith(place)
        file.write_bytes(data)


@pytest.mark.parametrize("where", ["chain", "numbers"])
def test_a_store_that_goes_away_is_no_difference(
    store, evaluated, runtime, report, monkeypatch, where
):
    """Nobody is told that a report is wrong because a cable was pulled."""
    get, asked = LocalStore.get, set()

    def gone(self, blob):
        # The chain reads each blob once, and what computes the numbers again reads some again.
        if where == "chain" or blob.sha256 in asked:
            raise AwayError("S3 does not answer")
        asked.add(blob.sha256)
        return get(self, blob)

    monkeypatch.setattr(LocalStore, "get", gone)
    with pytest.raises(AwayError, match="S3 does not answer"):
        verify(store, evaluated.digest, runtime, reports=[report], seeds=1)


def test_a_broken_link_of_the_chain_is_named(store, evaluated, tmp_path):
    copy = copied(store, tmp_path, without=("train",))
    found = check_chain(copy, evaluated).differences
    assert f"evaluation {evaluated.digest[:12]}: inputs.train" in [d.place for d in found]
    assert "is not sealed" in found[-1].found


# -- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["features", "images", "labels"])
def test_a_sample_that_its_seed_does_not_give_is_found(tiny, name, exact, tmp_path):
    store = chain.copied(tiny, tmp_path / "copy", without=())
    record = tiny["samples"]
    part = part_of(config_of(record), 0)
    output = part.images if name == "images" else part.table
    tensors = tensors_from_bytes(store.get(record.outputs[output]))
    # The sample of seed 0 is that of seed 1, as good as any to look at.
    tensors[name][0] = tensors[name][1]
    outputs = {**record.outputs, output: store.put(tensors_to_bytes(tensors))}
    forged = replace(record, outputs=outputs)
    check = check_samples(store, forged, 2, "cpu", exact=exact)
    assert [d.place for d in check.differences] == [f"seed 0: {name}"]


def test_samples_that_are_made_again_are_spread_over_all(tiny):
    """Whoever edits the last ones must not find that only the first are looked at."""
    check = check_samples(tiny.store, tiny["samples"], 3, "cpu", exact=False)
    assert check.text.startswith("seeds 0, 24, 49, made again")
    assert check.passed


@pytest.mark.parametrize(
    ("name", "change"),
    [("features", lambda x: x * 1.05), ("images", lambda x: (x.int() + 3).clamp(0, 255).byte())],
)
def test_a_sample_may_round_and_no_more(tiny, tmp_path, name, change):
    store = chain.copied(tiny, tmp_path / "copy", without=())
    record = tiny["samples"]
    part = part_of(config_of(record), 0)
    output = part.images if name == "images" else part.table
    tensors = tensors_from_bytes(store.get(record.outputs[output]))
    tensors[name][0] = change(tensors[name][0])
    outputs = {**record.outputs, output: store.put(tensors_to_bytes(tensors))}
    check = check_samples(store, replace(record, outputs=outputs), 1, "cpu", exact=False)
    assert [d.place for d in check.differences] == [f"seed 0: {name}"]


def test_samples_in_another_batch_are_equal_up_to_rounding(tiny):
    """The tolerance is not what lets them pass: they are far within it."""
    made = recomputation.generate.remake(tiny.store, tiny["samples"], [0, 33])
    kept = recomputation.samples.kept(tiny.store, tiny["samples"], [0, 33])
    assert (made["images"].double() - kept["images"].double()).abs().mean() < 0.1
    assert apart(kept["features"].numpy(), made["features"].numpy()) < 0.002


# -- other machines and versions ----------------------------------------------------------------


def test_another_kind_of_machine_has_a_tolerance(store, evaluated, again):
    elsewhere = replace(again, same_kind=False)
    path = ("evaluation", "metrics", "distance", "value")
    value = evaluated.values["evaluation"]["metrics"]["distance"]["value"]

    def with_value(number):
        values = json.loads(json.dumps(evaluated.values))
        values["evaluation"]["metrics"]["distance"]["value"] = number
        return replace(evaluated, values=values)

    assert check_numbers(store, with_value(value * (1 + 1e-5)), elsewhere).passed
    assert not check_numbers(store, with_value(value * (1 + 1e-5)), again).passed
    (found,) = check_numbers(store, with_value(value * 1.01), elsewhere).differences
    assert found.place == dotted(path)
    assert "another kind of machine" in check_numbers(store, evaluated, elsewhere).text


def test_what_makes_machines_alike(evaluated):
    here = evaluated.provenance
    assert is_same_kind(here, dict(here))
    assert is_same_kind(here, {**here, "began": "later", "git_revision": None})
    assert not is_same_kind(here, {**here, "threads": here["threads"] + 1})
    for name in ("device", "machine", "cpu_capability", "blas"):
        assert not is_same_kind(here, {**here, name: f"another {here[name]}"}), name
    older = {name: value for name, value in here.items() if name != "blas"}
    assert is_same_kind(older, here)
    for name in ("torch", "numpy"):
        assert not is_same_kind(here, {**here, "versions": {**here["versions"], name: "1"}}), name
    assert is_same_kind(here, {**here, "versions": {**here["versions"], "mlflow": "1"}})


def test_scores_that_are_others_are_named(store, evaluated, again):
    scores = tensors_from_bytes(again.outputs["ood-scores.safetensors"])
    name = sorted(scores)[0]
    scores[name] = scores[name] + 1
    outputs = {**again.outputs, "ood-scores.safetensors": tensors_to_bytes(scores)}
    for same_kind in (True, False):
        other = replace(again, outputs=outputs, same_kind=same_kind)
        (found,) = check_numbers(store, evaluated, other).differences
        assert found.place == f"outputs.ood-scores.safetensors: {name}"


@pytest.mark.parametrize(("factor", "equal"), [(1 + 1e-13, True), (1 + 1e-9, False)])
def test_scores_may_round_and_no_more(store, evaluated, again, factor, equal):
    scores = tensors_from_bytes(again.outputs["ood-scores.safetensors"])
    moved = {name: values * factor for name, values in scores.items()}
    outputs = {**again.outputs, "ood-scores.safetensors": tensors_to_bytes(moved)}
    found = check_numbers(store, evaluated, replace(again, outputs=outputs)).differences
    named = {f"outputs.ood-scores.safetensors: {name}" for name in scores}
    assert {one.place for one in found} == (set() if equal else named)


def test_an_evaluation_of_another_algorithm_is_not_verified_by_this_one(store, evaluated, runtime):
    with pytest.raises(DataError, match=r"sealed by algorithm 0, .*with the revision"):
        compute_again(store, replace(evaluated, algorithm=0), runtime, seeds=0, exact=False)


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".html"])
def test_a_file_is_held_against_the_stored_report(store, evaluated, report, tmp_path, suffix):
    file = tmp_path / f"mine{suffix}"
    whole = report.data if suffix == ".json" else report.page
    file.write_bytes(whole)
    digest, stored, check = stored_as(store, file)
    assert (digest, stored) == (evaluated.digest, report)
    assert check.passed
    file.write_bytes(whole.replace(b"tiny: Equilibrium", b"tiny: Equalibrium", 1))
    _, _, check = stored_as(store, file)
    (found,) = check.differences
    assert "Equalibrium" in found.sealed
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="is no report"):
        stored_as(store, file)


# -- differences --------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(codec="ascii", exclude_characters=".[]"), min_size=1, max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(JSON, st.randoms(use_true_random=False))
def test_one_changed_leaf_is_the_one_difference(value, chance):
    assert of_values(value, value) == []
    places = list(leaves(value))
    if not places:
        return
    path = chance.choice(places)
    (found,) = of_values(value, changed(value, path))
    assert found.place == dotted(path)
    assert found.sealed == at(value, path)


def at(value, path):
    for key in path:
        value = value[key]
    return value


def test_types_and_signs_are_values():
    for a, b in ((1, 1.0), (True, 1), (0.0, -0.0), ("1", 1), (None, False), ([], {})):
        assert [d.place for d in of_values({"a": a}, {"a": b})] == ["a"]
    assert of_values({"a": 1.0}, {"a": 1.0001}, tolerance=1e-3) == []
    assert of_values({"a": 1000}, {"a": 1001}, tolerance=1e-3)


def test_arrays_that_are_not_comparable_are_far_apart():
    one = torch.ones(3).numpy()
    assert apart(one, one) == 0
    assert apart(one, one[:2]) == math.inf
    assert apart(one, one * math.nan) == math.inf
    assert apart(one * 0, one) == math.inf
    assert apart(one, one * 1.5) == pytest.approx(0.5)


def test_only_so_much_is_told():
    found = of_values(list(range(30)), list(range(1, 31)))
    lines = told(found, 12)
    assert len(lines) == 13
    assert lines[0] == "[0]: sealed 0, again 1"
    assert lines[-1] == "and 18 more"
    (line,) = told(of_values("x" * 1000, "y"), 12)
    assert len(line) < 200


def test_the_first_byte_that_differs():
    assert of_bytes(b"abc", b"abc", "p") == []
    assert of_bytes(b"abc", b"abd", "p")[0].place == "p, byte 2"
    assert of_bytes(b"abc", b"ab", "p")[0].place == "p, byte 2"
    assert of_documents(b"{", b"{}", "d")[0].place == "d"
