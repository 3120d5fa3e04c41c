"""The guard of every change: play cases, keep their frames as ground truth, compare later builds against it.

Reading order: ``cases.py`` what is played, ``play.py`` how, ``ground_truth.py`` what is kept, ``guard.py`` what is
compared, ``report.py`` what a person sees.
"""
