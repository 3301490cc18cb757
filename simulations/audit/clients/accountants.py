"""A second and a third opinion on the epsilon of clients, told what the server or the clients do."""

from __future__ import annotations

from ....privacy import accounting
from ..finding import Finding
from ..opinions import Told, opinions
from .noise import update_noise, worst_sensitivity
from .subject import ClientSubject


def accountants(subject: ClientSubject) -> Finding:
    """The shown epsilon is what others find, who are given what is done and not what the plan says is accounted.

    That is the noise on the updates' sum (and on the votes), the rate of the cohorts, and the rounds that one client is
    in. Correlated noise is one Gaussian mechanism, of the noise over the most that one client adds to C G.
    """
    plan, rounds = subject.plan.aggregate, subject.planned
    if plan is None:
        local = subject.local
        return opinions(
            [_told("each client", 1.0, local.noise_multiplier, local.participations, local.delta, local.epsilon())]
        )
    correlation = plan.correlation()
    if correlation is not None:
        noise = correlation.noise_deviation / (plan.clipping_norm * worst_sensitivity(correlation))
        return opinions([_told("every client", 1.0, noise, 1, plan.delta, plan.epsilon())])
    noise, clipping = update_noise(plan), plan.clipping()
    if clipping is not None:
        # Both together, in units of a deviation of 1.
        noise = (clipping.update_noise_multiplier**-2 + (2 * clipping.votes_deviation) ** -2) ** -0.5
    sampler, clients = subject.sampler, len(subject.federation.names)
    rate, steps = 1.0, rounds
    if sampler.sampling == "poisson" and sampler.per_round is not None:
        rate = sampler.per_round / clients
    elif sampler.sampling == "cyclic" and sampler.per_round is not None:
        steps = -(-rounds // -(-clients // sampler.per_round))
    return opinions([_told("every client", rate, noise, steps, plan.delta, plan.epsilon())])


def _told(owner: str, rate: float, noise: float, steps: int, delta: float, shown: float) -> Told:
    by = accounting.accountant(sampling_rate=rate, noise_multiplier=noise, steps=steps)
    return Told(
        owner=owner, rate=rate, noise=noise, steps=steps, delta=delta, shown=shown, exact=by != "RDP", bounded=False
    )
