"""`stitch-ray select`: rate instruction data by the model's own uncertainty and keep the best part."""

if not __package__:
    raise SystemExit("run: python -m jobs.select")

import typer

from stitch_ray.console import job_command

select = job_command("select", limit="data.limit")

if __name__ == "__main__":
    typer.run(select)
