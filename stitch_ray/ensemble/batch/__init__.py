"""The `predict` job: the ensemble over a whole data set, on pools of actors or over a served ensemble."""
