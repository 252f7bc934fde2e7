"""Addresses of a job and of what belongs to it: in answers, and in the bodies of webhooks."""

from jobs.states import JobKind, JobState
from jobs.tables import Job

ALWAYS = ("events", "artifacts", "cancel", "retry")
RESULTS = ("results", "studies", "summary")
BY_KIND = {JobKind.TRAIN: ("metrics",), JobKind.PREDICT: RESULTS, JobKind.PREDICT_BATCH: RESULTS}
SOMETIMES = ("metrics", *RESULTS, "reproduce")


def job_links(job: Job, root: str) -> dict[str, str]:
    """By name. `root`: what the paths begin with, such as `/v1`."""
    own, special = f"{root}/jobs/{job.id}", BY_KIND.get(JobKind(job.kind), ())
    again = "reproduce" if (job.kind, job.state) == (JobKind.TRAIN, JobState.SUCCEEDED) else None
    return {"self": own, **{name: f"{own}/{name}" for name in (*special, *ALWAYS, again) if name}}
