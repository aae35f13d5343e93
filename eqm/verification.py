"""Is a report what its evaluation gives? Every number computed again, some samples made again.

Nothing is changed in the store. What must be equal: the digests of every record and blob that the
evaluation rests on; its numbers, computed again from sealed features; samples, made again from
their seeds; the decision; and the bytes of JSON and page, rendered again. Called by flows.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eqm import dossier, gate
from eqm.config import ALGORITHMS, Runtime, SourceConfig, replace
from eqm.discrepancies import Check, Difference, of_bytes, of_documents, of_values
from eqm.distributed import pick_device
from eqm.errors import (
    ConfigError,
    DataError,
    EqmError,
    IntegrityError,
    MissingError,
    OtherImagesError,
    StoreError,
)
from eqm.layouts import layout_of
from eqm.policy import PolicyConfig
from eqm.recomputation import check_numbers, compute_again
from eqm.records import Decision, Record, Ref, digest, from_json, to_json
from eqm.report import SCHEMA, ReportInput, render_json, report_key
from eqm.report_page import render_html
from eqm.stage import open_ref
from eqm.storage import Store, record_key
from eqm.words import counted

NO_SUCH = (EqmError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
"""What comes of reading things that somebody edited: anything may be missing, or another thing."""


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
    """Renders reports of one evaluation again, each once."""

    store: Store
    evaluation: Record
    _made: dict[tuple[str, str], bytes] = field(default_factory=dict)
    _decisions: dict[str, Decision] = field(default_factory=dict)

    def json(self, asked: "Asked") -> bytes:
        """The numbers."""
        return self._once("json", render_json, asked)

    def page(self, asked: "Asked") -> bytes:
        """The page."""
        return self._once("page", render_html, asked)

    def judged(self, decision: Decision) -> Decision:
        """What the policy of a decision says of the same evaluations."""
        key = digest(decision)
        if key not in self._decisions:
            self._decisions[key] = _judged(self.store, self.evaluation, decision)
        return self._decisions[key]

    def _once(self, kind: str, render: Callable[[ReportInput], bytes], asked: "Asked") -> bytes:
        key = kind, asked.key(self.evaluation)
        if key not in self._made:
            self._made[key] = render(self._content(asked))
        return self._made[key]

    def _content(self, asked: "Asked") -> ReportInput:
        return dossier.collect(
            self.store,
            self.evaluation,
            title=asked.title,
            model_name=asked.model_name,
            decision=asked.decision,
        )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a report is of, beside its evaluation: it cannot be computed from anything else."""

    title: str
    model_name: str
    decision: Decision | None

    def key(self, evaluation: Record) -> str:
        """Where the report lies."""
        return report_key(evaluation.digest, self.title, self.model_name, self.decision)


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
    DataError for an evaluation that is not in the store, ConfigError or DataError where
    ``runtime`` names a device or a place of images that is not there, or that holds other images
    than were listed, StoreError where the store does not answer: nothing can be said then.
    """
    record, damage = as_stored(store, evaluation)
    if record is not None and not damage:
        _check_means(record, runtime)
    checks = [Check(name="record", text=f"evaluation {evaluation[:12]}", differences=damage)]
    if record is None:
        return checks
    checks.append(check_chain(store, record))
    try:
        again = compute_again(store, record, runtime, seeds=seeds, exact=exact)
    except NO_SUCH as error:
        # Beside a difference that was found, images that differ may be another one.
        if isinstance(error, OtherImagesError) and all(check.passed for check in checks):
            raise DataError(
                f"these are not the images of evaluation {evaluation[:12]} ({error.args[0]}): give "
                "--source-uri the folder or file that was listed, as it was then"
            ) from error
        checks.append(_impossible("numbers", "computed again", error))
    else:
        checks += [check_numbers(store, record, again), *again.remade]
    renderer = Renderer(store, record)
    for report in stored_reports(store, evaluation) if reports is None else reports:
        checks += check_report(report, renderer)
    return checks


def _check_means(record: Record, runtime: Runtime) -> None:
    """What is asked of this machine must be there, or its lack would be told as a difference."""
    pick_device(runtime.device)
    if record.algorithm == ALGORITHMS["evaluation"]:
        source = from_json(SourceConfig, record.config["source"], "config.source")
        if source.kind != "digits" and runtime.source_uri is None:
            raise ConfigError(
                "--source-uri is missing: give the folder or file that holds the images of "
                f"evaluation {record.digest[:12]} (source.kind {source.kind!r}), on this machine "
                "or s3://bucket/prefix"
            )
        layout_of(source, runtime.source_uri)


def _impossible(name: str, text: str, error: Exception) -> Check:
    """A check that cannot be made is not passed. Raises StoreError where a store is away."""
    _raise_if_away(error)
    wrong = Difference(place=name, sealed="", found=_in_words(error))
    return Check(name=name, text=f"cannot be {text}", differences=(wrong,))


def _raise_if_away(error: Exception) -> None:
    """Where a store does not answer, nothing differs and nothing is proved: it is told so."""
    if isinstance(error, StoreError) and not isinstance(error, MissingError):
        raise error


def _in_words(error: Exception) -> str:
    """Python's own errors say little without their names: of KeyError, the key alone."""
    return str(error) if isinstance(error, EqmError) else f"{type(error).__name__}: {error}"


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
    text = f"digests of {counted(len(found), 'record')} and {counted(len(blobs), 'blob')}"
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
        _raise_if_away(error)
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


def stored_as(store: Store, path: Path) -> tuple[str, Stored, Check]:
    """The evaluation and the stored report of a file, .json or .html, and where they differ.

    Of several reports of an evaluation it is the one that is most like the file. Raises DataError
    for a file that is no report, or whose evaluation has none in the store.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a report's .json or .html")
    data = path.read_bytes()
    is_page = path.suffix == ".html"
    evaluation = _evaluation_in_page(data) if is_page else _evaluation_in_json(data)
    if evaluation is None:
        raise DataError(f"{path} is no report of this program: give its .json or .html")

    def compared(report: Stored) -> list[Difference]:
        if is_page:
            return of_bytes(data, report.page, path.name)
        return of_documents(data, report.data, path.name)

    closest = min(stored_reports(store, evaluation), key=lambda report: len(compared(report)))
    text = f"{path.name} against {store.where(closest.key)}{path.suffix}"
    return (
        evaluation,
        closest,
        Check(name="file", text=text, differences=tuple(compared(closest))),
    )


def _evaluation_in_page(data: bytes) -> str | None:
    found = re.search(rb'<meta name="eqm-evaluation" content="([0-9a-f]{64})">', data)
    return found[1].decode() if found else None


def _evaluation_in_json(data: bytes) -> str | None:
    try:
        digest = json.loads(data)["chain"][-1]["digest"]
    except (ValueError, LookupError, TypeError):
        return None
    return digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else None


def check_report(report: Stored, renderer: Renderer) -> list[Check]:
    """Name, decision, JSON and page of a report against its evaluation."""
    what = f"report {report.key.rpartition('/')[2]}"
    try:
        asked = _asked(report.data)
        key = asked.key(renderer.evaluation)
    except NO_SUCH as error:
        wrong = Difference(place="JSON", sealed=f"no {SCHEMA}: {error}", found=SCHEMA)
        return [Check(name="JSON", text=what, differences=(wrong,))]
    wrong = of_values(report.key, key, "title, model or decision")
    text = f"{what}: the digest of its title, model and decision"
    checks = [
        Check(name="name", text=text, differences=tuple(wrong)),
        check_decision(renderer, asked.decision),
    ]
    try:
        differences = of_documents(report.data, renderer.json(asked), "JSON")
        text = f"{what}: {len(report.data):,} bytes, rendered again"
        checks.append(Check(name="JSON", text=text, differences=tuple(differences)))
        # Of what is not this report any more there is no page to compare with.
        if not wrong:
            differences = of_bytes(report.page, renderer.page(asked), "page")
            text = f"{what}: {len(report.page):,} bytes, rendered again"
            checks.append(Check(name="page", text=text, differences=tuple(differences)))
    except NO_SUCH as error:
        checks.append(_impossible("JSON", "rendered again", error))
    return checks


def _asked(data: bytes) -> Asked:
    body = json.loads(data)
    if body["schema"] != SCHEMA:
        raise ValueError(f"schema is {body['schema']!r}")
    decision = body["decision"]
    return Asked(
        title=body["title"],
        model_name=body["model"],
        decision=None if decision is None else from_json(Decision, decision, "decision"),
    )


def check_decision(renderer: Renderer, decision: Decision | None) -> Check:
    """Judge once more, by the policy that the decision holds."""
    if decision is None:
        return Check(name="decision", text="none was made")
    try:
        again = renderer.judged(decision)
    except NO_SUCH as error:
        return _impossible("decision", "made again", error)
    wrong = of_values(to_json(decision), to_json(again), "decision")
    text = f"{len(decision.reasons)} checks of policy {decision.policy.get('name')!r}, made again"
    return Check(name="decision", text=text, differences=tuple(wrong))


def _judged(store: Store, record: Record, decision: Decision) -> Decision:
    against = decision.champion
    champion = None if against is None else open_ref(store, against)
    for name, ref in decision.studies.items():
        _check_study(store, record, name, ref)
    policy = from_json(PolicyConfig, decision.policy, "policy")
    evaluated = dossier.ended(record)
    found = gate.decide(
        dossier.evaluation_of(record),
        record.ref,
        policy,
        champion=None if champion is None else dossier.evaluation_of(champion),
        champion_ref=against,
        studies=decision.studies,
        evaluated=evaluated,
        now=None if evaluated is None else _moment(decision, evaluated),
    )
    # That a model was rolled back is known from the history alone. It can only speak against it.
    taken_back = tuple(r for r in decision.reasons if r.check == "rollback" and not r.passed)
    promote = found.promote and not taken_back
    return replace(found, promote=promote, reasons=(*found.reasons, *taken_back))


def _check_study(store: Store, record: Record, name: str, ref: Ref) -> None:
    """Refuse a study that is not sealed, or not of this model. Raises DataError, IntegrityError."""
    study, train = open_ref(store, ref), record.inputs["train"]
    cells = [open_ref(store, cell) for cell in study.inputs.values()]
    named = study.stage == "study" and study.config.get("study") == name
    if not named or all(cell.inputs.get("train") != train for cell in cells):
        raise DataError(
            f"{ref.stage} {ref.digest[:12]} is no study {name!r} of train {train.digest[:12]}: "
            "judge again with `eqm promote`"
        )


def _moment(decision: Decision, evaluated: datetime.datetime) -> datetime.datetime:
    """When a decision was made, as near as it says: it tells the day, on which the age passed.

    The moment of that day which is best for what it says; one before the evaluation where it says
    no day, as of an evaluation that is dated ahead.
    """
    told = next((reason for reason in decision.reasons if reason.check == "freshness"), None)
    day = None if told is None else re.search(r"judged on (\d{4}-\d\d-\d\d);", told.text)
    if told is None or day is None:
        return evaluated - datetime.timedelta(days=1)
    midnight = datetime.datetime.combine(
        datetime.date.fromisoformat(day[1]), datetime.time(), datetime.UTC
    )
    last = midnight + datetime.timedelta(days=1, seconds=-1)
    return min(max(midnight, evaluated), last) if told.passed else last
