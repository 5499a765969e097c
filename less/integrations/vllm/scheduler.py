"""A scheduler of vLLM that refuses to compute running requests anew.

vLLM preempts a request by freeing its blocks; it later reads prompt and answer again as one
prompt. On a bounded cache that is another text: what was evicted while it was generated would not
have been. Lack of memory preempts nothing, because no request ever wants a second page. What does
is ``reset_prefix_cache(reset_running_requests=True)``; here it is an error.

``choose`` sets it where vLLM's own scheduler would run. A scheduler of a user's own derives from
one of these.
"""

from __future__ import annotations

from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname
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


def choose(config: Any) -> None:
    """Set vLLM's ``scheduler_cls`` before it makes its scheduler.

    Args:
        config: vLLM's ``SchedulerConfig``. Written, where no class is asked for.

    Raises:
        ValueError: The class that is asked for would compute running requests anew.
    """
    asked = config.scheduler_cls
    if asked is None:
        config.scheduler_cls = LessAsyncScheduler if config.async_scheduling else LessScheduler
        return
    found = resolve_obj_by_qualname(asked) if isinstance(asked, str) else asked
    if not issubclass(found, (LessScheduler, LessAsyncScheduler)):
        raise ValueError(
            "less: vLLM's scheduler_cls must be a subclass of "
            "less.integrations.vllm.scheduler.LessScheduler or LessAsyncScheduler, which never "
            f"compute a running request anew, got {found.__module__}.{found.__qualname__}"
        )
