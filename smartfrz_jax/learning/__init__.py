"""From recorded runs to a predictor: targets, examples, fitting, evaluation."""
