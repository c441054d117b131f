"""Training predictors on recorded runs, and judging them on runs that they did not see."""
