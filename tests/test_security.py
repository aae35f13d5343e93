"""Ways in that are shut: what docs/security.md lists and no other test has.

Every test here has its opposite: the harm is shown to work where nothing guards against it.
"""

import importlib
import io
import itertools
import pickle
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE

import eqm
from eqm.autoencoder import autoencoder_from_bytes
from eqm.checkpoint import newest
from eqm.config import tiny, with_settings
from eqm.errors import ConfigError, DataError, EqmError
from eqm.features import inception_extractor
from eqm.model import weights_from_bytes
from eqm.records import note_from_bytes, sha256, to_json
from eqm.registry import check
from eqm.storage import LocalStore
from flows import plan
from flows.options import changes_of
from flows.settings import LETS_IN, read_settings
from infra import audit
from infra.deployments import declared_names
from infra.stack import External, ServiceError, Stack, child_environment

PROJECT = Path(__file__).resolve().parent.parent
FLOWS = sorted(p.stem for p in (PROJECT / "flows").glob("*.py") if p.stem != "__init__")

# -- C3: pickles in places where somebody looks for results ------------------------------------


class Poison:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (exec, (f"open({str(self.mark)!r}, 'w').close()",))


def from_official(folder: Path, poison: bytes) -> None:
    (folder / "x.pt").write_bytes(poison)
    eqm.load(folder / "x.pt")


def from_official_zip(folder: Path, poison: bytes) -> None:
    torch.save({"model": pickle.loads(pickle.dumps(torch.zeros(1)))}, folder / "x.pt")
    data = (folder / "x.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(folder / "y.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, poison if name.endswith("data.pkl") else old.read(name))
    eqm.load(folder / "y.pt")


def from_an_mlflow_model(folder: Path, poison: bytes) -> None:
    (folder / "python_model.pkl").write_bytes(poison)
    flavour = {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl"}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavour}}))
    eqm.load(folder)


def from_a_model_folder(folder: Path, poison: bytes) -> None:
    for name in ("ema.safetensors", "model.json", "digests.json"):
        (folder / name).write_bytes(poison)
    eqm.load(folder)


def from_weights(folder: Path, poison: bytes) -> None:
    weights_from_bytes(poison, "weights")


def from_an_extractor(folder: Path, poison: bytes) -> None:
    (folder / "inception.pth").write_bytes(poison)
    inception_extractor(folder / "inception.pth", sha256(poison))


def from_an_autoencoder(folder: Path, poison: bytes) -> None:
    autoencoder_from_bytes({"autoencoder.json": poison, "autoencoder.safetensors": poison})


def from_distributed_metadata(folder: Path, poison: bytes) -> None:
    """A checkpoint folder as torch.distributed.checkpoint writes it is no checkpoint at all."""
    store = LocalStore(folder)
    store.write_once("train/x/checkpoints/.metadata", poison)
    store.write_once("train/x/checkpoints/__0_0.distcp", poison)
    if newest(store, "x") is None:
        raise DataError("no checkpoint")


def from_a_record(folder: Path, poison: bytes) -> None:
    note_from_bytes(audit.Floor, poison, "record")


def from_a_config(folder: Path, poison: bytes) -> None:
    (folder / "run.toml").write_bytes(poison)
    plan.read_config(str(folder / "run.toml"))


WAYS_IN = (
    from_official,
    from_official_zip,
    from_an_mlflow_model,
    from_a_model_folder,
    from_weights,
    from_an_extractor,
    from_an_autoencoder,
    from_distributed_metadata,
    from_a_record,
    from_a_config,
)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("way", WAYS_IN, ids=lambda way: way.__name__)
def test_a_pickle_is_refused_in_words_and_never_run(
    tmp_path: Path, way: Callable[[Path, bytes], None], protocol: int
) -> None:
    mark = tmp_path / "ran"
    poison = pickle.dumps(Poison(mark), protocol=protocol)
    with pytest.raises(EqmError):
        way(tmp_path, poison)
    assert not mark.exists()
    pickle.loads(poison)
    assert mark.exists(), "it is harmless, and shows nothing"


def test_of_torch_fidelity_only_the_network_is_used() -> None:
    """Its cache is looked up by name and unpickled, so nothing that knows it is called."""
    used = {
        name
        for folder in ("eqm", "flows", "infra")
        for path in (PROJECT / folder).glob("*.py")
        for name in re.findall(r"torch_fidelity\.(\w+)", path.read_text())
    }
    assert used == {
        "FeatureExtractorInceptionV3",
        "__version__",
        "feature_extractor_clip",
        "interpolate_compat_tensorflow",
    }


# -- results of Prefect -------------------------------------------------------------------------


def declared(kind: type) -> Iterator[tuple[str, Any]]:
    for module in FLOWS:
        for name, value in vars(importlib.import_module(f"flows.{module}")).items():
            if isinstance(value, kind):
                yield f"{module}.{name}", value


def test_prefect_keeps_no_result_that_could_be_unpickled(tmp_path: Path) -> None:
    tasks, flows = dict(declared(Task)), dict(declared(Flow))
    assert {"encode.encode_range", "weekly.weekly", "clean.clean_store"} <= set(flows)
    assert len(tasks) >= 20
    for name, task in tasks.items():
        assert task.persist_result is False, name
        assert task.cache_policy == NO_CACHE, name
    for name, flow in flows.items():
        assert not flow.persist_result, name
        assert flow.result_serializer is None, name
    stack = Stack(home=tmp_path, embedded=frozenset({"prefect"}), prefect_auth="eqm:x")
    told = child_environment({"PREFECT_RESULTS_DEFAULT_SERIALIZER": "pickle"}, stack)
    assert told["PREFECT_RESULTS_DEFAULT_SERIALIZER"] == "json"


# -- W1: servers of somebody else ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "url"),
    [("MLFLOW_TRACKING_URI", "http://mlflow:5000"), ("PREFECT_API_URL", "https://prefect/api")],
)
def test_a_server_elsewhere_needs_credentials(name: str, url: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .* no credentials are given"):
        read_settings({name: url})
    for group in LETS_IN[name]:
        assert read_settings({name: url, **dict.fromkeys(group, "given")})
        if len(group) > 1:
            with pytest.raises(ConfigError, match="no credentials"):
                read_settings({name: url, group[0]: "given"})
    for loopback in ("http://127.0.0.1:5000", "http://localhost:5000", "http://[::1]:5000"):
        assert read_settings({name: loopback})


@pytest.mark.parametrize("name", ["EQM_S3_ENDPOINT", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest", "http://0.0.0.0:5000", "http://[fe80::1]:5000"]
)
def test_an_address_of_no_server_is_refused(name: str, url: str) -> None:
    every = {one: "given" for groups in LETS_IN.values() for group in groups for one in group}
    with pytest.raises(ConfigError, match=f"{name} is .* address of no server"):
        read_settings({name: url, **every})


@pytest.mark.parametrize("url", ["file:///etc/passwd", "sqlite:///x.db", "databricks", "ftp://x"])
def test_mlflow_is_asked_over_http_alone(url: str) -> None:
    with pytest.raises(ConfigError, match="http://"):
        read_settings({"MLFLOW_TRACKING_URI": url})
    with pytest.raises(EqmError, match="http://"):
        check(url)


def test_nothing_listens_where_others_could_reach_it() -> None:
    """Only containers listen everywhere; nothing that ``eqm up`` starts can be told to."""
    everywhere = re.compile(r"0\.0\.0\.0|\[::\]|INADDR_ANY")
    found = {
        path.relative_to(PROJECT).as_posix()
        for folder in ("eqm", "flows", "infra")
        for path in (PROJECT / folder).rglob("*.py")
        if everywhere.search(path.read_text())
    }
    assert found == {"infra/cluster.py"}
    assert not {name for name in vars(External()) if "host" in name}


# -- P2: secrets in addresses -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EQM_S3_ENDPOINT", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
def test_a_password_in_an_address_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(ConfigError, match="a user or a password") as refused:
        read_settings({name: "https://me:marker-of-a-secret@host/path"})
    assert "marker" not in str(refused.value)


def test_a_password_in_a_config_is_refused_and_not_repeated() -> None:
    changes = {"source.kind": "folder", "source_uri": "s3://KEY:marker-of-a-secret@bucket/x"}
    with pytest.raises(ConfigError, match="a user or a password") as refused:
        with_settings(tiny(), changes)
    assert "marker" not in str(refused.value)


def test_settings_show_no_secret() -> None:
    secret = "marker-of-a-secret"
    given = {"AWS_SECRET_ACCESS_KEY": secret, "PREFECT_API_KEY": secret, "HF_TOKEN": secret}
    settings = read_settings(given)
    assert secret not in repr(settings) + str(settings) + repr(vars(settings)["s3_secret_key"])
    assert settings.child_environment()["HF_TOKEN"] == secret


# -- T9: where data may come from ---------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "s3://other/x",
        "s3://images-of-others/x",
        "/etc/passwd",
        "/data/../etc",
        "/database",
        "s3://images/../other/x",
        "pictures",
        "../../etc",
        "file:///etc",
    ],
)
def test_data_outside_of_the_allowed_places_is_refused(uri: str) -> None:
    settings = read_settings({"EQM_SOURCES": "s3://images/,/data/", "EQM_STORE": "s3://eqm/store"})
    config = with_settings(tiny(), {"source.kind": "folder", "source_uri": uri})
    with pytest.raises(ConfigError, match="outside of EQM_SOURCES"):
        settings.check_sources(to_json(config))


def test_every_setting_that_names_data_is_looked_at(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = read_settings({"EQM_SOURCES": f"{tmp_path}/ours/", "EQM_STORE": "s3://eqm/store"})
    weights = {"uri": "ours/weights.safetensors", "sha256": "0" * 64}
    outside = {**weights, "uri": "theirs/weights.safetensors"}
    hub = {**weights, "uri": "owner/name", "revision": "1234567"}
    digest = {"name": "x", "kind": "folder", "sha256": "0" * 64}
    for name, taken, refused in (
        ("autoencoder.pretrained", [weights, hub], outside),
        ("train.init_from", [weights, hub], outside),
        ("extractor.pretrained", [weights, hub], outside),
        (
            "evaluate.ood.sets",
            [[{**digest, "uri": "ours/x"}]],
            [{**digest, "uri": "ours/../theirs"}],
        ),
    ):
        for value in taken:
            settings.check_sources(to_json(with_settings(tiny(), {name: value})))
        with pytest.raises(ConfigError, match=r"theirs.* is outside of EQM_SOURCES"):
            settings.check_sources(to_json(with_settings(tiny(), {name: refused})))
    up = {**hub, "uri": "owner/../../theirs"}
    with pytest.raises(ConfigError, match="theirs is outside"):
        settings.check_sources(to_json(with_settings(tiny(), {"train.init_from": up})))
    # What is there by the name of an id is read in its place.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ConfigError, match="owner/name is outside"):
        settings.check_sources(to_json(with_settings(tiny(), {"train.init_from": hub})))


def test_data_in_the_allowed_places_is_taken() -> None:
    settings = read_settings({"EQM_SOURCES": "s3://images/, /data/", "EQM_STORE": "s3://eqm/store"})
    for uri in ("s3://images/a", "/data/a", "/data", "s3://eqm/store/x"):
        config = with_settings(tiny(), {"source.kind": "folder", "source_uri": uri})
        settings.check_sources(to_json(config))
    read_settings({}).check_sources({"source_uri": "s3://anywhere/x"})


@pytest.mark.parametrize("value", ["images/", "s3://images", "/data", "http://x/"])
def test_a_list_of_places_that_says_less_than_it_seems_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="EQM_SOURCES has"):
        read_settings({"EQM_SOURCES": value})


# -- P3: names that are more than names ---------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/b", "$(touch x)", "`x`", "a b", "a;b", "<script>", "{{ x }}", "a\nb", "é"),
        *("", "x" * 61, "a'b", "s3://x", "a%2e"),
    ],
)
def test_names_of_runs_are_letters_digits_and_dashes(name: str) -> None:
    with pytest.raises(ConfigError, match="name is"):
        with_settings(tiny(), {"name": name})


def test_keys_stay_in_their_store(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    for key in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(EqmError, match="leaves the store"):
            store.write_once(key, b"x")
    assert not (tmp_path / "x").exists()


def test_deployments_are_plain_yaml_without_templates_or_tags(tmp_path: Path) -> None:
    text = (PROJECT / "prefect.yaml").read_text()
    assert "{{" not in text
    assert "!" not in re.sub(r"#.*", "", text)
    mark = tmp_path / "ran"
    tagged = f"deployments: !!python/object/apply:os.system ['touch {mark}']\n"
    (tmp_path / "prefect.yaml").write_text(tagged)
    with pytest.raises(ServiceError, match="declares no deployments that can be read"):
        declared_names(tmp_path)
    assert not mark.exists()
    yaml.unsafe_load(tagged)
    assert mark.exists(), "it is harmless, and shows nothing"


def test_values_of_set_are_json_or_words() -> None:
    told = changes_of(["name=$(touch x)", "train.images=__import__('os')", "a={{ x }}"])
    assert told == {"name": "$(touch x)", "train.images": "__import__('os')", "a": "{{ x }}"}


# -- the audit ----------------------------------------------------------------------------------


def test_what_is_locked_installed_and_written_passes() -> None:
    assert audit.main() == 0


def test_all_that_the_project_asks_for_is_locked() -> None:
    """`make setup` installs what is locked, and nothing else."""
    asked = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = [*asked["dependencies"], *itertools.chain(*asked["optional-dependencies"].values())]
    lock = (PROJECT / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", lock, re.MULTILINE))
    wanted = [Requirement(line) for line in lines]
    assert len(wanted) > 30
    told = [str(r) for r in wanted if r.name not in pins or pins[r.name] not in r.specifier]
    assert told == [], "run make lock"


@pytest.mark.parametrize("floor", audit.FLOORS, ids=lambda floor: floor.package)
def test_an_older_version_is_named_with_its_advisory(floor: audit.Floor) -> None:
    lock = (PROJECT / "requirements.lock").read_text()
    older = re.sub(
        rf"^{floor.package}==\S+", f"{floor.package}==0.0.1", lock, flags=re.MULTILINE | re.I
    )
    assert older != lock
    (problem, *_) = audit.locked(older)
    assert problem.startswith(f"{floor.package} 0.0.1 in requirements.lock must be >= ")
    assert floor.why in problem


def test_a_version_that_does_not_work_is_named() -> None:
    lock = re.sub(
        r"^fastapi==\S+",
        "fastapi==0.151.0",
        (PROJECT / "requirements.lock").read_text(),
        flags=re.MULTILINE,
    )
    assert [line.split(":")[0] for line in audit.locked(lock)] == [
        "fastapi 0.151.0 in requirements.lock must be >= 0.139, < 0.151"
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--extra-index-url https://user:pw@host/simple", "names a place"),
        ("x @ https://host/x.whl", "names a place"),
        ("nohash==1.0", "has no hash"),
    ],
)
def test_a_lock_file_from_elsewhere_is_refused(line: str, said: str) -> None:
    lock = f"{(PROJECT / 'requirements.lock').read_text()}{line}\n"
    assert any(said in problem for problem in audit.locked(lock))


@pytest.mark.parametrize(
    "source",
    [
        "np.load(f, allow_pickle=True)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "subprocess.run('x', shell=True)",
        "requests.get(u, verify=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "import joblib.externals",
        "from torch.distributed import checkpoint",
        "import torch.distributed.checkpoint as dcp",
    ],
)
def test_a_call_that_would_run_what_is_read_is_found(source: str) -> None:
    assert list(audit.unsafe_calls(source))


@pytest.mark.parametrize(
    "source",
    [
        "np.load(f, allow_pickle=False)",
        "torch.load(f, weights_only=True)",
        "json.load(f)",
        "from pickle import UnpicklingError",
        "subprocess.run(['x'])",
    ],
)
def test_a_call_that_would_not_is_left_alone(source: str) -> None:
    assert not list(audit.unsafe_calls(source))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')\n",
        "import yaml\nyaml.load('')\n",
        "import subprocess\nsubprocess.run('x', shell=True)\n",
        "import os\nos.system('x')\n",
        "import tempfile\ntempfile.mktemp()\n",
        "eval('1')\n",
        "exec('1')\n",
        "import hashlib\nhashlib.md5(b'')\n",
    ],
)
def test_ruff_bans_it(source: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "--stdin-filename=eqm/x.py", "-"],
        input=source,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"\bS\d{3}\b", told.stdout), told.stdout


# -- the table ----------------------------------------------------------------------------------


def test_every_test_in_the_table_of_threats_is_there() -> None:
    page = (PROJECT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 30
    for file, test in named:
        assert re.search(rf"def {test}\(", (PROJECT / file).read_text()), (file, test)
