"""diffusers' unconditional training loop (train_unconditional.py), and two lines.

python -m fastddpm.examples.diffusers_training --data PATH
"""

import torch

import fastddpm
from fastddpm.examples import common
from fastddpm.integrations import diffusers as ours

PROJECT = "pip install diffusers"


def example(run: common.Run) -> None:
    DDPMPipeline, UNet2DModel = run.theirs("diffusers", "DDPMPipeline", "UNet2DModel")
    (EMAModel,) = run.theirs("diffusers.training_utils", "EMAModel")
    model = UNet2DModel(
        run.size, block_out_channels=[run.width * k for k in (1, 2, 2, 2)],
        down_block_types=["DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * 2],
        up_block_types=[*["UpBlock2D"] * 2, "AttnUpBlock2D", "UpBlock2D"],
    )  # fmt: skip
    fastddpm.accelerate(model)  # the line for the network
    scheduler = ours.DDPMScheduler(run.T)  # and for the noise: in place of diffusers'
    ema = EMAModel(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999))
    for clean in run.batches():
        noise, t = torch.randn_like(clean), torch.randint(0, run.T, (len(clean),))
        (model(scheduler.add_noise(clean, noise, t), t).sample - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
    pipe = DDPMPipeline(model.eval(), scheduler)
    run.save(pipe(run.n, num_inference_steps=run.T, output_type="np").images)


if __name__ == "__main__":
    raise SystemExit(common.main(example, PROJECT))
