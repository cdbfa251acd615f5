"""`stitch-ray predict`: answer many questions selectively, with a confidence, or abstain."""

if not __package__:
    raise SystemExit("run: python -m jobs.predict")

import typer

from stitch_ray.console import job_command

predict = job_command("predict", limit="data.limit")

if __name__ == "__main__":
    typer.run(predict)
