"""`exar evaluate`: a refinement beside same-budget baselines, and the validator by itself."""
