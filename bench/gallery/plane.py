"""Two dimensions: the landscape of EqM beside that of flow matching that is blind to noise.

A datum is a latent (2, 1, 1), so the transformer is a residual MLP. Models are kept under
``.eqm/bench`` by a digest of data and configs.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import eqm
from bench.digits import FOLDER
from bench.gallery.drawing import BLUE, ORANGE, VERMILLION, Picture, Table, drawn
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
SHADES = 40
FEW = 20
"""Fewer data than these are drawn as rings."""
RULE, EULER = NAG(step_size=0.006, momentum=0.3), Euler(step_size=1 / UPDATES)
REACH, CELLS, DEPTH = 2.7, 140, 100
"""Half the side of a map, its cells on a side, and the ratio of its largest and least colour."""
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
    print(
        f"   loss {found.losses[:100].mean():.3f} -> {found.losses[-100:].mean():.3f}", flush=True
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path)
    return found.field


@dataclass(frozen=True)
class Landing:
    """Where descents from noise went."""

    paths: NDArray[np.float32]
    """(U + 1, B, 2)."""
    to_data: NDArray[np.float32]
    """(U + 1,) mean distance of samples to the nearest datum."""
    to_samples: NDArray[np.float32]
    """(U + 1,) mean distance of data to the nearest sample: large where data are missed."""
    heights: NDArray[np.float32]
    """Norm of the gradient over the map, as a share of the largest, (CELLS, CELLS)."""
    at_data: float
    """Mean norm of the gradient at the data, in the same shares."""


def landed(field: eqm.Field, data: Tensor, rule: Rule) -> Landing:
    """Descend from noise."""
    start = start_noise(
        torch.arange(SAMPLES), (2, 1, 1), dtype=torch.float32, device=torch.device("cpu")
    )
    way: list[Tensor] = []
    eqm.descend(
        lambda x, gamma=None: field.gradient(x),
        start,
        rule=rule,
        updates=UPDATES,
        on_update=lambda k, x: way.append(x.flatten(1)),
    )
    heights = _map(field)
    apart = [torch.cdist(x, data.flatten(1)) for x in way]
    return Landing(
        paths=torch.stack(way).numpy(),
        to_data=np.array([float(a.min(dim=1).values.mean()) for a in apart]),
        to_samples=np.array([float(a.min(dim=0).values.mean()) for a in apart]),
        heights=heights / heights.max(),
        at_data=float(norms(field.gradient(data)).mean() / heights.max()),
    )


def runs(name: str, data: Tensor) -> dict[str, Landing]:
    """Train and descend by every choice of c."""
    found = {}
    for choice, objective in CHOICES.items():
        field = learnt(f"{name}: {choice}", data, objective)
        found[choice] = landed(field, data, EULER if choice == FLOW else RULE)
    return found


def best_of(found: dict[str, Landing]) -> str:
    """The c of EqM whose descents end nearest to the data."""
    return min((c for c in found if c != FLOW), key=lambda c: found[c].to_data[-1])


# -- pictures -----------------------------------------------------------------------------------


def _map(field: eqm.Field) -> NDArray[np.float32]:
    """Norm of the gradient over the map, (CELLS, CELLS)."""
    side = (torch.arange(CELLS) + 0.5) / CELLS * 2 * REACH - REACH
    y, x = torch.meshgrid(side, side, indexing="ij")
    at = torch.stack([x.flatten(), y.flatten()], dim=1).view(-1, 2, 1, 1)
    return norms(field.gradient(at)).view(CELLS, CELLS).numpy()


def _panel(axes: Any, landing: Landing, data: Tensor) -> Any:
    """A map with data, paths and their ends; dark is flat."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    drawing = axes.imshow(
        landing.heights,
        origin="lower",
        extent=(-REACH, REACH, -REACH, REACH),
        cmap=colormaps["cividis"].resampled(SHADES),
        norm=LogNorm(vmin=1 / DEPTH, vmax=1),
        interpolation="bilinear",
    )
    paths = landing.paths[:, :PATHS]
    axes.plot(paths[..., 0], paths[..., 1], color="white", linewidth=0.7, alpha=0.5)
    at = data.flatten(1).T
    if len(data) < FEW:
        axes.scatter(*at, s=150, facecolors="none", edgecolors=ORANGE, linewidths=2, zorder=3)
    else:
        axes.scatter(*at, s=8, color=ORANGE, linewidths=0, zorder=3)
    style = {"edgecolors": "white", "linewidths": 0.7, "zorder": 4}
    axes.scatter(*paths[-1].T, s=20, color=VERMILLION, **style)
    axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    return drawing


def _curves(axes: Any, landings: dict[str, Landing]) -> None:
    """Both distances against updates."""
    for (name, landing), colour in zip(landings.items(), (BLUE, VERMILLION), strict=True):
        axes.plot(landing.to_data, color=colour, label=f"{name}: sample to datum")
        dashed = {"linestyle": (0, (3, 2)), "linewidth": 1.3}
        axes.plot(landing.to_samples, color=colour, label=f"{name}: datum to sample", **dashed)
    axes.set(xlabel="updates", xlim=(0, UPDATES), yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda distance, _: f"{distance:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("Mean distance to the nearest")
    axes.grid(axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=2, fontsize=9)


def picture(name: str, data: Tensor, *, title: str, seen: str) -> Picture:
    """Both landscapes, side by side."""
    found = runs(name, data)
    best = best_of(found)

    def draw(figure: Any) -> None:
        # By hand: a layout engine leaves gaps around squares.
        figure.set_layout_engine("none")
        boxes = (
            (0.01, 0.215, 0.305, 0.715),
            (0.33, 0.215, 0.305, 0.715),
            (0.7, 0.235, 0.285, 0.695),
        )
        left, middle, right = (figure.add_axes(box) for box in boxes)
        _panel(left, found[best], data)
        drawing = _panel(middle, found[FLOW], data)
        left.set_title("EqM")
        middle.set_title("Flow matching, blind to noise")
        _curves(right, {"EqM": found[best], "FM": found[FLOW]})
        under = figure.add_axes((0.17, 0.155, 0.305, 0.025))
        bar = figure.colorbar(drawing, cax=under, orientation="horizontal", extend="min")
        bar.outline.set_visible(False)
        bar.set_label("norm of the gradient, as a share of the largest")
        under.xaxis.set_major_formatter(lambda share, _: f"{share:g}")

    rows = [
        (choice, *(f"{v:.3f}" for v in (to.to_data[-1], to.to_samples[-1], to.at_data)))
        for choice, to in found.items()
    ]
    return Picture(
        name=name,
        title=title,
        seen=f"{LEGEND} {seen} Of three c at equal steps, the one drawn ({best}) ends nearest.",
        table=Table(HEAD, rows),
        code=(
            "field = eqm.learn(network, points, objective=eqm.ObjectiveConfig()).field\n"
            "eqm.descend(lambda x, gamma=None: field.gradient(x), noise,\n"
            f"            rule=eqm.NAG(step_size=0.006, momentum=0.3), updates={UPDATES})"
        ),
        png=drawn(draw, width=11.0, height=4.7),
    )


LEGEND = (
    "Orange: data. Lines: descents from noise; red: where they end. Dark: flat, on a logarithmic "
    f"scale of two decades. {UPDATES} evaluations each."
)
HEAD = (
    "c",
    "end points to the nearest datum",
    "data to the nearest end point",
    "gradient norm at data, as a share of the largest",
)


def circle_picture() -> Picture:
    """Five points."""
    return picture(
        "circle",
        circle(),
        title="A landscape in two dimensions: five points",
        seen=(
            "EqM's field all but vanishes at the data, so descents arrive and stay. That of flow "
            "matching is as steep at the data as beside them, and time runs out "
            "for some samples wherever they are. (In the other flat places of either, the pulls of "
            "several data cancel.)"
        ),
    )


def moons_picture() -> Picture:
    """Two moons."""
    return picture(
        "moons",
        moons(),
        title="A landscape in two dimensions: two moons",
        seen=(
            "EqM's samples end nearer to the data, and go on nearing them; but its gradient along "
            "the moons is small and not zero, so samples also creep along them and gather, and "
            "data are missed (dashed). Flow matching covers the moons better and leaves "
            "samples between them. EqM's derivation assumes many dimensions; two are its hardest "
            "case."
        ),
    )
