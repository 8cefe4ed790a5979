"""Language models: their tasks, questions with choices, and generation with uncertainty."""
