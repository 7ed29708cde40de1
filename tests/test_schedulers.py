"""diffusers' schedulers: what is read takes their steps, and every other word in one is refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from toy import generator, tiny_unet

from fastddpm import Diffusion, Schedule, UNet
from fastddpm.integrations.diffusers import to_diffusers
from fastddpm.integrations.schedulers import process, scheduler_config

diffusers = pytest.importorskip("diffusers")

READ = (
    "DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM",
    "DPMSolverMultistep", "DPMSolverSinglestep",
)  # fmt: skip
X, OUTPUT = (torch.randn(2, 3, 4, 4, generator=generator(seed)) for seed in (1, 2))


def assert_same_steps(diffusion: Diffusion, scheduler) -> None:
    """One ancestral step at the ends and in the middle is theirs, noise included.

    They compute 1 - abar and beta in float32, which costs digits where beta is small."""
    atol = 2e-5 if diffusion.T <= 60 else 2e-3
    for t in (0, 1, diffusion.T // 2, diffusion.T - 1):
        output = torch.cat((OUTPUT, X.sin()), 1) if diffusion.learns_variance else OUTPUT
        theirs = scheduler.step(output, t, X, generator=generator(7)).prev_sample
        z = torch.randn(X.shape, generator=generator(7))
        ours = diffusion.p_step(X, output, torch.tensor([t, t]), z=z)
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=atol)


@pytest.mark.parametrize(
    ("schedule", "variance", "prediction"),
    list(
        itertools.product(
            ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
            ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
            ("epsilon", "sample", "v_prediction"),
        )
    ),
)
def test_a_step_is_theirs(schedule, variance, prediction):
    scheduler = diffusers.DDPMScheduler(
        60, 0.001, 0.2, schedule, variance_type=variance, prediction_type=prediction
    )
    assert_same_steps(process(dict(scheduler.config), ""), scheduler)


def test_trained_betas_are_theirs():
    scheduler = diffusers.DDPMScheduler(3, trained_betas=[0.1, 0.2, 0.4])
    diffusion = process(dict(scheduler.config), "")
    assert_same_steps(diffusion, scheduler)
    with pytest.raises(ValueError, match="trained_betas are 3, but num_train_timesteps is 2"):
        process({"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 2}, "")


@pytest.mark.parametrize("name", READ)
def test_the_default_of_each_class_that_is_read(name):
    """Every option that the class writes down is known, and the betas are its own."""
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    diffusion = process({**scheduler.config, "_class_name": f"{name}Scheduler"}, "")
    betas = torch.tensor(diffusion.schedule.betas).float()
    torch.testing.assert_close(betas, scheduler.betas, rtol=1e-5, atol=1e-8)


def test_every_other_class_is_refused():
    """Each scheduler of diffusers that is not among ours, by its name."""
    ours = {f"{name}Scheduler" for name in READ}
    others = {name for name in dir(diffusers) if name.endswith("Scheduler")} - ours
    assert len(others) > 20
    for name in others:
        with pytest.raises(ValueError, match=f"_class_name must be one of .*; got '{name}'"):
            process({"_class_name": name}, "x.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance_type": "learned"}, "second half is sigma.2 there, and log sigma.2 here"),
        ({"prediction_type": "flow_prediction"}, "flow matching is another process"),
        ({"variance_type": "learned_range", "_fastddpm_loss": "simple"}, "needs loss='vlb' or"),
        ({"_fastddpm_loss_weight": "l1"}, "loss_weight must be None, 'min_snr' or a number for"),
        ({"prediction_type": ["epsilon"]}, "prediction_type must be one of"),
        ({"predict_epsilon": "false"}, "predict_epsilon must be true or false; got 'false'"),
        ({"predict_epsilon": 0}, "predict_epsilon must be true or false; got 0"),
        ({"predict_epsilon": False, "prediction_type": "epsilon"}, "must be true, as prediction_"),
        ({"beta_schedule": "laplace"}, "beta_schedule must be one of"),
        ({"beta_schedule": 3}, "beta_schedule must be one of"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must be false; got True"),
        ({"thresholding": True}, "thresholding must be false; got True"),
        ({"clip_sample": False}, r"clip_sample must be true; got False .*sample\(clip=False\)"),
        ({"clip_sample_range": 2.0}, "clip_sample_range must be 1.0; got 2.0"),
        ({"clip_sample_range": True}, "clip_sample_range must be 1.0; got True"),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, "set_alpha_to_one must be"),
        ({"_class_name": "DDIMScheduler", "steps_offset": 1}, "steps_offset must be 0; got 1"),
        ({"use_flow_sigmas": True}, r"use_flow_sigmas must be false.*flow matching is another"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of 'leading', 'linspace'"),
        ({"timestep_values": [1, 2]}, "timestep_values must be none"),
        ({"snr_shift_scale": 3.0}, "the option snr_shift_scale is not known here; got 3.0"),
        ({"snr_shift_scale": 0}, "the option snr_shift_scale is not known here; got 0"),
        ({"num_train_timesteps": 1.5}, "num_train_timesteps must be an integer"),
        ({"num_train_timesteps": 10**12}, "must be at most"),
        ({"beta_start": "0.1"}, "beta_start must be a number"),
        ({"beta_end": 2}, "beta_end must be a number"),
        ({"trained_betas": "0.1"}, "trained_betas must be a list of numbers"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas must be a number"),
        ({"trained_betas": []}, "betas must be a 1-D array of at least one step"),
        ({"_class_name": None, "_fastddpm_loss": "l1"}, "_fastddpm_loss must be one of 'simple'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_another_process_is_refused_by_name(tmp_path, options, message):
    to_diffusers(tiny_unet()).save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(options))
    with pytest.raises(ValueError, match=message) as caught:
        UNet.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    own = Diffusion(Schedule.cosine(7))
    assert UNet.from_pretrained(tmp_path, diffusion=own).diffusion is own, "the way around it"


@pytest.mark.parametrize(
    "options",
    [
        {"timestep_spacing": "trailing"},
        {"clip_sample_range": None, "thresholding": None, "trained_betas": None},
        {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True},
        {"tensor_format": "pt", "timestep_values": None, "predict_epsilon": True},
        {"_diffusers_version": "0.1.1", "some_future_switch": False},
        {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
    ],
    ids=str,
)
def test_what_changes_no_full_chain_is_read(options):
    assert process(options, "").to_config() == Diffusion(variance="fixed_small").to_config()


def test_a_scheduler_that_is_elsewhere_or_twice_is_not_guessed(tmp_path):
    """A stale one beside the network won; a broken link or a missing file meant the paper's."""
    cosine = Diffusion(Schedule.cosine(30), "x0")
    net = to_diffusers(tiny_unet(diffusion=cosine))
    theirs = {"num_train_timesteps": 30, "prediction_type": "sample"}
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", **theirs)
    diffusers.DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(tmp_path)
    assert UNet.from_pretrained(tmp_path).diffusion.to_config() == cosine.to_config()
    diffusers.DDIMScheduler(**theirs).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"unet/scheduler_config.json and .* different processes"):
        UNet.from_pretrained(tmp_path)
    (tmp_path / "unet" / "scheduler_config.json").unlink()
    own = UNet.from_pretrained(tmp_path).diffusion.schedule
    assert (own.betas == Schedule.linear(30).betas).all()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.unlink()
    with pytest.warns(UserWarning, match=r"model_index.json names a scheduler, but there is no"):
        UNet.from_pretrained(tmp_path)
    path.symlink_to("what was in a cache")
    with pytest.raises(ValueError, match=r"scheduler_config.json is not .*: no such file"):
        UNet.from_pretrained(tmp_path)
    assert UNet.from_pretrained(tmp_path, diffusion=cosine).diffusion is cosine


def test_the_oldest_files_say_predict_epsilon():
    assert process({"predict_epsilon": False}, "").prediction == "x0"
    both = {"predict_epsilon": False, "prediction_type": "sample"}
    assert process(both, "").prediction == "x0"


@pytest.mark.parametrize(
    ("diffusion", "named"),
    [
        (Diffusion(), True),
        (Diffusion(Schedule.cosine(), "x0"), True),
        (Diffusion(Schedule.quadratic(50, 0.01, 0.2), "eps", "fixed_small", "vlb"), True),
        (Diffusion(Schedule.constant(30), "x0", "fixed_small"), False),
        (Diffusion(Schedule.cosine(40, s=0.02)), False),
        (Diffusion(Schedule.linear(200, scaled=True)), False),
        (Diffusion(Schedule([0.1, 0.3, 0.2])), False),
        (Diffusion(Schedule.sigmoid_betas(40), "v", loss_weight="min_snr"), True),
        (Diffusion(Schedule.sigmoid(30), "v", loss_weight=np.ones(30)), False),
        (Diffusion(Schedule.linear(30), "eps", "learned_range", "hybrid"), True),
    ],
    ids=lambda value: str(value.to_config())[:60] if isinstance(value, Diffusion) else "",
)
def test_a_saved_diffusers_model_keeps_its_process(tmp_path, diffusion, named):
    """The cosine x0 model came back as a linear eps one."""
    model = tiny_unet(diffusion=diffusion)
    to_diffusers(model).save_pretrained(tmp_path)
    back = UNet.from_pretrained(tmp_path)
    assert (back.diffusion.schedule.betas == diffusion.schedule.betas).all()
    config = back.diffusion.to_config()
    if named:
        assert config == diffusion.to_config()
    else:
        assert {**config, "schedule": 0} == {**diffusion.to_config(), "schedule": 0}
    t = torch.tensor([0, 2])
    x = torch.randn(2, 1, 8, 8, generator=generator(3))
    with torch.no_grad():
        assert torch.equal(back(x, t), model(x, t))
    assert_same_steps(diffusion, diffusers.DDPMScheduler.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("diffusion", "message"),
    [
        (Diffusion(Schedule.linear(20), "mean"), "no scheduler for prediction 'mean'"),
        (Diffusion(Schedule.linear(20), variance="learned", loss="vlb"), "for variance 'learned'"),
        (Diffusion(Schedule.linear(20), rescale_timesteps=True), "rescaled timesteps"),
        (Diffusion(Schedule.linear(20)).respace(5), "a respaced schedule is not saved"),
    ],
    ids=["mean", "learned", "rescaled", "respaced"],
)
def test_a_process_without_a_scheduler_is_refused_before_a_file_is_touched(
    tmp_path, diffusion, message
):
    net = to_diffusers(tiny_unet(diffusion=diffusion))
    with pytest.raises(ValueError, match=message):
        net.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=message):
        scheduler_config(diffusion)
