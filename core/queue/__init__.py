"""The job queue: one Protocol, and Redis behind it."""

from core.queue.protocol import Claim, JobQueue

__all__ = ["Claim", "JobQueue"]
