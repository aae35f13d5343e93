"""The ``eqm`` command: quick help, dry runs, and one message for every mistake."""

import collections
import dataclasses
import importlib
import inspect
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chain
import httpx
import pytest
import torch
from contest import Bench, MemoryRegistry
from deployed import pictures
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import eqm
from eqm import champion
from eqm.autoencoder import identity
from eqm.config import NetworkConfig, SourceConfig, replace
from eqm.errors import ConfigError, DataError, IntegrityError, TrackingError
from eqm.events import EventLog
from eqm.images import open_source
from eqm.model import reconstructed
from eqm.records import Ref, sha256
from eqm.storage import LocalStore
from flows import cli, clusters, curves, settings
from flows.jobs import Plan
from flows.plan import make_launcher, read_config
from flows.terminal import any_encoding, show, table
from infra import alarms

PROJECT = Path(__file__).resolve().parent.parent.parent
COMMANDS = [
    *("up", "down", "status", "env", "doctor", "backup", "restore", "secrets"),
    *("pipeline", "encode", "train", "evaluate", "promote", "rollback", "history"),
    *("sample", "serve", "ema", "curves", "study", "recipes", "clean"),
    *("import-official", "export-official", "import-reference"),
]


@dataclass
class Told:
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No services of anybody; what a command does to the environment is taken back."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("EQM_", "AWS_", "MLFLOW_", "PREFECT_")):
            del os.environ[name]
    monkeypatch.chdir(tmp_path)
    os.environ["EQM_HOME"] = str(tmp_path / "home")
    yield
    os.environ.clear()
    os.environ.update(before)


def eqm_here(capsys, monkeypatch: pytest.MonkeyPatch, *words: str) -> Told:
    """Run the command in this process, through its entry point."""
    monkeypatch.setattr(sys, "argv", ["eqm", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run()
    said = capsys.readouterr()
    return Told(int(ended.value.code or 0), said.out, said.err)


@pytest.fixture
def run(capsys, monkeypatch: pytest.MonkeyPatch):
    # Consoles hold the streams of the moment they were made.
    monkeypatch.setattr(cli, "out", cli.Console(width=200))
    monkeypatch.setattr(cli, "err", cli.Console(stderr=True, width=200))
    return lambda *words: eqm_here(capsys, monkeypatch, *words)


def eqm_process(*words: str, **environment: str) -> Told:
    """Run the command as a process of its own, in an environment without services."""
    line = [sys.executable, "-m", "flows.cli", *words]
    environ = {**os.environ, "PYTHONPATH": str(PROJECT), **environment}
    ended = subprocess.run(line, env=environ, capture_output=True, text=True, check=False)
    return Told(ended.returncode, ended.stdout, ended.stderr)


def refused(told: Told, *parts: str) -> None:
    """See that it is one message with these parts, and status 2."""
    assert told.status == 2, told
    assert "Traceback" not in told.out + told.err
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, told.err
    for part in parts:
        assert part in told.err


def port_of_nobody() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# -- flows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "flow", "given"),
    [
        (("pipeline", "demo"), "pipeline.pipeline", {}),
        (("encode", "demo"), "encode.encode", {}),
        (("train", "demo"), "train.train", {}),
        (("evaluate", "demo"), "evaluate.evaluate", {}),
        (
            ("promote", "demo"),
            "promote.promote",
            {"despite_rollback": False, "evaluation": None},
        ),
        (
            ("promote", "demo", "--despite-rollback", "--evaluation", "42e7"),
            "promote.promote",
            {"despite_rollback": True, "evaluation": "42e7"},
        ),
        (("rollback", "demo"), "promote.rollback", {}),
        (("study", "samplers", "--seeds", "2"), "study.study", {"name": "samplers", "seeds": 2}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_flow_is_given_what_it_takes(
    run, monkeypatch, words: tuple[str, ...], flow: str, given: dict[str, object]
) -> None:
    module, _, name = flow.partition(".")
    found = importlib.import_module(f"flows.{module}")
    takes = inspect.signature(getattr(found, name).fn)
    calls = []

    def stand_in(**arguments: object) -> dict[str, str]:
        calls.append(takes.bind(**arguments).arguments)
        return collections.defaultdict(str, report="r.html")

    monkeypatch.setattr(found, name, stand_in)
    monkeypatch.setattr(settings, "check_prefect", lambda: None)
    told = run(*words, "--set", "train.images=1000")
    assert told.status == 0, told
    assert calls == [{"config": "demo", "changes": {"train.images": 1000}, **given}]


@pytest.mark.parametrize("promoted", [True, False])
def test_a_model_that_is_not_promoted_is_told_by_words_and_status(
    run, monkeypatch, promoted: bool
) -> None:
    """A script that promotes must be able to tell; a pipeline has done its work either way."""
    result = {"model": "eqm-x", "version": 3, "promoted": promoted, "report": "r.html"}
    result |= {"run_page": "http://127.0.0.1:5000/#/experiments/1/runs/2"}
    monkeypatch.setattr("flows.promote.promote", lambda **_: promoted)
    monkeypatch.setattr("flows.pipeline.pipeline", lambda **_: result)
    monkeypatch.setattr(settings, "check_prefect", lambda: None)
    told = run("promote", "demo")
    words = "champion" if promoted else "not promoted: the reasons are above"
    assert (told.status, told.out.strip()) == (0 if promoted else 1, words)
    told = run("pipeline", "demo")
    verdict = "champion" if promoted else "not promoted: the report says why"
    assert told.status == 0
    assert f"eqm-x version 3: {verdict}\n" in told.out
    assert Path("r.html").resolve().as_uri() in told.out
    assert result["run_page"] in told.out


def test_a_policy_file_is_judged_by_with_what_is_set_besides(run, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("name = 'mine'\nminimum_samples = 300\n")
    words = ("--policy", "policy.toml", "--set", "policy.minimum_samples=200", "--dry-run")
    for name in ("pipeline", "evaluate", "promote"):
        policy = json.loads(run(name, "demo", *words).out)["policy"]
        assert (policy["name"], policy["minimum_samples"]) == ("mine", 200)
        # As a whole: no floor of the demo's is left.
        assert policy["minimum_label_agreement"] == 0


def test_the_doctor_names_what_is_missing_and_how_to_get_it(run, monkeypatch) -> None:
    monkeypatch.setattr("flows.doctor.PINNED", {"torch": "0.1", "nothing-of-this-name": "1"})
    told = run("doctor")
    found = (line.split() for line in told.out.splitlines()[1:])
    lines = {words[1]: " ".join(words) for words in found if len(words) > 1}
    assert told.status == 1
    assert lines["Python"].startswith("ok")
    for what, remedy in {
        "torch": "make setup (wants 0.1)",
        "nothing-of-this-name": "make setup (wants 1)",
        "store": "eqm up",
        "MLflow": "eqm up",
        "Prefect": "eqm up",
    }.items():
        assert lines[what].startswith("no "), lines[what]
        assert remedy in lines[what]


# -- the champion -------------------------------------------------------------------------------


def test_history_is_shown_and_verified(run, tmp_path: Path, monkeypatch) -> None:
    store = LocalStore(tmp_path / "store")
    bench = Bench(store, MemoryRegistry(), "eqm-digits")
    monkeypatch.setenv("EQM_STORE", store.uri)
    days = itertools.count(1)
    monkeypatch.setattr(champion, "_now", lambda: f"2026-01-0{next(days)}T00:00:00+00:00")
    told = run("history", "demo")
    assert (told.status, told.out) == (0, "eqm-digits: 0 moves; no champion yet\n")
    bench.promotes(bench.trains())
    assert "eqm-digits: 1 move; the chain is whole" in run("history", "demo").out
    bench.promotes(bench.trains())
    bench.rolls_back()
    told = run("history", "demo")
    assert told.status == 0
    assert "3 moves; the chain is whole and its evidence is there" in told.out
    assert "eqm-digits: version 1 is champion since 2026-01-03" in run("status").out
    assert [line.split()[2] for line in told.out.splitlines()[1:4]] == [
        "promote",
        "promote",
        "rollback",
    ]
    assert "a test" in told.out
    found = json.loads(run("history", "demo", "--json").out)
    assert found["faults"] == []
    assert [e["version"] for e in found["entries"]] == [1, 2, 1]
    assert found["entries"][2]["previous"] == found["entries"][1]["sha256"]

    (store.root / "reports/2.html").write_text("<p>better")
    (store.root / "history/eqm-digits/00000001.json").write_text("{}")
    told = run("history", "demo")
    assert told.status == 1
    assert "broken: " in told.err
    assert "00000001.json" in told.err
    assert "reports/2.html was changed" in told.err
    assert "the chain is whole" not in told.out


# -- help ---------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['eqm', '--help']\n"
        "from flows import cli\n"
        "try: cli.run()\n"
        "finally: print('|', *[n for n in ('torch', 'prefect', 'mlflow', 'boto3', 'matplotlib', "
        "'numpy', 'scipy', 'sklearn', 'pandas', 'PIL', 'sqlalchemy') "
        "if n in sys.modules], file=sys.stderr)"
    )
    environ = {**os.environ, "PYTHONPATH": str(PROJECT)}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0
    assert told.stderr.strip() == "|"
    assert all(name in told.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    told = CliRunner().invoke(cli.app, [name, "--help"])
    assert told.exit_code == 0
    lines = [line.strip() for line in told.output.splitlines() if line.strip()]
    assert len(lines[1].split()) >= 4, lines


def test_the_list_of_commands_is_whole() -> None:
    found = {command.name or command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]
    assert found == set(COMMANDS)


# -- dry runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipeline", "encode", "train", "evaluate", "promote"])
def test_a_dry_run_prints_the_config_and_starts_nothing(run, tmp_path: Path, name: str) -> None:
    told = run(name, "tiny", "--set", "train.images=4096", "--set", "name=mine", "--dry-run")
    assert (told.status, told.err) == (0, "")
    shown = json.loads(told.out)
    assert (shown["name"], shown["train"]["images"]) == ("mine", 4096)
    assert shown["generate"]["samples"] == 100
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_file(run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('preset = "tiny"\n[train]\nimages = 2048\n')
    told = run("pipeline", "mine.toml", "--dry-run")
    shown = json.loads(told.out)
    assert (shown["train"]["images"], shown["train"]["batch_size"]) == (2048, 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["compute.micro_batch=7"], "compute.micro_batch is 7"),
        (["source.kind=folder", "source_uri=."], "which is in the source .: its folders"),
        (["source.held_out_fraction=0"], "source.held_out_fraction is 0, which leaves no"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    run, tmp_path: Path, monkeypatch, changes: list[str], words: str
) -> None:
    monkeypatch.setenv("EQM_STORE", "store")
    sets = [word for change in changes for word in ("--set", change)]
    refused(run("pipeline", "tiny", *sets, "--dry-run"), words)
    refused(run("study", "samplers", "--config", "tiny", *sets, "--dry-run"), words)
    assert list(tmp_path.iterdir()) == []


def test_a_study_is_rehearsed_at_full_size(run, tmp_path: Path) -> None:
    told = run("study", "adaptive", "--config", "b2-512", "--seeds", "2", "--dry-run")
    assert (told.status, told.err) == (0, "")
    lines = told.out.splitlines()
    # The paper's threshold of 10 is for 32 x 32 latents, and these are twice as large.
    assert 'until the norm is below 20: {"generate.sampler.stop_below": 20.0}' in lines
    assert lines[-1] == (
        "with 2 repetitions: 2 trainings of 102,481,920 images, 14 times 50,000 samples"
    )
    told = run("study", "energies", "--config", "b2-256", "--dry-run")
    assert "9 trainings of" in told.out
    assert list(tmp_path.iterdir()) == []
    # A row that is none is refused here, and not hours later.
    sets = ("--set", "network.time=conditioned", "--set", "generate.sampler.rule=euler")
    refused(run("study", "samplers", *sets, "--dry-run"), "generate.sampler.rule is 'gd'")
    sets = ("--set", "compute.compile=true", "--set", "objective.backward=double")
    refused(run("study", "energies", *sets, "--dry-run"), "compute.compile is true, but compiled")


# -- mistakes in a config -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["dmeo"], ["'dmeo' is neither a preset (demo, tiny, defaults), nor one of", ".toml file"]),
        (["gone.toml"], ["gone.toml cannot be read: No such file or directory"]),
        (["tiny", "--set", "train.imges=1"], ["imges", "did you mean", "images"]),
        (["tiny", "--set", "colour=1"], ["colour"]),
        (["tiny", "--set", "trian.images=1"], ["there is no table 'trian' to set 'images' in"]),
        (["tiny", "--set", "train.images=0"], ["train.images is 0", "greater than 0"]),
        (["tiny", "--set", "train.images=many"], ["train.images is 'many'", "type int"]),
        (["tiny", "--set", "train.images"], ["'train.images' must look like name=value"]),
        (["tiny", "--set", "source.kind=folders"], ["source.kind", "did you mean 'folder'"]),
        (["tiny", "--set", "source.kind=folder"], ["source_uri"]),
        (["tiny", "--set", "processes=3"], ["train.batch_size is 64", "a multiple of processes"]),
        (["tiny", "--set", "train=1"], ["config.train must be a table of settings, not 1"]),
    ],
)
def test_a_mistake_is_named(run, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    refused(run("pipeline", *words, "--dry-run"), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name = ?", ["mine.toml is not TOML", "line 1"]),
        ('preset = "big"', ["preset is 'big'; it must be one of demo, tiny"]),
        ("[train]\nimagse = 3", ["imagse", "did you mean", "images"]),
        ("[train]\nimages = -3", ["train.images is -3"]),
        ("train = 3", ["config.train must be a table of settings, not 3"]),
        ('name = "a b"', ["name is 'a b'", "letters, digits and dashes"]),
    ],
)
def test_a_mistake_in_a_file_is_named(run, tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "mine.toml").write_text(text)
    refused(run("pipeline", "mine.toml", "--dry-run"), *parts)


def test_a_file_that_is_no_text_is_named(run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    refused(run("pipeline", "mine.toml", "--dry-run"), "mine.toml is not TOML")
    (tmp_path / "folder.toml").mkdir()
    refused(run("pipeline", "folder.toml", "--dry-run"), "folder.toml cannot be read")


@pytest.mark.parametrize("words", [["--labels", "a-b"], ["--seeds", "1,,2"]])
def test_bad_numbers_are_named(run, words: list[str]) -> None:
    told = run("sample", *words)
    refused(told, f"{words[0]} is {words[1]!r}", "0-9 or 0,3,5")
    assert ("classes are numbered from 0" in told.err) == (words[0] == "--labels")


def test_a_grid_that_nobody_could_look_at_is_refused_at_once(run) -> None:
    refused(run("sample", "--seeds", "0-99999999999999999999"), "names 100,000,000,000,000,000,000")
    refused(run("sample", "--seeds", "7-3"), "--seeds is '7-3', which names none")


def test_what_cannot_be_written_is_told_before_the_work(run, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: mode != os.W_OK)
    refused(run("sample", "--to", "a.png"), "--to is a.png, which this user may not write")


def test_a_folder_is_no_file_to_write(run) -> None:
    Path("grids").mkdir()
    Path("link.png").symlink_to("gone.png")
    for words in (["sample", "--to"], ["data", "preview", "gone", "--out"]):
        refused(run(*words, "grids"), "is grids, which is a folder", "grids/NAME")
        refused(run(*words, "link.png"), "is link.png, a link to gone.png, which is not there")


def test_what_the_command_line_itself_refuses(run) -> None:
    told = run("pipelin")
    assert told.status == 2
    assert "No such command" in told.err


def test_a_policy_that_nothing_can_meet_is_told_before_a_training(monkeypatch) -> None:
    from flows import evaluate

    page = (Path(__file__).parents[2] / "README.md").read_text()
    text = page.split("    # flowers.toml\n")[1].split("    eqm pipeline")[0]
    table = tomllib.loads(textwrap.dedent(text))
    told: list[str] = []
    monkeypatch.setattr(evaluate, "logged", told.append)
    evaluate.check_sets.fn(SimpleNamespace(config=read_config(table, {})))
    assert told == [], "the page's own example can pass"
    few = read_config(table, {"generate.samples": 1797})
    evaluate.check_sets.fn(SimpleNamespace(config=few))
    assert "minimum_samples is 5,000 and generate.samples 1,797: no model will pass" in told[0]
    told.clear()
    evaluate.check_sets.fn(SimpleNamespace(config=read_config(table, {"policy.name": "demo"})))
    assert "policy.name is 'demo', the policy of the preset, whose thresholds were" in told[0]
    told.clear()
    evaluate.check_sets.fn(SimpleNamespace(config=read_config("demo", {})))
    assert told == []


def test_an_evaluation_is_named_by_its_digits(tmp_path: Path, monkeypatch) -> None:
    """What weekly trained has a config that no file has: it is promoted by its evaluation."""
    from flows import promote

    store = LocalStore(tmp_path / "store")
    bench = Bench(store, MemoryRegistry(), "eqm-digits")
    judged = bench.evidence(bench.trains().number)
    plan = SimpleNamespace(store=store, model_name="eqm-digits", mlflow_uri="")
    monkeypatch.setattr(promote, "Registry", lambda _: bench.registry)
    assert promote.named.fn(plan, judged.digest[:6]).ref == judged
    with pytest.raises(DataError, match=r"--evaluation is none, and .* has no such evaluation"):
        promote.named.fn(plan, "none")
    plan.model_name = "eqm-other"
    with pytest.raises(DataError, match="no version of eqm-other: give the config whose name"):
        promote.named.fn(plan, judged.digest)


def test_the_programs_of_this_installation_are_found(run, monkeypatch) -> None:
    programs = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert f'export PATH={programs}:"$PATH"\n' in run("env").out
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin")
    assert "PATH=" not in run("env").out.replace("_PATH", "")


# -- mistakes in the environment ----------------------------------------------------------------


@pytest.mark.parametrize("words", [["pipeline", "tiny"], ["status"], ["up"], ["down"], ["env"]])
def test_an_unknown_variable_is_refused(run, words: list[str], tmp_path: Path) -> None:
    os.environ["EQM_STROE"] = "s3://eqm/store"
    refused(run(*words), "EQM_STROE is unknown: did you mean EQM_STORE?")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["up"], ["down"], ["status"], ["pipeline", "tiny"]])
@pytest.mark.parametrize("home", ["file", "file/below"])
def test_a_home_that_is_a_file_is_refused(run, tmp_path: Path, words: list[str], home: str) -> None:
    (tmp_path / "file").touch()
    os.environ["EQM_HOME"] = str(tmp_path / home)
    refused(run(*words), f"EQM_HOME is {tmp_path / home}, and {tmp_path / 'file'} is a file")


def test_a_place_of_a_variable_that_is_not_set_is_refused(run, tmp_path: Path) -> None:
    refused(run("backup", "--to", ""), "--to is empty: name what is meant (is a variable not set?)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["up"], ["backup", "--to", "/proc/nowhere"]])
def test_a_folder_that_cannot_be_made_is_named(run, words: list[str]) -> None:
    os.environ["EQM_HOME"] = "/proc/nowhere"
    refused(run(*words), "folder /proc/nowhere cannot be made", "name another one")


def test_a_folder_where_a_file_should_be_is_named(run, tmp_path: Path) -> None:
    os.environ["EQM_HOME"] = str(tmp_path / "home")
    (tmp_path / "home" / "stack.json").mkdir(parents=True)
    refused(run("status"), f"{tmp_path / 'home' / 'stack.json'} cannot be", "name another place")


def test_a_file_that_is_put_in_place_is_named_and_not_the_one_aside(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / ".aside-1").touch()
    moved = lambda: (tmp_path / ".aside-1").replace(tmp_path / "place")  # noqa: E731
    monkeypatch.setattr(cli, "app", moved)
    refused(run("samples", "export"), f"{tmp_path / 'place'} cannot be written (Is a directory)")


# -- terminals of all kinds ---------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("width", [None, 24])
def test_tables_are_whole_on_any_terminal(
    monkeypatch: pytest.MonkeyPatch, encoding: str, width: int | None
) -> None:
    bytes_ = io.BytesIO()
    written = io.TextIOWrapper(bytes_, encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", written)
    any_encoding()
    rows = table("what", "where")
    rows.add_row("Blüten, 花", "http://127.0.0.1:8333/a/long/address")
    show(rows, Console(force_terminal=width is not None, no_color=True, width=width))
    told = bytes_.getvalue().decode(encoding)
    if width is None:
        assert "http://127.0.0.1:8333/a/long/address" in told
    else:
        cells = (line.split()[-1] for line in told.splitlines()[1:])
        assert "".join(cells) == "http://127.0.0.1:8333/a/long/address"


def test_secrets_into_a_folder_that_is_not_there(run, tmp_path: Path) -> None:
    refused(run("secrets", "--to", "infra/.env"), f"there is no folder {tmp_path / 'infra'}")


def test_an_address_without_scheme_is_refused(run) -> None:
    os.environ["EQM_S3_ENDPOINT"] = "127.0.0.1:8333"
    refused(run("pipeline", "tiny"), "EQM_S3_ENDPOINT is '127.0.0.1:8333'", "http://")


def test_nothing_runs_and_nothing_is_given(run, tmp_path: Path) -> None:
    refused(run("pipeline", "tiny"), "Prefect is not running", "`eqm up`")
    refused(run("sample"), "MLflow", "`eqm up`")
    assert list(tmp_path.iterdir()) == []


def test_status_without_services(run) -> None:
    told = run("status")
    assert told.status == 0
    assert told.out.count("stopped") == 4
    assert "Traceback" not in told.out + told.err


def test_status_of_services_of_somebody_else(run) -> None:
    """In a shell that names them; `eqm up` was never run here, and there is nothing of ours."""
    os.environ["EQM_STORE"] = "s3://eqm/store"
    os.environ["EQM_S3_ENDPOINT"] = f"http://127.0.0.1:{port_of_nobody()}"
    os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:5"
    told = run("status")
    assert (told.out.count("external"), told.out.count("stopped")) == (2, 2)
    assert "http://127.0.0.1:5" in told.out


def test_prefect_is_down(run, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{port_of_nobody()}/api"
    os.environ["PREFECT_API_URL"] = address
    os.environ["EQM_STORE"] = str(tmp_path / "store")
    refused(run("encode", "tiny"), address, "cannot be reached", "PREFECT_API_URL")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(run, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(run("serve", "--host", host, "--port", str(port)), f"--port is {port}", "another")


def test_prefect_that_goes_away_is_told(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(**_: object) -> None:
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(settings, "check_prefect", lambda: None)
    monkeypatch.setitem(sys.modules, "flows.encode", SimpleNamespace(encode=gone))
    refused(run("encode", "tiny"), "went away while `encode` ran", "`eqm up`", "goes on")


@pytest.mark.services
def test_services_that_do_not_let_us_in(all_environment: dict[str, str], tmp_path: Path) -> None:
    """In processes of their own: Prefect's client keeps what it found when it was imported."""
    nobody = f"http://127.0.0.1:{port_of_nobody()}"
    bare = {k: v for k, v in all_environment.items() if not k.startswith("AWS_")}
    given = {
        **bare,
        "EQM_HOME": str(tmp_path / "home"),
        "EQM_S3_ENDPOINT": nobody,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "wrong-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    told = eqm_process("encode", "tiny", **given)
    refused(told, f"S3 at {nobody} cannot be reached", "EQM_S3_ENDPOINT")

    given["EQM_S3_ENDPOINT"] = all_environment["AWS_ENDPOINT_URL_S3"]
    told = eqm_process("encode", "tiny", **given)
    refused(told, "refuses these credentials", "AWS_ACCESS_KEY_ID")
    assert "wrong-secret" not in told.out + told.err

    given["PREFECT_API_AUTH_STRING"] = "eqm:wrong"
    told = eqm_process("encode", "tiny", **given)
    refused(told, "refuses", "(401)", "PREFECT_API_AUTH_STRING")
    assert not (tmp_path / "home").exists()


@pytest.mark.services
def test_mlflow_is_down(all_environment: dict[str, str], tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{port_of_nobody()}"
    store = tmp_path / "store"
    given = {**all_environment, "MLFLOW_TRACKING_URI": nobody, "EQM_STORE": str(store)}
    told = eqm_process("pipeline", "tiny", **given)
    refused(told, f"MLflow at {nobody} cannot be reached", "MLFLOW_TRACKING_URI")
    # It is found out before anything is begun.
    assert "starting" not in told.err
    assert not store.exists()


# -- images that cannot be used -----------------------------------------------------------------


@pytest.mark.services
@pytest.mark.slow
def test_folders_that_cannot_be_used(all_environment: dict[str, str], tmp_path: Path) -> None:
    empty, store = tmp_path / "empty", tmp_path / "store"
    empty.mkdir()
    given = {**all_environment, "EQM_STORE": str(store)}
    told = eqm_process("encode", "tiny", *changes_for(empty), **given)
    refused(told, f"{empty} is empty", "one folder of images a class")

    folder = tmp_path / "pictures"
    pictures(folder)
    (folder / "circles" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    told = eqm_process("encode", "tiny", *changes_for(folder), **given)
    refused(told, "1 of 25", "circles/torn.png", "on_corrupt")
    assert list(store.rglob("*.json")) == []

    told = eqm_process(
        "encode", "tiny", *changes_for(folder), "--set", "source.on_corrupt=skip", **given
    )
    assert told.status == 0, told
    (where,) = [line for line in told.out.splitlines() if line.startswith("latents: ")]
    record = json.loads(Path(where.removeprefix("latents: "), "record.json").read_text())
    manifest = store / "blobs/sha256" / record["outputs"]["manifest.json"]["sha256"]
    assert json.loads(manifest.read_text())["skipped"] == ["circles/torn.png"]


def test_skipped_images_change_the_listing(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures")
    config = SourceConfig(kind="folder", image_size_px=8, on_corrupt="skip")
    before = open_source(config, str(tmp_path / "pictures")).digest
    (tmp_path / "pictures" / "circles" / "torn.png").write_bytes(b"torn")
    assert open_source(config, str(tmp_path / "pictures")).digest != before


def test_no_other_variable_is_needed() -> None:
    # Alarms are told to Prefect by `eqm up`, and by nobody after it.
    known = set(settings.KNOWN) - set(clusters.VARIABLES) - {alarms.WEBHOOK, alarms.PRIVATE}
    assert known <= set(settings.SERVICE_VARIABLES)


def changes_for(folder: Path) -> list[str]:
    settings_of_it = {
        "name": "test-cli",
        "source.kind": "folder",
        "source.image_size_px": "8",
        "source_uri": str(folder),
        "autoencoder.kind": "identity",
    }
    return [word for k, v in settings_of_it.items() for word in ("--set", f"{k}={v}")]


# -- what a training logged -----------------------------------------------------------------------


def a_log(file: Path) -> EventLog:
    """Of a training that was interrupted at image 128, and is at 256."""
    log = EventLog(clock=lambda: 0)
    log.append("start", 0, world_size=1)
    for seen, loss in ((128, 32.0), (256, 16.0)):
        bands = {"loss/gamma_0.0_0.2": 2 * loss, "loss/gamma_0.8_1.0": loss / 4}
        log.append("metrics", seen, {"loss": loss, "mfu": 0.4, **bands})
        if seen == 128:
            log.append("resume", 128, world_size=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(log.to_bytes())
    return log


def test_curves_are_drawn_of_a_log_and_of_a_training_that_goes_on(run, tmp_path: Path) -> None:
    running = tmp_path / "home" / "cache" / "events" / f"{'ab' * 32}.jsonl"
    log = a_log(running)
    told = run("curves", str(running), "--to", "c.png")
    assert told.status == 0, told
    width, height = Image.open("c.png").size
    assert width > height > 100
    assert "mfu 0.4 0.4" in " ".join(told.out.split())
    assert "loss 16 24" in " ".join(told.out.split())
    assert "at image 128: resume (world_size 2)" in told.out
    assert "256 images" in told.out
    assert [event.images_seen for event in curves.events_of("abab")] == [0, 128, 128, 256]
    panels = dict(curves.panels_of([e for e in log.events if e.kind == "metrics"]))
    assert list(panels) == ["loss", "MFU"]
    assert panels["loss"]["gamma 0.8 to 1.0"] == ([128, 256], [8.0, 4.0])
    before = Path("c.png").read_bytes()
    # The line that is being written is not there yet.
    for written in (b"", b'{"at_ms": 17'):
        running.write_bytes(log.to_bytes() + written)
        for asked in ("abab", str(running)):
            assert run("curves", asked, "--to", "d.png").status == 0
            assert Path("d.png").read_bytes() == before
    running.write_bytes(b"no log")
    refused(run("curves", str(running)), "is no log of events")


def test_curves_are_of_a_training_and_not_of_a_config(run) -> None:
    refused(run("curves", "mine.toml"), "mine.toml is a config", "which `eqm train` prints")


def test_curves_pass_over_no_damaged_record(run, tmp_path: Path) -> None:
    os.environ["EQM_STORE"] = str(tmp_path / "store")
    a_log(tmp_path / "home" / "cache" / "events" / f"{'ab' * 32}.jsonl")
    assert run("curves", "abab").status == 0
    sealed = tmp_path / "store" / "train" / ("ab" * 32) / "record.json"
    sealed.parent.mkdir(parents=True)
    sealed.write_text("{")
    refused(run("curves", "abab"), "record.json")


def test_curves_of_what_is_no_training_are_refused(run, tmp_path: Path) -> None:
    os.environ["EQM_STORE"] = str(tmp_path / "store")
    refused(run("curves", "abab"), "abab is not sealed")
    refused(run("curves", "nothing.jsonl"), "nothing.jsonl: there is no such file")
    Path("empty.jsonl").write_bytes(b"")
    refused(run("curves", "empty.jsonl"), "one that has logged something")


# -- checkpoints of the official code -----------------------------------------------------------

OFFICIAL = PROJECT / "tests" / "golden" / "official_tiny_ema.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The official tiny model as a released file."""
    torch.save(load_file(OFFICIAL), tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def test_official_weights_go_in_and_come_out_bit_by_bit(run, checkpoint: Path) -> None:
    told = run("import-official", str(checkpoint), "--to", "model", "--num-heads", "4")
    assert told.status == 0, told
    assert "width 64, depth 2, 4 heads, patch 2, energy implicit" in told.out
    assert run("export-official", "model", "--to", "again.pt").status == 0
    before, after = (torch.load(f, weights_only=True) for f in (checkpoint, "again.pt"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.numpy().tobytes() == after[name].numpy().tobytes(), name


def test_official_weights_that_cannot_be_read_are_refused(run, checkpoint: Path) -> None:
    source, rest = str(checkpoint), ("--to", "model")
    refused(run("import-official", source, *rest), "give num_heads")
    refused(run("import-official", "nothing.pt", *rest), "nothing.pt")
    refused(run("import-official", "model.safetensors", *rest), "is no .pt file")
    wrong = run("import-official", source, *rest, "--energy", "dog", "--num-heads", "4")
    refused(wrong, "--energy is 'dog'")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    refused(run("import-official", source, *rest, "--num-heads", "4"), "tiny.pt", "fetch it again")
    assert not Path("model").exists()


def test_what_exists_is_not_written_over(run, checkpoint: Path) -> None:
    words = ("import-official", str(checkpoint), "--num-heads", "4", "--to")
    assert run(*words, "model").status == 0
    refused(run(*words, "model"), "which exists")
    refused(run("export-official", "model", "--to", str(checkpoint)), "exists")


def test_where_official_weights_are_written(run, checkpoint: Path) -> None:
    words = ("import-official", str(checkpoint), "--num-heads", "4", "--to")
    assert run(*words, "model").status == 0
    Path("file").touch()
    for lacking in ("no/model", "file/model"):
        refused(run(*words, lacking), f"--to is {lacking}", "there is no folder", "make it first")
    refused(run("export-official", "model", "--to", "no/a.pt"), "--to is no/a.pt", "no folder")
    refused(run("ema", "model", "--sigma-rel", "0.1", "--to", "no/a"), "--to is no/a", "no folder")
    assert not Path("no").exists()
    refused(run("export-official", "model", "--to", "a.bin"), "--to is a.bin", ".pt")
    assert not Path("a.bin").exists()


# -- averages of other lengths ------------------------------------------------------------------


def test_an_average_of_another_length_is_made_from_snapshots(run, tmp_path: Path) -> None:
    changes = {"train.images": 320, "train.ema_power": [0.05, 0.1]}
    made = chain.build(tmp_path / "store", changes, until="train")
    uri = made.uri("train")
    told = run("ema", uri, "--sigma-rel", "0.08", "--to", "model")
    assert told.status == 0, told
    assert "model: weights averaged over sigma_rel 0.08 at image 320, expected relative" in told.out
    expected, _ = reconstructed(uri, sigma_rel=0.08)
    saved = eqm.load("model", device="cpu").network.state_dict()
    for name, value in expected.network.state_dict().items():
        assert torch.equal(saved[name], value)
    assert run("ema", uri, "--sigma-rel", "0.1", "--images", "160", "--to", "early").status == 0
    refused(run("ema", uri, "--sigma-rel", "0.08", "--to", "model"), "which exists")
    refused(run("ema", uri, "--sigma-rel", "0.5", "--to", "other"), "sigma_rel is 0.5")
    strict = run("ema", uri, "--sigma-rel", "0.2", "--max-error", "1e-5", "--to", "other")
    refused(strict, "above 1e-05", "the last one before it is of image", "allow more")
    assert not Path("other").exists()


# -- samples ------------------------------------------------------------------------------------


def saved_model(folder: str, *, classes: int | None, decodes: bool = True) -> None:
    net = eqm.Transformer(NetworkConfig(width=16, depth=1), size=8, channels=1, classes=classes)
    autoencoder = identity(SourceConfig(image_size_px=8)) if decodes else None
    eqm.Model.of(net, objective=eqm.ObjectiveConfig(), autoencoder=autoencoder).save(folder)


@pytest.mark.parametrize("classes", [None, 2])
def test_samples_of_models_with_labels_and_without(run, classes: int | None) -> None:
    saved_model("model", classes=classes)
    told = run("sample", "model", "--updates", "2", "--seeds", "0-2", "--to", "grid.png")
    assert told.status == 0, told
    assert f"grid.png: {3 * (classes or 1)} samples" in told.out
    assert "sampler: nag, step size 0.003, 2 updates, momentum 0.3 (as asked for)" in told.err
    width, height = Image.open("grid.png").size
    assert (width // 64, height // 64) == (3, classes or 1)
    wrong = run("sample", "model", "--labels", "2", "--updates", "2", "--to", "other.png")
    numbered = ("asks for 2; this model has 0 (", ") to 1 (", "order of their names")
    refused(wrong, *(["leave it out"] if classes is None else numbered))
    assert not Path("other.png").exists()


def test_each_sample_of_a_grid_is_the_one_that_it_is_called(run, monkeypatch) -> None:
    """Rows share no noise, and a sample has elsewhere the seed that is told."""
    saved_model("model", classes=3)
    given: dict[str, object] = {}

    def sampled(*words: object, **how: object) -> object:
        given.update(how)
        return sample(*words, **how)  # type: ignore[arg-type]

    sample = eqm.sample
    monkeypatch.setattr(eqm, "sample", sampled)
    words = ("--labels", "2,0", "--seeds", "1,4", "--guidance", "1.5", "--momentum", "0.2")
    told = run("sample", "model", *words, "--updates", "3", "--step-size", "0.1", "--to", "g.png")
    assert "elsewhere, label k of seed s has seed 3 s + k" in told.out
    assert (given["labels"], given["seeds"]) == ([2, 2, 0, 0], [5, 14, 3, 12])
    assert (given["guidance"], given["updates"]) == (1.5, 3)
    assert given["rule"] == eqm.NAG(step_size=0.1, momentum=0.2)
    assert "momentum 0.2, guidance 1.5 (as asked for)" in told.err


def test_of_many_classes_the_first_are_sampled(run) -> None:
    saved_model("model", classes=12)
    told = run("sample", "model", "--updates", "1", "--seeds", "0", "--to", "grid.png")
    assert "grid.png: 10 samples" in told.out
    assert "10 of 12 classes: --labels names others" in told.out
    told = run("sample", "model", "--updates", "1", "--seeds", "0", "--labels", "0-11")
    assert "samples.png: 12 samples" in told.out
    assert "--labels names others" not in told.out


def test_a_seed_that_there_is_none_of_is_told_as_it_was_given(run) -> None:
    saved_model("model", classes=3)
    for words, told in (
        (("99999999999999999999999",), ("asks for 99999999999999999999999", "to 2932031007401 ")),
        (("2932031007402", "--labels", "2"), ("asks for 2932031007402", "to 2932031007401 here")),
    ):
        refused(run("sample", "model", "--updates", "1", "--seeds", *words), "--seeds", *told)
    assert run("sample", "model", "--updates", "1", "--seeds", "2932031007401").status == 0


def test_samples_that_run_off_are_no_success(run) -> None:
    net = eqm.Transformer(NetworkConfig(width=16, depth=1), size=8, channels=1, classes=2)
    for weights in net.parameters():
        torch.nn.init.normal_(weights, std=0.5)
    autoencoder = identity(SourceConfig(image_size_px=8))
    eqm.Model.of(net, objective=eqm.ObjectiveConfig(), autoencoder=autoencoder).save("model")
    told = run("sample", "model", "--step-size", "1e30", "--seeds", "0-1", "--to", "grid.png")
    assert told.status != 0
    assert "4 of 4 samples diverged, which grid.png shows as they are: lower --step-" in told.err
    assert Path("grid.png").exists()


def test_who_could_not_register_a_model_is_told_that_it_is_sealed(tmp_path, monkeypatch) -> None:
    from flows import train

    def away(*_: object) -> None:
        raise TrackingError("MLflow cannot be reached")

    plan = SimpleNamespace(store=LocalStore(tmp_path), mlflow_uri="http://127.0.0.1:9")
    monkeypatch.setattr(train, "Registry", away)
    told = rf"be reached\. The model is sealed \({tmp_path}/train/ab\), and the same command makes"
    with pytest.raises(TrackingError, match=told):
        train.register_model.fn(plan, SimpleNamespace(digest="ab"))


def test_what_no_evaluation_could_measure_is_refused_before_a_training() -> None:
    from flows import evaluate

    for change, why in (
        ({"source.held_out_fraction": 0}, "source.held_out_fraction is 0, which leaves no image"),
        ({"generate.samples": 3}, "generate.samples is 3, and each sample has evaluate.neigh"),
    ):
        config = read_config("demo", change)
        with pytest.raises(ConfigError, match=why):
            evaluate.check_sets.fn(SimpleNamespace(config=config))
    # Of ImageNet the validation images are held out.
    evaluate.check_sets.fn(SimpleNamespace(config=read_config("b2-256")))


def test_images_that_no_evaluation_could_measure_by_are_refused_before_a_training(
    tmp_path: Path, monkeypatch
) -> None:
    from flows import evaluate
    from flows.jobs import list_source, source_ref
    from flows.plan import make_plan

    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))

    def check(**changes: object) -> None:
        folder = {"source.kind": "folder", "source_uri": str(tmp_path / "images")}
        folder["evaluate.ood.neighbours"] = 2
        plan = make_plan("tiny", {**folder, **changes}, tracked=False)
        evaluate.check_sets.fn(plan, source_ref(list_source(plan)))

    for k in range(8):
        save_image(tmp_path / "images" / "cat" / f"{k}.png", k)
    with pytest.raises(DataError, match=r"extractor\.kind is 'fit', .* has only cat: set it to"):
        check(**{"source.held_out_fraction": 0.5})
    save_image(tmp_path / "images" / "dog" / "0.png", 9)
    check(**{"source.held_out_fraction": 0.5})
    # By their names: the second one is held out from 0.35 on.
    with pytest.raises(DataError, match=r"of 9 images only 1 is held out.*_fraction \(0\.2\) hig"):
        check(**{"source.held_out_fraction": 0.2})


def test_a_reference_file_that_cannot_be_read_is_refused_before_a_training(
    tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "batch.npz"
    inception = {"kind": "inception", "pretrained": {"uri": "x", "sha256": "0" * 64}}
    for reference, why in (
        ({"uri": str(tmp_path / "no.npz"), "sha256": "0" * 64}, r"no\.npz': there is no such file"),
        ({"uri": str(file), "sha256": "0" * 64}, r"batch\.npz has SHA-256 .* given with it is 000"),
    ):
        file.write_bytes(b"other")
        given: dict[str, Any] = {"reference.file": reference}
        with pytest.raises((DataError, IntegrityError), match=why):
            checked_digits(tmp_path, monkeypatch, given)
        further = {"own": {"extractor": inception, "reference": {"file": reference}}}
        with pytest.raises((DataError, IntegrityError), match=why):
            checked_digits(tmp_path, monkeypatch, {"further": further})
    checked_digits(
        tmp_path, monkeypatch, {"reference.file": {"uri": str(file), "sha256": sha256(b"other")}}
    )


def test_a_reference_that_is_sealed_asks_for_its_file_no_more(tmp_path: Path, monkeypatch) -> None:
    from flows import checks

    asked: list[str] = []

    class Sealed(LocalStore):
        def record(self, stage: str, digest: str) -> Any:
            asked.append(stage)
            return SimpleNamespace(ref=Ref(stage=stage, digest=digest, content=digest))

    gone = {"uri": str(tmp_path / "no.npz"), "sha256": "0" * 64}
    config = read_config("demo", {"reference.file": gone})
    sealed, launcher = Sealed(tmp_path), make_launcher(settings.current_settings())
    plan = Plan(config, settings.current_settings(), sealed, launcher)
    checks._check_references(plan, Ref(stage="source", digest="0" * 64, content="0" * 64))
    assert asked == ["extractor", "reference"]


def test_weights_to_begin_with_that_are_not_there_are_refused_before_an_autoencoder_is_fitted(
    tmp_path: Path, monkeypatch
) -> None:
    from flows.encode import encode_images, fit_autoencoder
    from flows.jobs import list_source, source_ref
    from flows.plan import make_plan

    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    gone = {"uri": str(tmp_path / "no.safetensors"), "sha256": "0" * 64}
    given = {"train.init_from": gone, "autoencoder.kind": "identity"}
    plan = make_plan("tiny", given, tracked=False)
    source = source_ref(list_source(plan))
    for kind in ("fit", "pretrained"):
        given = replace(plan.config.autoencoder, kind=kind, pretrained=plan.config.train.init_from)
        one = dataclasses.replace(plan, config=replace(plan.config, autoencoder=given))
        with pytest.raises(DataError, match=r"no\.safetensors': there is no such file"):
            fit_autoencoder.fn(one, source)
    fitted = fit_autoencoder.fn(plan, source, to_train=False)
    fit_autoencoder.fn(plan, source)
    with pytest.raises(DataError, match=r"no\.safetensors': there is no such file"):
        encode_images.fn(plan, source, fitted)
    encode_images.fn(plan, source, fitted, to_train=False)
    # What is there already may have begun with weights that are gone.
    encode_images.fn(plan, source, fitted)


def test_an_extractor_that_is_fitted_on_too_small_images_is_refused_before_a_training(
    tmp_path: Path, monkeypatch
) -> None:
    small = {"source.image_size_px": 4}
    further = {"own": {"extractor": {"kind": "fit"}}}
    inception = {"kind": "inception", "pretrained": {"uri": "x", "sha256": "0" * 64}}
    for changes, name in (
        (small, "extractor"),
        ({**small, "extractor": inception, "further": further}, r"further\.own\.extractor"),
    ):
        with pytest.raises(DataError, match=rf"^{name}\.kind is 'fit', which takes images of 8 px"):
            checked_digits(tmp_path, monkeypatch, changes)
    with pytest.raises(DataError, match=r"and source\.image_size_px is 4: set that to 8, or the"):
        checked_digits(tmp_path, monkeypatch, small)
    checked_digits(tmp_path, monkeypatch, {**small, "extractor": inception})
    checked_digits(tmp_path, monkeypatch, {"source.image_size_px": 8})


def test_a_baseline_of_more_images_than_there_are_is_refused_before_a_training(
    tmp_path: Path, monkeypatch
) -> None:
    name = "evaluate.ood.baseline_images"
    for changes, why in (
        ({"evaluate.ood.neighbours": 2000}, "neighbours 2000 is fitted on 2,000 .* are 1,43.: add"),
        (
            {"evaluate.ood.neighbours": 2000},
            r"images, lower evaluate\.ood\.neighbours, or leave",
        ),
        (
            {name: 4},
            r"s 5 is fitted on 5 .* are 4: raise evaluate\.ood\.baseline_images \(4\), lo",
        ),
        ({name: 2}, "'pixel_gaussian' is fitted on 3 training images at least, and there are 2: r"),
    ):
        with pytest.raises(DataError, match=why):
            checked_digits(tmp_path, monkeypatch, changes)
    some = {"evaluate.ood.baselines": ["pixel_pca"], name: 2}
    checked_digits(tmp_path, monkeypatch, {"evaluate.ood.neighbours": 2000, **some})
    # Nothing is scored then.
    checked_digits(tmp_path, monkeypatch, {name: 2, "train.label_dropout": 0.0})


def checked_digits(tmp_path: Path, monkeypatch, changes: dict[str, object]) -> None:
    from flows import evaluate
    from flows.jobs import list_source, source_ref
    from flows.plan import make_plan

    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    plan = make_plan("tiny", changes, tracked=False)
    evaluate.check_sets.fn(plan, source_ref(list_source(plan)))


def save_image(path: Path, gray: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), gray).save(path)


def test_a_model_that_cannot_be_decoded_is_told_before_its_descent(run, monkeypatch) -> None:
    saved_model("model", classes=None, decodes=False)
    monkeypatch.setattr(eqm, "sample", None)
    refused(run("sample", "model", "--updates", "2"), "came without its autoencoder")


# -- studies ------------------------------------------------------------------------------------


def test_studies_are_listed_and_their_rows_shown(run, tmp_path: Path) -> None:
    listed = run("study").out
    assert "samplers" in listed
    assert "eqm-vs-flow" in listed
    shown = run("study", "step-sizes", "--config", "b2-256", "--dry-run").out
    assert '0.7 / N: {"generate.sampler.rule": "gd"' in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["sampler"], ["study is 'sampler'", "one of samplers, step-sizes"]),
        (["samplers", "--config", "b2"], ["'b2' is neither a preset", "eqm recipes"]),
        (["samplers", "--here", "--to", "gone"], ["--to is gone", "make it first"]),
        (["samplers", "--set", "train.imges=1"], ["imges", "images"]),
    ],
)
def test_a_mistake_about_a_study_is_named(
    run, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    refused(run("study", *words), *parts)
    assert list(tmp_path.iterdir()) == []
