"""How much rank a task and an input use, and what can go."""
