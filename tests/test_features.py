"""Extractors: what they give, what their digest covers, round trips, and what is refused."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_clip import CLIPVisual, FeatureExtractorCLIP
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torchvision.models import VisionTransformer

from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.features import (
    CNNExtractor,
    SmallCNN,
    SmallCNNConfig,
    clip_extractor,
    dinov2_extractor,
    extract,
    extractor_from_bytes,
    extractor_to_bytes,
    inception_extractor,
    signed,
)
from eqm.vision_transformer import DINOv2

CONFIG = SmallCNNConfig(channels=1, classes=10, width=8, dimension=16)


def images(count, channels=1, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def network(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return SmallCNN(config)


def waves(config=CONFIG):
    """A network whose weights are written down, not drawn."""
    made = SmallCNN(config)
    for index, value in enumerate(made.state_dict().values()):
        value.copy_(torch.sin(torch.arange(value.numel()) * 0.7 + index).view_as(value) * 0.5)
    return made


# -- the small network --------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 13), (16, 16), (64, 32)])
def test_features_and_logits_have_their_shapes_at_any_size(channels, height, width):
    made = network(SmallCNNConfig(channels=channels, classes=7))
    extractor = CNNExtractor(made, "toy")
    x = images(5, channels, height, width)
    assert extractor.dimension == 64
    assert extractor(x).shape == (5, 64)
    assert extractor(x).dtype == torch.float32
    assert extractor.logits(x).shape == (5, 7)
    assert torch.equal(extractor.logits(x), made(signed(x)))


def test_activations_are_those_of_one_pass():
    made = network()
    extractor = CNNExtractor(made, "toy")
    for height, width in ((8, 8), (9, 13)):
        x = images(5, 1, height, width)
        found = extractor.activations(x)
        assert torch.equal(found.features, extractor(x))
        assert torch.equal(found.logits, extractor.logits(x))
        hidden = made.body(signed(x))[:, :7]
        assert torch.equal(found.spatial, hidden.permute(0, 2, 3, 1).reshape(5, -1))


def test_positions_of_large_images_are_averaged():
    made = network()
    x = images(2, 1, 128, 64)
    hidden = made.body(signed(x))[:, :7]
    assert hidden.shape == (2, 7, 32, 16)
    rows = hidden.unflatten(2, (16, 2)).mean(dim=3).permute(0, 2, 3, 1).reshape(2, -1)
    assert torch.allclose(CNNExtractor(made, "toy").activations(x).spatial, rows, atol=1e-6)


def test_signed_maps_black_and_white_to_the_ends():
    assert signed(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def literal_features(made, x):
    """The architecture written out, in float64."""
    w = {key: value.double() for key, value in made.state_dict().items()}
    h = x.double() / 127.5 - 1
    for place, stride, groups in ((0, 1, 1), (3, 2, 2), (6, 1, 2), (9, 2, 4)):
        h = F.conv2d(
            h, w[f"body.{place}.weight"], w[f"body.{place}.bias"], stride=stride, padding=1
        )
        scale, shift = w[f"body.{place + 1}.weight"], w[f"body.{place + 1}.bias"]
        h = F.silu(F.group_norm(h, groups, scale, shift))
    return h.mean(dim=(2, 3)) @ w["project.weight"].T + w["project.bias"]


def test_features_of_written_weights_are_what_they_were():
    # A change here is a change of every feature: "kind" in the digest needs another name then.
    made, x = waves(), (torch.arange(64) * 37 % 256).to(torch.uint8).view(1, 1, 8, 8)
    found = CNNExtractor(made, "waves")(x)
    golden = [0.394031, -0.617332, -0.796476, 1.347871]
    np.testing.assert_allclose(found[0, :4].numpy(), golden, rtol=1e-4)
    torch.testing.assert_close(found.double(), literal_features(made, x), rtol=1e-4, atol=1e-5)


def test_nothing_depends_on_the_rest_of_the_batch():
    made = network()
    assert not any("BatchNorm" in type(part).__name__ for part in made.modules())
    extractor = CNNExtractor(made, "toy")
    x = images(64)
    alone = torch.cat([extractor(one) for one in x.split(1)])
    torch.testing.assert_close(alone, extractor(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(extractor(x), extractor(x))


def test_the_network_learns_and_its_features_tell_classes_apart():
    # Two classes: bright left half, bright right half, in heavy noise.
    made = network(SmallCNNConfig(channels=1, classes=2, width=8, dimension=16))
    x = images(256).float() * 0.7
    labels = torch.arange(256) % 2
    x[labels == 0, :, :, :4] += 70
    x[labels == 1, :, :, 4:] += 70
    x = signed(x.to(torch.uint8))
    optimiser = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        F.cross_entropy(made(x), labels).backward()
        optimiser.step()
    assert (made(x).argmax(dim=1) == labels).float().mean() > 0.95


def test_the_extractor_is_a_frozen_copy():
    made = network().train()
    extractor = CNNExtractor(made, "toy")
    before, digest = extractor(images(3)), extractor.digest
    with torch.no_grad():
        made.project.weight.mul_(2)
    assert made.training
    assert all(p.requires_grad for p in made.parameters())
    assert torch.equal(extractor(images(3)), before)
    assert not before.requires_grad
    assert CNNExtractor(made, "toy").digest != digest


def test_digest_covers_weights_and_architecture_but_not_the_name():
    digest = CNNExtractor(network(), "toy").digest
    assert len(digest) == 64
    assert CNNExtractor(network(), "other").digest == digest
    assert CNNExtractor(network(seed=1), "toy").digest != digest
    wider = SmallCNNConfig(channels=1, classes=10, width=16, dimension=16)
    assert CNNExtractor(network(wider), "toy").digest != digest
    nudged = network()
    with torch.no_grad():
        nudged.head.bias[3] += 1e-6
    assert CNNExtractor(nudged, "toy").digest != digest


def test_digest_of_written_weights_is_the_same_in_another_process():
    # Computed from whole numbers, so that no library's sine enters.
    script = (
        "import torch; from eqm.features import *\n"
        "made = SmallCNN(SmallCNNConfig(channels=1, classes=2, width=8, dimension=4))\n"
        "[v.copy_((torch.arange(v.numel()) % 7 - 3.0).view_as(v) / 8)"
        " for v in made.state_dict().values()]\n"
        "print(CNNExtractor(made, 'x').digest)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == "1d447ffd1b4b1929ed968c11d0f799fb70ac3540fcc3143c39c3ba35c6b714f9"


def test_precision_chosen_for_training_does_not_reach_features():
    extractor = CNNExtractor(network(SmallCNNConfig(channels=1, classes=10)), "toy")
    before = extractor(images(8))
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("medium")
    convolutions.fp32_precision = "tf32"
    try:
        assert torch.equal(extractor(images(8)), before)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert convolutions.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "wrong",
    [{"channels": 2}, {"classes": 0}, {"width": 12}, {"width": 0}, {"dimension": -1}],
)
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"extractor.{next(iter(wrong))} is .*it must be"):
        SmallCNNConfig(**{"channels": 1, "classes": 10, **wrong})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images(2).float(), "float32: give uint8"),
        (images(2, 3), r"\(2, 3, 8, 8\); the extractor takes \(B, 1, H, W\)"),
        (images(2)[0], r"\(1, 8, 8\); the extractor takes"),
        (images(2, 1, 7, 9), "least height and width is 8 px"),
    ],
)
def test_other_images_are_refused(bad, message):
    with pytest.raises(DataError, match=message):
        CNNExtractor(network(), "toy")(bad)


# -- bytes --------------------------------------------------------------------------------------


def test_bytes_come_back_as_the_same_network_and_the_same_bytes():
    made = network()
    weights, config = extractor_to_bytes(made, CONFIG)
    state = torch.random.get_rng_state()
    back = extractor_from_bytes(weights, config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert back.config == CONFIG
    assert not back.training
    assert extractor_to_bytes(back, CONFIG) == (weights, config)
    assert torch.equal(back(signed(images(4))), made(signed(images(4))))
    assert CNNExtractor(back, "toy").digest == CNNExtractor(made, "toy").digest
    assert json.loads(config) == {"channels": 1, "classes": 10, "dimension": 16, "width": 8}


def test_a_config_of_another_network_is_refused():
    with pytest.raises(ConfigError, match="the network's own"):
        extractor_to_bytes(network(), SmallCNNConfig(channels=1, classes=9))


def test_weights_that_are_not_finite_are_refused():
    broken = network()
    with torch.no_grad():
        broken.head.bias[0] = torch.nan
    with pytest.raises(DataError, match=r"weight 'head.bias' holds NaN"):
        extractor_to_bytes(broken, CONFIG)


def test_other_weights_and_configs_are_refused_in_words():
    made = network()
    weights, config = extractor_to_bytes(made, CONFIG)
    state = made.state_dict()
    extra = safetensors.torch.save({**state, "surplus": torch.zeros(1)})
    less = safetensors.torch.save({k: v for k, v in state.items() if k != "head.bias"})
    reshaped = safetensors.torch.save({**state, "head.bias": torch.zeros(11)})
    for data, message in (
        (extra, "(?s)not the network's.*surplus"),
        (less, "(?s)not the network's.*Missing.*head.bias"),
        (reshaped, "(?s)not the network's.*size mismatch for head.bias"),
        (weights[:-1], "cannot be read as safetensors"),
        (b"", "cannot be read as safetensors"),
    ):
        with pytest.raises(DataError, match=message):
            extractor_from_bytes(data, config)
    with pytest.raises(ConfigError, match=r"unknown setting 'widht'.*'width'"):
        extractor_from_bytes(weights, config.replace(b"width", b"widht"))
    with pytest.raises(ConfigError, match="lacks classes"):
        extractor_from_bytes(weights, b'{"channels":1}')
    with pytest.raises(DataError, match="not JSON"):
        extractor_from_bytes(weights, b"\xff{")


# -- extraction ---------------------------------------------------------------------------------


def test_extract_keeps_the_order_of_the_images():
    extractor = CNNExtractor(network(), "toy")
    x = images(10)
    found = extract(extractor, (part for part in (x[:4], x[4:4], x[4:])))
    assert found.shape == (10, 16)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, extractor(x).numpy(), rtol=1e-5, atol=1e-6)


def test_extract_refuses_nothing_and_features_that_are_not_finite():
    extractor = CNNExtractor(network(), "toy")
    with pytest.raises(DataError, match="no images"):
        extract(extractor, [])

    class Broken:
        name, digest, dimension = "broken", "0", 2

        def __call__(self, x):
            return torch.tensor([[0.0, 1.0], [torch.inf, 0.0]])

    with pytest.raises(DataError, match=r"broken gives NaN or infinity for 1 of 2 .*number 1:"):
        extract(Broken(), [images(2)])


# -- vision transformers ------------------------------------------------------------------------


def scaled(state, seed=0):
    """Seeded values for every tensor, so that none is what it was initialised with."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name, value):
        noise = torch.randn(value.shape, generator=generator)
        return noise / value[0].numel() ** 0.5 if value.ndim > 1 else 1 + 0.1 * noise

    return {name: drawn(name, value) for name, value in state.items()}


def saved(folder, state):
    path = folder / "weights.pth"
    torch.save(state, path)
    return path, sha256_of(path)


def reference_of_dinov2(state, images):
    """torchvision's transformer with the same weights, layer scales multiplied into them."""
    model = VisionTransformer(224, 14, 2, 6, 384, 1536)
    model.heads = torch.nn.Identity()
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    scale = (16 + 0.1) / 37
    small = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    assert small.shape[2:] == (16, 16)
    positions = small.permute(0, 2, 3, 1).reshape(1, 256, 384)
    theirs = {
        "class_token": state["cls_token"],
        "encoder.pos_embedding": torch.cat([state["pos_embed"][:, :1], positions], dim=1),
    }
    for kind in ("weight", "bias"):
        theirs[f"conv_proj.{kind}"] = state[f"patch_embed.proj.{kind}"]
        theirs[f"encoder.ln.{kind}"] = state[f"norm.{kind}"]
        for i in range(2):
            ours, block = f"blocks.{i}", f"encoder.layers.encoder_layer_{i}"
            first, second = (state[f"{ours}.ls{k}.gamma"] for k in (1, 2))
            if kind == "weight":
                first, second = first[:, None], second[:, None]
            theirs |= {
                f"{block}.ln_1.{kind}": state[f"{ours}.norm1.{kind}"],
                f"{block}.ln_2.{kind}": state[f"{ours}.norm2.{kind}"],
                f"{block}.self_attention.in_proj_{kind}": state[f"{ours}.attn.qkv.{kind}"],
                f"{block}.self_attention.out_proj.{kind}": state[f"{ours}.attn.proj.{kind}"]
                * first,
                f"{block}.mlp.0.{kind}": state[f"{ours}.mlp.fc1.{kind}"],
                f"{block}.mlp.3.{kind}": state[f"{ours}.mlp.fc2.{kind}"] * second,
            }
    model.load_state_dict(theirs)
    return model.eval()(images)


def test_dinov2_is_the_transformer_that_torch_fidelity_feeds(tmp_path, monkeypatch):
    state = scaled(DINOv2(384, 2, gated=False).state_dict())
    state["pos_embed"] *= 20
    extractor = dinov2_extractor(*saved(tmp_path, state))
    assert (extractor.name, extractor.dimension) == ("dinov2-vit-s-14", 384)
    fed = []

    class Hub(torch.nn.Module):
        def forward(self, x):
            fed.append(x)
            return reference_of_dinov2(state, x)

    monkeypatch.setattr(torch.hub, "load", lambda *_: Hub())
    library = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    x = images(2, 3, 40, 56)
    found = extractor(x)
    (truth,) = library(x)
    assert fed[0].shape == (2, 3, 224, 224)
    assert found.std() > 0.1
    assert torch.allclose(found, truth, atol=2e-4)
    assert (found - found[:1]).abs().max() > 0.1
    assert extractor.activations(x).tensors().keys() == {"features"}
    gray = images(1, 1, 16, 16)
    assert torch.equal(extractor(gray), extractor(gray.repeat(1, 3, 1, 1)))


def test_the_largest_dinov2_has_gates():
    """The layout of its file; too large to run here."""
    with torch.device("meta"):
        state = DINOv2(1536, 40, gated=True).state_dict()
    assert sum(v.numel() for v in state.values()) == pytest.approx(1136e6, rel=2e-3)
    assert state["blocks.39.mlp.w12.weight"].shape == (8192, 1536)
    assert state["blocks.39.mlp.w3.weight"].shape == (1536, 4096)
    block = DINOv2(64, 1, gated=True).blocks[0].mlp
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    first, second = block.w12(x).split(block.w3.in_features, dim=1)
    truth = block.w3(first * torch.sigmoid(first) * second)
    assert torch.allclose(block(x), truth, atol=1e-6)


def test_clip_equals_the_library(tmp_path):
    made = CLIPVisual(512, 224, 2, 128, 32)
    state = {key: v.half().float() for key, v in scaled(made.state_dict(), seed=1).items()}
    extractor = clip_extractor(*saved(tmp_path, {**state, "text_projection": torch.ones(2, 512)}))
    assert (extractor.name, extractor.dimension) == ("clip-vit-b-32", 512)

    class Released:
        """In place of a TorchScript file, of which the library reads the state dict alone."""

        def state_dict(self):
            return {**state, "text_projection": torch.ones(2, 512)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *_, **__: Released())
        library = FeatureExtractorCLIP("clip-vit-b-32", ["clip"], "weights.pt")
    x = images(2, 3, 40, 56)
    assert torch.equal(extractor(x), library(x)[0])
    assert extractor(x).std() > 0.1


HUB = json.loads((Path(__file__).parent / "golden" / "hub_layouts.json").read_text())
"""What Hugging Face's transformers made of weights like ``as_on_the_hub``, in its own layout."""


def as_on_the_hub(shapes):
    def drawn(name, shape):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return noise / noise[0].numel() ** 0.5 if noise.ndim > 1 else 1 + 0.1 * noise

    return {name: drawn(name, shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("kind", "make", "prefix"),
    [
        ("dinov2", dinov2_extractor, ""),
        ("dinov2", dinov2_extractor, "dinov2."),
        ("dinov2-gated", dinov2_extractor, ""),
        ("clip", clip_extractor, ""),
    ],
)
def test_weights_in_the_layout_of_the_hub_give_what_its_library_gives(kind, make, prefix, tmp_path):
    truth = HUB[kind]
    state = {prefix + k: v for k, v in as_on_the_hub(truth["shapes"]).items()}
    file = tmp_path / "model.safetensors"
    # Of the text side, or of a classifier, which nobody looks at.
    beside = "text_model.final_layer_norm.bias" if kind == "clip" else "classifier.bias"
    safetensors.torch.save_file(
        {**state, **({beside: torch.ones(4)} if prefix or kind == "clip" else {})}, file
    )
    extractor = make(file, sha256_of(file))
    side = truth["side_px"]
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = extractor._network(x)[0]
    known = torch.tensor(truth["features"])
    torch.testing.assert_close(found[: len(known)], known, rtol=1e-3, atol=1e-3 * truth["norm"])
    assert float(found.norm()) == pytest.approx(truth["norm"], rel=1e-3)


def test_a_layout_of_the_hub_that_lacks_a_tensor_is_refused(tmp_path):
    state = as_on_the_hub(HUB["dinov2"]["shapes"])
    state.pop("encoder.layer.1.attention.attention.key.weight")
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, file)
    with pytest.raises(DataError, match=r"(?s)tensors are not DINOv2's.*blocks\.1\.attn\.qkv"):
        dinov2_extractor(file, sha256_of(file))


def test_registers_are_refused_and_not_left_out(tmp_path):
    state = as_on_the_hub(HUB["dinov2"]["shapes"])
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(
        {**state, "embeddings.register_tokens": torch.ones(1, 4, 384)}, file
    )
    with pytest.raises(DataError, match=r"(?s)tensors are not DINOv2's.*register_tokens"):
        dinov2_extractor(file, sha256_of(file))


@pytest.mark.parametrize("make", [dinov2_extractor, clip_extractor])
def test_other_weights_are_no_transformer(make, state, tmp_path):
    path, digest = saved(tmp_path, {"fc.bias": state["fc.bias"]})
    with pytest.raises(DataError, match=r"holds no (weights of DINOv2|vision transformer of CLIP)"):
        make(path, digest)
    with pytest.raises(IntegrityError, match="has SHA-256"):
        make(path, "0" * 64)
    path, digest = saved(tmp_path, {"bomb": Bomb(tmp_path / "ran")})
    with pytest.raises(DataError, match="code in a file is never run"):
        make(path, digest)
    assert not (tmp_path / "ran").exists()


# -- Inception ----------------------------------------------------------------------------------


class Blank(FeatureExtractorInceptionV3):
    """The library's layout with the weights it was initialised with."""

    def load_state_dict(self, *_):
        return None


@pytest.fixture(scope="module")
def state():
    """Seeded weights under which every layer's activations are of order one."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    made = Blank("blank", ["2048"], feature_extractor_weights_path=empty)
    norms = [part for part in made.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # running statistics become those of the one batch below
    made.train()
    made(images(2, 3, 64, 64, seed=5))
    return made.state_dict()


@pytest.fixture(scope="module")
def weights_file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def inception(weights_file):
    return inception_extractor(weights_file, sha256_of(weights_file))


def test_inception_equals_the_library_bit_for_bit(weights_file, inception):
    library = FeatureExtractorInceptionV3(
        "library", ["2048"], feature_extractor_weights_path=str(weights_file)
    )
    for x in (images(2, 3, 40, 56, seed=1), images(1, 3, 299, 299, seed=2)):
        found = inception(x)
        assert found.shape == (len(x), 2048)
        assert found.dtype == torch.float32
        assert found.std() > 0.01
        assert torch.equal(found, library(x)[0])
    both = FeatureExtractorInceptionV3(
        "library", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights_file)
    )
    found = inception.activations(x)
    assert torch.equal(found.features, both(x)[0])
    assert torch.equal(found.logits, both(x)[1])
    # These are not the weights of the field, and the name says so.
    assert inception.name == f"inception-v3-{sha256_of(weights_file)[:8]}"
    assert inception.dimension == 2048


def test_spatial_features_of_inception_are_those_of_adm(weights_file, inception):
    """The 1 x 1 branch of the third 17 x 17 block, layer by layer."""
    library = FeatureExtractorInceptionV3(
        "library", ["2048"], feature_extractor_weights_path=str(weights_file)
    )
    x = images(2, 3, 299, 299, seed=3)
    h = (x.float() - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1"):
        h = getattr(library, name)(h)
    for name in ("Conv2d_4a_3x3", "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a"):
        h = getattr(library, name)(h)
    mixed_6 = library.Mixed_6d.branch1x1(library.Mixed_6c(library.Mixed_6b(h)))
    found = inception.activations(x).spatial
    assert found.shape == (2, 2023)
    assert found.dtype == torch.float32
    assert found.std() > 0.01
    # Row by row with channels last, as in files of ADM.
    assert torch.equal(found.reshape(2, 17, 17, 7), mixed_6[:, :7].permute(0, 2, 3, 1))


@pytest.mark.parametrize("kind", ["inception", "dinov2", "clip"])
def test_precision_chosen_for_training_does_not_reach_networks_of_others(
    kind, weights_file, tmp_path
):
    """On a GPU: TF32 is on by default there, and no CPU would tell."""
    if kind == "inception":
        extractor = inception_extractor(weights_file, sha256_of(weights_file))
    elif kind == "dinov2":
        state = DINOv2(384, 1, gated=False).state_dict()
        extractor = dinov2_extractor(*saved(tmp_path, state))
    else:
        state = CLIPVisual(512, 224, 1, 64, 32).state_dict()
        extractor = clip_extractor(*saved(tmp_path, state))
    knobs, told = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), []
    extractor._network.register_forward_pre_hook(
        lambda *_: told.append([knob.fp32_precision for knob in knobs])
    )
    before = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "tf32"
        extractor(images(1, 3, 16, 16))
    finally:
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value
    assert told == [["ieee", "ieee"]]


def test_inception_repeats_grayscale(inception):
    gray = images(1, 1, 16, 16)
    assert torch.equal(inception(gray), inception(gray.repeat(1, 3, 1, 1)))
    with pytest.raises(DataError, match=r"takes \(B, 1 or 3, H, W\)"):
        inception(images(1, 2))
    with pytest.raises(DataError, match="give uint8"):
        inception(gray.float())


def test_inception_reads_safetensors_and_files_without_batch_counts(state, inception, tmp_path):
    path = tmp_path / "weights.safetensors"
    lean = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    safetensors.torch.save_file(lean, path)
    before = torch.random.get_rng_state()
    found = inception_extractor(path, sha256_of(path))
    assert torch.equal(torch.random.get_rng_state(), before)
    x = images(1, 3, 32, 32)
    assert torch.equal(found(x), inception(x))
    assert found.digest != inception.digest


def test_inception_reads_the_older_file_format_of_torch(state, inception, tmp_path):
    path = tmp_path / "older.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    x = images(1, 3, 32, 32)
    assert torch.equal(inception_extractor(path, sha256_of(path))(x), inception(x))


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_the_digest_is_checked_before_anything_is_parsed(weights_file, monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("parsed before its digest was checked")

    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(IntegrityError, match=r"has SHA-256 .* fetch the file again"):
        inception_extractor(weights_file, "0" * 64)
    with pytest.raises(DataError, match=r"no Inception weights at .*missing.pth"):
        inception_extractor(tmp_path / "missing.pth", "0" * 64)


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_weights_file_is_refused_and_not_run(state, tmp_path, as_zip):
    path, trace = tmp_path / "bomb.pth", tmp_path / "ran"
    torch.save(
        {"fc.bias": state["fc.bias"], "bomb": Bomb(trace)},
        path,
        _use_new_zipfile_serialization=as_zip,
    )
    with pytest.raises(DataError, match="code in a file is never run"):
        inception_extractor(path, sha256_of(path))
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the bomb is one


def test_other_tensors_are_refused_in_words(state, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({k: v for k, v in state.items() if k != "fc.bias"}, path)
    with pytest.raises(DataError, match=r"(?s)not the network's.*fc.bias"):
        inception_extractor(path, sha256_of(path))
    torch.save([1, 2], path)
    with pytest.raises(DataError, match="no state dict"):
        inception_extractor(path, sha256_of(path))
    path.write_bytes(b"garbage")
    with pytest.raises(DataError, match="cannot be read as plain tensors"):
        inception_extractor(path, sha256_of(path))


def test_torch_fidelity_is_imported_when_first_used():
    script = "import sys, eqm.features; sys.exit('torch_fidelity' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
