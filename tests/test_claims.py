"""What modules say of who calls them is true."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("eqm", "flows", "infra", "bench")
IMPORT = re.compile(r"^ *from ([\w.]+) import (\([^)]*\)|.*)|^ *import ([\w.]+)", re.MULTILINE)
DOCSTRING = re.compile(r'\s*"""(.*?)"""', re.DOTALL)
LIST = re.compile(r"\b[Cc]alled by (?!`)(.*?)(?:[.:;](?: |$)|$)")
WORDS = {"and", "by", "people"}
ENDS = {"before", "every", "for"}
"""What follows is no list any more: "called by flows before a promotion"."""


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
