"""From settings to connected parts: what both entrypoints do first."""

from __future__ import annotations

from core.changes import ChangeFeed, RedisChangeFeed
from core.presence import Presence, RedisPresence
from core.queue import JobQueue
from core.queue.connection import connect
from core.queue.redis import RedisJobQueue
from core.settings import Settings


def open_queue(settings: Settings) -> tuple[JobQueue, ChangeFeed, Presence]:
    """Return what is shared through Redis, over one client; closing the queue closes all three."""
    client = connect(settings.redis_url.get_secret_value())
    queue = RedisJobQueue(
        client,
        prefix=settings.redis_prefix,
        max_queued=settings.max_queued_jobs,
        max_attempts=settings.max_attempts,
        retention_seconds=settings.job_retention_seconds,
        max_running=settings.max_running_jobs,
    )
    feed = RedisChangeFeed(client, prefix=settings.redis_prefix)
    return queue, feed, RedisPresence(client, prefix=settings.redis_prefix)
