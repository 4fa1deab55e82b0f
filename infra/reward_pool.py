
from reward import score_math
def make_scorer(*a):
    return lambda tasks: [[score_math(r, t.ground_truth) for r in t.responses] for t in tasks]
