"""What modules and pages say of the project is there: callers, commands, links, variables."""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
import yaml

from flows.cli import app
from flows.doctor import PINNED
from flows.settings import KNOWN

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("eqm", "flows", "infra", "bench")
FOLDERS = ("docs", "flows", "infra")
IMPORT = re.compile(r"^ *from ([\w.]+) import (\([^)]*\)|.*)|^ *import ([\w.]+)", re.MULTILINE)
DOCSTRING = re.compile(r'\s*"""(.*?)"""', re.DOTALL)
LIST = re.compile(r"\b[Cc]alled by (?!`)(.*?)(?:[.:;](?: |$)|$)")
WORDS = {"and", "by", "people"}
ENDS = {"before", "every", "for"}
"""What follows is no list any more: "called by flows before a promotion"."""
PAGES = sorted(
    {
        path: path.read_text()
        for path in (ROOT / "README.md", *(f for d in FOLDERS for f in (ROOT / d).rglob("*.md")))
        if path.name != "LOG.md"
    }.items()
)
"""Every page of the project but its log, which tells of what was."""


def sources() -> dict[str, str]:
    """Every module of the project by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text()
    return found


def callers(modules: dict[str, str]) -> dict[str, set[str]]:
    """Which modules import a module, whether at their top or within a function."""
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, source in modules.items():
        for home, names, alone in IMPORT.findall(source):
            inside = [f"{home}.{one}" for one in re.findall(r"\w+", names)]
            for one in [alone or home, *inside]:
                found.get(one, set()).add(name)
    return found


def named(source: str) -> list[str]:
    """The callers that a module's docstring lists: modules, or packages for all of theirs."""
    docstring = DOCSTRING.match(source)
    sentence = LIST.search(" ".join(docstring.group(1).split())) if docstring else None
    words: list[str] = []
    for word in re.findall(r"[\w.]+", sentence.group(1) if sentence else ""):
        if word in ENDS:
            break
        words.append(word)
    return [word for word in words if word not in WORDS]


def faults(name: str, listed: list[str], real: set[str], modules: dict[str, str]) -> list[str]:
    """Callers that are listed and are none, and those that are not listed.

    Benchmarks need not be listed, nor the package that offers a module's names.
    """
    package = name.split(".")[0]
    full = [w if w in PACKAGES or w in modules else f"{package}.{w}" for w in listed]
    idle = [w for w in full if not any(r == w or r.startswith(f"{w}.") for r in real)]
    need = {r for r in real if r not in PACKAGES and not r.startswith("bench.")}
    left = [r for r in sorted(need) if not any(r == w or r.startswith(f"{w}.") for w in full)]
    return [f"{w} does not import it" for w in idle] + [f"{r} is not named" for r in left]


def test_who_is_said_to_call_a_module_does() -> None:
    modules = sources()
    real = callers(modules)
    lists = {name: named(source) for name, source in modules.items()}
    told = {
        name: found
        for name, listed in lists.items()
        if listed and (found := faults(name, listed, real[name], modules))
    }
    assert told == {}
    assert sum(bool(listed) for listed in lists.values()) > 30


# -- pages --------------------------------------------------------------------------------------

COMMAND = re.compile(r"(?:^ *|`|&& |\$\()eqm ([a-z][\w-]*)([^`\n#|)]*)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)")


def commands(
    command: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every command of ``eqm`` by its words, with the options that it takes."""
    yield path, {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def anchors(page: str) -> set[str]:
    """What a link may name of a page: its headings, as they are written in addresses."""
    heads = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_commands_on_pages_exist_with_their_options() -> None:
    known = dict(commands(typer.main.get_command(app)))
    # `eqm report demo` is `eqm report fetch demo`.
    known["report",] |= known["report", "fetch"]
    told, count = [], 0
    for path, page in PAGES:
        for name, rest in COMMAND.findall(page):
            second = re.match(r" ([a-z-]+)", rest)
            both = (name, second[1]) if second else (name,)
            options = known.get(both, known.get((name,)))
            if options is None:
                told.append(f"{path.name}: eqm {name}")
                continue
            count += 1
            given = {option.partition("=")[0] for option in re.findall(r"(?<=\s)--[\w-]+", rest)}
            told += [f"{path.name}: eqm {name} {option}" for option in given - options]
    assert told == []
    assert count > 100


def test_programs_and_targets_on_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    benchmarks = {path.stem for path in (ROOT / "bench").glob("*.py")}
    told, count = [], 0
    for path, page in PAGES:
        asked = re.findall(r"(?:`|^ +)make ([a-z]+)", page, re.MULTILINE)
        told += [f"{path.name}: make {name}" for name in asked if name not in targets]
        named = re.findall(r"-m ((?:eqm|flows|infra|bench)\b[\w.]*)(?: ([a-z]\w*))?", page)
        for module, word in named:
            place = ROOT / module.rstrip(".").replace(".", "/")
            if not (place.with_suffix(".py").exists() or (place / "__main__.py").exists()):
                told.append(f"{path.name}: python -m {module}")
            if module == "bench" and word and word not in benchmarks:
                told.append(f"{path.name}: python -m bench {word}")
        files = re.findall(r"\btests/[\w/]+\.py", page)
        told += [f"{path.name}: {file}" for file in files if not (ROOT / file).exists()]
        count += len(asked) + len(named) + len(files)
    assert told == []
    assert count > 100


WHEN = {
    "0 3 * * 1": "Mondays 03:00",
    "30 1 * * *": "nightly 01:30",
    "0 6 1 * *": "on the 1st, 06:00",
    "0 7 2 * *": "on the 2nd, 07:00",
}
DAY_SECONDS = 86_400


def test_what_runs_when_is_what_is_deployed() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    rows = re.findall(r"^\| (`[a-z`, -]+) \| (.*?) \|.*\| ([\d.]+) (days|hours) \|$", page, re.M)
    shown = {
        name: (when, float(limit) * (DAY_SECONDS if unit == "days" else 3600))
        for names, when, limit, unit in rows
        for name in re.findall(r"`([a-z-]+)`", names)
    }
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert set(shown) == {one["name"] for one in deployed}
    flows = set()
    for one in deployed:
        module, _, name = one["entrypoint"].partition(":")
        flow = getattr(import_module(module.removesuffix(".py").replace("/", ".")), name)
        flows.add(f"{flow.name}/{one['name']}")
        when, limit = shown[one["name"]]
        assert flow.timeout_seconds == limit, one["name"]
        schedules = one.get("schedules", [])
        assert all(WHEN[each["cron"]] in when for each in schedules), one["name"]
        # What does not fire by itself says so, and nothing else does.
        fires = any(each.get("active", True) for each in schedules)
        assert ("on demand" in when) == (not fires), one["name"]
    told = {
        name for _, text in PAGES for name in re.findall(r"deployment run ([\w-]+/[\w-]+)", text)
    }
    assert told
    assert told <= flows


def test_links_of_pages_lead_somewhere() -> None:
    told = []
    for path, page in PAGES:
        for target, anchor in LINK.findall(page):
            to = path.parent / target if target else path
            if target.startswith("http"):
                continue
            if not to.exists() or (anchor and anchor not in anchors(to.read_text())):
                told.append(f"{path.name}: {target}#{anchor}")
    assert told == []


def test_variables_on_pages_exist_and_all_are_on_one() -> None:
    told = {name for _, page in PAGES for name in re.findall(r"\bEQM_[A-Z0-9_]*[A-Z0-9]\b", page)}
    # Those of tests say where tests find something.
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    of_tests = {name for name in told if name.startswith("EQM_TEST_") and f'"{name}"' in tests}
    assert told - of_tests - set(KNOWN) == set()
    readme = (ROOT / "README.md").read_text()
    # The README's table has "`EQM_SLURM_FOLDER`, `_TIME`".
    short = {
        f"EQM_{group}{end}"
        for group in ("SLURM", "KUBERNETES")
        for end in re.findall(r"`(_[A-Z_]+)`", readme)
    }
    assert set(KNOWN) - told - short == set()


def test_every_module_of_flows_is_in_its_readme() -> None:
    page = (ROOT / "flows" / "README.md").read_text()
    modules = {path.stem for path in (ROOT / "flows").glob("*.py")} - {"__init__"}
    assert {name for name in modules if f"`{name}." not in page} == set()


def test_versions_that_the_doctor_wants_are_locked() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert {f"{name}=={version}" for name, version in PINNED.items()} <= set(
        re.findall(r"^[\w-]+==[\w.]+", lock, re.MULTILINE)
    )
