"""lucidrains/denoising-diffusion-pytorch: its Unet, process and Trainer, and one line.

python -m fastddpm.examples.lucidrains --data PATH
"""

import tempfile
from pathlib import Path

import fastddpm
from fastddpm import figures
from fastddpm.examples import common

PROJECT = "pip install denoising-diffusion-pytorch"


def example(run: common.Run) -> None:
    Unet, GaussianDiffusion, Trainer = run.theirs(
        "denoising_diffusion_pytorch", "Unet", "GaussianDiffusion", "Trainer"
    )
    unet = Unet(dim=run.width, dim_mults=(1, 2, 4), flash_attn=False)
    diffusion = GaussianDiffusion(unet, image_size=run.size, timesteps=run.T)
    fastddpm.accelerate(diffusion)  # the line: network, steps and loss

    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(run.pixels(max(100, run.batch))):  # the Trainer wants files
            figures.to_pil(image).save(Path(folder) / f"{i}.png")
        trainer = Trainer(
            diffusion, folder, train_batch_size=run.batch, train_num_steps=run.steps,
            gradient_accumulate_every=max(1, 16 // run.batch), calculate_fid=False,
            save_and_sample_every=run.steps + 1, results_folder=f"{folder}/results",
        )  # fmt: skip
        trainer.train()
    run.save(diffusion.sample(run.n) * 2 - 1)


if __name__ == "__main__":
    raise SystemExit(common.main(example, PROJECT))
