"""Jobs: requests of trainings and predictions, state, events, results, summaries, explanations."""
