"""What is rendered for people: charts and model cards."""
