"""Shares: who has had more of the denoiser than an equal share; tenants with work in flight have equal ones."""

from collections.abc import Collection, Mapping

SLACK_SECONDS = 10.0  # of denoiser time a tenant may be ahead of another before it has to wait


class Shares:
    """Seconds of denoiser time, by tenant, ahead of an equal share of all that was given out while it had work here."""

    def __init__(self) -> None:
        self.ahead: dict[str, float] = {}

    def spent(self, used: Mapping[str, float], present: Collection[str]) -> None:
        """The denoiser worked: `used` says for whom, in seconds; `present` are the tenants who had work for it.

        Who could have had more gains no more than the slack, so that nobody saves up. Who leaves while ahead stays on
        the books until the others have caught up, so that leaving pays no debt.
        """
        each = sum(used.values()) / max(len(present), 1)
        for tenant in {*present, *self.ahead}:
            ahead = self.ahead.get(tenant, 0.0) + used.get(tenant, 0.0) - each
            if tenant in present:
                self.ahead[tenant] = max(ahead, -SLACK_SECONDS)
            elif ahead > 0:
                self.ahead[tenant] = ahead
            else:
                self.ahead.pop(tenant, None)

    def waiting(self, present: Collection[str]) -> set[str]:
        """Those of `present` who have to let others go first."""
        if len(present) == 1:
            return set()
        least = min(self.ahead.get(tenant, 0.0) for tenant in present)
        return {tenant for tenant in present if self.ahead.get(tenant, 0.0) > least + SLACK_SECONDS}
