"""Images for labels and seeds over HTTP, from a real process, and what it refuses."""

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chain
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import eqm
from eqm import serving
from eqm.config import SamplerConfig
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.storage import LocalStore
from flows.models import _token

PROJECT = Path(__file__).resolve().parent.parent
TOKEN = "0123456789abcdef"
SAMPLER = SamplerConfig(updates=5, step_size=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="train")


@pytest.fixture(scope="module")
def served(trained: chain.Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real `eqm serve` of the model."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "token").write_text(f"{TOKEN}\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("EQM_", "MLFLOW_"))}
    told = (folder / "told").open("w")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "flows.cli", "serve", trained.uri("train")),
            *("--port", str(port), "--token-file", str(folder / "token")),
            *("--updates", str(SAMPLER.updates), "--step-size", str(SAMPLER.step_size)),
        ],
        env={**environ, "EQM_HOME": str(folder / "home"), "PYTHONPATH": str(PROJECT)},
        cwd=folder,
        stdout=told,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not answers(address):
            assert server.poll() is None, (folder / "told").read_text()
            assert time.monotonic() < deadline, (folder / "told").read_text()
            time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.wait()
        told.close()


def answers(address: str) -> bool:
    try:
        call(f"{address}/ping")
    except (urllib.error.URLError, OSError):
        return False
    return True


def call(address: str, body: Any = None, token: str = TOKEN) -> bytes:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(address, data=data, headers=headers), timeout=60
    ) as answer:
        return answer.read()


def images(address: str, labels: list[int], seeds: list[int], **params: Any) -> Any:
    body = {"inputs": {"labels": labels, "seeds": seeds}, "params": params}
    found = json.loads(call(f"{address}/invocations", body))
    return np.array(found["predictions"], dtype=np.uint8)


def expected(trained: chain.Chain, labels: list[int], seeds: list[int], updates: int) -> Any:
    found = eqm.sample(
        eqm.load(trained.uri("train"), device="cpu"),
        labels=labels,
        seeds=seeds,
        rule=eqm.NAG(step_size=SAMPLER.step_size, momentum=SAMPLER.momentum),
        updates=updates,
    )
    return found.images().numpy()


def test_images_are_those_of_the_library(trained: chain.Chain, served: str) -> None:
    labels, seeds = [3, 7, 3], [0, 1, 2]
    found = images(served, labels, seeds)
    assert found.shape == (3, 1, 8, 8)
    np.testing.assert_array_equal(found, expected(trained, labels, seeds, SAMPLER.updates))
    other = images(served, labels, seeds, updates=2)
    np.testing.assert_array_equal(other, expected(trained, labels, seeds, 2))
    assert (found != other).any()
    # A sample is a function of its seed and label, not of its company.
    np.testing.assert_array_equal(images(served, [7], [1]), found[1:2])


def split(data: Any, *more: str) -> dict[str, Any]:
    return {"columns": ["labels", "seeds", *more], "data": data}


@pytest.mark.parametrize(
    "body",
    [
        {"instances": [{"labels": 3, "seeds": 0}, {"labels": 7, "seeds": 1}]},
        {"instances": {"labels": [3, 7], "seeds": [0, 1]}},
        {"dataframe_records": [{"labels": 3, "seeds": 0}, {"labels": 7, "seeds": 1}]},
        {"dataframe_split": split([[3, 0], [7, 1]])},
    ],
)
def test_every_form_of_a_call_is_answered_alike(served: str, body: Any) -> None:
    found = json.loads(call(f"{served}/invocations", {**body, "params": {"updates": 2}}))
    expected = images(served, [3, 7], [0, 1], updates=2)
    np.testing.assert_array_equal(np.array(found["predictions"], dtype=np.uint8), expected)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"inputs": {"labels": [99], "seeds": [0]}}, "label 99 is given"),
        ({"inputs": {"labels": [1], "seeds": [-1]}}, "seed -1 is out of range"),
        ({"inputs": {"labels": [1, 2], "seeds": [0]}}, "2 labels for 1 seed: give one each"),
        ({"inputs": {"labels": [10], "seeds": [0]}}, "label 10 is given"),
        ({"inputs": {"labels": [1], "seeds": ["a"]}}, "seeds holds 'a'; give whole numbers"),
        ({"inputs": {"labels": [0.5], "seeds": [0]}}, "labels holds 0.5; give whole numbers"),
        ({"inputs": {"labels": [True], "seeds": [0]}}, "labels holds True; give whole numbers"),
        (
            {"inputs": {"labels": [1], "seeds": [0]}, "params": {"steps": 5}},
            "parameter 'steps' is none of updates, step_size, guidance",
        ),
        (
            {"inputs": {"labels": [1], "seeds": [0], "guidance": [4]}},
            "input 'guidance' is none of labels, seeds: parameters (updates, step_size, guidance)",
        ),
        ({"inputs": {"labels": [1], "seeds": [0], "updates": []}}, "input 'updates' is none of"),
        (
            {"inputs": {"labels": [1], "seeds": [0]}, "parms": {"updates": 3}},
            "a call has 'parms', which is none of inputs, instances, dataframe_split, dataframe_r",
        ),
        ({"inputs": {"labels": [1], "seeds": [0]}, "updates": 3}, "a call has 'updates', which"),
        ({"inputs": {"labels": [[1]], "seeds": [0]}}, "labels holds [1]; give whole numbers"),
        ({"instances": {"labels": [1], "seeds": [0], "guidance": [4]}}, "input 'guidance' is"),
        (
            {"instances": [{"labels": 1, "seeds": 0}, {"labels": 1, "seeds": 1, "updates": 3}]},
            "input 'updates' is none of labels, seeds",
        ),
        ({"instances": [{"labels": 0.5, "seeds": 0}]}, "labels holds 0.5; give whole numbers"),
        ({"dataframe_records": [{"labels": 1, "seeds": 0, "guidance": 4}]}, "input 'guidance' is"),
        ({"dataframe_records": [{"labels": [0.5], "seeds": [0]}]}, "labels holds [0.5]; give"),
        ({"dataframe_split": split([[1, 0, 4]], "guidance")}, "input 'guidance' is none of"),
        ({"dataframe_split": split([[0.5, 0]])}, "labels holds 0.5; give whole numbers"),
        ({"dataframe_split": split([{"labels": 1, "seeds": 0, "updates": 3}])}, "input 'updates'"),
        ({"dataframe_split": split({"labels": [True], "seeds": [0]})}, "labels holds True; give"),
        ({"inputs": {"labels": [1]}}, "seeds"),
        ({"inputs": {"labels": [1] * 257, "seeds": [0] * 257}}, "257 is more than the 256"),
        (
            {"inputs": {"labels": [1], "seeds": [0]}, "params": {"updates": 100_000}},
            "100,000 is more than the 10,000",
        ),
        (
            {"inputs": {"labels": [1], "seeds": [0]}, "params": {"step_size": -1.0}},
            "sampler.step_size is -1.0",
        ),
        (
            {"inputs": {"labels": [1], "seeds": [0]}, "params": {"step_size": 1e30}},
            "1 of 1 sample diverged: lower step_size (1e+30) or guidance (1)",
        ),
    ],
)
def test_what_cannot_be_answered_is_said(served: str, body: Any, said: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as told:
        call(f"{served}/invocations", body)
    words = told.value.read().decode()
    assert told.value.code == 400
    assert said in words
    assert "Traceback" not in words


def test_a_table_of_which_no_column_is_checked_is_refused(served: str) -> None:
    headers = {
        "Content-Type": "application/vnd.apache.parquet",
        "Authorization": f"Bearer {TOKEN}",
    }
    table = io.BytesIO()
    columns = {"labels": [1], "seeds": [0], "guidance": [4]}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    with pytest.raises(urllib.error.HTTPError) as told:
        urllib.request.urlopen(
            urllib.request.Request(f"{served}/invocations", data=table.getvalue(), headers=headers)
        )
    assert told.value.code == 415
    assert "is not read here: send JSON" in told.value.read().decode()


def test_labels_for_a_model_without_classes_are_refused() -> None:
    seeds = {"inputs": {"seeds": [0]}}
    serving.check_call(seeds, inputs=("seeds",))
    with pytest.raises(ConfigError, match="input 'labels' is none of seeds"):
        serving.check_call({"inputs": {"labels": [1], "seeds": [0]}}, inputs=("seeds",))
    with pytest.raises(DataError, match=r"seeds holds 0\.5"):
        serving.check_call(
            {"dataframe_split": {"columns": ["seeds"], "data": [0.5]}}, inputs=("seeds",)
        )


def test_nobody_is_let_in_without_the_token(served: str) -> None:
    for path in ("/ping", "/invocations", "/version"):
        with pytest.raises(urllib.error.HTTPError) as told:
            call(served + path, token="fedcba9876543210")
        assert told.value.code == 401


def test_off_loopback_a_token_is_asked_for(tmp_path: Path) -> None:
    assert _token("127.0.0.1", None) is None
    with pytest.raises(ConfigError, match="where others can call: give --token-file"):
        _token("0.0.0.0", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        _token("0.0.0.0", tmp_path / "none")
    (tmp_path / "short").write_text("secret")
    with pytest.raises(ConfigError, match="fewer than 16"):
        _token("0.0.0.0", tmp_path / "short")


def test_mlflow_reads_the_signature(trained: chain.Chain, tmp_path: Path) -> None:
    from mlflow.models import Model
    from mlflow.types import TensorSpec

    files = serving.files_of(trained.store, trained["train"], SAMPLER)
    (tmp_path / "MLmodel").write_bytes(files["MLmodel"])
    signature = Model.load(str(tmp_path)).signature
    assert signature.inputs.inputs == [
        TensorSpec(np.dtype("int64"), (-1,), "labels"),
        TensorSpec(np.dtype("int64"), (-1,), "seeds"),
    ]
    assert signature.outputs.inputs == [TensorSpec(np.dtype("uint8"), (-1, 1, 8, 8))]
    assert {p.name: p.default for p in signature.params} == {
        "updates": 5,
        "step_size": 0.1,
        "guidance": 1.0,
    }
    assert serving.files_of(trained.store, trained["train"], SAMPLER) == files


def test_every_setting_of_the_sampler_reaches_the_descent(
    trained: chain.Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = SamplerConfig(
        rule="heavy-ball", step_size=0.02, momentum=0.7, stop_below=2.5, guidance_channels=1
    )
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(
        serving, "sample", lambda model, **how: told.append(how) or eqm.sample(model, **how)
    )
    endpoint = serving.Endpoint(eqm.load(trained.uri("train"), device="cpu"), sampler)
    asked = {"labels": np.array([3]), "seeds": np.array([2])}
    endpoint.predict(asked, {"updates": 4, "guidance": 1.5})
    expected = {
        "labels": [3],
        "seeds": [2],
        "rule": eqm.HeavyBall(step_size=0.02, momentum=0.7),
        "updates": 4,
        "guidance": 1.5,
        "guidance_channels": 1,
        "stop": eqm.GradientNormBelow(2.5),
    }
    assert {name: told[0][name] for name in expected} == expected


def test_what_is_served_has_every_setting_of_the_sampler_that_was_given(
    trained: chain.Chain, tmp_path: Path
) -> None:
    """MLflow's signature holds three of them, and fills these in."""
    sampler = SamplerConfig(
        rule="heavy-ball", step_size=0.02, momentum=0.7, updates=7, stop_below=2.5, guidance=1.5
    )
    files = serving.files_of(trained.store, trained["train"], sampler)
    (tmp_path / serving.FILE).write_bytes(files[serving.FILE])
    assert serving._load_pyfunc(str(tmp_path / serving.FILE)).sampler == sampler


def test_damaged_weights_are_not_served(trained: chain.Chain, tmp_path: Path) -> None:
    store = chain.copied(trained, tmp_path / "store", without=())
    record = trained["train"]
    files = serving.files_of(store, record, SAMPLER)
    (tmp_path / serving.FILE).write_bytes(files[serving.FILE])
    serving._load_pyfunc(str(tmp_path / serving.FILE))
    blob = LocalStore(store.root).root / record.outputs["ema.safetensors"].key
    blob.chmod(0o600)
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    with pytest.raises(IntegrityError, match="is damaged"):
        serving._load_pyfunc(str(tmp_path / serving.FILE))
    (tmp_path / serving.FILE).write_bytes(
        files[serving.FILE].replace(b'"guidance": 1.0', b'"guidance": 2.0')
    )
    with pytest.raises(IntegrityError, match="does not match its own digest"):
        serving._load_pyfunc(str(tmp_path / serving.FILE))
