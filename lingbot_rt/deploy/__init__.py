"""Many engines behind one address: ``front`` is what clients reach, ``ray`` runs the engines with Ray Serve."""
