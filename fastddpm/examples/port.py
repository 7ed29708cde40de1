"""pesser/pytorch_diffusion, the PyTorch port of the paper's code: its network and chain, and one
line. The port samples alone; what trains its network here is ours.

python -m fastddpm.examples.port --data PATH --code FOLDER
"""

from tqdm import tqdm

import fastddpm
from fastddpm.examples import common

PROJECT = "git clone https://github.com/pesser/pytorch_diffusion and say --code pytorch_diffusion"


def example(run: common.Run) -> None:
    (Diffusion,) = run.theirs("pytorch_diffusion.diffusion", "Diffusion")
    process = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    network = {"resolution": run.size, "in_channels": 3, "out_ch": 3, "ch": run.width}
    diffusion = Diffusion(
        {**process, "num_diffusion_timesteps": run.T, "model_var_type": "fixedlarge"},
        {**network, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 2, "attn_resolutions": (16,)},
        "cpu",
    )
    fastddpm.accelerate(diffusion.model)  # the line

    own = fastddpm.Diffusion(fastddpm.Schedule.linear(run.T, 1e-4, 0.02))
    trainer = fastddpm.Trainer(diffusion.model, diffusion=own, warmup=1)
    for x_0 in run.batches():
        trainer.step(x_0)  # Algorithm 1

    diffusion.model.eval()
    run.save(diffusion.denoise(run.n, progress_bar=tqdm))


if __name__ == "__main__":
    raise SystemExit(common.main(example, PROJECT))
