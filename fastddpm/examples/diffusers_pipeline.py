"""diffusers' DDPMPipeline, with the bundled model of clothes in it, and two lines.

python -m fastddpm.examples.diffusers_pipeline --data PATH
"""

import torch

import fastddpm
from fastddpm.examples import common
from fastddpm.integrations import diffusers as ours

PROJECT = "pip install diffusers"


def example(run: common.Run) -> None:
    DDPMPipeline, Theirs = run.theirs("diffusers", "DDPMPipeline", "DDPMScheduler")
    bundled = fastddpm.UNet.from_pretrained("fashion-mnist")
    pipe = DDPMPipeline(ours.to_diffusers(bundled), Theirs(variance_type="fixed_large"))
    fastddpm.accelerate(pipe.unet)  # the line for the network
    pipe.scheduler = ours.DDPMScheduler.from_config(pipe.scheduler.config)  # and for the steps

    random = torch.Generator().manual_seed(0)
    run.save(pipe(run.n, random, num_inference_steps=run.T, output_type="np").images)


if __name__ == "__main__":
    raise SystemExit(common.main(example, PROJECT))
