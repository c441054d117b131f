"""How the predictor's training set is made: what ``python -m train.collect`` runs."""
