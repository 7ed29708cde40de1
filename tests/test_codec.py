"""Lossless coding: every pixel comes back, in as many bits as the model's bound, and what can't be
decoded here is refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import PREDICTIONS, SCHEDULE, Oracle, images, tiny_unet

import fastddpm
from fastddpm import Diffusion, Schedule, _native, cli, reference
from fastddpm.codec import bits_back, compress, decompress, group, plain
from fastddpm.codec.grid import FINEST, Grids
from fastddpm.codec.network import Network
from fastddpm.pretrained import save_model

pytestmark = pytest.mark.skipif(_native.C is None, reason="the codec needs the native module")

QUIET = {"progress": False}
MODEL = tiny_unet()


def smooth(n: int, channels: int = 1, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Images that a plain coder makes smaller than their bytes."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    slope = torch.randint(0, 9, (n, channels, 2), generator=torch.Generator().manual_seed(seed))
    pixels = 40 + slope[..., 0, None, None] * x + slope[..., 1, None, None] * y
    return pixels.to(torch.uint8)


def round_trip(model, x, **options) -> bytes:
    data = compress(model, x, **QUIET, **options)
    assert torch.equal(decompress(model, data, **QUIET), x)
    return data


# ---- every pixel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned", "learned_range"])
def test_every_process_is_coded(prediction, variance):
    learned = variance.startswith("learned")
    process = Diffusion(SCHEDULE, prediction, variance, "hybrid" if learned else "simple")
    model = tiny_unet(diffusion=process, out_channels=2 if learned else 1)
    for steps in (None, 4):
        round_trip(model, images(5, 1, 8, 8), steps=steps)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.cosine(10),
        Schedule.linear(10, 1e-9, 0.3),
        Schedule.constant(1, 0.9),
        Schedule.linear(12, 0.01, 0.35),
    ],
)
def test_every_schedule_is_coded(schedule):
    for variance in ("fixed_large", "fixed_small"):
        model = tiny_unet(diffusion=Diffusion(schedule, variance=variance))
        round_trip(model, images(5, 1, 8, 8))


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_few_images_and_noise_are_coded(n):
    round_trip(MODEL, images(n, 1, 8, 8))  # which no plain coder makes smaller
    round_trip(MODEL, smooth(n))


def test_other_sizes_colours_and_layouts_are_coded():
    model = tiny_unet(in_channels=3, out_channels=3)
    x = smooth(12, channels=3, size=12)
    data = round_trip(model, x)
    assert compress(model, x.to(memory_format=torch.channels_last), **QUIET) == data
    wide = torch.zeros(12, 3, 12, 16, dtype=torch.uint8)
    wide[..., :12] = x
    assert compress(model, wide[..., :12], **QUIET) == data
    round_trip(model, wide)


def test_steps_by_name_and_by_number_are_coded():
    x = images(6, 1, 8, 8)
    for steps in (1, 5, "ddim4", [0, 3, 4, 11]):
        round_trip(MODEL, x, steps=steps)
    round_trip(MODEL, x, steps=5, spacing="trailing")


def test_groups_hold_a_bounded_number_of_images(monkeypatch):
    monkeypatch.setattr(group, "PIXELS", 5 * 64)
    x = smooth(13)
    data = round_trip(MODEL, x)
    assert data.count(b"GRUP") == 3


def test_bits_do_not_depend_on_threads_or_on_what_the_caller_is_under():
    x = smooth(10)
    data = compress(MODEL, x, **QUIET)
    assert compress(MODEL, x, **QUIET) == data
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        MODEL.train()
        assert compress(MODEL, x, **QUIET) == data
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(decompress(MODEL, data, **QUIET), x)
    finally:
        MODEL.eval()
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(before)


def test_batches_are_stored_and_any_size_decodes():
    x = smooth(60)
    sizes = {size: len(round_trip(MODEL, x, batch_size=size)) for size in (1, 7, 64)}
    assert max(sizes.values()) - min(sizes.values()) < 80  # larger ones take no more bits


def test_plain_images_come_back():
    for x in (smooth(3), images(2, 3, 5, 7), torch.zeros(4, 1, 1, 1, dtype=torch.uint8)):
        for kind in range(4):
            residual = x - plain._predicted(x, kind)
            stream = plain.encode(x)
            assert torch.equal(plain.decode(stream, tuple(x.shape)), x)
            deflate = plain.zlib.compressobj(9, plain.zlib.DEFLATED, -15)
            content = residual.numpy().tobytes()
            stream = bytes([kind]) + deflate.compress(content) + deflate.flush()
            assert torch.equal(plain.decode(stream, tuple(x.shape)), x)


# ---- as many bits as the bound -------------------------------------------------------------------


class Ideal:
    """A network, and what each latent that passes costs by its densities, in float64."""

    def __init__(self, network, grids: Grids, x0: torch.Tensor):
        self.network, self.grids, self.x0 = network, grids, x0
        self.previous, self.nats = reference.to_unit(x0), 0.0

    def __call__(self, xt, i):
        output = self.network(xt, i)
        mean, log_variance = self.grids.forward(self.previous, i)
        self.nats += self.log_density(xt, mean, log_variance)
        mean, log_variance = self.grids.reverse(xt, output, i)
        if i == 0:
            x0 = reference.to_unit(self.x0, torch.float64)
            scale = torch.as_tensor(log_variance, dtype=torch.float64).expand_as(x0) / 2
            self.nats -= reference.discretized_log_likelihood(x0, mean.double(), scale).sum()
        else:
            self.nats -= self.log_density(self.previous, mean, log_variance)
        self.previous = xt.clone()
        if i == self.grids.T - 1:
            self.nats -= self.log_density(xt, torch.zeros_like(xt), 0.0)
        return output

    @staticmethod
    def log_density(x, mean, log_variance):
        log_variance = torch.as_tensor(log_variance, dtype=torch.float64)
        z2 = (x.double() - mean.double()).square() * (-log_variance).exp()
        return -0.5 * (z2 + log_variance + math.log(2 * math.pi)).sum()


def net_bits(network, process, x, pool: int = 400_000) -> tuple[float, float]:
    """(coded, by the densities) bits/dim without initial bits; network: (x_t, index) -> output."""
    grids = Grids(process)
    ideal = Ideal(network, grids, x)
    coder = _native.C.codec.Coder(_native.C.codec.random_words(pool))
    before = coder.bits
    bits_back.encode(coder, grids, ideal, x)
    return (coder.bits - before) / x.numel(), float(ideal.nats) / math.log(2) / x.numel()


class Nearly:
    """A model that knows each image up to some noise: a good one, of which no latent is an
    outlier."""

    def __init__(self, process: Diffusion, x: torch.Tensor):
        off = 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        self.oracle = Oracle(process, reference.to_unit(x) + off)

    def __call__(self, xt, t):
        return self.oracle(xt, t)

    def at(self, xt, i):
        return self.oracle(xt, torch.full((len(xt),), i))


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_the_net_length_is_what_the_densities_say(variance):
    process, x = Diffusion(Schedule.linear(100, 1e-3, 0.1), variance=variance), images(20, 1, 8, 8)
    coded, ideal = net_bits(Nearly(process, x).at, process, x)
    assert abs(coded - ideal) < 0.002
    assert coded > 1


def test_its_expectation_is_the_bound():
    """Of bits_per_dim, at other noise: over many images the two means agree."""
    process, x = Diffusion(Schedule.linear(100, 1e-3, 0.1)), images(300, 1, 8, 8)
    model = Nearly(process, x)
    coded, _ = net_bits(model.at, process, x, pool=4_000_000)
    options = {"diffusion": process, "batch_size": len(x), **QUIET}
    bound = float(fastddpm.bits_per_dim(model, x, **options).total.mean())
    # what is coded has a variance of two nats a nat of KL, which the bound has averaged out
    spread = math.sqrt(2 * bound * x[0].numel() * math.log(2) / len(x)) / x[0].numel() / math.log(2)
    assert abs(coded - bound) < 4 * spread
    assert spread < 0.02 * bound


@pytest.mark.slow
def test_a_trained_model_codes_within_thousandths_of_its_bound():
    x = _fashion(8)
    model = fastddpm.UNet.from_pretrained("fashion-mnist")
    for steps, n in ((50, 8), (None, 2)):
        process = Diffusion.of(model).respace(steps)
        network = Network(model, process, x.shape[1:])
        coded, ideal = net_bits(network, process, x[:n])
        assert coded - ideal < 0.003


@pytest.mark.slow
def test_many_images_pay_little_beside_the_bound():
    """All of 1,000 images' file: initial bits, plain images, checksums and container."""
    x, model = _fashion(1000), fastddpm.UNet.from_pretrained("fashion-mnist")
    data = compress(model, x, steps=8, **QUIET)
    process = Diffusion.of(model).respace(8)
    grids = Grids(process)
    coder = _native.C.codec.Coder(_native.C.codec.random_words(4_000_000))
    before, network = coder.bits, Network(model, process, x.shape[1:])
    for part in x.split(50):
        bits_back.encode(coder, grids, network, part)
    assert 8 * len(data) - (coder.bits - before) < 0.02 * x.numel()


def _fashion(n: int) -> torch.Tensor:
    path = Path("/usr/share/datasets/fashion-mnist")
    if not path.exists():
        pytest.skip("Fashion-MNIST is not installed")
    return fastddpm.data.open_dataset(path, split="test", progress=False).images(range(n))


def test_latents_are_exact_in_float32_and_as_fine_as_their_deviations():
    tiny = Schedule.linear(5, 1e-15, 0.1)
    for schedule in (SCHEDULE, Schedule.linear(), Schedule.cosine(), tiny):
        grids = Grids(Diffusion(schedule))
        spread = np.sqrt(np.minimum(schedule.betas, np.append(schedule.posterior_variance[1:], 1)))
        fineness = spread / 2.0 ** np.array(grids.exponents)
        coarse = np.array(grids.exponents) == FINEST
        assert np.all((fineness >= 16) & (fineness < 32) | coarse)


# ---- refused by name -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (smooth(3).float(), "uint8"),
        (smooth(3)[0], "uint8"),
        (smooth(0), "N >= 1"),
        (smooth(3).numpy(), "tensor"),
        (smooth(3, channels=3), "must be .N, 1, H, W"),
        (smooth(3, size=7), "multiples of 2"),
    ],
)
def test_other_images_are_refused(x, what):
    with pytest.raises(ValueError, match=what):
        compress(MODEL, x, **QUIET)


def test_other_models_are_refused():
    for model, what in (
        (tiny_unet(num_classes=3), "3 classes"),
        (lambda x, t: x, "not a fastddpm.UNet"),
        (tiny_unet().double(), "not float32"),
        (tiny_unet().to("meta"), "meta"),
        (None, "not a fastddpm.UNet"),
    ):
        with pytest.raises(ValueError, match=what):
            compress(model, smooth(3), **QUIET)
    broken = tiny_unet()
    torch.nn.init.constant_(broken.conv_out.bias, math.nan)
    with pytest.raises(ValueError, match="NaN"):
        compress(broken, smooth(9), **QUIET)
    broken = tiny_unet()
    broken.conv_in.weight.data *= 1e38
    with pytest.raises(FloatingPointError, match="not a number"):
        compress(broken, smooth(9), **QUIET)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"steps": 99}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"precision": "bf16"}, "precision must be one of 'fp32'"),
        ({"spacing": "wide"}, "spacing"),
    ],
)
def test_other_options_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        compress(MODEL, smooth(3), **QUIET, **options)


def test_a_file_is_decoded_by_its_model_alone():
    data = compress(MODEL, smooth(9), **QUIET)
    with pytest.raises(ValueError, match="another model"):
        decompress(tiny_unet(seed=1), data, **QUIET)
    other = Diffusion(Schedule.linear(12, 0.01, 0.34))
    with pytest.raises(ValueError, match="another model"):
        decompress(MODEL, data, diffusion=other, **QUIET)
    by_other = compress(MODEL, smooth(9), diffusion=other, **QUIET)
    assert torch.equal(decompress(MODEL, by_other, diffusion=other, **QUIET), smooth(9))
    with pytest.raises(ValueError, match="data must be bytes"):
        decompress(MODEL, "in.ddpm", **QUIET)


@pytest.mark.skipif(len(_native.isas_available()) < 2, reason="one instruction set")
def test_another_instruction_set_is_refused_or_decodes():
    before = _native.isa()
    x = smooth(9)
    try:
        _native.use_isa("plain")
        data = compress(MODEL, x, **QUIET)
        for isa in _native.isas_available():
            _native.use_isa(isa)
            if isa == "plain":
                assert torch.equal(decompress(MODEL, data, **QUIET), x)
            else:
                with pytest.raises(ValueError, match=r"instruction set is 'plain'.*FASTDDPM_ISA"):
                    decompress(MODEL, data, **QUIET)
    finally:
        _native.use_isa(before)


def test_sets_with_the_same_kernels_read_each_others_files():
    sets = [isa for isa in _native.isas_available() if isa.startswith(("avx512", "amx"))]
    if len(sets) < 2:
        pytest.skip("this processor has no two of them")
    before, x = _native.isa(), smooth(9)
    try:
        _native.use_isa(sets[0])
        data = compress(MODEL, x, **QUIET)
        for isa in sets[1:]:
            _native.use_isa(isa)
            assert torch.equal(decompress(MODEL, data, **QUIET), x)
    finally:
        _native.use_isa(before)


def test_a_network_whose_bits_differ_is_refused(monkeypatch):
    data = compress(MODEL, smooth(9), **QUIET)
    facts = Network.__init__

    def changed(self, *arguments, **options):
        facts(self, *arguments, **options)
        self.facts["probe"] = "00000000"

    monkeypatch.setattr(Network, "__init__", changed)
    with pytest.raises(ValueError, match="bits of the network's output is"):
        decompress(MODEL, data, **QUIET)


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a folder of pictures."""
    root = tmp_path_factory.mktemp("codec")
    save_model(tiny_unet(), root / "model")
    (root / "pictures").mkdir()
    for k, image in enumerate(smooth(11)):
        Image.fromarray(image[0].numpy()).save(root / f"pictures/img{k}.png")
    return root


def run(folder, capsys, *argv) -> tuple[int, str]:
    code = cli.main([*map(str, argv), "--model", str(folder / "model"), "--quiet"])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_folder_of_pictures_comes_back(folder, capsys, tmp_path):
    out, back = tmp_path / "out.ddpm", tmp_path / "back"
    code, said = run(folder, capsys, "compress", folder / "pictures", out, "--steps", 5)
    assert code == 0, said
    assert "11 images 1x8x8" in said
    assert f"{out.stat().st_size:,} bytes" in said
    code, said = run(folder, capsys, "decompress", out, back)
    assert code == 0, said
    found = [np.array(Image.open(path)) for path in sorted(back.iterdir())]
    assert np.array_equal(found, smooth(11)[:, 0].numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out.ddpm"]
    # nothing is written over
    before = out.read_bytes()
    for argv in (("compress", folder / "pictures", out), ("decompress", out, back)):
        code, said = run(folder, capsys, *argv)
        assert code == 2
        assert "is there already" in said
    assert out.read_bytes() == before


def test_mistakes_are_one_line_and_leave_nothing(folder, capsys, tmp_path):
    damaged = tmp_path / "damaged.ddpm"
    code, said = run(folder, capsys, "compress", folder / "pictures", damaged)
    assert code == 0, said
    damaged.write_bytes(damaged.read_bytes()[:-40])
    (tmp_path / "empty").mkdir()
    (tmp_path / "clear").mkdir()
    Image.new("LA", (8, 8), (9, 9)).save(tmp_path / "clear/a.png")
    (tmp_path / "colours").mkdir()
    Image.new("RGB", (8, 8), (9, 99, 200)).save(tmp_path / "colours/a.png")
    (tmp_path / "broken").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "broken/a.png")
    (tmp_path / "broken/b.png").write_bytes(b"no picture")
    there = sorted(tmp_path.rglob("*"))
    for argv, what in (
        (("compress", tmp_path / "empty", tmp_path / "x"), "holds no images"),
        (("compress", tmp_path / "none", tmp_path / "x"), "does not exist"),
        (("compress", tmp_path / "clear", tmp_path / "x"), "transparent"),
        (("compress", tmp_path / "colours", tmp_path / "x"), "3 channels"),
        (("compress", tmp_path / "broken", tmp_path / "x"), "can't be used"),
        (("compress", folder / "pictures", tmp_path / "no/x"), "there is no folder"),
        (("compress", folder / "pictures", tmp_path / "x", "--steps", 99), "steps"),
        (("compress", folder / "pictures", tmp_path / "x", "--n", 12), "--n"),
        (("decompress", damaged, tmp_path / "x"), "cut off"),
        (("decompress", folder / "pictures/img0.png", tmp_path / "x"), "no file of coded images"),
        (("decompress", tmp_path / "none", tmp_path / "x"), "no such file"),
        (("decompress", folder, tmp_path / "x"), "no regular file"),
    ):
        code, said = run(folder, capsys, *argv)
        assert code == 2, argv
        assert said.count("\n") == 1, said
        assert what in said, said
        assert sorted(tmp_path.rglob("*")) == there
