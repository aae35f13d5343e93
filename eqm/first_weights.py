"""The network as a training begins: drawn from a seed, or with the weights of another model.

Weights of a model trained here are held against what they were trained as, where anybody says that:
with other heads, or on latents of another autoencoder, they would begin at the wrong field without
a word. The objective may be another: L2 energies begin from an implicit EqM, and EqM from flow
matching. Called by train.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from eqm import model
from eqm.autoencoder import read_pretrained
from eqm.config import PretrainedFile, TrainStage
from eqm.learner import check_slope
from eqm.model import ModelSpec
from eqm.official import import_official, read_official
from eqm.records import sha256
from eqm.storage import Store


def first_network(stage: TrainStage, spec: ModelSpec, store: Store) -> torch.nn.Module:
    """The network as the run begins: drawn from the seed, or with the weights of another model."""
    net = spec.build()
    # The l2 energy of a head of zeros has no slope anywhere: it would never train.
    net.initialise(stage.train.seed, zero_head=stage.objective.energy != "l2")
    if stage.train.init_from is not None:
        found = read_weights(stage.train.init_from, stage.network.heads)
        known = known_spec(stage.train.init_from, store)
        if known is not None:
            model.check_same(known, spec, stage.train.init_from.uri)
        model.filled(net, found, stage.train.init_from.uri)
    check_slope(net, stage.objective)
    return net


def read_weights(file: PretrainedFile, heads: int) -> dict[str, Tensor]:
    """Weights of another training, or of a checkpoint of the official code or of SiT (``.pt``)."""
    data = read_pretrained(file)
    if not file.uri.lower().endswith(".pt"):
        return model.weights_from_bytes(data, file.uri)
    with tempfile.NamedTemporaryFile(suffix=".pt") as copy:
        copy.write(data)
        copy.flush()
        # Heads are the config's: no weight's shape depends on them.
        return import_official(read_official(copy.name), num_heads=heads, where=file.uri).tensors


def known_spec(file: PretrainedFile, store: Store) -> ModelSpec | None:
    """What weights of this digest were trained as; None where nobody says it.

    A directory of ``Model.save`` says it of the weights in it, and the store of all that were
    trained there, wherever the file lies now.
    """
    folder = Path(file.uri).parent
    if (folder / "digests.json").is_file():
        files = model.read_folder(folder)
        if sha256(files["ema.safetensors"]) == file.sha256:
            return model.spec_from_bytes(files["model.json"], str(folder / "model.json"))
    places = store.folders("train/")
    for record in (store.record("train", place.removeprefix("train/")) for place in places):
        if record is not None and file.sha256 in {b.sha256 for b in record.outputs.values()}:
            data = store.get(record.outputs["model.json"])
            return model.spec_from_bytes(data, f"model.json of {record.digest[:12]}")
    return None
