"""How a cluster is made: simulated on one machine (`local.py`), by Ray's launcher, on Kubernetes, under Slurm.

`README.md` says which to use when.
"""
