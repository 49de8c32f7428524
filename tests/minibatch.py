"""A whole minibatch of the mining, from its plan to its end."""


def planned_and_ended(bullet, logits, labels, **options):
    """The plan of a minibatch that counts now; F_R stays where it was."""
    plan, fraction = bullet.plan(logits, labels, **options), bullet.robust_fraction.clone()
    if len(labels):
        bullet.observe(logits.nan_to_num(), labels)
    bullet.robust_fraction.copy_(fraction)
    return plan
