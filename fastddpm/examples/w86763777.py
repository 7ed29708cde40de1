"""w86763777/pytorch-ddpm: its network, trainer and sampler, and one line.

python -m fastddpm.examples.w86763777 --data PATH --code FOLDER
"""

import torch

import fastddpm
from fastddpm.examples import common

PROJECT = "git clone https://github.com/w86763777/pytorch-ddpm and say --code pytorch-ddpm"


def example(run: common.Run) -> None:
    (UNet,) = run.theirs("model", "UNet")
    Trainer, Sampler = run.theirs(
        "diffusion", "GaussianDiffusionTrainer", "GaussianDiffusionSampler"
    )
    net = UNet(run.T, run.width, [1, 2, 2, 2], attn=[1], num_res_blocks=2, dropout=0.1)
    fastddpm.accelerate(net)  # the line: what follows is its main.py's

    trainer = Trainer(net, 1e-4, 0.02, run.T)
    optim = torch.optim.Adam(net.parameters(), lr=2e-4)
    for x_0 in run.batches():
        optim.zero_grad()
        trainer(x_0).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()

    sampler = Sampler(net.eval(), 1e-4, 0.02, run.T, run.size, "epsilon", "fixedlarge")
    with torch.no_grad(), run.counted(net):
        drawn = sampler(torch.randn(run.n, 3, run.size, run.size))
    run.save(drawn)


if __name__ == "__main__":
    raise SystemExit(common.main(example, PROJECT))
