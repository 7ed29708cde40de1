"""NVlabs/edm: its preconditioned network, loss and sampler, which is no DDPM, and one line for the
3x3 convolutions of the network; the rest stays theirs.

python -m fastddpm.examples.edm --data PATH --code FOLDER
"""

import torch

import fastddpm
from fastddpm.examples import common

PROJECT = "git clone https://github.com/NVlabs/edm, pip install click, and say --code edm"


def example(run: common.Run) -> None:
    (EDMPrecond,) = run.theirs("training.networks", "EDMPrecond")
    (EDMLoss,) = run.theirs("training.loss", "EDMLoss")
    (edm_sampler,) = run.theirs("generate", "edm_sampler")
    net = EDMPrecond(run.size, 3, model_type="SongUNet", model_channels=run.width)
    fastddpm.accelerate(net)  # the line

    loss_fn = EDMLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for images in run.batches():
        optimizer.zero_grad(set_to_none=True)
        loss_fn(net=net, images=images).sum().mul(1 / run.batch).backward()
        optimizer.step()

    latents = torch.randn(run.n, 3, run.size, run.size)
    with torch.no_grad():
        run.save(edm_sampler(net.eval(), latents, num_steps=18))


if __name__ == "__main__":
    raise SystemExit(common.main(example, PROJECT))
