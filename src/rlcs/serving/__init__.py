"""From a trained model to people: a Python session, the terminal, an OpenAI-compatible server."""
