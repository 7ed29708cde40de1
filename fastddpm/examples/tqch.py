"""tqch/ddpm-torch: its network, process and Trainer, and one line.

python -m fastddpm.examples.tqch --data PATH --code FOLDER
"""

import torch

import fastddpm
from fastddpm.examples import common

PROJECT = "git clone https://github.com/tqch/ddpm-torch and say --code ddpm-torch"


def example(run: common.Run) -> None:
    UNet, Trainer, GaussianDiffusion, get_beta_schedule = run.theirs(
        "ddpm_torch", "UNet", "Trainer", "GaussianDiffusion", "get_beta_schedule"
    )
    model = UNet(3, run.width, 3, (1, 2, 2, 2), 2, (False, True, False, False), drop_rate=0.1)
    fastddpm.accelerate(model)  # the line: what follows is its train.py's

    betas = get_beta_schedule("linear", 1e-4, 0.02, run.T)
    diffusion = GaussianDiffusion(betas, "eps", "fixed-large", "mse")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    shape = (3, run.size, run.size)
    trainer = Trainer(
        model, optimizer, diffusion, 1, run.batches(bar=False), shape=shape, num_samples=0
    )
    trainer.train()

    with run.counted(model.eval()):
        drawn = trainer.sample_fn(run.n)
    run.save(drawn)


if __name__ == "__main__":
    raise SystemExit(common.main(example, PROJECT))
