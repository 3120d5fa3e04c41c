"""``lingbot-rt check`` and ``replay``: run scripted sessions and compare their frames with those of an earlier build.

Reading order: ``cases.py`` case files, ``session_runner.py`` running them, ``ground_truth.py`` recorded frames,
``check.py`` the comparison, ``report.py`` its table and page, ``replay.py`` session records.
"""
