"""A model behind HTTP: uploads, one queue, results that are kept for a while."""
