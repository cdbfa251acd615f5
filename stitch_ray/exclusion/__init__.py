"""EXAR (Longo et al. 2025): answers labelled right or wrong, a validator that learns to tell, and answers found anew with
the wrong ones excluded."""
