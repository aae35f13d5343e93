"""Is a report what its evaluation gives? Every number computed again, some samples made again.

Nothing is changed in the store. What must be equal: the digests of every record and blob that the
evaluation rests on; its numbers, computed again from sealed features; samples, made again from
their seeds; the decision; and the bytes of JSON and page, rendered again. Called by flows.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from eqm import dossier, gate
from eqm.config import PolicyConfig, Runtime, replace
from eqm.discrepancies import Check, Difference, of_bytes, of_documents, of_values
from eqm.errors import DataError, EqmError, IntegrityError
from eqm.recomputation import check_numbers, compute_again
from eqm.records import Decision, Record, Ref, from_json, to_json
from eqm.report import SCHEMA, render_json, report_key
from eqm.report_page import render_html
from eqm.stage import open_ref
from eqm.storage import Store, record_key

UNKNOWN_CHECKS = ("rollback",)
"""Reasons of a decision that come from the history, not from evaluation and policy."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A report as it lies in the store."""

    key: str
    """Without suffix."""
    data: bytes
    """The JSON."""
    page: bytes


@dataclass(frozen=True)
class Renderer:
    """Renders reports of one evaluation, each once."""

    store: Store
    evaluation: Record
    _made: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)

    def __call__(
        self, title: str, model_name: str, decision: Decision | None
    ) -> tuple[bytes, bytes]:
        """JSON and page."""
        key = report_key(self.evaluation.digest, title, model_name, decision)
        if key not in self._made:
            content = dossier.collect(
                self.store,
                self.evaluation,
                title=title,
                model_name=model_name,
                decision=decision,
            )
            self._made[key] = render_json(content), render_html(content)
        return self._made[key]


def verify(
    store: Store,
    evaluation: str,
    runtime: Runtime,
    *,
    reports: list[Stored] | None = None,
    seeds: int = 4,
    exact: bool = False,
) -> list[Check]:
    """All checks of the reports of a sealed evaluation (its digest); all of them unless given.

    ``runtime`` says where its images lie. ``seeds`` samples are made again, alone or, with
    ``exact``, in their whole batches, which gives the same bits on the same kind of machine. Raises
    DataError for an evaluation that is not in the store.
    """
    record, damage = as_stored(store, evaluation)
    checks = [Check(name="record", text=f"evaluation {evaluation[:12]}", differences=damage)]
    if record is None:
        return checks
    checks.append(check_chain(store, record))
    try:
        again = compute_again(store, record, runtime, seeds=seeds, exact=exact)
    except EqmError as error:
        checks.append(_impossible("numbers", "computed again", error))
    else:
        checks += [check_numbers(store, record, again), *again.remade]
    renderer = Renderer(store, record)
    for report in stored_reports(store, evaluation) if reports is None else reports:
        checks += check_report(report, renderer)
    return checks


def _impossible(name: str, text: str, error: EqmError) -> Check:
    """A check that cannot be made has not been passed."""
    wrong = Difference(place=name, sealed="", found=str(error))
    return Check(name=name, text=f"cannot be {text}", differences=(wrong,))


# -- what is sealed -----------------------------------------------------------------------------


def as_stored(store: Store, digest: str) -> tuple[Record | None, tuple[Difference, ...]]:
    """The record of an evaluation, also where it is not its own digest's any more, and what is so.

    So that the checks after this one can name the value that was changed. Raises DataError where
    there is none.
    """
    try:
        record = store.record("evaluation", digest)
    except IntegrityError as error:
        wrong = Difference(place=f"evaluation {digest[:12]}", sealed="", found=str(error))
        return _unchecked(store.read(record_key("evaluation", digest))), (wrong,)
    if record is None:
        raise DataError(
            f"evaluation {digest[:12]} is not sealed in {store.uri}: look for it in another store"
        )
    return record, ()


def _unchecked(data: bytes) -> Record | None:
    try:
        body = json.loads(data)
        named = {k: v for k, v in body.items() if k not in ("digest", "content")}
        return from_json(Record, named, "record")
    except (ValueError, AttributeError, EqmError):
        return None


def check_chain(store: Store, record: Record) -> Check:
    """Digests of every record that this one rests on, and of every blob that they name.

    Bytes are read from the store itself, not from copies on this machine.
    """
    found: dict[str, Record] = {record.digest: record}
    wrong = _broken_inputs(store, record, found)
    blobs = {
        blob.sha256: (f"{r.stage} {r.digest[:12]}: {name}", blob)
        for r in found.values()
        for name, blob in {**r.outputs, **r.logs}.items()
    }
    for place, blob in blobs.values():
        wrong += _trouble(place, functools.partial(store.get, blob))
    text = f"digests of {len(found)} records and {len(blobs)} blobs"
    return Check(name="chain", text=text, differences=tuple(wrong))


def _broken_inputs(store: Store, record: Record, found: dict[str, Record]) -> list[Difference]:
    wrong: list[Difference] = []
    for name, ref in sorted(record.inputs.items()):
        if ref.stage == "source" or ref.digest in found:
            continue
        place = f"{record.stage} {record.digest[:12]}: inputs.{name}"
        trouble = _trouble(place, functools.partial(_open, store, ref, found))
        wrong += trouble or _broken_inputs(store, found[ref.digest], found)
    return wrong


def _open(store: Store, ref: Ref, found: dict[str, Record]) -> None:
    found[ref.digest] = open_ref(store, ref)


def _trouble(place: str, read: Callable[[], object]) -> list[Difference]:
    try:
        read()
    except EqmError as error:
        return [Difference(place=place, sealed="", found=str(error))]
    return []


# -- decision, JSON and page --------------------------------------------------------------------


def stored_reports(store: Store, evaluation: str) -> list[Stored]:
    """All reports of an evaluation. Raises DataError for none."""
    keys = [k for k in store.list(f"reports/{evaluation}/") if k.endswith(".json")]
    if not keys:
        raise DataError(
            f"evaluation {evaluation[:12]} has no report in {store.uri}: make it with `eqm "
            "evaluate` or `eqm promote`"
        )
    return [stored_report(store, key.removesuffix(".json")) for key in keys]


def stored_report(store: Store, key: str) -> Stored:
    """A report by its key, with or without suffix. Raises MissingError."""
    stem = key.removesuffix(".json").removesuffix(".html")
    return Stored(key=stem, data=store.read(f"{stem}.json"), page=store.read(f"{stem}.html"))


def check_report(report: Stored, renderer: Renderer) -> list[Check]:
    """Name, decision, JSON and page of a report against its evaluation."""
    evaluation, what = renderer.evaluation, f"report {report.key.rpartition('/')[2]}"
    try:
        title, model_name, decision = _asked(report.data)
    except (ValueError, KeyError, EqmError) as error:
        wrong = Difference(place="JSON", sealed=f"no {SCHEMA} ({error})", found=SCHEMA)
        return [Check(name="JSON", text=what, differences=(wrong,))]
    named = report_key(evaluation.digest, title, model_name, decision)
    wrong = of_values(report.key, named, "title, model or decision (the report's name)")
    checks = [
        Check(name="name", text=f"{what}: digest of what it is of", differences=tuple(wrong)),
        check_decision(renderer, decision),
    ]
    try:
        data, page = renderer(title, model_name, decision)
    except EqmError as error:
        return [*checks, _impossible("JSON", "rendered again", error)]
    return [
        *checks,
        Check(
            name="JSON",
            text=f"{what}: {len(report.data):,} bytes, rendered again",
            differences=tuple(of_documents(report.data, data, "JSON")),
        ),
        Check(
            name="page",
            text=f"{what}: {len(report.page):,} bytes, rendered again",
            differences=tuple(of_bytes(report.page, page, "page")),
        ),
    ]


def _asked(data: bytes) -> tuple[str, str, Decision | None]:
    """What a report is of, beside its evaluation: not to be computed from anything else."""
    body = json.loads(data)
    if not isinstance(body, Mapping):
        raise ValueError("it is no table")
    decision = body["decision"]
    parsed = None if decision is None else from_json(Decision, decision, "decision")
    return str(body["title"]), str(body["model"]), parsed


def check_decision(renderer: Renderer, decision: Decision | None) -> Check:
    """Judge once more, by the policy that the decision holds."""
    if decision is None:
        return Check(name="decision", text="none was made")
    try:
        again = _judged(renderer, decision)
    except EqmError as error:
        return _impossible("decision", "made again", error)
    wrong = of_values(to_json(decision), to_json(again), "decision")
    text = f"{len(decision.reasons)} checks of policy {decision.policy.get('name')!r}, made again"
    return Check(name="decision", text=text, differences=tuple(wrong))


def _judged(renderer: Renderer, decision: Decision) -> Decision:
    record, against = renderer.evaluation, decision.champion
    champion = None if against is None else open_ref(renderer.store, against)
    found = gate.decide(
        dossier.evaluation_of(record),
        record.ref,
        from_json(PolicyConfig, decision.policy, "policy"),
        champion=None if champion is None else dossier.evaluation_of(champion),
        champion_ref=against,
    )
    kept = tuple(r for r in decision.reasons if r.check in UNKNOWN_CHECKS)
    reasons = (*found.reasons, *kept)
    return replace(found, promote=all(r.passed for r in reasons), reasons=reasons)
