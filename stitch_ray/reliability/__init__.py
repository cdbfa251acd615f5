"""How far an answer can be trusted: sampled answers, uncertainty signals, a scorer, metrics, calibration with a guarantee."""
