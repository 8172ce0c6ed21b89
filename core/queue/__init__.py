"""The job queue: one Protocol, a Redis implementation and an in-memory twin for unit tests."""

from core.queue.protocol import Claim, JobQueue

__all__ = ["Claim", "JobQueue"]
