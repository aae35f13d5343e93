"""A sealed model behind MLflow's scoring protocol: labels and seeds in, images out.

MLflow is told of a model by a file ``MLmodel``. Ours names this module as its loader, so that what
runs is installed code alone, and beside it lies a file with the digests of a sealed training: no
pickle, no code, no weights. :func:`application` makes both anew from the sealed record. Those that
lie beside the record in the store are for MLflow's pages, and for `mlflow models serve` where
whoever may write to the store is trusted.
"""

import functools
import json
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eqm.config import SamplerConfig, replace
from eqm.distributed import pick_device
from eqm.errors import ConfigError, DataError, EqmError
from eqm.model import Model, ModelSpec, from_record, sealed, spec_from_bytes
from eqm.records import Record, Ref, note_from_bytes, note_to_bytes
from eqm.registry import refusal, scoring_application
from eqm.sampling import rule_of, sample, stop_of
from eqm.stage import open_ref
from eqm.storage import Store, open_store
from eqm.words import counted

FILE = "eqm-model.json"
MOST_SAMPLES = 256
"""Of one call."""
MOST_UPDATES = 10_000
PARAMETERS = ("updates", "step_size", "guidance")
"""Settings of the sampler that a call may change."""
FORMS = ("inputs", "instances", "dataframe_split", "dataframe_records")
"""Keys under which MLflow's protocol takes labels and seeds; a call has one of them."""
HINT = f"parameters ({', '.join(PARAMETERS)}) go into params"


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """What is served: eqm-model.json."""

    store: str
    train: Ref
    sampler: SamplerConfig
    """How samples are found where a call does not say otherwise."""


def files_of(store: Store, trained: Record, sampler: SamplerConfig) -> dict[str, bytes]:
    """The files by which MLflow knows a sealed model: its signature, and where it lies."""
    spec = _spec(store, trained)
    size = spec.latent.image_size_px
    defaults = {"updates": "long", "step_size": "double", "guidance": "double"}
    signature = {
        "inputs": json.dumps([_tensor("int64", [-1], name=name) for name in _inputs(spec)]),
        "outputs": json.dumps([_tensor("uint8", [-1, spec.latent.image_channels, size, size])]),
        "params": json.dumps(
            [
                {"name": name, "type": kind, "default": getattr(sampler, name), "shape": None}
                for name, kind in defaults.items()
            ]
        ),
    }
    flavor = {
        "loader_module": "eqm.serving",
        "data": FILE,
        "python_version": trained.provenance.get("python"),
    }
    described = {
        "flavors": {"python_function": flavor},
        "signature": signature,
        "metadata": {"eqm.train": trained.digest, "eqm.content": trained.content},
        "utc_time_created": trained.provenance.get("ended"),
    }
    pointer = Pointer(store=store.uri, train=trained.ref, sampler=sampler)
    # JSON is YAML.
    return {
        "MLmodel": json.dumps(described, indent=1).encode() + b"\n",
        FILE: note_to_bytes(pointer),
    }


def _spec(store: Store, trained: Record) -> ModelSpec:
    return spec_from_bytes(store.get(trained.outputs["model.json"]), trained.digest[:12])


def _inputs(spec: ModelSpec) -> tuple[str, ...]:
    """What each call gives as many of as it wants samples."""
    return ("labels", "seeds") if spec.classes else ("seeds",)


def _tensor(dtype: str, shape: list[int], **name: str) -> dict[str, Any]:
    return {**name, "type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}


def application(
    uri: str, sampler: SamplerConfig, *, token: str | None, mlflow_uri: str | None, cache: Path
) -> Any:
    """MLflow's scoring server of a sealed or registered model, as an ASGI application.

    With ``token``, calls must bring it as ``Authorization: Bearer TOKEN``. Raises as eqm.load.
    """
    store, record = sealed(uri, mlflow_uri=mlflow_uri, cache=cache)
    if record.stage != "train":
        raise ConfigError(f"{uri} is a record of stage {record.stage}, not of a trained model")
    check = functools.partial(check_call, inputs=_inputs(_spec(store, record)))
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files_of(store, record, sampler).items():
            (Path(folder) / name).write_bytes(data)
        return scoring_application(Path(folder), token=token, check=check)


def check_call(body: object, *, inputs: Sequence[str]) -> None:
    """Refuse what MLflow takes without a word: it drops unknown names, and makes 0 of 0.5.

    ``body`` is the JSON of a call, ``inputs`` what the model takes; what has another form is left
    to MLflow. Raises ConfigError, DataError.
    """
    given = body if isinstance(body, dict) else {}
    for key in given:
        if key not in (*FORMS, "params"):
            raise ConfigError(
                f"a call has {key!r}, which is none of {', '.join(FORMS)} and params: {HINT}"
            )
    params = given.get("params")
    _check_parameters(params if isinstance(params, dict) else {})
    for name, values in _columns(given):
        if name not in inputs:
            raise ConfigError(f"input {name!r} is none of {', '.join(inputs)}: {HINT}")
        for value in values:
            # True is an int to Python.
            if type(value) is not int:
                raise DataError(f"{name} holds {value!r}; give whole numbers")


def _columns(given: Mapping[str, Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Names and values of a call, some names again and again, in any form that MLflow reads."""
    for form in FORMS:
        data, names = given.get(form), []
        if form == "dataframe_split" and isinstance(data, dict):
            columns = data.get("columns")
            data, names = data.get("data"), columns if isinstance(columns, list) else []
        yield from ((name, []) for name in names)
        if isinstance(data, dict):
            for name, values in data.items():
                yield name, values if isinstance(values, list) else [values]
        for row in data if isinstance(data, list) else ():
            yield from ((name, [value]) for name, value in _cells(row, names))


def _cells(row: Any, names: list[Any]) -> Iterable[tuple[Any, Any]]:
    if isinstance(row, dict):
        return row.items()
    # How many they must be, MLflow tells.
    return zip(names, row if isinstance(row, list) else [row], strict=False)


def _check_parameters(given: Mapping[str, Any]) -> None:
    unknown = set(given) - set(PARAMETERS)
    if unknown:
        raise ConfigError(f"parameter {min(unknown)!r} is none of {', '.join(PARAMETERS)}")


def _load_pyfunc(path: str) -> "Endpoint":  # pyright: ignore[reportUnusedFunction]
    """What MLflow calls to load; ``path`` is that of eqm-model.json. Raises as eqm.load."""
    pointer = note_from_bytes(Pointer, Path(path).read_bytes(), path)
    store = open_store(pointer.store)
    loaded = from_record(store, open_ref(store, pointer.train)).to(pick_device("auto"))
    return Endpoint(loaded, pointer.sampler)


class Endpoint:
    """What answers calls, one after the other."""

    def __init__(self, model: Model, sampler: SamplerConfig) -> None:
        self.model, self.sampler = model, sampler
        # One that came without an autoencoder is refused now, and not at the first call.
        _ = model.autoencoder
        self._one_at_a_time = threading.Lock()

    def predict(
        self, model_input: Mapping[str, NDArray[Any]], params: Mapping[str, Any] | None = None
    ) -> NDArray[np.uint8]:
        """Images (B, C, H, W) uint8 of labels (B,) and seeds (B,); MLflow's name and arguments."""
        try:
            with self._one_at_a_time:
                return self._images(model_input, dict(params or {}))
        except EqmError as error:
            raise refusal(error) from None

    def _images(self, given: Mapping[str, Any], changes: dict[str, Any]) -> NDArray[np.uint8]:
        seeds = np.asarray(given["seeds"]).ravel().tolist()
        labels = np.asarray(given["labels"]).ravel().tolist() if "labels" in given else None
        _check_parameters(changes)
        self._check_labels(labels, len(seeds))
        sampler: SamplerConfig = replace(self.sampler, **changes)
        for name, value, most in (
            ("seeds", len(seeds), MOST_SAMPLES),
            ("updates", sampler.updates, MOST_UPDATES),
        ):
            if value > most:
                raise DataError(f"{name}: {value:,} is more than the {most:,} of one call")
        found = sample(
            self.model,
            labels=labels,
            seeds=seeds,
            rule=rule_of(sampler),
            updates=sampler.updates,
            guidance=sampler.guidance,
            guidance_channels=sampler.guidance_channels,
            stop=stop_of(sampler),
        )
        diverged = int(found.diverged.sum())
        if diverged:
            raise DataError(
                f"{diverged} of {counted(len(seeds), 'sample')} diverged: lower step_size "
                f"({sampler.step_size:g}) or guidance ({sampler.guidance:g})"
            )
        return found.images().cpu().numpy()

    def _check_labels(self, labels: list[int] | None, seeds: int) -> None:
        """A class for each seed; a model's own "no label", the number behind the last, is none."""
        if labels is None:
            return
        classes = len(self.model.spec.classes)
        for label in labels:
            if not 0 <= label < classes:
                raise DataError(
                    f"label {label} is given, and labels of this model go from 0 to {classes - 1}"
                )
        if len(labels) != seeds:
            given = counted(len(labels), "label")
            raise DataError(f"{given} for {counted(seeds, 'seed')}: give one each")
