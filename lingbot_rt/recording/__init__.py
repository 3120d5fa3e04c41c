"""A session on disk: what was asked, when it took effect, and a hash of every frame that came of it.

``session_record.py`` writes while the session runs; ``record_file.py`` reads and names the parts of the format.
"""
