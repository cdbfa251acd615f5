"""Uncertainty signals, a file a family.

`registry` tells which way each points, `compute.compute_signals` computes them for a batch of answers, and
`compute.unsupported` tells beforehand which an engine cannot give. From the answer's own tokens: `tokens`; from answers
sampled beside it: `samples`, with the relations of `equivalence`, `embedding` and `entailment`; from asking the model:
`prompted`.
"""
