"""`sample-answers`: candidate answers, their labels and signals."""
