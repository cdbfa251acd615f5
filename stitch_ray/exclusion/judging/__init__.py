"""`exar judge`: a validator on labelled answers."""
