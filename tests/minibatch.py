"""Runs a whole minibatch of the mining, from its plan to its end."""


def planned_and_ended(bullet, logits, labels, **options):
    """Plans a minibatch, which counts, and ends it; F_R does not move."""
    plan, fraction = bullet.plan(logits, labels, **options), bullet.robust_fraction.clone()
    if len(labels):
        bullet.observe(logits.nan_to_num(), labels)
    bullet.robust_fraction.copy_(fraction)
    return plan
