"""What a job is: its states, its rows, the verbs that move it on. Both the API and the workers import this package."""
