"""A second and a third opinion on each site's epsilon, told what the kernel did."""

from __future__ import annotations

import numpy as np

from ....privacy import accounting
from ....privacy.mechanism import RecordLevelPlan
from ..finding import Finding
from ..opinions import Told, opinions
from .subject import Subject

_MECHANISMS = 4


def accountants(subject: Subject) -> Finding:
    """The shown epsilon is what others find, who are given what the kernel does, not what the plan says is accounted.

    That is the steps of a round that ran, and the batch size by the number of records.
    """
    told = []
    for site, plan in _different(subject):
        rounds = subject.experiment.experiment.rounds
        visits = [visit for visit in subject.trained().visits if visit.site == site and visit.reply is not None]
        ran = max((len(visit.steps) for visit in visits), default=plan.steps_per_round)
        rate, noise, steps = min(1.0, plan.batch_size / plan.records), plan.noise_multiplier, ran * rounds
        by = accounting.accountant(sampling_rate=rate, noise_multiplier=noise, steps=steps)
        told.append(
            Told(
                owner=site,
                rate=rate,
                noise=noise,
                steps=steps,
                delta=plan.delta,
                shown=plan.epsilon(),
                exact=by != "RDP",
                bounded=plan.accounted_records is not None,
            )
        )
    return opinions(told)


def _different(subject: Subject) -> list[tuple[str, RecordLevelPlan]]:
    """Return a few sites whose mechanisms differ, the ones with the fewest and the most records among them."""
    found: dict[tuple[int, float], tuple[str, RecordLevelPlan]] = {}
    for site, plan in sorted(subject.mechanisms.items(), key=lambda item: item[1].records):
        found.setdefault((plan.records, plan.noise_multiplier), (site, plan))
    places = np.linspace(0, len(found) - 1, min(_MECHANISMS, len(found)))
    return [list(found.values())[round(place)] for place in places]
