"""Small worlds with a known optimum, in which what the papers claim can come out false. See ``__main__``.

learning.py     one training loop, many seeds at once, through the package's own estimators and losses
worlds.py       the worlds: what is seen, what can be done, what the best policy gets, why variants can differ there
deliberating.py N agents with offline rewards of all actions (MPDF's own setting)
experiments.py  each claim as arms that differ in one thing, and the comparison that decides it
effects.py      paired differences, 95 % intervals, verdicts
"""
