"""Two dimensions: the landscape of EqM beside that of flow matching that is blind to noise.

A datum is a latent (2, 1, 1), so the transformer is a residual MLP. Models are kept under
``.eqm/bench`` by a digest of data and configs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import eqm
from bench.digits import FOLDER
from bench.gallery.drawing import ORANGE, VERMILLION, Picture, drawn
from eqm.config import NetworkConfig, ObjectiveConfig, TrainConfig
from eqm.records import digest, to_json
from eqm.rules import NAG, Euler, Rule
from eqm.sampler import norms, start_noise

NETWORK = NetworkConfig(width=64, depth=3, heads=1, patch=1)
RECIPE = TrainConfig(
    images=360_000,
    batch_size=256,
    learning_rate=3e-3,
    warmup_images=10_000,
    decay_fraction=0.6,
    ema_half_life_images=15_000.0,
)
UPDATES, SAMPLES, PATHS = 200, 400, 60
REACH, CELLS = 3.0, 140
"""Half the side of a map, and its cells on a side."""
FLOW = "flow matching"
CHOICES = {
    "truncated, a = 0.8": ObjectiveConfig(),
    "truncated, a = 0.5": ObjectiveConfig(a=0.5),
    "linear": ObjectiveConfig(c="linear"),
    FLOW: ObjectiveConfig(c="constant", multiplier=1.0),
}
"""The first is the paper's."""


def circle() -> Tensor:
    """Five points (5, 2, 1, 1) on a circle."""
    angle = torch.arange(5) * (2 * math.pi / 5) + math.pi / 2
    return 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1).view(-1, 2, 1, 1)


def moons() -> Tensor:
    """Two moons (400, 2, 1, 1), each coordinate of mean 0 and variance 1."""
    from sklearn.datasets import make_moons

    points = torch.tensor(make_moons(400, noise=0.05, random_state=0)[0], dtype=torch.float32)
    points = (points - points.mean(dim=0)) / points.std(dim=0)
    return points.view(-1, 2, 1, 1)


def learnt(name: str, data: Tensor, objective: ObjectiveConfig) -> eqm.Field:
    """A field of the data; trained when first asked for, and kept."""
    net = eqm.Transformer(NETWORK, size=1, channels=2, classes=None)
    configs = [to_json(NETWORK), to_json(objective), to_json(RECIPE)]
    path = FOLDER / f"{digest([data.flatten().tolist(), *configs])[:16]}.safetensors"
    if path.is_file():
        net.load_state_dict(load_file(path))
        return eqm.Field(net.eval().requires_grad_(False))
    print(f"   training on {name}", flush=True)
    found = eqm.learn(net, data, objective=objective, train=RECIPE)
    print(f"   loss {found.losses[:100].mean():.3f} -> {found.losses[-100:].mean():.3f}", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path)
    return found.field


@dataclass(frozen=True)
class Landing:
    """Where descents from noise went."""

    field: eqm.Field
    paths: NDArray[np.float32]
    """(U + 1, B, 2)."""
    to_data: float
    """Mean distance of end points to the nearest datum."""
    to_ends: float
    """Mean distance of data to the nearest end point: large where a datum is missed."""
    at_data: float
    """Mean norm of the gradient at the data."""


def landed(field: eqm.Field, data: Tensor, rule: Rule) -> Landing:
    """Descend from noise."""
    start = start_noise(
        torch.arange(SAMPLES), (2, 1, 1), dtype=torch.float32, device=torch.device("cpu")
    )
    way: list[Tensor] = []
    found = eqm.descend(
        lambda x, gamma=None: field.gradient(x),
        start,
        rule=rule,
        updates=UPDATES,
        on_update=lambda k, x: way.append(x.flatten(1)),
    )
    apart = torch.cdist(found.latents.flatten(1), data.flatten(1))
    return Landing(
        field=field,
        paths=torch.stack(way).numpy(),
        to_data=float(apart.min(dim=1).values.mean()),
        to_ends=float(apart.min(dim=0).values.mean()),
        at_data=float(norms(field.gradient(data)).mean()),
    )


def runs(name: str, data: Tensor) -> dict[str, Landing]:
    """Train and descend by every choice of c."""
    found = {}
    for choice, objective in CHOICES.items():
        field = learnt(f"{name}: {choice}", data, objective)
        flow = choice == FLOW
        rule = Euler(step_size=1 / UPDATES) if flow else NAG(step_size=0.01, momentum=0.3)
        found[choice] = landed(field, data, rule)
    return found


# -- pictures -----------------------------------------------------------------------------------


def _map(field: eqm.Field) -> NDArray[np.float32]:
    """Norm of the gradient over the map, (CELLS, CELLS)."""
    side = (torch.arange(CELLS) + 0.5) / CELLS * 2 * REACH - REACH
    y, x = torch.meshgrid(side, side, indexing="ij")
    at = torch.stack([x.flatten(), y.flatten()], dim=1).view(-1, 2, 1, 1)
    return norms(field.gradient(at)).view(CELLS, CELLS).numpy()


def _panel(axes: Any, landing: Landing, data: Tensor, title: str) -> Any:
    from matplotlib.colors import LogNorm

    drawing = axes.imshow(
        _map(landing.field),
        origin="lower",
        extent=(-REACH, REACH, -REACH, REACH),
        cmap="cividis",
        norm=LogNorm(vmin=0.05, vmax=10),
        interpolation="bilinear",
    )
    paths = landing.paths[:, :PATHS]
    axes.plot(paths[..., 0], paths[..., 1], color="white", linewidth=0.7, alpha=0.55)
    few = len(data) < 20
    at = data.flatten(1).numpy()
    axes.scatter(*at.T, s=150 if few else 7, color=ORANGE, linewidths=0, zorder=3, label="data")
    ends = landing.paths[-1, :PATHS]
    style = {"edgecolors": "white", "linewidths": 0.7, "zorder": 4}
    axes.scatter(*ends.T, s=22, color=VERMILLION, label="end of a descent", **style)
    axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[], title=title)
    for side in axes.spines.values():
        side.set_visible(False)
    return drawing


def best_of(found: dict[str, Landing]) -> str:
    """The c of EqM whose descents end nearest to the data."""
    return min((c for c in found if c != FLOW), key=lambda c: found[c].to_data)


def picture(name: str, data: Tensor, what: str, seen: str) -> Picture:
    """Both landscapes, side by side."""
    found = runs(name, data)
    best = best_of(found)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        _panel(left, found[best], data, "EqM: valleys end at the data")
        drawing = _panel(right, found[FLOW], data, "Flow matching, blind to noise: no valleys")
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, markerscale=1)
        figure.colorbar(drawing, ax=[left, right], label="norm of the gradient", shrink=0.85)

    figures = [row for choice, landing in found.items() for row in _rows(choice, landing)]
    return Picture(
        name=f"plane-{name}",
        title=f"{what}: EqM beside flow matching",
        seen=seen.format(best=best, paths=PATHS),
        figures=figures,
        code=(
            "field = eqm.learn(network, points, objective=eqm.ObjectiveConfig(...)).field\n"
            "eqm.descend(lambda x, gamma=None: field.gradient(x), noise,\n"
            f"            rule=eqm.NAG(step_size=0.01, momentum=0.3), updates={UPDATES})"
        ),
        png=drawn(draw, width=9.6, height=5.0),
    )


def _rows(choice: str, landing: Landing) -> list[tuple[str, str]]:
    return [
        (f"{choice}: mean distance of {SAMPLES} end points to the nearest datum", f"{landing.to_data:.3f}"),
        (f"{choice}: mean distance of a datum to the nearest end point", f"{landing.to_ends:.3f}"),
        (f"{choice}: mean norm of the gradient at the data", f"{landing.at_data:.3f}"),
    ]


def pictures() -> Sequence[Picture]:
    """Five points, and two moons."""
    return [picture("circle", circle(), "Five points", ""), picture("moons", moons(), "Two moons", "")]
