"""The steps of a shorter chain: diffusers' and OpenAI's rules, lists, and what is no choice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import SCHEDULE, generator, images, wave

import fastddpm
from fastddpm import Diffusion, Schedule, ops

LINEAR = Schedule.linear()


def steps_of(T: int, steps, **options) -> list[int]:
    return Schedule.linear(T).respace(steps, **options).timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("T", [60, 1000])
def test_diffusers_rules(spacing, T):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(T, timestep_spacing=spacing)
    for n in (*range(1, 61), T // 2 + 1, T):
        scheduler.set_timesteps(n)
        theirs = scheduler.timesteps.tolist()[::-1]
        if theirs[0] == -1:  # their sum of 13 60ths ends above 0, and is a 14th step before all
            assert (T, n, spacing) in [(60, k, "trailing") for k in (13, 26, 52, 55)]
            theirs = theirs[1:]
        assert steps_of(T, n, spacing=spacing) == theirs, n


def space_timesteps(num_timesteps, section_counts):
    """improved-diffusion's respace.py, in its own words; None where it raises."""
    if section_counts.startswith("ddim"):
        desired = int(section_counts[len("ddim") :])
        for i in range(1, num_timesteps):
            if len(range(0, num_timesteps, i)) == desired:
                return set(range(0, num_timesteps, i))
        return None
    counts = [int(x) for x in section_counts.split(",")]
    size_per, extra = num_timesteps // len(counts), num_timesteps % len(counts)
    start, steps = 0, []
    for i, count in enumerate(counts):
        size = size_per + (1 if i < extra else 0)
        if size < count:
            return None
        stride = 1 if count <= 1 else (size - 1) / (count - 1)
        at = 0.0
        for _ in range(count):
            steps.append(start + round(at))
            at += stride
        start += size
    return set(steps)


@pytest.mark.parametrize("T", [7, 60, 1000])
def test_openais_words(T):
    counts = range(T + 2) if T < 1000 else (25, 50, 63, 64, 99, 250, 333, 400, 500, 999, 1000)
    words = ["7", "1", "2,3,2", "1,1,1", f"{T}", *(f"ddim{n}" for n in counts)]
    words += ["10,15,20", "5,5,5,5,5,5", "300,10,10,10", "50,3"] if T > 7 else []
    for word in words:
        expected = space_timesteps(T, word)
        if expected is None:
            with pytest.raises(ValueError, match=word):
                steps_of(T, word)
        else:
            assert steps_of(T, word) == sorted(expected), word


@pytest.mark.parametrize(
    "steps",
    [[0, 3, 7], (7, 3, 0), range(0, 8, 3), np.array([7, 1], np.uint8), torch.tensor([2, 5]), [4]],
    ids=str,
)
def test_a_list_is_its_steps(steps):
    short = SCHEDULE.respace(steps)
    assert short.timesteps.tolist() == sorted(int(t) for t in steps)
    np.testing.assert_allclose(
        short.alphas_cumprod, SCHEDULE.alphas_cumprod[short.timesteps], rtol=1e-12
    )
    assert short.trained is SCHEDULE


def test_a_section_may_have_no_steps():
    """improved-diffusion's space_timesteps leaves such a section out."""
    assert Schedule.linear(12).respace("0,2").timesteps.tolist() == [6, 11]
    assert Schedule.linear(12).respace("1,0,2").timesteps.tolist() == [0, 8, 11]


def test_all_steps_by_any_name_are_the_schedule_itself():
    for steps, spacing in ((12, "leading"), (12, "trailing"), (12, "linspace")):
        assert SCHEDULE.respace(steps, spacing=spacing) is SCHEDULE
    assert SCHEDULE.respace("12") is SCHEDULE
    assert SCHEDULE.respace(range(12)) is SCHEDULE
    assert Diffusion(SCHEDULE).respace(None).schedule is SCHEDULE


def test_a_list_of_a_shorter_chain_is_of_its_own_steps():
    once = SCHEDULE.respace([1, 4, 9, 11])
    assert once.respace([0, 2]).timesteps.tolist() == [1, 9]


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        ([0, 0, 3], {}, r"steps must rise or fall within 0 .. 11, each given once; got \[0, 0, 3"),
        ([0, 5, 3], {}, "steps must rise or fall"),
        ([-1, 3], {}, "steps must rise or fall within 0 .. 11"),
        ([3, 12], {}, "steps must rise or fall within 0 .. 11"),
        ([], {}, "steps must be a 1-D sequence of integers"),
        ([0.0, 1.0], {}, "steps must be a 1-D sequence of integers"),
        ([True, False], {}, "steps must be a 1-D sequence of integers"),
        ([[0, 1]], {}, "steps must be a 1-D sequence of integers"),
        ([[0, 1], [2]], {}, "steps must be a 1-D sequence of integers"),
        ("", {}, "steps as a word must be 'ddimN' or numbers for sections"),
        ("fast", {}, "steps as a word must be 'ddimN' or numbers for sections"),
        ("ddim", {}, "steps as a word must be"),
        ("5,", {}, "steps as a word must be"),
        ("-5", {}, "steps as a word must be"),
        ("ddim5", {}, "no integer stride through 12 steps gives those of 'ddim5'"),
        ("ddim3,4", {}, "no integer stride"),
        ("13", {}, "section 1 is of 12 of the 12 steps.* must lie in 0 .. 12; got 13"),
        ("6,7", {}, "section 2 is of 6 of the 12 steps"),
        ("0,0", {}, "'0,0': at least one section must have a step"),
        (",".join("1" * 13), {}, "section 13 is of 0"),
        (5, {"spacing": "karras"}, "spacing must be one of 'strided', 'leading', 'trailing', 'lin"),
        ([0, 5], {"spacing": "leading"}, "spacing='leading' says how a number of steps is spread"),
        ("ddim4", {"spacing": "trailing"}, "spacing='trailing' says how a number"),
        (True, {}, "steps must be an integer in 1 .. 12; got True"),
        (5.0, {}, "steps must be an integer in 1 .. 12; got 5.0"),
        (b"5", {}, "steps must be an integer in 1 .. 12"),
        ({3: 4}, {}, "steps must be an integer in 1 .. 12"),
    ],
    ids=str,
)
def test_what_is_no_choice_of_steps_is_named(steps, options, message):
    for chain in (SCHEDULE, Diffusion(SCHEDULE)):
        with pytest.raises(ValueError, match=message):
            chain.respace(steps, **options)


@pytest.mark.filterwarnings("ignore:abar_T")
@pytest.mark.parametrize("steps", [[2, 7, 11], "ddim4"])
def test_the_noise_of_a_step_is_that_of_the_models_own(steps):
    """x_T of step T, z of step timesteps[i]: what the full chain draws at the same t."""
    short = Diffusion(SCHEDULE).respace(steps)
    index = torch.arange(3)
    x = ops.randn((3, 1, 4, 4), seed=9, step=12, sample_index=index)
    for i in reversed(range(short.T)):
        own = int(short.schedule.timesteps[i])
        t = torch.full((3,), i)
        z = ops.randn(x.shape, seed=9, step=own, sample_index=index)
        x = short.p_step(x, wave(x, torch.full((3,), own)), t, z=z)
    got = fastddpm.sample(wave, 3, seed=9, shape=(1, 4, 4), diffusion=short, progress=False)
    torch.testing.assert_close(got, x)
    x0 = images(3, 1, 4, 4)
    short_bound = fastddpm.bits_per_dim(wave, x0, diffusion=short, seed=1, progress=False)
    listed = fastddpm.bits_per_dim(
        wave, x0, diffusion=Diffusion(SCHEDULE), steps=steps, seed=1, progress=False
    )
    assert torch.equal(short_bound.terms, listed.terms)


def test_a_chain_that_begins_in_the_middle_is_told_of():
    """Samples start from pure noise there, of which x_t is none yet."""
    full = Diffusion(LINEAR)
    with pytest.warns(UserWarning, match="Take a last step nearer to the model's own, 999"):
        fastddpm.sample(wave, 1, shape=(1, 2, 2), diffusion=full.respace([0, 100]), progress=False)


@pytest.mark.parametrize(
    ("prediction", "variance"),
    [("v", "learned_range"), ("mean", "learned"), ("eps", "fixed_large")],
)
def test_every_rule_serves_every_process(prediction, variance):
    loss = "hybrid" if "learned" in variance else "simple"
    diffusion = Diffusion(LINEAR, prediction, variance, loss)
    channels = 2 if "learned" in variance else 1
    xt = torch.randn(4, 1, 2, 2, generator=generator())
    for steps, spacing in ((5, "leading"), (5, "trailing"), (5, "linspace"), ("2,2", "strided")):
        short = diffusion.respace(steps, spacing=spacing)
        t = torch.arange(4)
        x = short.p_step(xt, 0.1 * xt.repeat(1, channels, 1, 1), t, z=xt)
        assert x.isfinite().all()
