"""openai/guided-diffusion: its network and loop, its process by ours of the same names, and one
line. improved-diffusion's are the same, without image_size.

python -m fastddpm.examples.openai --data PATH --code FOLDER
"""

import torch

import fastddpm
from fastddpm.examples import common
from fastddpm.integrations import openai as gd  # in place of guided_diffusion.gaussian_diffusion

PROJECT = "git clone https://github.com/openai/guided-diffusion and say --code guided-diffusion"


def example(run: common.Run) -> None:
    (UNetModel,) = run.theirs("guided_diffusion.unet", "UNetModel")
    model = UNetModel(
        image_size=run.size, in_channels=3, model_channels=run.width, out_channels=6,
        num_res_blocks=2, attention_resolutions=(2, 4), channel_mult=(1, 2, 2, 2), num_heads=4,
        use_scale_shift_norm=True, dropout=0.1,
    )  # fmt: skip
    fastddpm.accelerate(model)  # the line
    diffusion = gd.create_gaussian_diffusion(steps=run.T, learn_sigma=True, noise_schedule="cosine")

    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for x_start in run.batches():
        t = torch.randint(run.T, (run.batch,))
        opt.zero_grad()
        diffusion.training_losses(model, x_start, t)["loss"].mean().backward()
        opt.step()

    shape = (run.n, 3, run.size, run.size)
    run.save(diffusion.p_sample_loop(model.eval(), shape, progress=True))


if __name__ == "__main__":
    raise SystemExit(common.main(example, PROJECT))
