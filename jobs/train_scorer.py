"""`stitch-ray train-scorer`: train a reliability scorer on labelled answers."""

if not __package__:
    raise SystemExit("run: python -m jobs.train_scorer")

import typer

from stitch_ray.console import job_command

train_scorer = job_command("train-scorer")

if __name__ == "__main__":
    typer.run(train_scorer)
