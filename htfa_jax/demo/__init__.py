"""The page where one can try a model, and a small HTTP API, over one engine."""
