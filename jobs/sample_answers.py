"""`stitch-ray sample-answers`: sample candidate answers, label them, and compute uncertainty signals."""

if not __package__:
    raise SystemExit("run: python -m jobs.sample_answers")

import typer

from stitch_ray.console import job_command

sample_answers = job_command("sample-answers", limit="data.limit")

if __name__ == "__main__":
    typer.run(sample_answers)
