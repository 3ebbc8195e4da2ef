"""What an entry of the store is made from, as one key."""

from __future__ import annotations

from medseg.data.store import digest
from medseg.labels import LabelScheme
from medseg.preprocess.pipeline import parameters
from medseg.schema.check import CaseFacts
from medseg.schema.plans import Configuration, Plans


def index_mark(plans: Plans, configuration: Configuration) -> str:
    """Return the mark of everything about the plans that preprocessing depends on."""
    return digest(parameters(plans, configuration))


def entry_key(
    facts: CaseFacts, labels: LabelScheme, plans: Plans, configuration: Configuration
) -> str:
    """Return the key of a case's entry: a hash of its files' content and of what is done to it.

    The spacing counts as it is for this case (slices of a 2D configuration keep their distance),
    so that configurations which do the same to a case share its entry.
    """
    done = parameters(plans, configuration)
    if facts.fingerprint is not None:
        own = [facts.fingerprint.spacing[axis] for axis in plans.network_axes]
        done["spacing"] = (*own[: 3 - len(configuration.spacing)], *configuration.spacing)
    return digest([facts.content, labels.values, labels.ignore_label, done])
