"""Pictures that clients send: which file formats are read, and how."""
