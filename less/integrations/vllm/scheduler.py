"""A scheduler of vLLM that refuses to compute running requests anew.

vLLM preempts a request by freeing its blocks; it later reads prompt and answer again as one
prompt. On a bounded cache that is another text: what was evicted while it was generated would not
have been. Lack of memory preempts nothing, because no request ever wants a second page. What does
is ``reset_prefix_cache(reset_running_requests=True)``; with one of these it is an error::

    vllm serve ... --scheduler-cls less.integrations.vllm.scheduler.LessAsyncScheduler
"""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


def _refuse(reset_running_requests: bool) -> None:
    if reset_running_requests:
        raise RuntimeError(
            "less: reset_running_requests would compute running requests anew, and a bounded cache "
            "would give them another text; wait until they end, or abort them"
        )


class LessScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler; on CPUs, and with ``--no-async-scheduling``."""

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Reset what is cached of prefixes, which is nothing of ours.

        Raises:
            RuntimeError: Running requests would be reset; none is.
        """
        _refuse(reset_running_requests)
        return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))


class LessAsyncScheduler(AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler, its default on GPUs."""

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """As in ``LessScheduler``.

        Raises:
            RuntimeError: Likewise.
        """
        _refuse(reset_running_requests)
        return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))
