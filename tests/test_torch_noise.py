"""Noise of torch's generators: the pictures of a plain loop and of diffusers' pipeline, whatever
the batches."""

from __future__ import annotations

import pytest
import torch
from loops import plain
from toy import SCHEDULE, generator, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, reference
from fastddpm.torch_noise import TorchNoise

T = SCHEDULE.T
SHAPE = (2, 3, 5)
DIFFUSION = Diffusion(SCHEDULE)


def draw(n=5, model=wave, **options) -> torch.Tensor:
    defaults = {"shape": SHAPE, "diffusion": DIFFUSION, "progress": False}
    return fastddpm.sample(model, n, **{**defaults, **options})


def each(n: int = 5) -> list[torch.Generator]:
    return [generator(100 + k) for k in range(n)]


def assert_same_states(a, b) -> None:
    pairs = zip(*(x if isinstance(x, list) else [x] for x in (a, b)), strict=True)
    assert all(torch.equal(mine.get_state(), theirs.get_state()) for mine, theirs in pairs)


@pytest.mark.parametrize("options", [{}, {"steps": 5}, {"eta": 0.5}, {"eta": 0.0}], ids=str)
def test_x_T_first_and_then_z_of_each_step(options):
    steps, eta = options.get("steps"), options.get("eta")
    schedule = SCHEDULE if steps is None else SCHEDULE.respace(steps)
    sampler = {} if eta is None else {"sampler": "ddim", "eta": eta}
    mine, theirs = generator(1), generator(1)
    x = torch.randn(5, *SHAPE, generator=theirs)
    still = torch.zeros(5, *SHAPE)
    z = lambda i: torch.randn(5, *SHAPE, generator=theirs) if eta != 0.0 else still  # noqa: E731
    expected = plain(wave, x, z, schedule=schedule, eta=eta)
    got = draw(generator=mine, steps=steps, **sampler)
    torch.testing.assert_close(got, expected.float(), atol=1e-4, rtol=0)
    # Nothing is drawn for the last step, which the loop above drew and left out.
    last = eta != 0.0
    again = generator(1)
    for _ in range(1 + (schedule.T - 1) * last):
        torch.randn(5, *SHAPE, generator=again)
    assert torch.equal(mine.get_state(), again.get_state())


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("options", [{}, {"steps": 5, "sampler": "ddim", "eta": 0.5}], ids=str)
def test_images_and_states_do_not_depend_on_the_batches(several, options):
    make = each if several else lambda: generator(1)
    given = make()
    whole = draw(generator=given, batch_size=5, **options)
    for batch_size in (1, 2, None):
        mine = make()
        got = draw(generator=mine, batch_size=batch_size, **options)
        assert torch.equal(got, whole)
        assert_same_states(mine, given)
    assert not torch.equal(draw(generator=given, **options), whole)  # it went on


def test_an_image_of_its_own_generator_is_that_image_alone():
    got = draw(generator=each(), batch_size=3)
    for k in range(5):
        assert torch.equal(draw(1, generator=generator(100 + k))[0], got[k])


def test_a_batch_that_memory_is_too_small_for_begins_its_noise_anew():
    def model(x, t):
        if len(x) > 2 and int(t[0]) == T // 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return wave(x, t)

    for make in (each, lambda: generator(1)):
        with pytest.warns(RuntimeWarning, match="batches of 5 images"):
            got = draw(model=model, generator=make(), batch_size=5)
        assert torch.equal(got, draw(generator=make()))


def test_with_a_given_beginning_the_first_draw_is_the_steps():
    theirs = generator(3)
    x_T = torch.randn(5, *SHAPE, generator=theirs)
    mine = generator(3)
    expected = draw(generator=mine)
    assert torch.equal(draw(x_T=x_T, generator=theirs), expected)
    # Images are noised by the first draw.
    x0, theirs = images(5, *SHAPE), generator(3)
    eps, ab = torch.randn(5, *SHAPE, generator=theirs), SCHEDULE.alphas_cumprod[6]
    xt = ab**0.5 * reference.to_unit(x0) + (1 - ab) ** 0.5 * eps
    rest = draw(x_T=xt.float(), start=7, generator=theirs)
    got = draw(init=x0, start=7, generator=generator(3), batch_size=2)
    torch.testing.assert_close(got, rest, atol=1e-5, rtol=0)


def test_a_generator_draws_for_every_engine_and_way():
    model = tiny_unet()
    options = {"progress": False, "precision": "fp32"}
    eager, plan = (
        fastddpm.sample(model, 3, engine=engine, generator=generator(2), **options)
        for engine in ("eager", "cpu_plan")
    )
    torch.testing.assert_close(eager, plan, atol=1e-4, rtol=0)
    samples, _, _ = fastddpm.sample_progressive(
        model, 3, frames=2, engine="eager", generator=generator(2), **options
    )
    assert torch.equal(samples, eager)


def test_the_global_generator_and_the_callers_mode_have_no_say():
    before = torch.get_rng_state()
    expected = draw(generator=generator(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            assert torch.equal(draw(generator=generator(1)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_rank_leaves_the_generators_as_one_process_does():
    for make in (each, lambda: generator(1)):
        alone = make()
        whole = TorchNoise(alone, 5, SHAPE, torch.device("cpu")).stream(slice(0, 5))
        drawn = [whole() for _ in range(3)]
        for rows in (slice(0, 2), slice(2, 5), slice(3, 3)):
            mine = make()
            noise = TorchNoise(mine, 5, SHAPE, torch.device("cpu"))
            if rows.start < rows.stop:
                stream = noise.stream(rows)
                for z in drawn:
                    assert torch.equal(stream(), z[rows])
            noise.skip(rows, 3)
            assert_same_states(mine, alone)


# ---- diffusers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_a_pipelines_pictures(variance, several):
    """diffusers' own DDPMPipeline, its scheduler and its network, with our weights."""
    diffusers = pytest.importorskip("diffusers")
    from fastddpm.integrations.diffusers import to_diffusers

    model = tiny_unet()
    scheduler = diffusers.DDPMScheduler(T, 0.01, 0.35, "linear", variance_type=variance)
    pipeline = diffusers.DDPMPipeline(to_diffusers(model), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs, mine = (each(3) if several else generator(5) for _ in range(2))
    expected = pipeline(3, generator=theirs, num_inference_steps=T, output_type="np").images
    got = fastddpm.sample(
        model, 3, diffusion=Diffusion(SCHEDULE, variance=variance), generator=mine, batch_size=2,
        progress=False, precision="fp32",
    )  # fmt: skip
    pixels = (got / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(pixels, torch.from_numpy(expected), atol=2e-4, rtol=0)
    assert_same_states(mine, theirs)
