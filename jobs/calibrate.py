"""`stitch-ray calibrate`: choose the threshold from which an answer is given, with a guarantee."""

if not __package__:
    raise SystemExit("run: python -m jobs.calibrate")

import typer

from stitch_ray.console import job_command

calibrate = job_command("calibrate")

if __name__ == "__main__":
    typer.run(calibrate)
