"""How the embedded judge is made: ``python -m recipes.train_judge``."""
