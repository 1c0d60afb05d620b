"""Training on the model: recipes, the plan of a run, the loop."""
