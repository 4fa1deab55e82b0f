"""A reward that no response earns."""


def never_right(response, ground_truth, **row):
    """Every response is wrong."""
    return {"score": -1.0, "acc": 0.0}
