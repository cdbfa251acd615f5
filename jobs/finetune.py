"""`stitch-ray finetune`: fine-tune a causal language model on one or several tasks."""

if not __package__:
    raise SystemExit("run: python -m jobs.finetune")

import typer

from stitch_ray.console import job_command

finetune = job_command("finetune", limit="limit")

if __name__ == "__main__":
    typer.run(finetune)
