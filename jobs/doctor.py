"""`stitch-ray doctor`: what this machine, or a cluster, can run."""

if not __package__:
    raise SystemExit("run: python -m jobs.doctor")

import importlib.util
import os
import shutil

import typer

from stitch_ray import ray_session
from stitch_ray.console import Address, exits
from stitch_ray.runs import versions


@exits
def doctor(address: Address = None) -> None:
    """Say which versions are installed, which engines can run and what resources Ray sees."""
    import torch

    for name, version in versions().items():
        print(f"{name:14} {version}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'GPUs':14} {', '.join(gpus) or 'none'}")
    print(f"{'free disk':14} {shutil.disk_usage(os.getcwd()).free / 1e9:.1f} GB here")
    for engine, module in (("transformers", "transformers"), ("vllm", "vllm")):
        found = importlib.util.find_spec(module) is not None
        print(f"engine {engine:13}{'available' if found else f'not installed (extra {engine!r})'}")
    with ray_session.session(address) as ray:
        resources = {name: amount for name, amount in ray.cluster_resources().items() if ":" not in name}
        listed = ", ".join(f"{name} {amount:g}" for name, amount in sorted(resources.items()) if "memory" not in name)
        print(f"{'Ray':14} {len(ray.nodes())} node(s): {listed}")


if __name__ == "__main__":
    typer.run(doctor)
