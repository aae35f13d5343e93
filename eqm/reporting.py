"""What a training tells of its updates: points of its curve, and figures in its log."""

import torch

from eqm import flops, gauges
from eqm.guards import guarded, tell_spikes
from eqm.learner import learning_rate
from eqm.progress import Progress
from eqm.run import Run, total_images


def report(run: Run, bar: Progress) -> None:
    """Log what is measured where that is due, and add a point to the curve where one is."""
    ends = run.images_seen % run.report_every == 0 or run.images_seen >= total_images(run)
    if not ends and not run.event_due:
        bar.advance(run.config.batch_size)
        return
    found, begun = guarded(run)
    loss, norm = found.mean(dim=0).tolist()
    tell_spikes(run, found, begun)
    if ends:
        add_point(run)
    bar.advance(run.config.batch_size, loss=loss, gradient=norm)
    # All processes take part: of shared weights each has its rows.
    weights = parameter_norm(run)
    if run.world.is_first:
        figures = {**figures_of(run, loss, norm), "parameter_norm": weights}
        run.log.append("metrics", run.images_seen, gauges.finite(figures))
    run.tally.zero_()


def add_point(run: Run) -> None:
    """Add the updates since the last point to the curve: means of those that were finite."""
    found = torch.stack(run.since_report).double().cpu()
    finite = found.isfinite().all(dim=1)
    loss, norm = found[finite].mean(dim=0).tolist()
    for name, value in (("images", run.images_seen), ("loss", loss), ("gradient_norm", norm)):
        run.history[name].append(value)
    if run.config.on_nonfinite == "skip":
        run.history.setdefault("skipped", []).append(float((~finite).sum()))
    run.since_report.clear()


def parameter_norm(run: Run) -> float:
    """Length of all weights as one vector."""
    here = gauges.parameter_norm(run.names)
    if run.learner.shards is None:
        return here
    return float(run.world.sum_(torch.tensor(here**2, device=run.world.device)).sqrt())


def figures_of(run: Run, loss: float, norm: float) -> dict[str, float]:
    """What is logged of the updates since the last report."""
    figures = {
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": learning_rate(run.config, run.images_seen - run.config.batch_size),
    }
    rates = run.stopwatch.figures(run.config.batch_size)
    work = speed(run, rates["images_per_second"])
    memory = gauges.peak_memory(run.world.device)
    return figures | gauges.band_figures(run.tally) | rates | work | memory


def speed(run: Run, images_per_second: float) -> dict[str, float]:
    """TFLOP/s and MFU of all devices since the last report, as far as they are known."""
    latent, network = run.spec.latent, run.stage.network
    tokens = latent.shape[1] * latent.shape[2] // network.patch**2
    asked = run.stage.objective
    work = flops.training_flops(network, asked, tokens=tokens, channels=latent.shape[0])
    device = run.world.device
    peak = flops.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return flops.figures(images_per_second, work, devices=run.world.size, peak=peak)
