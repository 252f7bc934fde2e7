"""`python -m worker.tracking`: try again to record in MLflow the trainings that were given up."""

from jobs.db import session_factory
from jobs.settings import Settings
from worker.tracking.backfill import ask_again

if __name__ == "__main__":
    with session_factory(Settings().database_url, 1, "renalq-tracking").begin() as session:
        print(f"{ask_again(session)} trainings will be recorded again.")
